"""Freed memory that is kept for the next tensor.

glibc gives every large tensor pages of its own and returns them when it is freed, so the kernel clears them anew for
the next layer's activations: a tenth of the time of a forward pass on a CPU. While `keeping` lasts, freed memory stays
with the process; then it is returned. Elsewhere than on Linux with glibc nothing happens.
"""

import ctypes
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST = 2**31 - 1
# The most that glibc takes for a block that is not mapped by itself (64-bit), and what it arrives at when not told.
MAPPED = 2**25


@contextmanager
def keeping() -> Generator[None]:
    """Keep freed memory for reuse inside, and return it at the end."""
    glibc = library()
    if glibc is None:
        yield
        return
    glibc.mallopt(M_MMAP_THRESHOLD, MAPPED)
    glibc.mallopt(M_TRIM_THRESHOLD, LARGEST)
    try:
        yield
    finally:
        glibc.mallopt(M_MMAP_THRESHOLD, MAPPED)
        glibc.mallopt(M_TRIM_THRESHOLD, 2 * MAPPED)
        glibc.malloc_trim(0)


def library() -> Any:
    """The C library of this process where it is glibc, else None."""
    found = ctypes.CDLL(None) if sys.platform == "linux" else None
    return found if hasattr(found, "gnu_get_libc_version") else None
