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


def name_ratio(ratio: float, low: float, high: float, digits: int = 2) -> str:
    """Name a ratio by its figure; if its interval is wide, by the end that is sure ("over 8.84×"), or as "unclear"."""
    if not is_vague(low, high):
        return f"{ratio:.{digits}f}×"
    if high > MEANINGLESS_FACTOR * low:
        return "unclear"
    if low >= VAGUE_FACTOR:
        return f"over {low:.{digits}f}×"
    return f"under {high:.{digits}f}×" if high <= 1 / VAGUE_FACTOR else "unclear"


def format_ratio(ratio: float, low: float, high: float, digits: int = 2) -> str:
    """Format a ratio as `name_ratio` does, with its interval if that says anything."""
    shown = name_ratio(ratio, low, high, digits)
    return shown if high > MEANINGLESS_FACTOR * low else f"{shown} {format_interval(low, high, digits)}"
