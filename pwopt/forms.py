"""Nodes → linear maps: every operator that is linear across channels, in every opset's spelling.

`read` gives a `Reading` (what the node computes, and where its numbers are), a `Refusal` (it is such an
operator, but cannot be proven linear here), or None (something else). The way back is `pwopt.emit`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from pwopt import attributes
from pwopt.graph import FLOATING, View
from pwopt.linear import Array, Geometry, LinearMap, Refusal, pointwise_geometry
from pwopt.shapes import known

#: Operators with a matrix of weights, and the kinds they are read as.
WEIGHTED_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
WEIGHTED = ("conv", "conv-transpose", "gemm", "matmul", "left-matmul")


@dataclass(frozen=True)
class Reading:
    """A node (or MatMul + Add) as a linear map of one tensor.

    Attributes
    ----------
    nodes : tuple of gs.Node
        What it covers; the last one produces the output.
    source : gs.Tensor
        The data input.
    geometry : Geometry
        Known without reading large weights.
    axis : int or None
        The channel axis; None for a scalar scale and shift, which fit any axis.
    kind : str
        The form: conv, conv-transpose, gemm, matmul (x·W), left-matmul (W·x), diagonal, pool, border, selection,
        reduction.
    weight : gs.Tensor or None
        The tensor that holds its matrix; None where the numbers are few or implied.
    load : callable
        Reads the numbers: a LinearMap, or a Refusal if they are not finite.
    fill : array or None
        Of a border: what it holds, per channel, where that is not zero.
    """

    nodes: tuple[gs.Node, ...]
    source: gs.Tensor
    geometry: Geometry
    axis: int | None
    kind: str
    weight: gs.Tensor | None
    load: Callable[[], LinearMap | Refusal]
    fill: Array | None = None

    @property
    def node(self) -> gs.Node:
        return self.nodes[-1]

    @property
    def output(self) -> gs.Tensor:
        return self.nodes[-1].outputs[0]

    @property
    def weighted(self) -> bool:
        return self.kind in WEIGHTED

    @property
    def weight_input(self) -> gs.Tensor:
        """The input that leads to the weight of a weighted map."""
        return self.nodes[0].inputs[0 if self.kind == "left-matmul" else 1]

    @property
    def channels(self) -> str:
        return f"{self.geometry.in_channels}→{self.geometry.out_channels}"


Result = Reading | Refusal | None
Reader = Callable[[View, gs.Node], Result]
READERS: dict[str, Reader] = {}


def reads(*ops: str) -> Callable[[Reader], Reader]:
    def register(reader: Reader) -> Reader:
        READERS.update(dict.fromkeys(ops, reader))
        return reader

    return register


def read(view: View, node: gs.Node | None) -> Result:
    """What `node` computes from its data input, if that is linear across channels.

    Parameters
    ----------
    view : View
    node : gs.Node
    """
    if node is None or view.op(node) not in READERS:
        return None
    if id(node) in view.readings:
        found: Result = view.readings[id(node)]
        return found
    result = READERS[node.op](view, node)
    if isinstance(result, Reading) and 0 in (result.geometry.in_channels, result.geometry.out_channels):
        result = None
    if node in view:
        view.readings[id(node)] = result
    return result


def linear(view: View, node: gs.Node | None) -> Reading | None:
    """`read`, with refusals left out."""
    reading = read(view, node)
    return reading if isinstance(reading, Reading) else None


def weighted(view: View, node: gs.Node | None) -> Reading | None:
    """The weighted map that `node` is, a MatMul together with the Add that is its bias; None for any other node."""
    reading = linear(view, node)
    if reading is None or not reading.weighted or node is None:
        return None
    follower = view.sole_reader(node.outputs[0]) if view.op(node) == "MatMul" else None
    wider = linear(view, follower) if view.op(follower) == "Add" else None
    return wider if wider is not None and wider.nodes[0] is node else reading


def owned(view: View, reading: Reading, between: gs.Tensor) -> LinearMap | Refusal:
    """The numbers of a map, if nobody else needs its weight, nor `between`, which a rewrite would do away with."""
    crowd = view.crowd(between)
    if crowd or view.shared(reading.weight_input):
        return Refusal(crowd or f"the weight {reading.weight_input.name!r} is shared")
    return reading.load()


def describe_map(view: View, reading: Reading, widths: str) -> str:
    """What the time of a map depends on."""
    g = reading.geometry
    kernel = "×".join(map(str, g.kernel)) or "1"
    return f"{reading.kind} {widths} kernel {kernel} stride {g.strides} at {view.size_of(reading.source)}"


#: Weights at most of a map that the model does not hold as numbers (a selection, a pooling): 128 MiB in float64.
MAX_IMPLIED = 1 << 24


NOT_CONSTANT = Refusal("its weight is not a constant (an input, an overridable initializer, or computed)")
NOT_FINITE = Refusal("its weights are not finite")


def _weight(view: View, node: gs.Node, index: int) -> gs.Tensor | None:
    """The holder of a constant floating-point weight, or None."""
    tensor = view.optional(node, index)
    held = None if tensor is None else view.constant(tensor)
    return held if held is not None and held.dtype in FLOATING else None


def _bias(view: View, node: gs.Node, index: int, channels: int) -> Array | Refusal:
    tensor = view.optional(node, index)
    if tensor is None:
        return np.zeros(channels)
    value = view.value(tensor)
    if value is None:
        return Refusal("its bias is not a finite constant")
    return (
        np.asarray(np.broadcast_to(value.reshape(-1), (channels,)))
        if value.size in (1, channels)
        else Refusal("its bias does not have one number per channel")
    )


def _loader(
    view: View, weight: gs.Tensor, geometry: Geometry, bias: Array, arrange: Callable[[Array], Array]
) -> Callable[[], LinearMap | Refusal]:
    def load() -> LinearMap | Refusal:
        value = view.value(weight)
        return NOT_FINITE if value is None else LinearMap.of(geometry, arrange(value), bias)

    return load


@reads("Conv")
def read_conv(view: View, node: gs.Node) -> Result:
    weight = _weight(view, node, 1)
    if weight is None:
        return NOT_CONSTANT
    out, inn, *kernel = weight.shape
    spatial = attributes.spatial_attributes(view, node, tuple(kernel))
    bias = _bias(view, node, 2, out)
    if isinstance(spatial, Refusal):
        return spatial
    if isinstance(bias, Refusal):
        return bias
    groups = node.attrs.get("group", 1)
    if groups < 1 or out % groups:
        return Refusal("its groups do not divide its channels")
    biased = bool(np.any(bias))
    geometry = Geometry(out, inn * groups, groups, tuple(kernel), *spatial, biased=biased)
    return Reading(
        (node,), node.inputs[0], geometry, 1, "conv", weight, _loader(view, weight, geometry, bias, lambda w: w)
    )


@reads("ConvTranspose")
def read_conv_transpose(view: View, node: gs.Node) -> Result:
    weight = _weight(view, node, 1)
    if weight is None:
        return NOT_CONSTANT
    if "output_shape" in node.attrs or node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return Refusal("its padding follows from an output shape")
    groups = node.attrs.get("group", 1)
    inn, out, *kernel = weight.shape
    out *= groups
    spatial = attributes.spatial_attributes(view, node, tuple(kernel))
    bias = _bias(view, node, 2, out)
    if isinstance(spatial, Refusal):
        return spatial
    if isinstance(bias, Refusal):
        return bias
    if groups < 1 or inn % groups:
        return Refusal("its groups do not divide its channels")
    extra = tuple(node.attrs.get("output_padding", (0,) * len(kernel)))
    biased = bool(np.any(bias))
    geometry = Geometry(out, inn, groups, tuple(kernel), *spatial, transposed=True, output_padding=extra, biased=biased)

    def arrange(w: Array) -> Array:  # ONNX keeps (in, out / groups, *kernel)
        blocks: Array = w.reshape(groups, inn // groups, out // groups, *kernel)
        return np.reshape(blocks.swapaxes(1, 2), (out, inn // groups, *kernel))

    return Reading(
        (node,), node.inputs[0], geometry, 1, "conv-transpose", weight, _loader(view, weight, geometry, bias, arrange)
    )


@reads("Gemm")
def read_gemm(view: View, node: gs.Node) -> Result:
    weight = _weight(view, node, 1)
    if weight is None:
        return NOT_CONSTANT
    if node.attrs.get("transA", 0):
        return Refusal("it transposes its data input")
    flip = bool(node.attrs.get("transB", 0))
    inn, out = reversed(weight.shape) if flip else weight.shape
    alpha, beta = node.attrs.get("alpha", 1.0), node.attrs.get("beta", 1.0)
    held = view.optional(node, 2)
    if held is not None and (
        held.shape is None or len(held.shape) > 2 or (len(held.shape) == 2 and held.shape[0] != 1)
    ):
        return Refusal("its bias differs between rows")
    bias = _bias(view, node, 2, out)
    if isinstance(bias, Refusal):
        return bias
    bias = beta * bias
    geometry = pointwise_geometry(out, inn, biased=bool(np.any(bias)))
    return Reading(
        (node,), node.inputs[0], geometry, 1, "gemm", weight,
        _loader(view, weight, geometry, bias, lambda w: alpha * (w if flip else w.T)),
    )  # fmt: skip


@reads("MatMul")
def read_matmul(view: View, node: gs.Node) -> Result:
    """x·W acts on the last axis, W·x on the one before it."""
    left, right = _weight(view, node, 0), _weight(view, node, 1)
    if (left is None) == (right is None):
        return None  # data-dependent, or foldable as a constant
    weight, source = (right, node.inputs[0]) if right is not None else (left, node.inputs[1])
    rank = view.rank(source)
    if weight is None or len(weight.shape) != 2:
        return Refusal("its weight is not one matrix")
    if rank is None or rank < 1 or (left is not None and rank < 2):
        return Refusal("the rank of its input is not known")
    out, inn = weight.shape if left is not None else reversed(weight.shape)
    geometry = pointwise_geometry(out, inn)
    if left is not None:
        load = _loader(view, weight, geometry, np.zeros(out), lambda w: w)
        return Reading((node,), source, geometry, rank - 2, "left-matmul", weight, load)
    load = _loader(view, weight, geometry, np.zeros(out), lambda w: w.T)
    return Reading((node,), source, geometry, rank - 1, "matmul", weight, load)


def _implied(geometry: Geometry, make: Callable[[], LinearMap]) -> Callable[[], LinearMap | Refusal]:
    """Loads numbers that follow from a few attributes, and could be any number of them."""
    too_many = Refusal(f"written out, it has {geometry.weights:,} weights")
    return lambda: make() if geometry.weights <= MAX_IMPLIED else too_many


def _diagonal(node: gs.Node, source: gs.Tensor, scale: Array, shift: Array, axis: int | None) -> Result:
    if not scale.size:
        return None
    if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
        return NOT_FINITE
    linear_map = LinearMap.diagonal(scale, shift)
    return Reading((node,), source, linear_map.geometry, axis, "diagonal", None, lambda: linear_map)


@reads("BatchNormalization")
def read_batch_normalization(view: View, node: gs.Node) -> Result:
    """γ(x − μ)/√(σ² + ε) + β at inference."""
    attrs = node.attrs
    if (
        attrs.get("training_mode", 0)
        or (view.opset < 7 and not attrs.get("is_test", 0))
        or any(o.name for o in node.outputs[1:])
    ):
        return Refusal("it normalises with the batch's own statistics (training mode)")
    if not attrs.get("spatial", 1):
        return Refusal("it normalises each position on its own (spatial = 0)")
    values = [view.value(t) for t in node.inputs[1:5]]
    if len(values) != 4 or any(v is None for v in values):
        return NOT_CONSTANT
    gamma, beta, mean, variance = (v for v in values if v is not None)
    with np.errstate(all="ignore"):
        scale = gamma / np.sqrt(variance + attrs.get("epsilon", float(np.float32(1e-5))))
        shift = beta - mean * scale
    return _diagonal(node, node.inputs[0], scale, shift, 1)


def _channel_constant(
    view: View, node: gs.Node, constant: gs.Tensor, source: gs.Tensor
) -> tuple[Array, int | None] | None:
    """The numbers of a constant that scales or shifts `source` per channel, and the channel axis.

    None where it differs along several axes, or where broadcasting could enlarge `source`.
    """
    elements, rank = view.elements(constant), view.rank(source)
    shape = tuple((view.constant(constant) or constant).shape)
    if elements is None or elements == 0 or (elements > 1 and rank is None):
        return None
    if view.opset < 7 and node.attrs.get("broadcast", 0) and "axis" in node.attrs and rank is not None:
        shape = (*shape, *(1,) * (rank - node.attrs["axis"] - len(shape)))
    if len(shape) > (rank or 0):
        return None
    axes = [len(shape) - i for i, d in enumerate(shape) if d != 1]
    if len(axes) > 1:
        return None
    value = view.value(constant)
    if value is None:
        return None
    if not axes:
        return value.reshape(1), None
    axis = (rank or 0) - axes[0]
    return (value.reshape(-1), axis) if view.dim(source, axis) == elements else None


@reads("Mul", "Div", "Add", "Sub")
def read_arithmetic(view: View, node: gs.Node) -> Result:
    """A scale or a shift by a constant; an Add after its own MatMul is that MatMul's bias."""
    if len(node.inputs) != 2:
        return None
    sides = [view.constant(t) is not None for t in node.inputs]
    if sides[0] == sides[1]:
        return None
    index = 0 if sides[1] else 1
    source, constant = node.inputs[index], node.inputs[1 - index]
    found = _channel_constant(view, node, constant, source)
    if found is None:
        return None
    value, axis = found
    op, one, zero = node.op, np.ones_like(value), np.zeros_like(value)
    if op == "Add":
        return _matmul_bias(view, node, source, value, axis) or _diagonal(node, source, one, value, axis)
    if op == "Sub":
        return _diagonal(node, source, one, -value, axis) if index == 0 else _diagonal(node, source, -one, value, axis)
    if op == "Mul":
        return _diagonal(node, source, value, zero, axis)
    if index == 1:
        return None  # constant / x
    with np.errstate(divide="ignore"):
        return _diagonal(node, source, 1.0 / value, zero, axis)


