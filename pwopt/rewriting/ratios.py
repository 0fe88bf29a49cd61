"""Ratios with their intervals in sentences and tables."""

from __future__ import annotations

#: An interval whose ends differ by more than this factor says little about a ratio.
VAGUE_FACTOR = 1.5
#: An interval whose ends differ by more than this factor says nothing.
MEANINGLESS_FACTOR = 100.0
#: An end of an interval from which on it is only called larger, since so wide an interval carries no information.
UNBOUNDED = 100.0


def is_vague(low: float, high: float) -> bool:
    """Whether an interval is too wide for its ratio to be of use."""
    return not high <= VAGUE_FACTOR * low


def format_interval(low: float, high: float, digits: int = 2) -> str:
    """Format the ends of the interval of a ratio."""
    return f"[{low:.{digits}f}, {f'{high:.{digits}f}' if high < UNBOUNDED else f'over {UNBOUNDED:.0f}'}]"


def format_ratio(ratio: float, low: float, high: float, digits: int = 2) -> str:
    """Format a ratio with its interval; "unclear" instead of one that says little."""
    if high > MEANINGLESS_FACTOR * low:
        return "unclear"
    shown = "unclear" if is_vague(low, high) else f"{ratio:.{digits}f}×"
    return f"{shown} {format_interval(low, high, digits)}"
