"""Keeping a process no larger than what it holds, where the C library and the kernel would let it grow.

Weights that transformers loads stay mapped to their file: slices of them are copies, and the file's pages count beside
them until the last tensor is gone. And glibc keeps freed buffers of a few megabytes, of which every layer leaves some.
Both are no-ops where the library has no such calls.
"""

import ctypes
import mmap
import sys
from typing import Any

from torch import nn

_LIBRARY: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
_DONT_NEED = 4  # MADV_DONTNEED


def own_weights(model: nn.Module) -> None:
    """Copy every CPU parameter into memory of its own, dropping each from its file as it goes."""
    for parameter in model.parameters():
        if parameter.device.type != "cpu":
            continue
        mapped = parameter.data
        parameter.data = mapped.clone()
        if _LIBRARY is not None:
            # Only pages that lie wholly inside this tensor, which nothing refers to any more.
            start = -(-mapped.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (mapped.data_ptr() + mapped.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            if end > start:
                _LIBRARY.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONT_NEED)


def give_back() -> None:
    """Return freed memory to the system."""
    if _LIBRARY is not None and hasattr(_LIBRARY, "malloc_trim"):
        _LIBRARY.malloc_trim(0)
