"""The C library's memory, for work that needs the same large blocks again and again."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""

_LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Have this process keep what it frees, for its next images or blobs of the same sizes.

    By default glibc hands large blocks back to the system, which gives them out again page by page, filled
    with zeros: up to a third of the time of decoding a photograph, and every pass over a network would pay
    for it, too (bench/create_lmdb.py, bench/torch_train.py). Another C library than glibc is left as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_M_MMAP_THRESHOLD, 2**30)
    mallopt(_M_TRIM_THRESHOLD, _LARGEST)
