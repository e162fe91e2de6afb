"""
Memory that a training step frees stays with the process, for the next step.

glibc gives free memory at the end of its heap back to the system, and each page of it costs a fault when it is wanted
again. A pass frees all of its activations at its end, so that this can take a tenth of the time of a step.
"""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST_HEAP_BLOCK = 32 * 2**20  # the most that glibc takes: larger blocks are maps of their own in any case
ENVIRONMENT = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
KEPT = 2**31 - 1  # bytes, the largest int


def keep_freed_memory() -> None:
    """For the whole process. Nothing happens without glibc, or where the environment says what is wanted."""
    if any(name in os.environ for name in ENVIRONMENT):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return
    mallopt(M_MMAP_THRESHOLD, LARGEST_HEAP_BLOCK)
    mallopt(M_TRIM_THRESHOLD, KEPT)
