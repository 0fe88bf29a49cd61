"""Move a scale and a shift per channel past operators that are not linear maps themselves.

f(A(x)) = A'(f(x)) for all x: then an affine map A can move past the operator f. Scales can if f is homogeneous (for any
scale, or for positive ones only). Shifts can if f preserves constants. The channel axis must survive. `sink` moves A
from the input of f to its output, and `lift` moves it from the output to the input.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from pwopt.algebra.geometry import Refusal
from pwopt.algebra.linear import LinearMap
from pwopt.graph import attributes
from pwopt.graph.dtypes import FLOATING, cancellation, range_of
from pwopt.graph.ir import Node, Tensor
from pwopt.graph.operators import ARITHMETIC, SUMS, VIEWS
from pwopt.graph.values import Entries, read_extents
from pwopt.graph.view import View
from pwopt.maps import forms, selections


@dataclass(frozen=True)
class Affine:
    """A diagonal map and the axis its channels lie on; None for one number on every axis."""

    map: LinearMap
    axis: int | None

    @property
    def scales(self) -> bool:
        return bool(np.any(self.map.scale != 1.0))

    @property
    def shifts(self) -> bool:
        return self.map.geometry.biased

    def moved(self, axis: int | None) -> Affine:
        return Affine(self.map, axis)

    def scale_only(self) -> Affine:
        return Affine(LinearMap.diagonal(self.map.scale), self.axis)


Moves = list[tuple[Tensor, Affine]]


@dataclass(frozen=True)
class Rule:
    """Which scales and shifts can move past an operator, between its first input and its first output.

    Attributes
    ----------
    scale : str
        "any", or "positive" for operators that are homogeneous only for positive factors.
    shift : bool
        Whether it preserves constants.
    axes : mapping or None
        Input axis → output axis for the axes that survive; None if all stay.
    """

    scale: str = "any"
    shift: bool = True
    axes: Mapping[int, int] | None = None


#: Operators that combine elements, beside those that sum.
MIXES = frozenset({"LeakyRelu", "PRelu", "Resize", "Upsample"})
#: Operators whose results may be smaller than their inputs, so that scaled inputs may overflow alone.
COMBINING = SUMS | MIXES | ARITHMETIC | {"Gemm"}
#: Batch and channels, the axes that pooling leaves alone.
KEPT_AXES: Mapping[int, int] = {0: 0, 1: 1}


def rule(view: View, node: Node) -> Rule | None:
    """The rule of an operator with one data input, or None if no scale or shift can move past it."""
    op = view.op(node)
    if op in ("Relu", "LeakyRelu", "PRelu", "Abs"):
        return Rule("positive", shift=False)
    if op == "GlobalAveragePool":
        return Rule(axes=KEPT_AXES)
    if op == "AveragePool":
        outside = any(node.attrs.get("pads", ())) or node.attrs.get("auto_pad", "NOTSET").startswith("SAME")
        partial = outside or node.attrs.get("ceil_mode", 0)
        hollow = outside and any(d > 1 for d in node.attrs.get("dilations", ()))  # a window may miss the input
        return Rule(shift=not hollow and not (partial and node.attrs.get("count_include_pad", 0)), axes=KEPT_AXES)
    if op in ("MaxPool", "GlobalMaxPool"):
        outside = any(node.attrs.get("pads", ())) or node.attrs.get("auto_pad", "NOTSET").startswith("SAME")
        hollow = outside and any(d > 1 for d in node.attrs.get("dilations", ()))  # a window may miss the input
        return None if hollow or any(o.name for o in node.outputs[1:]) else Rule("positive", axes=KEPT_AXES)
    if op in ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"):
        return _reduction(view, node, op)
    if op in ("Resize", "Upsample"):
        if node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize":
            return None
        return Rule(axes=_unscaled_axes(view, node))  # interpolation weights sum to one
    if op == "Pad":
        found = attributes.read_pad_parameters(view, node)
        if found is None:
            return None
        pads, mode, constant = found
        keep = {a: a for a in range(len(pads) // 2) if not pads[a] and not pads[a + len(pads) // 2]}
        return Rule(shift=mode != "constant", axes=keep) if mode != "constant" or constant == 0 else None
    if op == "Slice":
        parameters, rank = attributes.read_slice_parameters(view, node), view.rank(node.inputs[0])
        sliced = range(rank or 0) if parameters is None else [axis for axis, *_ in parameters]
        return Rule(axes={a: a for a in range(rank or 0) if a not in sliced})
    if op in ("Expand", "Tile"):
        return Rule(axes=_equal_axes(view, node))
    if op in ("DepthToSpace", "SpaceToDepth"):
        return Rule(axes={0: 0})
    if op == "Transpose":
        perm = attributes.read_permutation(view, node)
        return None if perm is None else Rule(axes={a: i for i, a in enumerate(perm)})
    if op in VIEWS:
        return Rule(axes=_kept_axes(view, node, op))
    if op == "Dropout":
        return Rule() if attributes.is_inactive_dropout(view, node) else None
    return Rule() if op == "Identity" else None


def product_rule(view: View, node: Node) -> Rule | None:
    """The rule of a product M·x with a constant matrix M, such as the adjacency of a graph or a transform of positions.

    It mixes the entries of the axis before the last, and treats the other axes alike. It preserves constants if every
    row sums to one, up to the rounding of its numbers.
    """
    reading = forms.linear(view, node)
    if reading is None or reading.kind != "left-matmul" or reading.geometry.biased or reading.axis is None:
        return None
    matrix = view.value(reading.weight_input)
    if matrix is None:
        return None
    rounding = cancellation(view.dtype(reading.weight_input)) * np.abs(matrix).sum(1)
    keeps = bool(np.all(np.abs(matrix.sum(1) - 1) <= rounding))
    rank = view.rank(reading.source) or 0
    return Rule(shift=keeps, axes={a: a for a in range(rank) if a != reading.axis})


def _equal_axes(view: View, node: Node) -> dict[int, int]:
    """Axes whose size is known and the same in input and output."""
    before, after = view.shape(node.inputs[0]), view.shape(node.outputs[0])
    if before is None or after is None or len(before) != len(after):
        return {}
    return {a: a for a, (x, y) in enumerate(zip(before, after, strict=True)) if isinstance(x, int) and x == y}


def _unscaled_axes(view: View, node: Node) -> dict[int, int]:
    """Axes that a Resize or Upsample does not change: the factor is 1. An equal size is not enough, because sizes are
    rounded."""
    scales = attributes.read_resize_scales(view, node)
    rank = view.rank(node.inputs[0])
    if scales is None:
        return _equal_axes(view, node) if attributes.is_resized_by_sizes(view, node) else {}
    return {a: a for a in range(rank or 0) if scales.get(a, 1.0) == 1.0}


def _reduction(view: View, node: Node, op: str) -> Rule | None:
    axes, rank = attributes.read_axes(view, node), view.rank(node.inputs[0])
    if not axes or rank is None:  # no axes means all of them, or none: noop_with_empty_axes
        return None
    left = [a for a in range(rank) if a not in axes]
    keep = {a: a if node.attrs.get("keepdims", 1) else i for i, a in enumerate(left)}
    return Rule("any" if op in ("ReduceMean", "ReduceSum") else "positive", op != "ReduceSum", keep)


def _kept_axes(view: View, node: Node, op: str) -> dict[int, int]:
    """Axes that a change of shape keeps: they have the same size, and as many elements before or after them as in the
    input."""
    before, after = read_extents(view, node.inputs[0]), read_extents(view, node.outputs[0])
    if before is None or after is None:
        return {}
    copied = view.integers(node.inputs[1]) if op == "Reshape" and len(node.inputs) > 1 else None
    zeros = {i for i, entry in enumerate(copied or ()) if entry == 0 and not node.attrs.get("allowzero", 0)}
    batch = view.dim(node.inputs[0], 0)
    if isinstance(batch, str) and batch == view.dim(node.outputs[0], 0):
        zeros.add(0)
    behind = _align_axes(before[::-1], after[::-1], set())
    kept = {len(before) - 1 - i: len(after) - 1 - j for i, j in behind.items()}
    return kept | _align_axes(before, after, zeros)


def _align_axes(before: Entries, after: Entries, same: Collection[int]) -> dict[int, int]:
    """Pairs of axes of equal size with as many elements before them. Axes in `same` have equal sizes if their index is
    equal."""
    kept: dict[int, int] = {}
    i = j = 0
    left = right = 1  # elements per step of the axes already passed, where they do not match one to one
    while i < len(before) and j < len(after):
        x, y = before[i], after[j]
        if left == right and (x == y or (i == j and i in same)):
            kept[i] = j
            i, j = i + 1, j + 1
        elif not isinstance(x, int) or not isinstance(y, int) or x == 0 or y == 0:
            break
        elif left * x <= right * y:
            left, i = left * x, i + 1
            if left == right * y:
                right, j = right * y, j + 1
        else:
            right, j = right * y, j + 1
    return kept


def _check_rule(view: View, affine: Affine, node: Node) -> Rule | Refusal:
    """The operator's rule, if `affine` can move past it."""
    name, found = node.op, rule(view, node)
    if found is None:
        return Refusal(f"a scale or shift does not pass through {name}")
    if affine.shifts and not found.shift:
        return Refusal(f"a shift does not pass through {name}")
    if found.scale == "positive" and not np.all(affine.map.scale > 0):
        return Refusal(f"only a positive scale passes through {name}")
    return (_find_overflow(view, affine, node) if view.op(node) in COMBINING else None) or found


