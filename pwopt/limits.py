"""A bound on memory around code that has none of its own."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

try:
    import resource
except ImportError:  # not a POSIX system
    resource = None  # type: ignore[assignment]

#: Where Linux keeps the size of this process, in pages.
STATM = Path("/proc/self/statm")


@contextlib.contextmanager
def memory_bound(extra: int) -> Iterator[None]:
    """Let the process grow by `extra` bytes at most; an allocation beyond that is a MemoryError.

    Only on Linux, and only in the main thread, since the bound holds for all threads.
    """
    if resource is None or not STATM.exists() or threading.current_thread() is not threading.main_thread():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    bound = int(STATM.read_text().split()[0]) * resource.getpagesize() + extra
    tighter = all(bound < limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)
    if tighter:
        resource.setrlimit(resource.RLIMIT_AS, (bound, hard))
    try:
        yield
    finally:
        if tighter:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
