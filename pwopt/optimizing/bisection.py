"""Find the rewrites at fault when a rewritten model cannot be used, by bisection over its rewrites."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pwopt.graph.reasons import Reason
from pwopt.rewriting.records import Rewrite
from pwopt.selecting.compilation import Compilation

#: The clause on a rewrite that makes the model unusable.
UNUSABLE_DEFECT = "a defect of pwopt or onnxruntime, please report it with the model"


def leave_out_faulty(
    compilation: Compilation, rewrites: Sequence[Rewrite], find_fault: Callable[[Compilation], str]
) -> Compilation:
    """Leave out at least one rewrite at fault if the model cannot be used.

    The bisection finds the shortest prefix of the rewrites with which the model cannot be used. The last rewrite of
    that prefix is at fault.

    Parameters
    ----------
    compilation : Compilation
    rewrites : sequence of Rewrite
        The rewrites of the model, in the order in which they were made.
    find_fault : callable
        Returns why the model of a compilation cannot be used, as a clause, or "".

    Returns
    -------
    Compilation
        The given one if its model can be used, or cannot be used without any rewrite either.
    """
    made = list({r.site: r for r in reversed(rewrites)}.values())[::-1]
    reason, low, high = find_fault(compilation), 0, len(made)
    if not reason or not made or find_fault(compilation.leave_out(made, reason)):
        return compilation
    while high - low > 1:
        middle = (low + high) // 2
        found = find_fault(compilation.leave_out(made[middle:], reason))
        low, high, reason = (low, middle, found) if found else (middle, high, reason)
    guilty = made[high - 1]
    whose = f"the fault of {guilty.pass_name}" if guilty.pass_name in name_plugins(compilation) else UNUSABLE_DEFECT
    reason = Reason("the model with it cannot be used, since {}; {}", reason, whose)
    return compilation.leave_out(add_repeated(compilation, [guilty], made), reason)


def name_plugins(compilation: Compilation) -> list[str]:
    """Name the passes of a compilation that are not pwopt's own."""
    return sorted(p.name for p in compilation.passes if not p.builtin)


def add_repeated(compilation: Compilation, guilty: Sequence[Rewrite], rewrites: Sequence[Rewrite]) -> list[Rewrite]:
    """Add to the rewrites at fault all others of the passes that were at fault before."""
    before = {s.pass_name for s in compilation.refused.values()}
    again = {r.pass_name for r in guilty} & before
    return list({r.site: r for r in (*guilty, *(r for r in rewrites if r.pass_name in again))}.values())
