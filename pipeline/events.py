"""TensorBoard files that say what the log of a training run says, while it is written or afterwards.

The log (`log.jsonl`, one line a step) is the one record; every number in it becomes a scalar of its own name. Events
are float32, as TensorBoard's scalars are. Their times are those of training, sittings put together.
"""

import importlib
import importlib.util
import json
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError

Progress = Callable[[int, int, str], None]


def check() -> None:
    """Raise ConfigError where TensorBoard's package is missing."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("runtime.tensorboard: needs tensorboard: pip install 'regrow[tensorboard]'")


def folder_of(run: Path, key: str) -> Path:
    """Where the events of a run's training lie: beside those of the same run with other settings."""
    return run / "tensorboard" / f"recover-{key}"


@contextmanager
def following(log: Path, folder: Path, progress: Progress) -> Generator[Progress]:
    """`progress`, which also brings the events up to date with the log. What `folder` held before is replaced."""
    events: list[Events] = []

    def told(done: int, total: int, note: str) -> None:
        if not events:  # now, as a resumed run has cut its log by the first time it tells anything
            events.append(Events(log, folder))
        events[0].catch_up()
        progress(done, total, note)

    try:
        yield told
    finally:
        for written in events:
            written.close()


class Events:
    """The events of a log, in a folder of their own."""

    def __init__(self, log: Path, folder: Path) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        shutil.rmtree(folder, ignore_errors=True)
        self.log, self.read, self.began = log, 0, 0.0
        self.writer: Any = EventFileWriter(str(folder))

    def catch_up(self) -> None:
        """Write the events of the lines that came since the last time, and bring them to disk."""
        if not self.log.is_file():
            return
        with self.log.open("rb") as file:
            file.seek(self.read)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        lines: list[dict[str, float]] = [json.loads(line) for line in whole.splitlines()]
        if not lines:
            return
        if not self.read:
            self.began = self.log.stat().st_mtime - lines[-1]["seconds"]
        self.read += len(whole)
        protocol = "tensorboard.compat.proto"
        event: Any = importlib.import_module(f"{protocol}.event_pb2").Event
        summary: Any = importlib.import_module(f"{protocol}.summary_pb2").Summary
        for line in lines:
            values = [summary.Value(tag=name, simple_value=value) for name, value in line.items() if name != "step"]
            when = self.began + line["seconds"]
            self.writer.add_event(event(wall_time=when, step=line["step"], summary=summary(value=values)))
        self.writer.flush()

    def close(self) -> None:
        """Write what is left, and let the file go."""
        self.catch_up()
        self.writer.close()


def of_log(log: Path, folder: Path) -> None:
    """Write the events of a finished log."""
    Events(log, folder).close()
