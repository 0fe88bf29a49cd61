"""Counts and costs in sentences."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable


def format_count(count: int, noun: str) -> str:
    """Format a count with its noun, in the plural unless it is one.

    Examples
    --------
    >>> format_count(1, "thread"), format_count(0, "thread"), format_count(2_000, "thread")
    ('1 thread', '0 threads', '2,000 threads')
    """
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def suggest(name: str, known: Iterable[str]) -> str:
    """Suggest the known name that is closest to a wrong one, otherwise list all of them.

    Examples
    --------
    >>> suggest("fold-chain", ["clean-up", "fold-chains"]), suggest("x", ["clean-up", "fold-chains"])
    ("did you mean 'fold-chains'?", 'choose from clean-up, fold-chains')
    """
    names = list(known)
    near = difflib.get_close_matches(name, names, 1)
    return f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(names)}"


def format_increase(before: float, after: float, absolute: bool = False) -> str:
    """Format the cost of a rewrite that saves no multiply-adds.

    Examples
    --------
    >>> format_increase(2048, 3072, absolute=True), format_increase(7_225_344, 7_225_344, absolute=True)
    ('1.50× the multiply-adds (2,048 → 3,072)', 'as many multiply-adds (7,225,344), a tie')
    >>> format_increase(1000, 1001)
    '1.001× the multiply-adds'
    """
    if math.isclose(before, after):
        return "as many multiply-adds" + (f" ({before:,.0f})" if absolute else "") + ", a tie"
    ratio = after / before if before else float("inf")
    shown = next((s for digits in range(2, 16) if float(s := f"{ratio:.{digits}f}") != 1), f"{ratio}")
    return f"{shown}× the multiply-adds" + (f" ({before:,.0f} → {after:,.0f})" if absolute else "")


def drop_name(name: str, signature: str) -> str:
    """Drop the name of a pass from the beginning of a signature, because it is shown before the signature anyway.

    Examples
    --------
    >>> drop_name("lower-resize", "lower-resize: 2×2 to 4×4"), drop_name("frames", "frames of 3")
    ('2×2 to 4×4', 'frames of 3')
    >>> drop_name("lower-residual", "lower-residual")
    ''
    """
    return "" if signature == name else signature.removeprefix(f"{name}: ")


def join_clauses(*clauses: str) -> str:
    """Join clauses with colons, without the empty ones.

    Examples
    --------
    >>> join_clauses("lower-residual", "", "measured 1.000×")
    'lower-residual: measured 1.000×'
    """
    return ": ".join(clause for clause in clauses if clause)
