"""Limits the memory of native code that has no limit of its own, and that may crash without memory."""

from __future__ import annotations

import faulthandler
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

#: The memory of a process in pages (Linux, proc(5)).
MEMORY_PAGES = Path("/proc/self/statm")


def run_isolated(work: Callable[[], bytes], extra: int) -> bytes | None:
    """Run `work` in a copy of this process that may grow by at most `extra` bytes.

    The result is None if that is not enough, or if the copy fails or dies. On systems other than Linux, and without
    ``/proc``, `work` runs in this process without a limit.
    """
    if sys.platform != "linux" or not MEMORY_PAGES.exists():
        try:
            return work()
        except Exception:  # as in the copy
            return None
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which the copy has none of
        child = os.fork()
    if child == 0:
        _answer(work, extra, writing)
    os.close(writing)
    with open(reading, "rb") as stream:
        answer = stream.read()
    _, status = os.waitpid(child, 0)
    return answer if status == 0 else None


def _answer(work: Callable[[], bytes], extra: int, writing: int) -> None:
    """In the copy: write the result of `work`, and end without running the exit handlers of this process."""
    code = 1
    try:
        import resource

        faulthandler.disable()
        pages = int(MEMORY_PAGES.read_text(encoding="utf-8").split()[0])
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        bound = pages * resource.getpagesize() + extra
        resource.setrlimit(resource.RLIMIT_AS, (bound if hard < 0 else min(bound, hard), hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with open(writing, "wb") as stream:
            stream.write(work())
        code = 0
    finally:
        os._exit(code)
