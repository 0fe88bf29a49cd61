"""Activations after a map, in the forms that exporters write, and their copies after other maps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pwopt.graph.ir import Node, Tensor
from pwopt.graph.operators import ACTIVATIONS
from pwopt.graph.view import View

#: Functions f for which exporters write x·f(x) as two operators.
GATES = ("Sigmoid", "HardSigmoid", "Tanh")


@dataclass(frozen=True)
class Step:
    """An activation of one tensor: its operators, its result, and a signature that is equal for equal activations."""

    nodes: tuple[Node, ...]
    output: Tensor
    signature: tuple[object, ...]


def read_activation(view: View, tensor: Tensor) -> Step | None:
    """Read the activation that is the only reader of `tensor`: an elementwise operator, or x·f(x)."""
    readers = view.readers(tensor)
    if view.must_keep(tensor) or not readers or len(readers) > 2:
        return None
    node = readers[0]
    if len(readers) == 1:
        if view.op(node) not in ACTIVATIONS or node.inputs[0] is not tensor:
            return None
        rest = [view.raw(t) if t.name else np.zeros(0) for t in node.inputs[1:]]
        numbers = [None if v is None else (v.shape, v.dtype.str, v.tobytes()) for v in rest if v is None or v.size <= 1]
        if len(numbers) < len(rest) or None in numbers:
            return None
        return Step((node,), node.outputs[0], (node.op, repr(sorted(node.attrs.items())), tuple(numbers)))
    gate, product = sorted(readers, key=lambda n: view.op(n) == "Mul")
    gated = view.op(gate) in GATES and view.op(product) == "Mul" and view.sole_reader(gate.outputs[0]) is product
    if not gated:
        return None
    return Step((gate, product), product.outputs[0], ("x·", gate.op, repr(sorted(gate.attrs.items()))))


def repeat_activation(view: View, step: Step, source: Tensor, output: Tensor) -> list[Node]:
    """Create the operators of a step on another tensor."""
    node = step.nodes[0]
    name = view.node_name(node.name, "_part")
    if len(step.nodes) == 1:
        # The siblings' own constants may be made further down than the first of them.
        numbers = [(t, view.raw(t)) for t in node.inputs[1:]]
        arguments = [t if v is None else view.new_constant(f"{output.name}_argument", v) for t, v in numbers]
        return [Node(node.op, name, dict(node.attrs), [source, *arguments], [output])]
    gate = view.new_variable(f"{node.outputs[0].name}_part", source)
    product = Node("Mul", view.node_name(step.nodes[1].name, "_part"), {}, [source, gate], [output])
    return [Node(node.op, name, dict(node.attrs), [source], [gate]), product]
