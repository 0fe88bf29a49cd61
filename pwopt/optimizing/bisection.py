"""What is left out when a rewritten model cannot be used: the rewrites at fault, found by halves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pwopt.rewriting.records import Rewrite
from pwopt.selecting.rewrite_selection import Compilation

#: What to say of a rewrite whose model cannot be used.
REPORT = "a defect of pwopt or onnxruntime, please report it with the model"


def culprits(work: Compilation, rewrites: Sequence[Rewrite], fault: Callable[[Compilation], str]) -> Compilation:
    """A work that leaves out a rewrite at least that is at fault if its model cannot be used.

    Rewrites are taken back from the last one on, by halves: of the first rewrite with which the model cannot be used,
    without those after it, its site is at fault.

    Parameters
    ----------
    work : Compilation
    rewrites : sequence of Rewrite
        Those that made the model.
    fault : callable
        Why the model of a work cannot be used, as a clause, else "".

    Returns
    -------
    Work
        The given one if its model can be used, or cannot without any rewrite either.
    """
    made = list({r.site: r for r in reversed(rewrites)}.values())[::-1]
    reason, low, high = fault(work), 0, len(made)
    if not reason or not made or fault(work.without(made, reason)):
        return work
    while high - low > 1:
        middle = (low + high) // 2
        found = fault(work.without(made[middle:], reason))
        low, high, reason = (low, middle, found) if found else (middle, high, reason)
    return work.without(
        alike(work, [made[high - 1]], made), f"the model with it cannot be used, since {reason}; {REPORT}"
    )


def alike(work: Compilation, guilty: Sequence[Rewrite], rewrites: Sequence[Rewrite]) -> list[Rewrite]:
    """Rewrites at fault, with all others of those passes that were at fault before."""
    before = {s.pass_name for s in work.refused.values()}
    again = {r.pass_name for r in guilty} & before
    return list({r.site: r for r in (*guilty, *(r for r in rewrites if r.pass_name in again))}.values())
