"""Averages and sums as linear maps: over windows, over channels."""

from __future__ import annotations

import math

import numpy as np

from pwopt.algebra.geometry import Geometry, Refusal, pointwise_geometry
from pwopt.algebra.linear import LinearMap
from pwopt.graph import attributes
from pwopt.graph.ir import Node
from pwopt.graph.view import View
from pwopt.maps.forms import Reading, Result, load_implied, reads


@reads("AveragePool")
def read_average_pool(view: View, node: Node) -> Result:
    """A depthwise stencil of 1/k, if every window has the same number of elements."""
    kernel = tuple(node.attrs["kernel_shape"])
    spatial = attributes.read_spatial_attributes(view, node, kernel)
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
    load = load_implied(
        geometry, lambda: LinearMap.of(geometry, np.full((channels, 1, *kernel), 1 / math.prod(kernel)))
    )
    return Reading((node,), node.inputs[0], geometry, 1, "pool", None, load)


@reads("ReduceSum", "ReduceMean")
def read_reduction(view: View, node: Node) -> Result:
    """A matrix with one row, if the channel axis is the only one that is reduced, and is kept with size 1."""
    axes = attributes.read_axes(view, node)
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
