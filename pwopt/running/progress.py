"""How long work reports its progress."""

from __future__ import annotations

from collections.abc import Callable

#: Called with the name of the current stage, and the fraction of it that is done, from 0 to 1.
Progress = Callable[[str, float], None]


def ignore_progress(_stage: str, _done: float) -> None:
    """Report nothing."""
