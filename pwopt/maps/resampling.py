"""Operators that repeat positions, pick every r-th one, or put phases together, as the algebra's maps between rates."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx.reference import ReferenceEvaluator

from pwopt.algebra.geometry import Refusal
from pwopt.graph import attributes
from pwopt.graph.shapes import Shape
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
    attrs = tuple(sorted((k, v) for k, v in node.attrs.items() if isinstance(v, (int, float, str)) and k != "axes"))
    sized = node.attrs.get("coordinate_transformation_mode") in SIZE_DEPENDENT
    for size, factor in zip(before[2:], factors[2:], strict=True):
        if sized and factor > 1 and not isinstance(size, int):
            return None
        lengths = (
            (size,)
            if sized and isinstance(size, int)
            else [min(size, n) if isinstance(size, int) else n for n in SHORT]
        )
        if factor > 1 and not all(_repeats(n, factor, node.op, attrs, view.opset) for n in lengths):
            return None
    return Repetition(node, tuple(factors[2:]))


def _factors(view: View, node: gs.Node, before: Shape, after: Shape | None) -> list[int] | None:
    """By which whole number each axis grows; None if by no such number, or that is not known."""
    scales: dict[int, float] | None
    if attributes.resized_by_sizes(view, node):
        pairs = list(zip(before, after, strict=True)) if after is not None and len(after) == len(before) else []
        scales = {a: y / x for a, (x, y) in enumerate(pairs) if isinstance(x, int) and isinstance(y, int) and x}
        sizes = view.integers(node.inputs[3])
        if len(scales) < len(before) and not ("axes" in node.attrs or sizes is None):
            scales |= {a: 1.0 for a in (0, 1) if a not in scales and _kept(before, after, a)}
        if len(scales) < len(before):
            return None
    else:
        scales = attributes.resize_scales(view, node)
    if scales is None:
        return None
    factors = [scales.get(a, 1.0) for a in range(len(before))]
    whole = all(f == int(f) and f >= 1 for f in factors)
    return [int(f) for f in factors] if whole else None


def _kept(before: Shape, after: Shape | None, axis: int) -> bool:
    """Whether an axis of a size that is not known has the same name after."""
    return after is not None and isinstance(before[axis], str) and before[axis] == after[axis]


@functools.lru_cache(256)
def _repeats(count: int, factor: int, op: str, attrs: tuple[tuple[str, Any], ...], opset: int) -> bool:
    """Whether an axis of `count` positions is repeated, by onnx's reference evaluator on numbers that no mixture of
    others gives."""
    if count > MAX_EVALUATED:
        return False
    if opset == 10:  # Resize began as a new name of Upsample
        op, opset = "Upsample", 9
    inputs = ["x", "scales"] if op == "Upsample" else ["x", "", "scales"]
    node = onnx.helper.make_node(op, inputs, ["y"], **dict(attrs))
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
        found = np.asarray(ReferenceEvaluator(model).run(None, feeds)[0])
    except Exception:  # whatever a reference implementation raises for what it does not know
        return False
    return bool(np.array_equal(found, np.repeat(x, factor)))


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
