"""Analytic cost: multiply-adds, from shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pwopt.algebra.geometry import Geometry
from pwopt.graph.ir import Node
from pwopt.graph.operators import WEIGHTED_OPERATORS
from pwopt.graph.view import View
from pwopt.maps.forms import Reading

#: What reading or writing one element costs, in multiply-adds: 50 G of those per second on one core with AVX-512,
#: against some 10 GB/s between core and memory.
ELEMENT = 16


@dataclass(frozen=True)
class Cost:
    """Size of a graph.

    Attributes
    ----------
    nodes : int
        Operators, Constant nodes not counted.
    params : int
        Elements of floating-point constants, each counted once.
    macs : int
        Multiply-adds of convolutions and matrix products; elementwise operators and pooling not counted.
    unknown : int
        Convolutions and products left out of `macs` because a size is not known.
    """

    nodes: int
    params: int
    macs: int
    unknown: int

    def change(self, after: Cost) -> float | None:
        """Relative change of the multiply-adds; None where the two counts are not of the same operators.

        A count that becomes known because a rewrite made a size static is not additional work.
        """
        return (after.macs - self.macs) / self.macs if self.macs and self.unknown == after.unknown else None


NO_COST = Cost(0, 0, 0, 0)


def positions(view: View, reading: Reading) -> int | None:
    """At how many positions a map is applied: those of the output, or of the input if transposed; None if unknown."""
    if reading.geometry.transposed:
        size, channels = view.size_of(reading.source), reading.geometry.in_channels
    else:
        size, channels = view.size_of(reading.output), reading.geometry.out_channels
    return None if size is None else math.prod(size) // max(1, channels)


def macs(view: View, node: Node) -> int | None:
    """Multiply-adds of one node; 0 for operators that have none, None if a size is unknown.

    A convolution has (inputs per group · taps) per output element, a matrix product its inner size.
    """
    op = view.op(node)
    if op not in WEIGHTED_OPERATORS:
        return 0
    if op in ("Conv", "ConvTranspose"):
        weight = view.size_of(node.inputs[1])
        over = view.size_of(node.outputs[0] if op == "Conv" else node.inputs[0])
        return None if weight is None or over is None else math.prod(over) * math.prod(weight[1:])
    a, out = view.size_of(node.inputs[0]), view.size_of(node.outputs[0])
    if a is None or out is None or not a:
        return None
    inner = a[0] if op == "Gemm" and node.attrs.get("transA", 0) else a[-1]
    return math.prod(out) * inner


def measure(view: View) -> Cost:
    """The cost of the graph in its current state."""
    nodes = [n for n in view.nodes() if view.op(n) != "Constant"]
    counted = [macs(view, n) for n in nodes]
    constants = {}
    for node in view.nodes():
        for tensor in node.inputs:
            held = view.constant(tensor)
            if held is not None and held.dtype is not None and np.dtype(held.dtype).kind in "fV":
                constants[id(held)] = math.prod(held.shape)
    return Cost(len(nodes), sum(constants.values()), sum(c or 0 for c in counted), counted.count(None))


def price(geometry: Geometry, places: float) -> float:
    """Multiply-adds of a map applied `places` times."""
    return geometry.weights * places
