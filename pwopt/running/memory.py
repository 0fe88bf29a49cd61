"""Returns memory that this process has freed to the operating system."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path

#: Linux's count of the pages of a process (proc(5)).
PAGES = Path("/proc/self/statm")
#: Below this resident memory in bytes, nothing is released, because it would not pay.
MIN_RESIDENT = 256 << 20


@functools.cache
def _find_trim() -> Callable[[int], int] | None:
    """Find glibc's `malloc_trim`; None with other C libraries."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
        return trim
    return None


def count_resident() -> int:
    """Count the bytes of resident memory of this process; 0 where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(PAGES.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def release_freed() -> None:
    """Return freed memory to the operating system if this process holds much memory (glibc).

    glibc keeps what is freed below memory that is still in use. When onnxruntime has created a session, two thirds of
    the process's memory are free in this way: the file's bytes, the parsed message, and weights before they are packed.
    """
    trim = _find_trim() if count_resident() >= MIN_RESIDENT else None
    if trim is not None:
        trim(0)
