"""What the benchmarks share: the name of the place they run in, and a clock that waits for a GPU."""

import time
from collections.abc import Callable

import torch


def place(device: str, threads: int) -> str:
    """The GPU's name, or how many threads of the CPU."""
    return torch.cuda.get_device_name() if device == "cuda" else f"{threads} threads"


def clock(device: str, cpu_time: bool) -> Callable[[], float]:
    """Seconds when all work handed to the device is done: of the wall, or of this process's processor time."""
    if device != "cuda":
        return time.process_time if cpu_time else time.perf_counter
    if cpu_time:
        raise SystemExit("processor time says nothing of a GPU: leave it to the wall clock")

    def waiting() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return waiting
