"""View composition: consecutive Transposes and Reshapes become one or none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pwopt.graph import attributes, values
from pwopt.graph.ir import Node, Tensor
from pwopt.graph.operators import VIEWS
from pwopt.graph.values import Entries
from pwopt.maps import forms
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.records import Rewrite, Skip

from .settle_shapes import copy_sizes

#: The first opset in which the shape is an input of Reshape.
RESHAPE_TAKES_SHAPES = 5


class JoinViews(Pass):
    """TₚTᵩ = Tᵩₚ; R_a R_b = R_a; R⁻¹ R = 1; R⁻¹ T R = T′ if R joins adjacent axes and R⁻¹ splits them again

    Canonicalisation of views; T is a Transpose and R a Reshape.

    * Nothing else reads the tensors between them.
    * Sizes are compared entry by entry, also if they are dynamic (`pwopt.graph.values`).
    * R_a needs no comparison if none of its entries copies a size of the tensor between the two.
    * A Transpose that only moves axes of size 1 is a Reshape.
    * A Gemm absorbs a Transpose of its operand. A Gather with one index absorbs the Unsqueeze after it.
    * A channel shuffle with computed shapes becomes one Gather.

    PyTorch's dynamo exporter transposes the keys of attention by three operators, with sizes from Shape: (b, h, s, d) →
    (b·h, s, d) → (b·h, d, s) → (b, h, d, s). One Transpose gives the same order of elements, because the joined axes
    are adjacent before and after it.
    """

    name = "join-views"
    operators = VIEWS | {"Gemm", "Transpose"}

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        op = rw.op(node)
        if op == "Gemm":
            return _absorb_into_gemm(rw, node)
        before = rw.producer(node.inputs[0]) if op in ("Transpose", *VIEWS) else None
        if before is None or rw.other_uses(node.inputs[0]):
            return None
        if op == "Unsqueeze" and rw.is_a(before, "Gather"):
            return _keep_gather_axis(rw, before, node)
        if op == "Transpose":
            return _compose_transposes(rw, before, node)
        if rw.is_a(before, "Transpose"):
            if op != "Reshape":
                return None
            return _absorb_reshapes(rw, before, node) or _write_shuffle(rw, node) or _skip_transpose(rw, before, node)
        return _compose_reshapes(rw, before, node) if rw.is_a(before, *VIEWS) else None


def _can_bypass(rw: Rewriter, source: Tensor, output: Tensor) -> bool:
    """Whether one of two equal tensors may lose its name."""
    return not rw.must_keep(output) or not (rw.producer(source) is None or rw.must_keep(source))


def _keep_gather_axis(rw: Rewriter, gather: Node, node: Node) -> Rewrite | None:
    """Replace a Gather of one entry and the Unsqueeze that restores its axis by one Gather, or by nothing."""
    source, index = gather.inputs
    rank, entry = rw.rank(source), rw.integers(index)
    constant = rw.constant(index)
    axes = attributes.read_axes(rw, node)
    axis = int(gather.attrs.get("axis", 0))
    axis += rank if axis < 0 and rank is not None else 0
    if entry is None or constant is None or len(constant.shape) or axes != [axis] or rank is None:
        return None
    output = node.outputs[0]
    if rw.dim(source, axis) == 1 and entry[0] in (0, -1):
        possible = _can_bypass(rw, source, output)
        return rw.bypass_all([gather, node], source, "Gather takes the only entry") if possible else None
    kept = rw.new_constant(f"{output.name}_index", np.array(entry, np.int64))
    new = Node("Gather", node.name, {"axis": axis}, [source, kept], [output])
    return _replace_by_one(rw, [gather, node], new)


def _compose_reshapes(rw: Rewriter, before: Node, node: Node) -> Rewrite | None:
    """Replace two Reshapes (or similar views) by one, or by none if the second undoes the first."""
    source, output = before.inputs[0], node.outputs[0]
    first, between = values.read_extents(rw, source), _find_output_sizes(rw, before)
    after = None if between is None else _find_output_sizes(rw, node, between)
    if first is not None and after is not None and _are_same_sizes(first, after):
        possible = _can_bypass(rw, source, output)
        return rw.bypass_all([before, node], source, f"{node.op} undoes {before.op}") if possible else None
    if node.op == "Reshape" and _copies_no_size(rw, node):  # a copied size is one of the tensor between them
        inputs, attrs = [source, *node.inputs[1:]], dict(node.attrs)
    else:
        target = None if first is None or after is None or 0 in after else copy_sizes(after, first, allowzero=False)
        if target is None or rw.opset < RESHAPE_TAKES_SHAPES:
            return None
        inputs, attrs = [source, rw.new_constant(f"{output.name}_shape", np.array(target, np.int64))], {}
    return _replace_by_one(rw, [before, node], Node("Reshape", node.name, attrs, inputs, [output]))


def _copies_no_size(rw: Rewriter, node: Node) -> bool:
    """Whether no entry of a Reshape's target copies a size of its input, as a 0 does without `allowzero`."""
    if len(node.inputs) < 2 or node.inputs[1] is node.inputs[0]:
        return False
    shape = rw.integers(node.inputs[1])
    return bool(node.attrs.get("allowzero", 0)) or (shape is not None and 0 not in shape)


def _replace_by_one(rw: Rewriter, old: Sequence[Node], new: Node) -> Rewrite:
    return rw.replace(old, [new], f"{', '.join(n.op for n in old[:-1])} and {old[-1].op} become one {new.op}")