def _matmul_bias(view: View, node: gs.Node, source: gs.Tensor, value: Array, axis: int | None) -> Result:
    maker = view.producer(source)
    if not view.is_a(maker, "MatMul") or view.sole_reader(source) is not node:
        return None
    product = linear(view, maker)
    if product is None or axis not in (product.axis, None):
        return None
    bias = np.broadcast_to(value, (product.geometry.out_channels,))

    def load() -> LinearMap | Refusal:
        base = product.load()
        return base if isinstance(base, Refusal) else LinearMap.of(base.geometry, base.weight, bias)

    geometry = replace(product.geometry, biased=bool(np.any(bias)))
    return replace(product, nodes=(*product.nodes, node), geometry=geometry, load=load)


@reads("Neg")
def read_neg(view: View, node: gs.Node) -> Result:
    if view.dtype(node.inputs[0]) not in FLOATING:
        return None
    return _diagonal(node, node.inputs[0], -np.ones(1), np.zeros(1), None)


@reads("Identity", "Dropout")
def read_identity(view: View, node: gs.Node) -> Result:
    if any(o.name for o in node.outputs[1:]):
        return Refusal("its mask is used")
    if node.op == "Dropout" and not attributes.inactive_dropout(view, node):
        return Refusal("it drops units (training mode)")
    if view.dtype(node.inputs[0]) not in FLOATING:
        return None
    return _diagonal(node, node.inputs[0], np.ones(1), np.zeros(1), None)


