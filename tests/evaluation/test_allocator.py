"""Freed memory is kept while asked for and returned afterwards, by the kernel's own counts."""

import resource
from pathlib import Path

import pytest
import torch

from evaluation.allocator import MAPPED, keeping, library

HELD = 4  # tensors at once: together more than glibc keeps by itself
PAGES = HELD * MAPPED // resource.getpagesize()

pytestmark = pytest.mark.skipif(library() is None, reason="only glibc's allocator is told anything")


def work() -> int:
    """Page faults of filling some tensors, which are freed again."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(MAPPED // 4 - 2**15) for _ in range(HELD)]
    del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1])


def test_freed_pages_are_used_again_and_returned_at_the_end():
    with keeping():
        work()
        work()
        assert work() < PAGES // 2
        kept = resident()
    assert resident() < kept - PAGES // 2
