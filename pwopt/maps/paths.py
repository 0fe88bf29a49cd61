"""Paths: linear maps in sequence, each of which is the only reader of the one before."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from pwopt.algebra.geometry import Refusal
from pwopt.algebra.linear import LinearMap, compose
from pwopt.graph.dtypes import cancellation
from pwopt.graph.ir import Node, Tensor
from pwopt.graph.reasons import Reason
from pwopt.graph.view import View
from pwopt.maps import forms
from pwopt.maps.cost import positions, price
from pwopt.maps.forms import Reading

#: The most maps of a path; real models have a handful.
MAX_PATH_MAPS = 32


@dataclass(frozen=True)
class Path:
    """Linear maps from `source` to `output`.

    Attributes
    ----------
    source, output : Tensor
        The same tensor if the path has no maps.
    readings : tuple of Reading
        In the order of execution.
    axis : int or None
        The channel axis of all maps; None if any axis will do.
    obstacle : str
        Why the path does not start further up.
    """

    source: Tensor
    output: Tensor
    readings: tuple[Reading, ...]
    axis: int | None
    obstacle: str

    @property
    def nodes(self) -> list[Node]:
        return [n for r in self.readings for n in r.nodes]

    def compose(self, view: View) -> LinearMap:
        """Compose all maps into one; the identity of one channel if there are none."""
        composed = LinearMap.identity(1)
        precision = cancellation(view.dtype(self.output))
        for step in (s for r in self.readings for s in steps(r)):
            composed = compose(step, composed, precision)
        return composed

    def price(self, view: View) -> float:
        """Multiply-adds of the convolutions and products, per position of the output; other operators count as free."""
        spatial = [r for r in self.readings if r.weighted or not r.geometry.pointwise]
        places = relative_places(view, spatial)
        total = sum(price(r.geometry, p) for r, p in zip(spatial, places, strict=True) if r.weighted)
        return total / (places[-1] or 1.0) if total else 0.0


def steps(reading: Reading) -> Iterator[LinearMap]:
    """A map as a sequence of maps that pad with zeros only: padding x with v is padding x − v with zeros, plus v."""
    if reading.fill is not None:
        yield LinearMap.diagonal(np.ones_like(reading.fill), -reading.fill)
    yield reading.load()
    if reading.fill is not None:
        yield LinearMap.diagonal(np.ones_like(reading.fill), reading.fill)


def trace(view: View, tensor: Tensor, fused: Collection[Node] = ()) -> Path:
    """Find the longest path to `tensor` without the nodes in `fused`, which must not change."""
    readings: list[Reading] = []
    axis: int | None = None
    start, obstacle = tensor, ""
    while len(readings) < MAX_PATH_MAPS:
        node = view.producer(start)
        if node is None:
            break
        obstacle = view.other_uses(start)
        if obstacle:
            break
        reading = forms.read(view, node)
        if isinstance(reading, Refusal):
            obstacle = Reason("{} is not linear here: {}", node.op, reading.reason)
            break
        if reading is None or reading.output is not start:
            obstacle = f"{node.op} is not a linear map with constant numbers"
            break
        if reading.turned:
            obstacle = f"{node.op} transposes its data input"
            break
        if any(n in fused for n in reading.nodes):
            obstacle = f"{node.op} belongs to a larger operator that onnxruntime runs as one"
            break
        if reading.weighted and view.is_shared(reading.weight_input):
            obstacle = Reason("the weight {!r} is shared", reading.weight_input.name)
            break
        if None not in (axis, reading.axis) and axis != reading.axis:
            obstacle = f"{node.op} acts on axis {reading.axis}, not {axis}"
            break
        axis = reading.axis if axis is None else axis
        readings.insert(0, reading)
        start = reading.source
    return Path(start, tensor, tuple(readings), axis, obstacle)


def relative_places(view: View, maps: list[Reading]) -> list[float]:
    """At how many positions each map is applied; relative to the first one, by the strides alone, if a size is
    unknown."""
    counted = [positions(view, r) for r in maps]
    if all(counted):  # none unknown, none empty
        return [float(c or 0) for c in counted]
    places, current = [], 1.0
    for r in maps:
        ratio = float(np.prod(r.geometry.strides, initial=1))
        if r.geometry.transposed:
            places.append(current)
            current *= ratio
        else:
            current /= ratio
            places.append(current)
    return places