@reads("AveragePool")
def read_average_pool(view: View, node: gs.Node) -> Result:
    """A depthwise stencil of 1/k, if every window has the same number of elements."""
    kernel = tuple(node.attrs["kernel_shape"])
    spatial = attributes.spatial_attributes(view, node, kernel)
    if isinstance(spatial, Refusal):
        return spatial
    channels = view.dim(node.inputs[0], 1)
    if not isinstance(channels, int):
        return Refusal("the number of channels is not known")
    if node.attrs.get("ceil_mode", 0):
        return Refusal("its last window may reach over the edge (ceil_mode)")
    if (any(spatial.pads) and not node.attrs.get("count_include_pad", 0)) or spatial.auto_pad:
        return Refusal("its windows at the border average fewer elements")
    geometry = Geometry(channels, channels, channels, kernel, *spatial)
    load = _implied(geometry, lambda: LinearMap.of(geometry, np.full((channels, 1, *kernel), 1 / math.prod(kernel))))
    return Reading((node,), node.inputs[0], geometry, 1, "pool", None, load)


@reads("ReduceSum", "ReduceMean")
def read_reduction(view: View, node: gs.Node) -> Result:
    """A one-row matrix, when exactly the channel axis is reduced and kept."""
    axes = attributes.axes_of(view, node, since=13 if node.op == "ReduceSum" else 18)
    if axes is None or len(axes) != 1 or not node.attrs.get("keepdims", 1) or view.rank(node.inputs[0]) is None:
        return None
    channels = view.dim(node.inputs[0], axes[0])
    if not isinstance(channels, int) or channels < 1:
        return None
    row = np.full((1, channels), 1.0 if node.op == "ReduceSum" else 1.0 / channels)
    return Reading(
        (node,),
        node.inputs[0],
        pointwise_geometry(1, channels),
        axes[0],
        "reduction",
        None,
        lambda: LinearMap.pointwise(row),
    )


