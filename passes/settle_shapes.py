"""Shape arithmetic on sizes that are known is computed, also where others are open."""

from __future__ import annotations

import numpy as np

from pwopt.graph import values
from pwopt.graph.ir import Node
from pwopt.graph.values import Entries
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.records import Rewrite, Skip


class SettleShapes(Pass):
    """Shape(x)[k] = n where axis k has n entries; Reshape(x, (…, Shape(x)[k], …)) = Reshape(x, (…, 0, …)).

    Exporters write out shapes in full in a dynamic model, though most of what they compute depends on fixed sizes: the
    channel split of CSP blocks, attention's scale and heads. What is known is followed entry by entry
    (`pwopt.graph.values`). In a Reshape, a size that stays where it is becomes a 0. One size more may be left to a −1
    if all others are numbers: onnxruntime refuses a −1 beside an axis that turns out to be empty.
    """

    name = "settle-shapes"
    context = 8  # operators between a Shape and what is settled

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        op = rw.op(node)
        if op == "Reshape" and len(node.inputs) > 1:
            return _restated(rw, node) if rw.constant(node.inputs[1]) is None else None
        if op not in values.RULES or len(node.outputs) != 1 or not node.inputs:
            return None
        output = node.outputs[0]
        dtype, rank, found = rw.dtype(output), rw.rank(output), values.whole(values.entries(rw, output))
        if found is None or dtype is None or rank is None or rw.must_keep(output) or rw.constant(output) is not None:
            return None
        array = np.array(found, dtype).reshape(() if rank == 0 else -1)
        return rw.freeze(node, [array], "the sizes that it depends on are fixed")


def _restated(rw: Rewriter, node: Node) -> Rewrite | None:
    """A Reshape whose target is a constant but for sizes of its input that stay where they are, and one other."""
    source, target = node.inputs
    found, before = values.entries(rw, target), values.extents(rw, source)
    written = None if found is None or before is None else copied(found, before, bool(node.attrs.get("allowzero", 0)))
    dtype = rw.dtype(target)
    if written is None or dtype is None:
        return None
    shape = rw.new_constant(f"{node.outputs[0].name}_shape", np.array(written, dtype))
    attrs = {k: v for k, v in node.attrs.items() if k != "allowzero"}
    new = Node("Reshape", node.name, attrs, [source, shape], list(node.outputs))
    return rw.replace([node], [new], "its shape restates sizes of its input")


def copied(target: Entries, before: Entries, allowzero: bool) -> list[int] | None:
    """A Reshape's target in numbers: 0 for a size that stays in its place, −1 for one other; None if that is not all.

    `allowzero` says that a 0 in the target is a size; there is none then, if there is a result.
    """
    written: list[int | None] = []
    for axis, entry in enumerate(target):
        stays = not isinstance(entry, int) and entry is not None and before[axis : axis + 1] == (entry,)
        written.append(0 if stays else entry if isinstance(entry, int) else None)
    numbers = [w for w in written if w is not None]
    if allowzero and any(entry == 0 for entry in target):
        return None
    left = len(written) - len(numbers)
    if left > 1 or (left and min(numbers, default=1) < 1):
        return None
    return [-1 if w is None else w for w in written]
