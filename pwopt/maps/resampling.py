"""Operators that repeat positions, pick every r-th one, or put phases together, as the algebra's maps between rates."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx.reference import ReferenceEvaluator

from pwopt.algebra import Values
from pwopt.algebra.geometry import Refusal
from pwopt.graph import attributes
from pwopt.graph.shapes import Dim, Shape, known
from pwopt.graph.view import View
from pwopt.maps.elementwise import ELEMENTWISE

#: Coordinates that depend on the size of an axis. Under any other convention, the coordinate of p + r is one more than
#: that of p for a factor of r, so that the few positions of a short axis show them all.
SIZE_DEPENDENT = ("align_corners", "tf_crop_and_resize")
#: Lengths of an axis that is short, and yet has a border on either side and an interior.
SHORT = (1, 2, 5)
#: The longest axis that is evaluated.
MAX_EVALUATED = 512


@dataclass(frozen=True)
class Repetition:
    """u[n] = x[⌊n/r⌋] along each spatial axis."""

    node: gs.Node
    repeats: tuple[int, ...]

    @property
    def source(self) -> gs.Tensor:
        return self.node.inputs[0]


def repetition(view: View, node: gs.Node | None) -> Repetition | None:
    """A Resize or Upsample that repeats positions, whatever its attributes call that: found by evaluating it."""
    if node is None or not view.is_a(node, "Resize", "Upsample"):
        return None
    before, after = view.shape(node.inputs[0]), view.shape(node.outputs[0])
    if before is None or len(before) < 3 or 0 in before[2:] or 0 in (after or ())[2:]:
        return None
    if "keep_aspect_ratio_policy" in node.attrs and node.attrs["keep_aspect_ratio_policy"] != "stretch":
        return None
    factors = _factors(view, node, before, after)
    if factors is None or factors[:2] != [1, 1] or all(f == 1 for f in factors):
        return None
    told = {str(k): v for k, v in node.attrs.items() if isinstance(v, (int, float, str)) and k != "axes"}
    attrs = tuple(sorted(told.items()))
    sized = node.attrs.get("coordinate_transformation_mode") in SIZE_DEPENDENT
    for size, factor in zip(before[2:], factors[2:], strict=True):
        lengths = [min(size, n) for n in SHORT] if isinstance(size, int) else [*SHORT]
        if sized:
            lengths = [size] if isinstance(size, int) else []
        if factor > 1 and not (lengths and all(_repeats(n, factor, node.op, attrs, view.opset) for n in lengths)):
            return None
    return Repetition(node, tuple(factors[2:]))


def _factors(view: View, node: gs.Node, before: Shape, after: Shape | None) -> list[int] | None:
    """By which whole number each axis grows; None if by no such number, or that is not known."""
    scales = attributes.resize_scales(view, node)
    if attributes.resized_by_sizes(view, node):
        small, large = known(before), known(after)
        if small is None or large is None or len(small) != len(large) or 0 in small:
            return None
        scales = {a: y / x for a, (x, y) in enumerate(zip(small, large, strict=True))}
    if scales is None:
        return None
    factors = [scales.get(a, 1.0) for a in range(len(before))]
    whole = all(f == int(f) and f >= 1 for f in factors)
    return [int(f) for f in factors] if whole else None


@functools.lru_cache(256)
def _repeats(count: int, factor: int, op: str, attrs: tuple[tuple[Any, Any], ...], opset: int) -> bool:
    """Whether an axis of `count` positions is repeated, by onnx's reference evaluator on numbers that no mixture of
    others gives."""
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
    if op == "Upsample" and opset < 9:
        node.attribute.append(onnx.helper.make_attribute("scales", [float(factor)]))
    try:
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
        (found,) = ReferenceEvaluator(model).run(None, feeds)
    except Exception:  # whatever a reference implementation raises for what it does not know
        return False
    return np.array_equal(np.asarray(found), np.repeat(x, factor))


#: How deep Concats and activations are followed up.
MAX_DEPTH = 8


@dataclass(frozen=True)
class Part:
    """Consecutive channels of a tensor.

    Attributes
    ----------
    tensor : gs.Tensor
        As it is before the activations: repeated, if it was.
    count : int
        Channels.
    steps : tuple of gs.Node
        Activations between it and the whole, the last one first.
    repeated : Repetition or None
    """

    tensor: gs.Tensor
    count: int
    steps: tuple[gs.Node, ...]
    repeated: Repetition | None


@dataclass(frozen=True)
class Composition:
    """What a tensor consists of, and the operators that make it of that, if some of it was repeated.

    An activation takes each position alone, as a repetition copies it, so that they may change places. A Concat of
    channels is the sum of its parts, each with zeros beside it.
    """

    parts: tuple[Part, ...]
    nodes: tuple[gs.Node, ...] = ()

    @property
    def factors(self) -> tuple[int, ...]:
        """By which all that was repeated was repeated at least; empty if nothing was."""
        listed = [p.repeated.repeats for p in self.parts if p.repeated is not None]
        return tuple(math.gcd(*row) for row in zip(*listed, strict=True))


def composition(view: View, tensor: gs.Tensor) -> Composition | Refusal:
    """The parts of a tensor; refused if others need what is repeated in it, with an empty reason if its
    channels are not known."""
    return _composed(view, tensor, (), 0)


def _composed(view: View, tensor: gs.Tensor, steps: tuple[gs.Node, ...], depth: int) -> Composition | Refusal:
    node, count = view.producer(tensor), view.dim(tensor, 1)
    found = repetition(view, node)
    if not isinstance(count, int):
        return Refusal("")
    own = Composition((Part(tensor, count, steps, found),), () if node is None or found is None else (node,))
    if found is None:
        inner = [_composed(view, t, steps + extra, depth + 1) for t, extra in _inner(view, node, depth)]
        refused = next((r for r in inner if isinstance(r, Refusal)), None)
        if refused is not None:
            return refused
        joined = [c for c in inner if isinstance(c, Composition)]
        if node is None or not any(c.factors for c in joined):
            return own
        nodes = (*(n for c in joined for n in c.nodes), node)
        own = Composition(tuple(p for c in joined for p in c.parts), nodes)
    crowd = view.crowd(tensor)
    return Refusal(crowd) if crowd else own


def _inner(view: View, node: gs.Node | None, depth: int) -> list[tuple[gs.Tensor, tuple[gs.Node, ...]]]:
    """What a Concat of channels, or an activation, is made of."""
    if node is None or depth >= MAX_DEPTH:
        return []
    if view.op(node) == "Concat" and attributes.concat_axis(view, node) == 1:
        return [] if any(view.constant(t) is not None for t in node.inputs) else [(t, ()) for t in node.inputs]
    if view.op(node) in ELEMENTWISE and all(view.elements(t) == 1 for t in node.inputs[1:] if t.name):
        return [(node.inputs[0], (node,))]
    return []


def repeated_less(view: View, found: Repetition, source: gs.Tensor, factors: tuple[int, ...]) -> gs.Node:
    """The repetition of `source` by other factors, in the form of an operator that every opset has."""
    output = view.new_variable(f"{found.node.outputs[0].name}_less", source, lambda s: _grown(s, factors))
    values = [1.0, 1.0, *map(float, factors)]
    name = view.node_name(found.node.name, "_less")
    if view.opset < 9:
        return gs.Node("Upsample", name, {"mode": "nearest", "scales": values}, [source], [output])
    scales = view.new_constant(f"{output.name}_scales", np.array(values, np.float32))
    if view.opset < 11:
        op = "Upsample" if view.opset == 9 else "Resize"
        return gs.Node(op, name, {"mode": "nearest"}, [source, scales], [output])
    attrs = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    region = (
        gs.Variable.empty() if view.opset >= 13 else view.new_constant(f"{output.name}_region", np.zeros(0, np.float32))
    )
    return gs.Node("Resize", name, attrs, [source, region, scales], [output])


def _grown(shape: Shape, factors: tuple[int, ...]) -> Shape:
    parts = zip(shape[2:], factors, strict=True)
    return (*shape[:2], *(d * f if isinstance(d, int) else d if f == 1 else None for d, f in parts))


#: An end from which on a Slice goes to the end of any axis; exporters write the largest number of 32 or 64 bits.
LONGEST = 2**31 - 1
#: Transposes that bring both parts of a block behind the channels, or before them.
UNSHUFFLES = ((0, 1, 3, 5, 2, 4), (0, 3, 5, 1, 2, 4))


@dataclass(frozen=True)
class Subsampling:
    """Blocks of channels z_j[q] = x[r·q + o_j].

    Attributes
    ----------
    nodes : tuple of gs.Node
    source : gs.Tensor
    steps : tuple of int
        r for each spatial axis.
    offsets : tuple of tuple of int
        o for each block and axis.
    order : tuple of int
        Where the channels of one block after the other are.
    """

    nodes: tuple[gs.Node, ...]
    source: gs.Tensor
    steps: tuple[int, ...]
    offsets: tuple[tuple[int, ...], ...]
    order: tuple[int, ...]


def subsampling(view: View, node: gs.Node | None) -> Subsampling | None:
    """Space to depth: SpaceToDepth, a Concat of Slices, or a Reshape to blocks, a Transpose and a Reshape."""
    if node is None:
        return None
    channels = view.dim(node.outputs[0], 1)
    if not isinstance(channels, int) or channels < 1:
        return None
    if view.op(node) == "SpaceToDepth":
        size = int(node.attrs["blocksize"])
        return _blocks((node,), node.inputs[0], (size, size), range(channels))
    if view.op(node) == "Concat" and attributes.concat_axis(view, node) == 1:
        return _sliced(view, node, channels)
    return _unshuffled(view, node, channels) if view.op(node) == "Reshape" else None


def _blocks(nodes: tuple[gs.Node, ...], source: gs.Tensor, steps: tuple[int, ...], order: Sequence[int]) -> Subsampling:
    """A block for every offset, in row-major order."""
    return Subsampling(nodes, source, steps, tuple(itertools.product(*map(range, steps))), tuple(order))


def _sliced(view: View, node: gs.Node, channels: int) -> Subsampling | None:
    """Focus (Jocher, YOLOv5; Ge et al., "YOLOX", 2021), and patch merging where channels come first."""
    followed = [_slices(view, t) for t in node.inputs]
    found = [f for f in followed if f is not None]
    if len(found) < len(followed) or len({id(f.source) for f in found}) > 1 or len({f.steps for f in found}) > 1:
        return None
    nodes = {id(n): n for f in found for n in f.nodes}
    offsets = tuple(f.offsets[0] for f in found)
    return Subsampling((*nodes.values(), node), found[0].source, found[0].steps, offsets, tuple(range(channels)))


def _slices(view: View, tensor: gs.Tensor) -> Subsampling | None:
    """Every r-th position from the o-th on, by a Slice, or one for each axis."""
    rank, start = view.rank(tensor), tensor
    steps, offsets = dict[int, int](), dict[int, int]()
    nodes: list[gs.Node] = []
    while rank is not None:
        node = view.producer(start)
        listed = attributes.slice_parameters(view, node) if view.is_a(node, "Slice") else None
        if node is None or listed is None or any(axis < 2 or axis in steps for axis, *_ in listed):
            break
        size = [view.dim(node.inputs[0], axis) for axis, *_ in listed]
        if not all(0 <= b < s and _whole(d, e) for (_, b, e, s), d in zip(listed, size, strict=True)):
            break
        steps |= {axis: step for axis, _, _, step in listed}
        offsets |= {axis: begin for axis, begin, _, _ in listed}
        nodes.append(node)
        start = node.inputs[0]
    if rank is None or not nodes:
        return None
    axes = range(2, rank)
    at = tuple(offsets.get(a, 0) for a in axes)
    return Subsampling(tuple(reversed(nodes)), start, tuple(steps.get(a, 1) for a in axes), (at,), ())


def _whole(size: Dim, end: int) -> bool:
    """Whether a Slice goes on to the end of an axis, however long that is."""
    return end >= LONGEST or (isinstance(size, int) and end >= size)


def _unshuffled(view: View, node: gs.Node, channels: int) -> Subsampling | None:
    """Pixel unshuffle, as exporters write it: (N, C, H/r, r, W/r, r), then r·r next to C, on either side of it."""
    transpose = view.producer(node.inputs[0])
    split = view.producer(transpose.inputs[0]) if view.is_a(transpose, "Transpose") else None
    if transpose is None or split is None or not view.is_a(split, "Reshape"):
        return None
    if view.crowd(node.inputs[0]) or view.crowd(transpose.inputs[0]):
        return None
    before, inner, after = (view.shape(t) for t in (split.inputs[0], split.outputs[0], node.outputs[0]))
    perm = tuple(transpose.attrs.get("perm", ()))
    sizes = known((before or ())[1:]), known((inner or ())[1:]), known((after or ())[1:])
    if perm not in UNSHUFFLES or sizes[0] is None or sizes[1] is None or sizes[2] is None or len(sizes[0]) != 3:
        return None
    c, h, w = sizes[0]
    _, short, r, narrow, s = sizes[1]
    if sizes[1] != (c, h // r, r, w // s, s) or (short * r, narrow * s) != (h, w):
        return None
    if sizes[2] != (c * r * s, short, narrow):
        return None
    order = np.arange(channels).reshape((c, r * s) if perm == UNSHUFFLES[0] else (r * s, c))
    by_block = order.T if perm == UNSHUFFLES[0] else order
    return _blocks((split, transpose, node), split.inputs[0], (r, s), by_block.reshape(-1).tolist())


def shuffled(view: View, node: gs.Node) -> tuple[tuple[int, int], Values] | None:
    """A DepthToSpace: its factors, and which channel is which of each phase, shape (rows, columns, channels)."""
    if view.op(node) != "DepthToSpace":
        return None
    size, channels = node.attrs.get("blocksize"), view.dim(node.inputs[0], 1)
    if not isinstance(size, int) or not isinstance(channels, int):
        return None
    if size < 2 or channels < 1 or channels % size**2:
        return None
    count = channels // size**2
    if node.attrs.get("mode", "DCR") == "CRD":
        return (size, size), np.arange(channels).reshape(count, size, size).transpose(1, 2, 0)
    return (size, size), np.arange(channels).reshape(size, size, count)