def _find_overflow(view: View, affine: Affine, node: Node) -> Refusal | None:
    """Why the results of an operator could overflow once `affine` has moved past it; None if they cannot."""
    dtype = view.dtype(node.outputs[0]) or view.dtype(node.inputs[0])
    if dtype not in FLOATING:
        return None
    limits = range_of(dtype)
    if not limits.allows_scale(affine.map.scale):
        return Refusal(f"a scale moved past {node.op} could overflow {dtype}")
    if not limits.allows_shift(affine.map.bias):
        return Refusal(f"a shift moved past {node.op} could overflow {dtype}")
    return None


def sink(view: View, node: Node, tensor: Tensor, affine: Affine) -> Moves | Refusal:
    """Move an affine map from `tensor`, an input of `node`, to the node's outputs.

    Returns
    -------
    list of (output tensor, Affine), or Refusal
        What is left to apply after the node once `tensor` no longer carries the map.
    """
    op = view.op(node)
    if sum(t is tensor for t in node.inputs) > 1:
        return Refusal(f"{node.op} reads it twice")
    if _empty(view, node):
        return Refusal(f"{node.op} has an empty tensor")
    if op == "Split":
        return _through_split(view, node, affine)
    if op == "Concat":
        return _through_concat(view, node, tensor, affine)
    if op in ARITHMETIC:
        return _through_pair(view, node, tensor, affine, op)
    if tensor is not node.inputs[0]:
        return Refusal(f"a scale or shift does not pass through {node.op}")
    found = _check_rule(view, affine, node)
    if isinstance(found, Refusal):
        return found
    axis = affine.axis
    if axis is not None and found.axes is not None:
        if axis not in found.axes:
            return Refusal(f"{node.op} changes the channel axis")
        axis = found.axes[axis]
    return [(node.outputs[0], affine.moved(axis))]