def _selection(node: gs.Node, source: gs.Tensor, picks: Sequence[int], channels: int, axis: int) -> Reading:
    geometry = pointwise_geometry(len(picks), channels)
    load = _implied(geometry, lambda: LinearMap.selection(picks, channels))
    return Reading((node,), source, geometry, axis, "selection", None, load)


@reads("Slice")
def read_slice(view: View, node: gs.Node) -> Result:
    parameters = attributes.slice_parameters(view, node)
    if parameters is None or len(parameters) != 1:
        return None
    axis, start, end, step = parameters[0]
    channels = view.dim(node.inputs[0], axis)
    if not isinstance(channels, int):
        return None
    return _selection(node, node.inputs[0], range(channels)[start:end:step], channels, axis)


@reads("Gather")
def read_gather(view: View, node: gs.Node) -> Result:
    rank, axis = view.rank(node.inputs[0]), node.attrs.get("axis", 0)
    picks = view.integers(node.inputs[1])
    held = view.constant(node.inputs[1])
    if rank is None or picks is None or held is None or len(held.shape) != 1:
        return None
    axis += rank if axis < 0 else 0
    channels = view.dim(node.inputs[0], axis)
    if not isinstance(channels, int) or any(not -channels <= p < channels for p in picks):
        return None
    return _selection(node, node.inputs[0], [p % channels for p in picks], channels, axis)


