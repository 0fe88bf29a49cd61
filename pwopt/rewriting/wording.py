"""How counts read in sentences."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """A count and its noun, in the plural unless it is one.

    Examples
    --------
    >>> counted(1, "thread"), counted(0, "thread"), counted(2_000, "thread")
    ('1 thread', '0 threads', '2,000 threads')
    """
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
