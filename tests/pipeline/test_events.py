"""TensorBoard's events: read back by its own reader, they are the log."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline import events
from pipeline.cli import main


def read(folder: Path) -> dict[int, dict[str, float]]:
    """Every scalar by step and name."""
    accumulator = EventAccumulator(str(folder)).Reload()
    found: dict[int, dict[str, float]] = {}
    for tag in accumulator.Tags()["scalars"]:
        for event in accumulator.Scalars(tag):
            assert tag not in found.setdefault(event.step, {})  # once
            found[event.step][tag] = event.value
    return found


def logged(log: Path) -> dict[int, dict[str, float]]:
    """The log as float32, by step and name."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return {line.pop("step"): {name: float(np.float32(value)) for name, value in line.items()} for line in lines}


def line(step: int, **more: float) -> str:
    return json.dumps({"step": step, "tokens": 100 * step, "loss": 3 / step, **more, "seconds": 2.0 * step}) + "\n"


def test_events_follow_the_log_as_it_grows_and_begin_anew_when_it_was_cut(tmp_path: Path) -> None:
    log, folder, told = tmp_path / "log.jsonl", tmp_path / "run" / "events", []
    with events.following(log, folder, lambda *said: told.append(said)) as progress:
        progress(0, 300, "no log yet")
        log.write_text(line(1) + line(2)[:10])  # a line that is being written is left for the next time
        progress(100, 300, "one")
        assert read(folder) == {1: logged_of(line(1))}
        log.write_text(line(1) + line(2, validation_loss=2.5) + line(3))
        progress(200, 300, "three")
        assert read(folder) == logged(log)
        assert list(read(folder)) == [1, 2, 3]
    assert told == [(0, 300, "no log yet"), (100, 300, "one"), (200, 300, "three")]
    log.write_text(line(1) + line(2, loss=9.0))  # resumed from step 1
    with events.following(log, folder, lambda *said: None) as progress:
        progress(200, 300, "two")
        assert read(folder) == logged(log)
    times = [event.wall_time for event in EventAccumulator(str(folder)).Reload().Scalars("loss")]
    assert np.diff(times) == pytest.approx(2.0)
    assert times[-1] == pytest.approx(log.stat().st_mtime)


def logged_of(text: str) -> dict[str, float]:
    return {name: float(np.float32(value)) for name, value in json.loads(text).items() if name != "step"}


def recover(*options: str) -> Result:
    return CliRunner().invoke(main, ["recover", "run.yaml", "--set", "runtime.tensorboard=true", *options])


def test_a_run_writes_events_and_a_cached_one_has_them_too(small_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tensorboard", None)
        result = recover()
        assert result.exit_code == 2
        assert "runtime.tensorboard: needs tensorboard: pip install 'regrow[tensorboard]'" in result.output
        assert not (small_run / "runs").exists()
    for _ in ("built", "cached"):
        result = recover()
        assert result.exit_code == 0, result.output
        artifact = (small_run / "runs/small/artifacts/recover").resolve()
        (folder,) = (small_run / "runs/small/tensorboard").iterdir()
        assert folder.name == f"recover-{artifact.name}"
        assert read(folder) == logged(artifact / "log.jsonl")
        assert {"loss", "learning_rate", "tokens"} <= read(folder)[1].keys()
        assert any("validation_loss" in values for values in read(folder).values())
        shutil.rmtree(folder)
    plain = CliRunner().invoke(main, ["recover", "run.yaml"])  # the option is in no key
    assert plain.exit_code == 0
    assert not folder.exists()
    assert (small_run / "runs/small/artifacts/recover").resolve() == artifact
