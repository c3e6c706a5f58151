"""Keep freed memory in the process, so that training on a CPU does not ask the kernel for it again."""

from __future__ import annotations

import ctypes

_MMAP_MAX, _TRIM_THRESHOLD = -4, -1
"""Parameters of glibc's ``mallopt`` (malloc.h)."""


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory; returns whether it could be told.

    By default, glibc maps every large tensor anew and gives it back when it is freed, and the kernel clears
    its pages each time. With this, the process's memory stays at its highest use until it ends.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))
