"""Signals that end the process from outside are handled like Ctrl-C, so that nothing is left behind."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

#: The signals of `kill`, `timeout` and service managers, and of a terminal that closes.
TERMINATING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))

_received: list[int] = []


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


def _raise_interrupt(number: int, _frame: FrameType | None) -> None:
    for other in TERMINATING:  # another one must not interrupt the clean-up
        signal.signal(other, signal.SIG_IGN)
    _received.append(number)
    raise KeyboardInterrupt
