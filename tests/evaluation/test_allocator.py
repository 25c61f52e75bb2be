"""Freed memory is kept while asked for and returned afterwards, by the kernel's own counts."""

import resource
from pathlib import Path

import pytest

from evaluation.allocator import MAPPED, keeping, library

HELD = 4  # blocks at once: together more than glibc keeps by itself
PAGES = HELD * MAPPED // resource.getpagesize()

pytestmark = pytest.mark.skipif(library() is None, reason="only glibc's allocator is told anything")


def work() -> int:
    """Page faults of filling some blocks, which are freed again.

    Not tensors: torch wants aligned blocks, off which glibc before 2.38 cuts scraps that keep a freed block from
    fitting the next one, so that some rounds pass before every tensor finds its place.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [b"1" * (MAPPED - 2**17) for _ in range(HELD)]
    del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1])


def test_freed_pages_are_used_again_and_returned_at_the_end():
    with keeping():
        work()
        assert work() < PAGES // 2
        kept = resident()
    assert resident() < kept - PAGES // 2
