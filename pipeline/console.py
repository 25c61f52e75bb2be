"""What a person sees while work goes on: one line a step and a bar on stderr; results alone go to stdout."""

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

LINE_EVERY = 20.0  # seconds between progress lines where stderr is not a terminal


class Reporter:
    """Writes to stderr, or nothing at all."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet)

    def say(self, message: str) -> None:
        self.console.print(message, markup=False)

    def warn(self, message: str) -> None:
        self.console.print(f"warning: {message}", markup=False)

    @contextmanager
    def step(self, label: str) -> Generator[Callable[[int, int, str], None]]:
        """Announce a step; yields the `progress(done, total, note)` it is to call."""
        started = time.monotonic()
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            with Progress(*columns, TextColumn("{task.fields[note]}"), console=self.console, transient=True) as bar:
                task = bar.add_task(label, total=None, note="")
                yield lambda done, total, note: bar.update(task, completed=done, total=total, note=note)
        else:
            self.say(f"{label} ...")
            yield _lines(label, self.say)
        self.say(f"{label}: done in {time.monotonic() - started:.1f} s")


def _lines(label: str, say: Callable[[str], None]) -> Callable[[int, int, str], None]:
    last = time.monotonic()

    def progress(done: int, total: int, note: str) -> None:
        nonlocal last
        if time.monotonic() - last >= LINE_EVERY:
            last = time.monotonic()
            share = f"{done / total:4.0%}" if total else str(done)
            say(f"{label}: {share} {note}".rstrip())

    return progress


def out() -> Console:
    """Stdout, for results: nothing is cut or broken to a width, which the terminal does better, nor read as markup."""
    return Console(file=sys.stdout, highlight=False, markup=False, soft_wrap=True)
