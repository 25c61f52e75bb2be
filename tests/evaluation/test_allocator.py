"""Freed memory is kept while asked for and returned afterwards, by the kernel's own counts."""

import json
import resource
import subprocess
import sys
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


def measured() -> dict[str, int]:
    with keeping():
        work()
        work()
        faults, kept = work(), resident()
    return {"faults": faults, "returned": kept - resident()}


def test_freed_pages_are_used_again_and_returned_at_the_end():
    """In a process of its own: what other tests left in the heap decides, too, where glibc finds room."""
    code = "import json; from tests.evaluation.test_allocator import measured; print(json.dumps(measured()))"
    root = Path(__file__).parents[2]
    found = json.loads(subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=True).stdout)
    assert found["faults"] < PAGES // 2
    assert found["returned"] > PAGES // 2
