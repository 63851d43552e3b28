"""Keep freed memory mapped: large temporaries that are mapped and faulted in anew each time cost a quarter of a
sweep.
"""

from __future__ import annotations

import ctypes
import functools
import sys

# From glibc's malloc.h. Blocks up to this size come from the heap, and the heap is not trimmed when they are freed.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST = 2**30


@functools.cache
def keep_freed_memory() -> bool:
    """Raise glibc's thresholds for this process; False where the C library is another."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST)) and bool(mallopt(_M_TRIM_THRESHOLD, _LARGEST))
