"""Child processes: started with a clean module path, and ended together with this process."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

#: The folder that pwopt is imported from.
ROOT = str(Path(__file__).resolve().parents[2])

#: The signals that end a program from outside: from `kill`, `timeout` and service managers, and a closed terminal.
TERMINATING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))

_received: list[int] = []


def child_command(function: Callable[..., None], *arguments: str) -> list[str]:
    """Return the command that calls a function of a module in a new Python process.

    ``python -m`` and ``python -c`` search the current folder first, where a model may lie beside a file ``numpy.py``.
    So the child takes this process's module path without the current folder before it imports anything.

    Parameters
    ----------
    function : callable
        A function at the top of a module. It gets the arguments as strings.
    arguments : str
    """
    code = (
        f"import sys; sys.path[:] = {module_path()!r}; "
        f"from {function.__module__} import {function.__qualname__} as call; call(*sys.argv[1:])"
    )
    return [sys.executable, "-c", code, *arguments]


def module_path() -> list[str]:
    """Return `sys.path` without the current folder, unless pwopt or Python's own packages lie there."""
    here, paths = os.path.abspath(os.curdir), sysconfig.get_paths()
    needed = {ROOT, *(os.path.abspath(paths[name]) for name in ("stdlib", "platstdlib", "purelib", "platlib"))}
    kept = [p for p in sys.path if p and (os.path.abspath(p) != here or os.path.abspath(p) in needed)]
    kept = [os.path.abspath(p) for p in kept]
    return kept if ROOT in map(os.path.realpath, kept) else [*kept, ROOT]


@contextlib.contextmanager
def signals_interrupt() -> Iterator[None]:
    """Let signals that would end the process raise KeyboardInterrupt, so that temporary folders are removed."""
    main = threading.current_thread() is threading.main_thread()
    changed = [n for n in TERMINATING if main and signal.getsignal(n) == signal.SIG_DFL]
    for number in changed:
        signal.signal(number, _raise_interrupt)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)


def received_signal() -> int | None:
    """The signal that raised KeyboardInterrupt; None for Ctrl-C."""
    return _received[0] if _received else None


def _raise_interrupt(number: int, _frame: FrameType | None) -> Any:
    for other in TERMINATING:  # another one must not interrupt the clean-up
        signal.signal(other, signal.SIG_IGN)
    _received.append(number)
    raise KeyboardInterrupt
