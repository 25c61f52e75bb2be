"""One run by several processes (`torchrun`, `accelerate launch`): the first does everything, the others help it train.

The helpers wait for the first one's word. It is JSON in a tensor: torch's own object messages are pickles.
"""

import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from pipeline.errors import ConfigError

PATIENCE = timedelta(days=30)  # helpers wait while the first process prunes and scores


def count() -> int:
    """How many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def first() -> bool:
    """Whether this process is the one that does everything."""
    return count() == 1 or os.environ.get("RANK", "0") == "0"


def device() -> str:
    """This process's GPU: `cuda`, with a number where there are several processes."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if count() > 1 else "cuda"


@contextmanager
def joined() -> Generator[None]:
    """Join the other processes for a block; when the first one leaves it, the helpers are told that it is over.

    Raises ConfigError where this machine has GPUs, but not one for every process.
    """
    if count() == 1:
        yield
        return
    import torch
    from torch import distributed

    cuda = torch.cuda.is_available()
    if cuda:
        # Every process refuses, so that none waits for another.
        local = int(os.environ.get("LOCAL_RANK", "0"))
        here, there = max(local + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))), torch.cuda.device_count()
        if here > there:
            remedy = "start no more than that, or set CUDA_VISIBLE_DEVICES to nothing to train on the CPU"
            raise ConfigError(f"{here} processes on this machine, where torch sees {there} GPU(s): {remedy}")
        torch.cuda.set_device(device())
    distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    yield  # after an error nothing is said: the launcher ends the helpers
    if first():
        call(None)
    distributed.destroy_process_group()


def call(message: Any) -> None:
    """Say something JSON-able to the helpers, if there are any."""
    if count() > 1:
        _broadcast(json.dumps(message).encode())


def hear() -> Any:
    """What the first process says next."""
    return json.loads(_broadcast(b""))


def _broadcast(said: bytes) -> bytes:
    import torch
    from torch import distributed

    length = torch.tensor([len(said)])
    distributed.broadcast(length, 0)
    content = torch.tensor(list(said), dtype=torch.uint8) if first() else torch.empty(int(length), dtype=torch.uint8)
    distributed.broadcast(content, 0)
    return bytes(content.tolist())
