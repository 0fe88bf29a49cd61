"""How those who wait are told what is going on."""

from __future__ import annotations

from collections.abc import Callable

#: Called with (stage, fraction done).
Progress = Callable[[str, float], None]


def silent(_stage: str, _done: float) -> None:
    """Tell nobody."""