def read_split(view: View, node: gs.Node) -> list[Reading] | None:
    """One selection per output of a Split with known sizes; None if one is empty."""
    axis, rank = node.attrs.get("axis", 0), view.rank(node.inputs[0])
    if rank is None:
        return None
    axis += rank if axis < 0 else 0
    channels = view.dim(node.inputs[0], axis)
    sizes = [view.dim(t, axis) for t in node.outputs]
    numbers = known(sizes)
    if not isinstance(channels, int) or numbers is None or 0 in numbers or sum(numbers) != channels:
        return None
    starts = np.concatenate([[0], np.cumsum(numbers)]).tolist()
    return [
        _selection(node, node.inputs[0], range(starts[i], starts[i + 1]), channels, axis) for i in range(len(numbers))
    ]


def read_concat(view: View, node: gs.Node) -> list[Reading] | None:
    """One embedding per input of a Concat; the output is their sum."""
    axis = attributes.concat_axis(view, node)
    sizes = None if axis is None else known([view.dim(t, axis) for t in node.inputs])
    if axis is None or sizes is None:
        return None
    starts, total = np.concatenate([[0], np.cumsum(sizes)]).tolist(), sum(sizes)
    return [
        _selection(
            node, t, [c - starts[i] if starts[i] <= c < starts[i + 1] else -1 for c in range(total)], sizes[i], axis
        )
        for i, t in enumerate(node.inputs)
    ]


@reads("Pad")
def read_pad(view: View, node: gs.Node) -> Result:
    """Constant channels before and after: a selection with a bias. Constant positions around: a map with a border."""
    found = attributes.pad_parameters(view, node)
    if found is None:
        return None
    pads, mode, constant = found
    rank = len(pads) // 2
    axes = [a for a in range(rank) if pads[a] or pads[a + rank]]
    if mode != "constant" or not axes or constant is None or min(pads) < 0:
        return None
    axis = min(axes[0], 1)
    channels = view.dim(node.inputs[0], axis)
    if not isinstance(channels, int) or channels < 1:
        return None
    if axes[0] >= 2:
        around = (*pads[2:rank], *pads[rank + 2 :])
        return _border((node,), node.inputs[0], around, np.full(channels, constant))
    if len(axes) != 1:
        return None
    before, total = pads[axis], pads[axis] + channels + pads[axis + rank]
    geometry = pointwise_geometry(total, channels, biased=bool(constant))

    def padded() -> LinearMap:
        picks = np.full(total, -1)
        picks[before : before + channels] = np.arange(channels)
        selection = LinearMap.selection(picks.tolist(), channels)
        return LinearMap.of(geometry, selection.weight, np.where(picks < 0, constant, 0.0))

    return Reading((node,), node.inputs[0], geometry, axis, "selection", None, _implied(geometry, padded))


