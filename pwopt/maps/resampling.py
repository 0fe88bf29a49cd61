"""Read operators that repeat positions, keep every r-th position or interleave phases, for
`pwopt.algebra.multirate`."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from pwopt.algebra import Values
from pwopt.algebra.geometry import Refusal
from pwopt.graph import attributes
from pwopt.graph.ir import Node, Tensor, Variable
from pwopt.graph.operators import ACTIVATIONS
from pwopt.graph.shapes import Dim, Shape, as_fixed
from pwopt.graph.view import View
from pwopt.maps.forms import Reading

#: Modes whose coordinates depend on the size of an axis. In any other mode, the coordinate of p + r exceeds that of p
#: by one for a factor of r. So a short axis shows how every axis is resized.
SIZE_DEPENDENT = ("align_corners", "tf_crop_and_resize")
#: Short lengths of an axis; the last one has a border on either side and an interior.
TRIAL_LENGTHS = (1, 2, 5)
#: The longest axis that is evaluated.
MAX_EVALUATED = 512


@dataclass(frozen=True)
class Repetition:
    """u[n] = x[⌊n/r⌋] along each spatial axis."""

    node: Node
    repeats: tuple[int, ...]

    @property
    def source(self) -> Tensor:
        return self.node.inputs[0]


def repetition(view: View, node: Node | None) -> Repetition | None:
    """Read a Resize or Upsample that repeats positions. Its attributes have many spellings, so it is evaluated on small
    inputs."""
    if not view.is_a(node, "Resize", "Upsample"):
        return None
    before = view.shape(node.inputs[0])
    if before is None or 0 in before[2:]:
        return None
    factors = _factors(view, node, before)
    if factors is None or factors[:2] != [1, 1] or all(f == 1 for f in factors):
        return None
    told = {str(k): v for k, v in node.attrs.items() if isinstance(v, (int, float, str)) and k != "axes"}
    attrs = tuple(sorted(told.items()))
    sized = node.attrs.get("coordinate_transformation_mode") in SIZE_DEPENDENT
    for size, factor in zip(before[2:], factors[2:], strict=True):
        lengths = [min(size, n) for n in TRIAL_LENGTHS] if isinstance(size, int) else [*TRIAL_LENGTHS]
        if sized:
            lengths = [size] if isinstance(size, int) else []
        if factor > 1 and not (lengths and all(_repeats(n, factor, node.op, attrs, view.opset) for n in lengths)):
            return None
    return Repetition(node, tuple(factors[2:]))


def _factors(view: View, node: Node, before: Shape) -> list[int] | None:
    """The whole-number factor of each axis; None if one is not a whole number or is unknown.

    If sizes are given, the factor is their ratio. A policy that keeps the aspect ratio has the same factor for all
    axes; it is the ratio of the axis that gets the requested size.
    """
    scales = attributes.read_resize_scales(view, node)
    if attributes.is_resized_by_sizes(view, node):
        small, large = as_fixed(before), as_fixed(view.shape(node.outputs[0]))
        if small is None or large is None or 0 in small:
            return None
        scales = {a: y / x for a, (x, y) in enumerate(zip(small, large, strict=True))}
    if scales is None:
        return None
    factors = [scales.get(a, 1.0) for a in range(len(before))]
    whole = all(f == int(f) and f >= 1 for f in factors)
    return [int(f) for f in factors] if whole else None


@functools.lru_cache(256)
def _repeats(count: int, factor: int, op: str, attrs: tuple[tuple[Any, Any], ...], opset: int) -> bool:
    """Whether an axis of `count` positions is repeated. onnx's reference evaluator runs on random numbers, which no
    interpolation reproduces."""
    if count > MAX_EVALUATED:
        return False
    if opset == 10:  # Resize began as a new name of Upsample
        op, opset = "Upsample", 9
    inputs = ["x", "scales"] if op == "Upsample" else ["x", "", "scales"]
    node = onnx.helper.make_node(op, inputs, ["y"], **{str(k): v for k, v in attrs})
    names = [n for n in inputs if n]
    graph = onnx.helper.make_graph(
        [node], "axis", [onnx.ValueInfoProto(name=n) for n in names], [onnx.ValueInfoProto(name="y")]
    )
    x = np.random.default_rng(0).normal(size=count).astype(np.float32)
    feeds = {"x": x, "scales": np.array([factor], np.float32)}
    if opset < 9:  # of Upsample, they were an attribute
        node.attribute.append(onnx.helper.make_attribute("scales", [float(factor)]))
    try:
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
        from onnx.reference import ReferenceEvaluator  # loads the schema of every operator

        (found,) = ReferenceEvaluator(model).run(None, feeds)
    except Exception:  # whatever a reference implementation raises for what it does not know
        return False
    return np.array_equal(np.asarray(found), np.repeat(x, factor))


#: The most Concats and activations that are followed upwards.
MAX_DEPTH = 8


@dataclass(frozen=True)
class Part:
    """Consecutive channels of a tensor.

    Attributes
    ----------
    tensor : Tensor
        The tensor before the activations, and after the repetition if there is one.
    count : int
        Channels.
    steps : tuple of Node
        Activations after it, the last one first.
    repeated : Repetition or None
    """

    tensor: Tensor
    count: int
    steps: tuple[Node, ...]
    repeated: Repetition | None


@dataclass(frozen=True)
class Composition:
    """The parts that a tensor is concatenated from, and the operators in between if a part was repeated.

    An activation acts on each position alone, so it commutes with a repetition. A Concat of channels is the sum of its
    parts, each padded with channels of zeros.
    """

    parts: tuple[Part, ...]
    nodes: tuple[Node, ...] = ()

    @property
    def factors(self) -> tuple[int, ...]:
        """The common factor of all repetitions, per axis; empty if there are none."""
        listed = [p.repeated.repeats for p in self.parts if p.repeated is not None]
        return tuple(math.gcd(*row) for row in zip(*listed, strict=True))


def composition(view: View, tensor: Tensor) -> Composition | Refusal:
    """Find the parts of a tensor. Refuses if a repeated part has other uses, and with an empty reason if the number of
    channels is unknown."""
    return _find_parts(view, tensor, (), 0)


def _find_parts(view: View, tensor: Tensor, steps: tuple[Node, ...], depth: int) -> Composition | Refusal:
    node, count = view.producer(tensor), view.dim(tensor, 1)
    found = repetition(view, node)
    if not isinstance(count, int):
        return Refusal("")
    own = Composition((Part(tensor, count, steps, found),), () if found is None else (found.node,))
    if found is None:
        inner = [_find_parts(view, t, steps + extra, depth + 1) for t, extra in _inner(view, node, depth)]
        refused = next((r for r in inner if isinstance(r, Refusal)), None)
        if refused is not None:
            return refused
        joined = [c for c in inner if isinstance(c, Composition)]
        if not any(c.factors for c in joined):
            return own
        assert node is not None  # which they are parts of
        nodes = (*(n for c in joined for n in c.nodes), node)
        own = Composition(tuple(p for c in joined for p in c.parts), nodes)
    other_uses = view.other_uses(tensor)
    return Refusal(other_uses) if other_uses else own


def _inner(view: View, node: Node | None, depth: int) -> list[tuple[Tensor, tuple[Node, ...]]]:
    """The inputs of a Concat of channels or of an activation, each with the activation in between."""
    if depth >= MAX_DEPTH:
        return []
    if view.is_a(node, "Concat") and attributes.read_concat_axis(view, node) == 1:
        return [(t, ()) for t in node.inputs]
    if view.is_a(node, *ACTIVATIONS) and all(view.elements(t) == 1 for t in node.inputs[1:] if t.name):
        return [(node.inputs[0], (node,))]
    return []


def repeat_less(view: View, found: Repetition, source: Tensor, factors: tuple[int, ...]) -> Node:
    """A node that repeats the positions of `source` by other factors, in a form that the opset has."""
    output = view.new_variable(f"{found.node.outputs[0].name}_less", source, lambda s: _grow_shape(s, factors))
    values = [1.0, 1.0, *map(float, factors)]
    name = view.node_name(found.node.name, "_less")
    if view.opset < 9:
        return Node("Upsample", name, {"mode": "nearest", "scales": values}, [source], [output])
    scales = view.new_constant(f"{output.name}_scales", np.array(values, np.float32))
    if view.opset < 11:
        op = "Upsample" if view.opset == 9 else "Resize"
        return Node(op, name, {"mode": "nearest"}, [source, scales], [output])
    attrs = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    region = (
        Variable.empty() if view.opset >= 13 else view.new_constant(f"{output.name}_region", np.zeros(0, np.float32))
    )
    return Node("Resize", name, attrs, [source, region, scales], [output])


def _grow_shape(shape: Shape, factors: tuple[int, ...]) -> Shape:
    parts = zip(shape[2:], factors, strict=True)
    return (*shape[:2], *(d * f if isinstance(d, int) else d if f == 1 else None for d, f in parts))


#: A Slice with this end or a larger one goes to the end of any axis; exporters write the largest number of 32 or 64
#: bits.
SLICE_TO_END = 2**31 - 1
#: Transposes that move both axes of a block after the channels, or before them.
UNSHUFFLES = ((0, 1, 3, 5, 2, 4), (0, 3, 5, 1, 2, 4))


@dataclass(frozen=True)
class Subsampling:
    """Blocks of channels z_j[q] = x[r·q + o_j].

    Attributes
    ----------
    nodes : tuple of Node
    source : Tensor
    steps : tuple of int
        r for each spatial axis.
    offsets : tuple of tuple of int
        o for each block and axis.
    order : tuple of int
        The indices of the channels of the first block, of the second, and so on.
    """

    nodes: tuple[Node, ...]
    source: Tensor
    steps: tuple[int, ...]
    offsets: tuple[tuple[int, ...], ...]
    order: tuple[int, ...]


def subsampling(view: View, reading: Reading) -> Subsampling | None:
    """Read the space-to-depth operation before a convolution: SpaceToDepth, a Concat of Slices, or a Reshape to blocks,
    a Transpose and a Reshape."""
    node, channels = view.producer(reading.source), range(reading.geometry.in_channels)
    if view.is_a(node, "SpaceToDepth"):
        size = int(node.attrs["blocksize"])
        return _blocks((node,), node.inputs[0], (size, size), channels)
    if view.is_a(node, "Concat") and attributes.read_concat_axis(view, node) == 1:
        return _read_slices(view, node, reading.geometry.rank, channels)
    return _read_unshuffle(view, node, channels) if view.is_a(node, "Reshape") else None


def _blocks(nodes: tuple[Node, ...], source: Tensor, steps: tuple[int, ...], order: Sequence[int]) -> Subsampling:
    """A subsampling with a block for every offset, in row-major order."""
    return Subsampling(nodes, source, steps, tuple(itertools.product(*map(range, steps))), tuple(order))


def _read_slices(view: View, node: Node, rank: int, channels: Sequence[int]) -> Subsampling | None:
    """Focus (Jocher, YOLOv5; Ge et al., "YOLOX", 2021), and patch merging where channels come first."""
    followed = [_read_slice(view, t, rank) for t in node.inputs]
    found = [f for f in followed if f is not None]
    if len(found) < len(followed) or len({f.source for f in found}) > 1 or len({f.steps for f in found}) > 1:
        return None
    nodes = {n: n for f in found for n in f.nodes}
    offsets = tuple(f.offsets[0] for f in found)
    return Subsampling((*nodes.values(), node), found[0].source, found[0].steps, offsets, tuple(channels))


def _read_slice(view: View, tensor: Tensor, rank: int) -> Subsampling | None:
    """Read one Slice, or one per axis, that keeps every r-th position from position o on."""
    start = tensor
    steps, offsets = dict[int, int](), dict[int, int]()
    nodes: list[Node] = []
    while view.is_a(node := view.producer(start), "Slice"):
        listed = attributes.read_slice_parameters(view, node)
        if listed is None or any(axis < 2 or axis in steps for axis, *_ in listed):
            break
        size = [view.dim(node.inputs[0], axis) for axis, *_ in listed]
        if not all(0 <= b < s and _goes_to_end(d, e) for (_, b, e, s), d in zip(listed, size, strict=True)):
            break
        steps |= {axis: step for axis, _, _, step in listed}
        offsets |= {axis: begin for axis, begin, _, _ in listed}
        nodes.append(node)
        start = node.inputs[0]
    if not nodes:
        return None
    axes = range(2, 2 + rank)
    at = tuple(offsets.get(a, 0) for a in axes)
    return Subsampling(tuple(reversed(nodes)), start, tuple(steps.get(a, 1) for a in axes), (at,), ())


def _goes_to_end(size: Dim, end: int) -> bool:
    """Whether a Slice goes to the end of an axis of any length."""
    return end >= SLICE_TO_END or (isinstance(size, int) and end >= size)


def _read_unshuffle(view: View, node: Node, channels: Sequence[int]) -> Subsampling | None:
    """Read a pixel unshuffle: a Reshape to (N, C, H/r, r, W/r, r), and a Transpose that moves both r before or after
    C."""
    transpose = view.producer(node.inputs[0])
    if not view.is_a(transpose, "Transpose"):
        return None
    split = view.producer(transpose.inputs[0])
    if not view.is_a(split, "Reshape"):
        return None
    tensors = split.inputs[0], split.outputs[0], node.outputs[0]
    before, inner, after = ((view.shape(t) or (None, None))[1:] for t in tensors)
    blocks, perm = as_fixed(inner), tuple(transpose.attrs.get("perm", ()))
    if perm not in UNSHUFFLES or blocks is None:
        return None
    c, short, r, narrow, s = blocks
    if before != (c, short * r, narrow * s) or after != (c * r * s, short, narrow):
        return None
    order = np.array(channels).reshape((c, r * s) if perm == UNSHUFFLES[0] else (r * s, c))
    by_block = order.T if perm == UNSHUFFLES[0] else order
    return _blocks((split, transpose, node), split.inputs[0], (r, s), by_block.reshape(-1).tolist())


def read_depth_to_space(node: Node, channels: int) -> tuple[tuple[int, int], Values] | None:
    """The factors of a DepthToSpace, and the index of each channel of each phase as an array (rows, columns,
    channels)."""
    size = int(node.attrs["blocksize"])
    if channels % size**2:
        return None
    count = channels // size**2
    if node.attrs.get("mode", "DCR") == "CRD":
        return (size, size), np.arange(channels).reshape(count, size, size).transpose(1, 2, 0)
    return (size, size), np.arange(channels).reshape(size, size, count)