def _empty(view: View, node: Node) -> bool:
    """Whether a tensor that would be scaled has no elements; optional inputs such as regions of interest do not
    count."""
    pieces = [*node.outputs, *(node.inputs if node.op == "Concat" else node.inputs[:1])]
    return any(0 in (view.shape(t) or ()) for t in pieces)


def _through_split(view: View, node: Node, affine: Affine) -> Moves | Refusal:
    parts = selections.read_split(view, node)
    if affine.axis is None or (parts is not None and affine.axis != parts[0].axis):
        return [(t, affine) for t in node.outputs if t.name]
    if parts is None:
        return Refusal("the sizes of a Split are not known")
    ends = np.cumsum([p.geometry.out_channels for p in parts])
    return [
        (t, Affine(LinearMap.diagonal(s, b), affine.axis))
        for t, s, b in zip(
            node.outputs, np.split(affine.map.scale, ends), np.split(affine.map.bias, ends), strict=False
        )
    ]


def _through_concat(view: View, node: Node, tensor: Tensor, affine: Affine) -> Moves | Refusal:
    axis, widths = (
        attributes.read_concat_axis(view, node),
        [view.dim(t, node.attrs.get("axis", 1)) for t in node.inputs],
    )
    if axis is None or not all(isinstance(w, int) for w in widths) or affine.axis not in (axis, None):
        return Refusal("the other inputs of a Concat are not scaled")
    sizes = [w for w in widths if isinstance(w, int)]
    own = affine.map.broadcast(sizes[next(i for i, t in enumerate(node.inputs) if t is tensor)])
    scale = np.concatenate([own.scale if t is tensor else np.ones(w) for t, w in zip(node.inputs, sizes, strict=True)])
    shift = np.concatenate([own.bias if t is tensor else np.zeros(w) for t, w in zip(node.inputs, sizes, strict=True)])
    return [(node.outputs[0], Affine(LinearMap.diagonal(scale, shift), axis))]


def _same_channels(view: View, affine: Affine, tensor: Tensor, output: Tensor) -> bool:
    """Whether broadcasting changes neither the place nor the size of the channel axis of `tensor`."""
    if affine.axis is None:
        return True
    wide = view.dim(tensor, affine.axis)
    return view.rank(tensor) == view.rank(output) and isinstance(wide, int) and wide == view.dim(output, affine.axis)


def _through_pair(view: View, node: Node, tensor: Tensor, affine: Affine, op: str) -> Moves | Refusal:
    first = tensor is node.inputs[0]
    if not _same_channels(view, affine, tensor, node.outputs[0]):
        return Refusal(f"{op} broadcasts it")
    if op in ("Mul", "Div"):
        if affine.shifts or (op == "Div" and not first):
            return Refusal(f"a shift does not pass through {op}" if affine.shifts else "it is a divisor")
        return _find_overflow(view, affine, node) or [(node.outputs[0], affine)]
    if affine.scales:
        return Refusal(f"a scale of one operand does not pass through {op}")
    overflow = _find_overflow(view, affine, node)
    if overflow is not None:
        return overflow
    if op == "Sub" and not first:
        affine = Affine(LinearMap.diagonal(np.ones_like(affine.map.bias), -affine.map.bias), affine.axis)
    return [(node.outputs[0], affine)]


