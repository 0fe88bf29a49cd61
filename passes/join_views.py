"""Transposes and Reshapes in a row become one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pwopt.graph import attributes, values
from pwopt.graph.ir import Node
from pwopt.graph.operators import VIEWS
from pwopt.graph.values import Entries
from pwopt.maps import forms
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.records import Rewrite, Skip

from .settle_shapes import copied

#: The opset since which the shape is an input of Reshape.
RESHAPE_TAKES_SHAPES = 5


class JoinViews(Pass):
    """TₚTᵩ = Tᵩₚ; R_a R_b = R_a; R⁻¹ R = 1; R⁻¹ T R = T′ where R joins axes and R⁻¹ parts them again; Gemm of
    a transposed matrix transposes by itself

    The dynamo exporter of PyTorch turns the keys of attention so, with the sizes taken from Shape: (b, h, s, d) →
    (b·h, s, d) → (b·h, d, s) → (b, h, d, s). The elements come in the same order either way, since the axes that are
    joined lie side by side in both.
    """

    name = "join-views"

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        op = rw.op(node)
        if op == "Gemm":
            return _turned_before_gemm(rw, node)
        before = rw.producer(node.inputs[0]) if op in ("Transpose", *VIEWS) else None
        if before is None or rw.other_uses(node.inputs[0]):
            return None
        if op == "Unsqueeze" and rw.is_a(before, "Gather"):
            return _picked(rw, before, node)
        if op == "Transpose":
            return _turned_twice(rw, before, node)
        if rw.is_a(before, "Transpose"):
            return _turned_inside(rw, before, node) or _shuffled(rw, node) if op == "Reshape" else None
        return _seen_twice(rw, before, node) if rw.is_a(before, *VIEWS) else None


def _picked(rw: Rewriter, gather: Node, node: Node) -> Rewrite | None:
    """Gather of one entry, and the axis that it loses put back: Gather that keeps it, or nothing of one."""
    source, index = gather.inputs
    rank, at = rw.rank(source), rw.integers(index)
    held = rw.constant(index)
    axes = attributes.axes_of(rw, node)
    axis = int(gather.attrs.get("axis", 0))
    axis += rank if axis < 0 and rank is not None else 0
    if at is None or held is None or len(held.shape) or axes != [axis] or rank is None:
        return None
    reason, output = "Gather and Unsqueeze are one Gather", node.outputs[0]
    if rw.dim(source, axis) == 1 and at[0] in (0, -1):
        ends = rw.must_keep(output) and (rw.producer(source) is None or rw.must_keep(source))
        return None if ends else rw.bypass_all([gather, node], source, "Gather takes the only entry")
    entry = rw.new_constant(f"{output.name}_index", np.array(at, np.int64))
    new = Node("Gather", node.name, {"axis": axis}, [source, entry], [output])
    return rw.replace([gather, node], [new], reason)


def _seen_twice(rw: Rewriter, before: Node, node: Node) -> Rewrite | None:
    """Two views in a row as one, or as none if the second undoes the first."""
    source, output = before.inputs[0], node.outputs[0]
    outside, inside = values.extents(rw, source), _after(rw, before)
    after = None if inside is None else _after(rw, node, inside)
    if outside is not None and after is not None and _restored(outside, after):
        maker = rw.producer(source)
        if rw.must_keep(output) and (maker is None or rw.must_keep(source)):
            return None
        return rw.bypass_all([before, node], source, f"{node.op} undoes {before.op}")
    given = rw.integers(node.inputs[1]) if node.op == "Reshape" and len(node.inputs) > 1 else None
    if given and 0 not in given:  # a 0 stands for the size before it
        inputs, attrs = [source, *node.inputs[1:]], dict(node.attrs)
    else:
        target = None if outside is None or after is None or 0 in after else copied(after, outside, allowzero=False)
        if target is None or rw.opset < RESHAPE_TAKES_SHAPES:
            return None
        inputs, attrs = [source, rw.new_constant(f"{output.name}_shape", np.array(target, np.int64))], {}
    return _one(rw, [before, node], Node("Reshape", node.name, attrs, inputs, [output]))


def _one(rw: Rewriter, old: Sequence[Node], new: Node) -> Rewrite:
    return rw.replace(old, [new], f"{', '.join(n.op for n in old[:-1])} and {old[-1].op} are one {new.op}")


def _turned_twice(rw: Rewriter, before: Node, node: Node) -> Rewrite | None:
    perms = attributes.perm(rw, before) if rw.is_a(before, "Transpose") else None, attributes.perm(rw, node)
    if perms[0] is None or perms[1] is None:
        return None
    attrs = {**node.attrs, "perm": [perms[0][p] for p in perms[1]]}
    return _one(rw, [before, node], Node("Transpose", node.name, attrs, [before.inputs[0]], list(node.outputs)))


def _turned_before_gemm(rw: Rewriter, node: Node) -> Rewrite | None:
    """Gemm of a transposed matrix: Gemm transposes by itself, or no longer."""
    for index, name in enumerate(("transA", "transB")):
        operand = node.inputs[index]
        turn = rw.producer(operand)
        alone = not rw.other_uses(operand) and sum(t is operand for t in node.inputs) == 1
        if alone and rw.is_a(turn, "Transpose") and attributes.perm(rw, turn) == [1, 0]:
            attrs = {**node.attrs, name: 1 - bool(node.attrs.get(name, 0))}
            inputs = [turn.inputs[0] if t is operand else t for t in node.inputs]
            return _one(rw, [turn, node], Node("Gemm", node.name, attrs, inputs, list(node.outputs)))
    return None


def _turned_inside(rw: Rewriter, turn: Node, node: Node) -> Rewrite | None:
    """Reshape → Transpose → Reshape as one Transpose of what comes in."""
    joint, perm = rw.producer(turn.inputs[0]), attributes.perm(rw, turn)
    if not rw.is_a(joint, *VIEWS) or rw.other_uses(turn.inputs[0]) or perm is None:
        return None
    source = joint.inputs[0]
    outside, inside = values.extents(rw, source), _after(rw, joint)
    parts = None if outside is None or inside is None else joined(outside, inside)
    if parts is None or outside is None or inside is None or len(perm) != len(parts):
        return None
    order = [axis for p in perm for axis in parts[p]]
    after = _after(rw, node, tuple(inside[p] for p in perm))
    if after is None or not _restored([outside[axis] for axis in order], after):
        return None
    new = Node("Transpose", node.name, {"perm": order}, [source], list(node.outputs))
    return _one(rw, [joint, turn, node], new)


def _shuffled(rw: Rewriter, node: Node) -> Rewrite | None:
    """A channel shuffle whose shapes are computed as one Gather, which needs none."""
    reading = forms.linear(rw, node)
    if reading is None or reading.kind != "selection" or len(reading.nodes) != 3 or reading.axis is None:
        return None
    linear = reading.try_load()
    views = (reading.nodes[0], reading.nodes[2])
    if linear is None or all(rw.constant(n.inputs[1]) is not None for n in views):
        return None
    picks = linear.weight.reshape(linear.geometry.out_channels, -1).argmax(1).astype(np.int64)
    index = rw.new_constant(f"{node.outputs[0].name}_index", picks)
    new = Node("Gather", node.name, {"axis": reading.axis}, [reading.source, index], list(node.outputs))
    return rw.replace(list(reading.nodes), [new], "a channel shuffle is one Gather")


def _after(rw: Rewriter, node: Node, before: Entries | None = None) -> Entries | None:
    """The sizes that a view gives; None for what a −1 stands for."""
    found = values.entries(rw, node.inputs[1]) if node.op == "Reshape" and len(node.inputs) > 1 else None
    before = before if before is not None else values.extents(rw, node.inputs[0])
    if node.op != "Reshape":
        return values.extents(rw, node.outputs[0])
    if found is None or before is None:
        return None
    copies = not node.attrs.get("allowzero", 0)
    if copies and any(e == 0 and axis >= len(before) for axis, e in enumerate(found)):
        return None
    return tuple(None if e == -1 else before[a] if e == 0 and copies else e for a, e in enumerate(found))


def joined(before: Entries, after: Entries) -> list[list[int]] | None:
    """For each axis after, the axes before that it joins, if one at most joins several; None if that is not known."""
    first = 0
    while first < min(len(before), len(after)) and before[first] == after[first] is not None:
        first += 1
    last, shorter = 0, min(len(before), len(after)) - first
    while last < shorter and before[-1 - last] == after[-1 - last] is not None:
        last += 1
    middle = list(range(first, len(before) - last))
    left = len(after) - first - last
    if left > 1 or (left == 0 and middle) or (left == 1 and not middle):
        return None
    own = [[axis] for axis in range(first)] + [middle] * left
    return own + [[axis] for axis in range(len(before) - last, len(before))]


def _restored(expected: Sequence[values.Entry], after: Entries) -> bool:
    """Whether these are the same sizes; one may be left to a −1, as the number of elements tells it."""
    fits = len(expected) == len(after) and after.count(None) <= 1
    return fits and all(b in (a, None) for a, b in zip(expected, after, strict=True))