def _border(nodes: tuple[gs.Node, ...], source: gs.Tensor, pads: tuple[int, ...], fill: Array) -> Reading:
    """Positions around a feature map that hold `fill`, one number per channel."""
    channels, ones = len(fill), (1,) * (len(pads) // 2)
    geometry = Geometry(channels, channels, channels, ones, ones, ones, pads)
    padding = LinearMap.of(geometry, np.ones(channels))
    return Reading(nodes, source, geometry, 1, "border", None, lambda: padding, fill if fill.any() else None)


#: The largest tensor whose positions are followed one by one.
MAX_FOLLOWED = 1 << 22


@reads("ScatterND", "Transpose")
def read_overwritten_border(view: View, node: gs.Node) -> Result:
    """A Pad whose border is then overwritten with one number per channel.

    Assignments to slices (``y[:, :, :p] = b``) are exported as ScatterND between Transposes; diverse branch blocks
    (Ding et al., 2021) pad so with the value that their normalisation gives to zero.
    """
    chain, scatters = [node], 0
    while view.op(chain[-1]) != "Pad":
        scatters += view.op(chain[-1]) == "ScatterND"
        before = view.producer(chain[-1].inputs[0])
        if not view.is_a(before, "Pad", "ScatterND", "Transpose", "Identity") or view.crowd(chain[-1].inputs[0]):
            return None
        if len(chain) > 16:
            return None
        chain.append(before)
    chain.reverse()
    pad = read_pad(view, chain[0])
    shape, before_pad = known(view.shape(chain[0].outputs[0])), known(view.shape(chain[0].inputs[0]))
    if not scatters or not isinstance(pad, Reading) or pad.kind != "border" or shape is None or before_pad is None:
        return None
    if math.prod(shape) > MAX_FOLLOWED or math.prod(before_pad) == 0:
        return None
    begins = pad.geometry.pads[: pad.geometry.rank]
    inside = (slice(None), slice(None), *(slice(b, b + n) for b, n in zip(begins, before_pad[2:], strict=True)))
    places = np.full(shape, -1)
    places[inside] = np.arange(math.prod(before_pad)).reshape(before_pad)
    values = np.zeros(shape)
    values += 0.0 if pad.fill is None else pad.fill.reshape(-1, *(1,) * pad.geometry.rank)
    original = places.copy()
    for step in chain[1:]:
        if step.op == "Transpose":
            perm = step.attrs.get("perm")
            places, values = np.transpose(places, perm), np.transpose(values, perm)
        elif step.op == "ScatterND":
            indices, updates = view.raw(step.inputs[1]), view.value(step.inputs[2])
            if indices is None or updates is None or step.attrs.get("reduction", "none") != "none":
                return None
            at = tuple(np.moveaxis(indices, -1, 0))
            places, values = places.copy(), values.copy()
            places[at], values[at] = -1, updates
    if places.shape != original.shape or not np.array_equal(places, original):
        return None
    outside = np.moveaxis(places, 1, 0).reshape(shape[1], -1) < 0
    border = np.moveaxis(values, 1, 0).reshape(shape[1], -1)[outside].reshape(shape[1], -1)
    if np.any(border != border[:, :1]):
        return None
    return _border(tuple(chain), chain[0].inputs[0], pad.geometry.pads, border[:, 0])


@reads("Reshape")
def read_shuffle(view: View, node: gs.Node) -> Result:
    """Channel shuffle: Reshape (N, g, C/g, …) → Transpose (swap g and C/g) → Reshape back is a permutation."""
    transpose = view.producer(node.inputs[0])
    if transpose is None or view.op(transpose) != "Transpose" or view.crowd(node.inputs[0]):
        return None
    split = view.producer(transpose.inputs[0])
    if split is None or view.op(split) != "Reshape" or view.crowd(transpose.inputs[0]):
        return None
    source = split.inputs[0]
    before, inner, after = (view.shape(t) for t in (source, split.outputs[0], node.outputs[0]))
    if before is None or inner is None or after is None or len(before) != len(after) or len(inner) != len(before) + 1:
        return None
    groups, width, channels = inner[1], inner[2], before[1]
    swap = [0, 2, 1, *range(3, len(inner))]
    if not isinstance(groups, int) or not isinstance(width, int) or not isinstance(channels, int):
        return None
    same_space = attributes.same_shape([before[0], *before[2:]], [inner[0], *inner[3:]]) and attributes.same_shape(
        before, after
    )
    if list(transpose.attrs.get("perm", [])) != swap or groups * width != channels or not same_space:
        return None
    picks = np.arange(channels).reshape(groups, width).T.reshape(-1)
    return replace(_selection(node, source, picks.tolist(), channels, 1), nodes=(split, transpose, node))