def lift(view: View, node: Node, affine: Affine) -> list[Moves] | Refusal:
    """Move an affine map from the output of `node` to its inputs.

    Returns
    -------
    list of alternatives, or Refusal
        Each alternative lists the inputs that must all take a map over.
    """
    op = view.op(node)
    if _empty(view, node):
        return Refusal(f"{node.op} has an empty tensor")
    if op in ("Concat", *ARITHMETIC) and len(set(node.inputs)) < len(node.inputs):
        return Refusal(f"{op} reads one tensor twice")
    if op == "Concat":
        axis, parts = attributes.read_concat_axis(view, node), selections.read_concat(view, node)
        if affine.axis is None:
            return [[(t, affine) for t in node.inputs]]
        if affine.axis != axis:
            return (
                [[(t, affine) for t in node.inputs]]
                if axis is not None
                else Refusal("the axis of a Concat is not known")
            )
        if parts is None:
            return Refusal("the sizes of a Concat are not known")
        ends = np.cumsum([p.geometry.in_channels for p in parts])[:-1]
        pieces = zip(np.split(affine.map.scale, ends), np.split(affine.map.bias, ends), strict=True)
        return [[(t, Affine(LinearMap.diagonal(s, b), axis)) for t, (s, b) in zip(node.inputs, pieces, strict=True)]]
    if op in ARITHMETIC:
        return _lift_pair(view, node, affine, op)
    if op == "Gemm":
        return _lift_gemm(view, node, affine)
    found = _check_rule(view, affine, node)
    if isinstance(found, Refusal):
        return found
    axis = affine.axis
    if axis is not None and found.axes is not None:
        back = {out: inn for inn, out in found.axes.items()}
        if axis not in back:
            return Refusal(f"{node.op} changes the channel axis")
        axis = back[axis]
    return [[(node.inputs[0], affine.moved(axis))]]


def _lift_gemm(view: View, node: Node, affine: Affine) -> list[Moves] | Refusal:
    """(αAB + βC)s + t = αA(Bs) + β(Cs + t/β) for one number per column."""
    flip, summand = bool(node.attrs.get("transB", 0)), view.optional_input(node, 2)
    beta, output = node.attrs.get("beta", 1.0) if summand is not None else 0.0, node.outputs[0]
    if affine.axis == 0 or view.opset < 7:
        return Refusal(
            "Gemm takes one number per column, not per row" if affine.axis == 0 else "Gemm may not broadcast"
        )
    if len(set(node.inputs)) < len(node.inputs):
        return Refusal("Gemm reads one tensor twice")
    scaled, overflow = affine.scale_only(), _find_overflow(view, affine, node)
    if overflow is not None and any(view.constant(t) is None for t in node.inputs[1:] if t.name):
        return overflow
    moves = [(node.inputs[1], scaled.moved(None if affine.axis is None else 0 if flip else 1))] if affine.scales else []
    if beta == 0.0 or summand is None:
        return Refusal("Gemm adds nothing that could be shifted") if affine.shifts else [moves]
    if not _same_channels(view, affine, summand, output):
        return Refusal("Gemm broadcasts what it adds")
    own = Affine(LinearMap.diagonal(affine.map.scale, affine.map.bias / beta), affine.axis)
    return [[*moves, (summand, own)]]


def _lift_pair(view: View, node: Node, affine: Affine, op: str) -> list[Moves] | Refusal:
    operands = list(node.inputs)
    overflow = _find_overflow(view, affine, node)
    constant = [view.constant(t) is not None for t in operands]
    fits = [_same_channels(view, affine, t, node.outputs[0]) for t in operands]
    if op in ("Mul", "Div"):
        if affine.shifts:
            return Refusal(f"a shift does not pass through {op}")
        useful = zip(operands if op == "Mul" else operands[:1], fits, constant, strict=False)
        moves = [(t, held) for t, fit, held in useful if fit]
        safe = [[(t, affine)] for t, held in moves if held or overflow is None]
        return safe or (overflow if moves and overflow is not None else Refusal(f"{op} broadcasts it"))
    if not all(fits):
        return Refusal(f"{op} broadcasts it")
    if not affine.scales:
        moves = list(zip(operands[:1] if op == "Sub" else operands, constant, strict=False))
        return [[(t, affine)] for t, held in moves if held or overflow is None] or overflow or []
    if overflow is not None and constant.count(False) > 1:
        return overflow
    rest = affine.scale_only()
    return [[(t, affine if i == 0 else rest) for i, t in enumerate(operands)]]