def _compose_transposes(rw: Rewriter, before: Node, node: Node) -> Rewrite | None:
    perms = (
        attributes.read_permutation(rw, before) if rw.is_a(before, "Transpose") else None,
        attributes.read_permutation(rw, node),
    )
    if perms[0] is None or perms[1] is None:
        return None
    attrs = {**node.attrs, "perm": [perms[0][p] for p in perms[1]]}
    return _replace_by_one(
        rw, [before, node], Node("Transpose", node.name, attrs, [before.inputs[0]], list(node.outputs))
    )


def _absorb_into_gemm(rw: Rewriter, node: Node) -> Rewrite | None:
    """Fold a Transpose of an operand into the attribute transA or transB of a Gemm."""
    for index, name in enumerate(("transA", "transB")):
        operand = node.inputs[index]
        transpose = rw.producer(operand)
        alone = not rw.other_uses(operand) and sum(t is operand for t in node.inputs) == 1
        if alone and rw.is_a(transpose, "Transpose") and attributes.read_permutation(rw, transpose) == [1, 0]:
            attrs = {**node.attrs, name: 1 - bool(node.attrs.get(name, 0))}
            inputs = [transpose.inputs[0] if t is operand else t for t in node.inputs]
            return _replace_by_one(rw, [transpose, node], Node("Gemm", node.name, attrs, inputs, list(node.outputs)))
    return None


def _absorb_reshapes(rw: Rewriter, transpose: Node, node: Node) -> Rewrite | None:
    """Replace a Reshape that joins axes, a Transpose, and a Reshape that splits them again by one Transpose."""
    reshape, perm = rw.producer(transpose.inputs[0]), attributes.read_permutation(rw, transpose)
    if not rw.is_a(reshape, *VIEWS) or rw.other_uses(transpose.inputs[0]) or perm is None:
        return None
    source = reshape.inputs[0]
    first, between = values.read_extents(rw, source), _find_output_sizes(rw, reshape)
    parts = None if first is None or between is None else _match_axes(first, between)
    if parts is None or first is None or between is None or len(perm) != len(parts):
        return None
    order = [axis for p in perm for axis in parts[p]]
    after = _find_output_sizes(rw, node, tuple(between[p] for p in perm))
    if after is None or not _are_same_sizes([first[axis] for axis in order], after):
        return None
    new = Node("Transpose", node.name, {"perm": order}, [source], list(node.outputs))
    return _replace_by_one(rw, [reshape, transpose, node], new)


def _skip_transpose(rw: Rewriter, transpose: Node, node: Node) -> Rewrite | None:
    """Remove a Transpose before a Reshape, if it only moves axes of size 1."""
    perm, sizes = attributes.read_permutation(rw, transpose), values.read_extents(rw, transpose.inputs[0])
    if perm is None or sizes is None or not _copies_no_size(rw, node):
        return None
    moved = [axis for axis in perm if sizes[axis] != 1]
    if moved != sorted(moved):
        return None
    new = Node("Reshape", node.name, dict(node.attrs), [transpose.inputs[0], node.inputs[1]], list(node.outputs))
    return rw.replace([transpose, node], [new], "Transpose only moves axes of size 1")


def _write_shuffle(rw: Rewriter, node: Node) -> Rewrite | None:
    """Replace a channel shuffle with computed shapes by one Gather, which needs no shapes."""
    reading = forms.linear(rw, node)
    if reading is None or reading.kind != "selection" or len(reading.nodes) != 3 or reading.axis is None:
        return None
    linear = reading.try_load()
    views = (reading.nodes[0], reading.nodes[2])
    if linear is None or all(rw.constant(n.inputs[1]) is not None for n in views):
        return None
    picks = linear.weight.reshape(linear.geometry.out_channels, -1).argmax(1).astype(np.int64)
    index = rw.new_constant(f"{node.outputs[0].name}_index", picks)
    # OpenVINO 2026.4 folds a Gather along axis 1 into the convolution after it with the inverse permutation.
    axis = reading.axis - (rw.rank(reading.source) or 0)
    new = Node("Gather", node.name, {"axis": axis}, [reading.source, index], list(node.outputs))
    return rw.replace(list(reading.nodes), [new], "a channel shuffle becomes one Gather")


def _find_output_sizes(rw: Rewriter, node: Node, before: Entries | None = None) -> Entries | None:
    """The output sizes of a view, with None for an entry of −1; None if they are not known."""
    found = values.read_entries(rw, node.inputs[1]) if node.op == "Reshape" and len(node.inputs) > 1 else None
    before = before if before is not None else values.read_extents(rw, node.inputs[0])
    if node.op != "Reshape":
        return values.read_extents(rw, node.outputs[0])
    if found is None or before is None:
        return None
    copies = not node.attrs.get("allowzero", 0)
    if copies and any(e == 0 and axis >= len(before) for axis, e in enumerate(found)):
        return None
    return tuple(None if e == -1 else before[a] if e == 0 and copies else e for a, e in enumerate(found))


def _match_axes(before: Entries, after: Entries) -> list[list[int]] | None:
    """For each axis after a Reshape, the axes before it that it joins; at most one axis may join several.

    None if the Reshape does something else, or if the sizes do not prove it.
    """
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
    leading = [[axis] for axis in range(first)]
    return leading + [middle] * left + [[axis] for axis in range(len(before) - last, len(before))]


def _are_same_sizes(expected: Sequence[values.Entry], after: Entries) -> bool:
    """Whether these are the same sizes. One of them may be a −1, because the number of elements determines it."""
    fits = len(expected) == len(after) and after.count(None) <= 1
    return fits and all(b in (a, None) for a, b in zip(expected, after, strict=True))
