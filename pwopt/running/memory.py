"""Settings of memory: garbage collection, and what the operating system gets back."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

#: Linux's count of the pages of a process (proc(5)).
PAGES = Path("/proc/self/statm")
#: How many new objects the garbage collector waits for, instead of Python's 700 or 2,000. Imports and graphs make many
#: objects, and few of them are garbage.
COLLECT_AFTER = 50_000
#: Below this resident memory in bytes, nothing is released, because it would not pay.
MIN_RESIDENT = 128 << 20
#: Garbage with fewer bytes of weights is not looked for, because that takes longer the more nodes there are.
MIN_GARBAGE = 8 << 20
#: Sessions of models from this many bytes on are not open side by side, but one after the other.
LARGE_MODEL = 112 << 20


@functools.cache
def _find_trim() -> Callable[[int], int] | None:
    """Find glibc's `malloc_trim`; None with other C libraries."""
    import ctypes  # here, because the command line must start quickly

    with contextlib.suppress(OSError, AttributeError, TypeError):
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
        return trim
    return None


@contextlib.contextmanager
def collect_rarely() -> Iterator[None]:
    """Let the garbage collector wait for more new objects while the context lasts, unless it is off or waits longer."""
    before = gc.get_threshold()
    raised = 0 < before[0] < COLLECT_AFTER
    if raised:
        gc.set_threshold(COLLECT_AFTER, *before[1:])
    try:
        yield
    finally:
        if raised:
            gc.set_threshold(*before)


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


def collect_garbage(weights: int) -> None:
    """Free unreachable cycles, such as graphs with this many bytes of weights, if this process holds much memory."""
    if weights >= MIN_GARBAGE and count_resident() >= MIN_RESIDENT:
        gc.collect()
        release_freed()
