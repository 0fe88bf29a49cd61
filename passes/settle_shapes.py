"""Shape folding: shape arithmetic on static axes becomes constants, even if other axes are dynamic."""

from __future__ import annotations

import numpy as np

from pwopt.graph import values
from pwopt.graph.ir import Node
from pwopt.graph.values import Entries
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.records import Rewrite, Skip

#: Why the target of a Reshape that copies one size, and computes another one, stays as it is.
EMPTY = "a −1 could replace the one size that it computes, but onnxruntime refuses a −1 if another axis is empty"


class SettleShapes(Pass):
    """Shape(x)[k] = n if axis k has n entries; Reshape(x, (…, Shape(x)[k], …)) = Reshape(x, (…, 0, …))

    Constant folding of shapes, entry by entry (`pwopt.graph.values`).

    * A result becomes a constant if all its entries depend on static axes only.
    * In the target of a Reshape, a size that stays at its axis becomes a 0. One other size may become a −1, if all
      remaining entries are positive numbers. (onnxruntime refuses a −1 if another axis turns out to be empty.)

    Exporters write dynamic models with complete shape arithmetic, but most of it depends on static sizes: the channel
    split of CSP blocks, the scale and the heads of attention.
    """

    name = "settle-shapes"
    operators = frozenset(values.RULES) | {"Reshape"}
    context = 8  # operators between a Shape and the folded result

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        op = rw.op(node)
        if op == "Reshape" and len(node.inputs) > 1:
            return _copy_input_sizes(rw, node) if rw.constant(node.inputs[1]) is None else None
        if op not in values.RULES or len(node.outputs) != 1 or not node.inputs:
            return None
        output = node.outputs[0]
        dtype, rank, found = rw.dtype(output), rw.rank(output), values.as_numbers(values.read_entries(rw, output))
        if found is None or dtype is None or rank is None or rw.must_keep(output) or rw.constant(output) is not None:
            return None
        array = np.array(found, dtype).reshape(() if rank == 0 else -1)
        return rw.replace_by_constants(node, [array], "the sizes that it depends on are static")


def _copy_input_sizes(rw: Rewriter, node: Node) -> Rewrite | Skip | None:
    """Give a Reshape a constant target, if its entries are numbers, sizes of its input, and at most one other size."""
    source, target = node.inputs
    found, before, dtype = values.read_entries(rw, target), values.read_extents(rw, source), rw.dtype(target)
    if found is None or before is None or dtype is None:
        return None
    sizes = copy_sizes(found, before, bool(node.attrs.get("allowzero", 0)))
    if sizes is None:
        computed = sum(not isinstance(entry, int) for entry in found)
        return Skip(EMPTY) if computed == 1 and 0 in found else None
    shape = rw.new_constant(f"{node.outputs[0].name}_shape", np.array(sizes, dtype))
    attrs = {k: v for k, v in node.attrs.items() if k != "allowzero"}
    new = Node("Reshape", node.name, attrs, [source, shape], list(node.outputs))
    return rw.replace([node], [new], "its target shape repeats sizes of its input")


def copy_sizes(target: Entries, before: Entries, allowzero: bool) -> list[int] | None:
    """The target of a Reshape in numbers: 0 for a size that stays at its axis, −1 for at most one other size.

    Returns None if the target has more unknown sizes. With `allowzero`, a 0 in the target means an empty axis, so that
    sizes cannot be copied.
    """
    sizes: list[int | None] = []
    for axis, entry in enumerate(target):
        stays = not isinstance(entry, int) and entry is not None and before[axis : axis + 1] == (entry,)
        sizes.append(0 if stays else entry if isinstance(entry, int) else None)
    numbers = [size for size in sizes if size is not None]
    if allowzero and any(entry == 0 for entry in target):
        return None
    unknown = len(sizes) - len(numbers)
    if unknown > 1 or (unknown and min(numbers, default=1) < 1):
        return None
    return [-1 if size is None else size for size in sizes]
