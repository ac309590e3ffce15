"""What the C library does with memory that was freed. No tensor is touched, and nothing that is computed changes."""

from __future__ import annotations

import ctypes
import os
import platform
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt(3): the numbers of the settings
SETTINGS = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"}
KEPT = 2**31 - 1
"""Freed bytes at the end of the heap that stay with the process; the most that can be asked for."""
BLOCK = 32 << 20
"""Bytes from which a block is given back at once: where glibc's own threshold ends, which grows with what was freed. So
the heap is cut up as it would be anyway."""


def keep_freed_memory() -> bool:
    """Lets a process on a CPU keep what it frees for its next step, and returns whether it does.

    Without gradients a pass frees its activations as it goes, and glibc gives them back to the system whenever twice
    the largest block so far is free. They come again page by page, each page cleared: a tenth of the time of a forward
    pass and more (benchmarks/RESULTS.md). What is kept serves blocks below `BLOCK` alone. Nothing happens with another
    C library, or where the environment sets it up (`SETTINGS`, or `GLIBC_TUNABLES`).
    """
    told = SETTINGS & set(os.environ) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if told or sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(TRIM_THRESHOLD, KEPT)) and bool(mallopt(MMAP_THRESHOLD, BLOCK))
