"""Groups of nodes that compute one operator: activations, and other groups that onnxruntime fuses.

`name-activations` replaces them by the standard operator if the opset has one. Otherwise, the other passes keep them
whole, because onnxruntime does not fuse a group that lacks a factor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from pwopt.graph.dtypes import epsilon
from pwopt.graph.ir import Node, Tensor
from pwopt.graph.view import View
from pwopt.maps import forms

SQRT_HALF = math.sqrt(0.5)


@dataclass(frozen=True)
class ScaledTensor:
    """A tensor as ``scale · base + shift`` with two numbers, and the nodes that compute it from `base`."""

    base: Tensor
    scale: float = 1.0
    shift: float = 0.0
    nodes: tuple[Node, ...] = ()


def peel(view: View, tensor: Tensor, *, into: bool = True) -> ScaledTensor:
    """Collect the scalar scales and shifts above `tensor`, up to the first whose result has other uses.

    Parameters
    ----------
    into : bool
        Whether `tensor` must have only one reader, too.
    """
    scale, shift = 1.0, 0.0
    nodes: list[Node] = []
    while len(nodes) < 8:
        node = view.producer(tensor)
        if (into or nodes) and view.sole_reader(tensor) is None:
            break
        reading = forms.linear(view, node) if node is not None else None
        if reading is None or reading.kind != "diagonal" or reading.axis is not None:
            break
        step = reading.try_load()
        if step is None:
            break
        shift += scale * float(step.bias[0])
        scale *= float(step.scale[0])
        nodes.append(reading.node)
        tensor = reading.source
    return ScaledTensor(tensor, scale, shift, tuple(nodes))


@dataclass(frozen=True)
class Activation:
    """An activation that is written as several operators.

    Attributes
    ----------
    op : str
        HardSigmoid, HardSwish (x·HardSigmoid(x)), Swish (x·Sigmoid(x)) or Gelu (exact, with erf).
    source : Tensor
    nodes : tuple of Node
        Everything it replaces; the first produces the output.
    alpha, beta : float
        Of the hard sigmoid max(0, min(1, αx + β)).
    """

    op: str
    source: Tensor
    nodes: tuple[Node, ...]
    alpha: float = 0.0
    beta: float = 0.0


def is_close(value: float, target: float, dtype: np.dtype[Any] | None) -> bool:
    """Whether two numbers are equal up to the rounding of two constants in the type of the model."""
    return abs(value - target) <= 2 * epsilon(dtype) * abs(target)


def activation(view: View, node: Node) -> Activation | None:
    """The activation whose last operator is `node`, if there is one."""
    if view.op(node) not in ("Mul", "Div"):
        return None
    outer = peel(view, node.outputs[0], into=False)
    if outer.shift:
        return None
    inner = view.producer(outer.base)
    if outer.nodes and view.sole_reader(outer.base) is None:
        return None
    dtype = view.dtype(node.outputs[0])
    if view.is_a(inner, "Mul"):
        return _read_gate(view, inner, outer, dtype)
    return _hard_sigmoid(view, outer, dtype)


def _clip(view: View, tensor: Tensor) -> tuple[Tensor, float, tuple[Node, ...]] | None:
    """(x, upper bound, nodes) if `tensor` is min(max(x, 0), upper): Clip in either form, or Min, Max, Relu."""
    node = view.producer(tensor)
    op = view.op(node)
    if node is None:
        return None
    if op == "Clip":
        if view.opset < 11:
            low, high = node.attrs.get("min"), node.attrs.get("max")
        else:
            bounds = [view.optional_input(node, i) for i in (1, 2)]
            low, high = (None if t is None else view.uniform(t) for t in bounds)
        return (node.inputs[0], float(high), (node,)) if low == 0 and high is not None and high > 0 else None
    if op != "Min":
        return None
    found = _bound(view, node)
    if found is None:
        return None
    inner, high = found
    if high <= 0 or view.other_uses(inner):
        return None
    floor = view.producer(inner)
    if floor is None:
        return None
    if view.is_a(floor, "Relu"):
        return floor.inputs[0], high, (node, floor)
    low = _bound(view, floor) if view.is_a(floor, "Max") else None
    return (low[0], high, (node, floor)) if low is not None and low[1] == 0 else None


def _bound(view: View, node: Node) -> tuple[Tensor, float] | None:
    """(x, number) of a Min or Max of a tensor and one number that does not enlarge it."""
    if len(node.inputs) != 2:
        return None
    for x, bound in (node.inputs, node.inputs[::-1]):
        held, rank = view.constant(bound), view.rank(x)
        number = view.uniform(bound) if held is not None and view.elements(bound) == 1 else None
        if number is not None and held is not None and view.constant(x) is None and len(held.shape) <= (rank or 0):
            return x, number
    return None


def _hard_sigmoid(view: View, outer: ScaledTensor, dtype: np.dtype[Any] | None) -> Activation | None:
    """scale·clip(a·x + b, 0, 1/scale) = clip(scale·a·x + scale·b, 0, 1)."""
    clip = _clip(view, outer.base)
    if clip is None or not is_close(outer.scale * clip[1], 1.0, dtype):
        return None
    x = peel(view, clip[0])
    nodes = (*outer.nodes, *clip[2], *x.nodes)
    return Activation("HardSigmoid", x.base, nodes, x.scale * outer.scale, x.shift * outer.scale)


def _read_gate(view: View, product: Node, outer: ScaledTensor, dtype: np.dtype[Any] | None) -> Activation | None:
    """scale·(p·x)·(q·f(a·x + b) + r) for f a clip, HardSigmoid, Sigmoid or Erf."""
    for i in (0, 1):
        gate = peel(view, product.inputs[i])
        f = view.producer(gate.base)
        if (
            f is None
            or view.sole_reader(gate.base) is None
            or view.op(f) not in ("Clip", "Min", "HardSigmoid", "Sigmoid", "Erf")
        ):
            continue
        other = product.inputs[1 - i]
        clip = _clip(view, gate.base)
        inner = peel(view, clip[0] if clip is not None else f.inputs[0])
        side = peel(view, other)
        if other is inner.base:
            side = ScaledTensor(other)
        if side.base is not inner.base or side.shift:
            continue
        nodes = (
            *outer.nodes,
            product,
            *side.nodes,
            *gate.nodes,
            *(clip[2] if clip is not None else (f,)),
            *inner.nodes,
        )
        found = _name_gate(f, clip, inner, gate, outer.scale * side.scale, dtype)
        if found is not None:
            return Activation(found[0], inner.base, nodes, *found[1:])
    return None


def _name_gate(
    f: Node,
    clip: tuple[Tensor, float, tuple[Node, ...]] | None,
    inner: ScaledTensor,
    gate: ScaledTensor,
    scale: float,
    dtype: np.dtype[Any] | None,
) -> tuple[str, float, float] | None:
    q, r = scale * gate.scale, scale * gate.shift
    if clip is not None:
        ok = r == 0 and is_close(q * clip[1], 1.0, dtype)
        return ("HardSwish", inner.scale * q, inner.shift * q) if ok else None
    if f.op == "HardSigmoid":
        alpha, beta = f.attrs.get("alpha", 0.2), f.attrs.get("beta", 0.5)
        ok = r == 0 and is_close(q, 1.0, dtype)
        return ("HardSwish", alpha * inner.scale, alpha * inner.shift + beta) if ok else None
    plain = inner.shift == 0 and is_close(inner.scale, 1.0, dtype)
    if f.op == "Sigmoid":
        return ("Swish", 0.0, 0.0) if plain and r == 0 and is_close(q, 1.0, dtype) else None
    if f.op == "Erf" and inner.shift == 0 and is_close(inner.scale, SQRT_HALF, dtype):
        return ("Gelu", 0.0, 0.0) if is_close(q, 0.5, dtype) and is_close(r, 0.5, dtype) else None
    return None


def layer_norm_affine(view: View, root: Node) -> list[Node]:
    """The scale and the shift at the end of a layer normalisation whose Sqrt is `root`; empty if `root` belongs to
    none.

    (x − mean)/√(mean((x − mean)²) + ε)·γ + β, as exporters wrote it before LayerNormalization (opset 17).
    """
    divide = view.sole_reader(root.outputs[0]) if root.outputs else None
    epsilon_add = view.producer(root.inputs[0])
    if not view.is_a(divide, "Div") or not view.is_a(epsilon_add, "Add"):
        return []
    if not any(view.op(view.producer(t)) == "ReduceMean" for t in epsilon_add.inputs):
        return []
    if view.op(view.producer(divide.inputs[0])) != "Sub":
        return []
    scale = view.sole_reader(divide.outputs[0])
    if not view.is_a(scale, "Mul"):
        return []
    shift = view.sole_reader(scale.outputs[0])
    return [scale, shift] if view.is_a(shift, "Add") else [scale]


def fused_by_runtime(view: View) -> dict[Node, str]:
    """Nodes that onnxruntime fuses into a larger operator, each with the name of that operator."""
    found: dict[Node, str] = {}
    for node in view.nodes():
        op = view.op(node)
        if op == "Sqrt":
            found.update((n, "layer normalisation") for n in layer_norm_affine(view, node))
        elif op == "Erf":
            for ending in _downstream(view, node, 4):
                spelled = activation(view, ending)
                if spelled is not None and spelled.op == "Gelu":
                    found.update((n, "Gelu") for n in spelled.nodes)
    return found


def _downstream(view: View, node: Node, steps: int) -> list[Node]:
    """The next nodes after `node`, each the only reader of the one before."""
    following = []
    for _ in range(steps):
        reader = view.sole_reader(node.outputs[0])
        if reader is None:
            break
        following.append(reader)
        node = reader
    return following
