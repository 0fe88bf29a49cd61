"""The lowering table: its rows are passes that replace one operator by a form that a runtime computes faster.

Each row is a pass of its own. So users can deny it, races can reject it, and it is left out alone if it is slower. The
kind of execution provider (`pays_on`) and the opset of the model select the rows that run. `Lowering` states what a
row must declare, and docs/passes.md shows the rows as a table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pwopt.graph.ir import Node
from pwopt.graph.reasons import Reason
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.records import Rewrite, Skip

#: How the result of a lowered form relates to that of the original: the same bits for all numbers, the same up to
#: rounding for all numbers, or the same up to rounding for finite numbers.
Exactness = Literal["bit-exact", "rounding", "rounding, finite inputs"]


@dataclass(frozen=True)
class Form:
    """The operators that a row replaces, and those that it writes.

    Attributes
    ----------
    old, new : tuple of Node
        The last node of `new` computes what the last node of `old` computes.
    reason : str
        One sentence for the user.
    detail : str
        What the running time depends on, such as sizes. Forms of one row that differ only in it are measured together.
    pays : bool
        Whether the form is expected to be faster here, when nothing is measured.
    residual : float
        Largest relative rounding of new weights.
    """

    old: tuple[Node, ...]
    new: tuple[Node, ...]
    reason: str
    detail: str = ""
    pays: bool = True
    residual: float = 0.0


class Lowering(Pass):
    """One row of the lowering table.

    A subclass declares the row and implements `lower`. Its docstring begins with the form, and lists the preconditions.

    Attributes
    ----------
    operators : frozenset of str
        The operators at which the row looks: the last operator of what it replaces.
    since, until : int
        The opsets in which the row applies. `until` is 0 if there is no last one.
    exactness : str
        See `Exactness`.
    figure : str
        The measured gain, with the processor, or the reason why no measurement is needed.
    """

    operators: ClassVar[frozenset[str]] = frozenset()
    since: ClassVar[int] = 1
    until: ClassVar[int] = 0
    exactness: ClassVar[Exactness]
    figure: ClassVar[str]

    def lower(self, node: Node, rw: Rewriter) -> Form | Skip | None:
        """Return the lowered form of a node, a refusal, or None if the row does not apply."""
        raise NotImplementedError

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        if rw.op(node) not in self.operators:
            return None
        if rw.opset < self.since or 0 < self.until < rw.opset:
            return None
        form = self.lower(node, rw)
        if form is None or isinstance(form, Skip):
            return form
        if not form.pays and not self.eager:
            return Skip(Reason("{}; only measuring can tell whether that is faster", form.reason))
        done = rw.replace(form.old, form.new, form.reason, form.residual)
        return done.with_signature(f"{self.name}: {form.detail}") if self.policy == "measured" else done
