"""Ctrl-C while work is under way that must be put down in order."""

import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any


@contextmanager
def noticed() -> Generator[Callable[[], bool]]:
    """Gives a function that says whether Ctrl-C was pressed inside; a second one interrupts at once.

    Elsewhere than in the main thread, where signals cannot be taken, and where it is ignored, as in the background of
    a shell, it is never told.
    """
    before, pressed = signal.getsignal(signal.SIGINT), threading.Event()
    if threading.current_thread() is not threading.main_thread() or before == signal.SIG_IGN:
        yield pressed.is_set
        return

    def take(number: int, frame: Any) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, take)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)
