"""Crop hoisting (code motion): a crop moves before the operators that compute the positions it discards."""

from __future__ import annotations

import math

import numpy as np

from pwopt.graph import attributes
from pwopt.graph.ir import Node, Tensor
from pwopt.graph.reasons import Reason
from pwopt.graph.shapes import ShapeChange
from pwopt.maps.positions import has_positions, pooling, positionwise, stencil
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.records import Rewrite, Skip

#: The first and the last position that a crop keeps, for each spatial axis that it cuts.
Window = dict[int, tuple[int, int]]


class HoistCrop(Pass):
    """C(f(x, y)) = f(Cx, Cy) for elementwise f; C(Wx) = W′(C′x) for a k×k map or a pooling W

    * C is a Slice of spatial axes with step 1, and only C reads the result of f or W.
    * C′ keeps the positions that the remaining windows cover. Where they extend beyond x, W′ has padding.
    * Cropping the inputs of f costs less than it saves.

    U-Nets crop to the centre (Ronneberger et al., 2015), and other models cut off borders.
    """

    name = "hoist-crop"
    operators = frozenset({"Slice"})
    policy = "if cheaper"

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        window = _read_window(rw, node)
        maker = rw.producer(node.inputs[0]) if window else None
        if window is None or maker is None or len(maker.outputs) != 1:
            return None
        reading = stencil(rw, maker)
        has_windows = pooling(rw, maker) or (reading is not None and not reading.geometry.pointwise)
        if not has_windows and not positionwise(rw, maker):
            return None
        other_uses = rw.other_uses(node.inputs[0])
        if other_uses:
            return Skip(Reason("its input is needed uncropped: {}", other_uses))
        hoist = _hoist_past_windows if has_windows else _hoist_past_elementwise
        return hoist(rw, node, maker, window)


def _hoist_past_elementwise(rw: Rewriter, node: Node, maker: Node, window: Window) -> Rewrite | Skip:
    """Crop every input that has positions instead, if that costs less than it saves."""
    rank = (rw.rank(node.outputs[0]) or 2) - 2
    spatial = [t for t in maker.inputs if rw.constant(t) is None and has_positions(rw, t, rank)]
    small, large = (math.prod(rw.size_of(t) or (0,)) for t in (node.outputs[0], node.inputs[0]))
    if (len(spatial) - 1) * 2 * small >= (len(spatial) + 1) * (large - small):
        return Skip(f"cropping the {len(spatial)} inputs of {maker.op} would cost more than it saves")
    crops, slices = {}, []
    for t in dict.fromkeys(spatial):
        crops[t] = rw.new_variable(f"{t.name}_cropped", t, _crop_shape(window))
        slices.append(_make_slice(rw, t, crops[t], window))
    inputs = [crops.get(t, t) for t in maker.inputs]
    moved = Node(maker.op, maker.name, dict(maker.attrs), inputs, list(node.outputs), domain=maker.domain)
    return rw.replace([maker, node], [*slices, moved], f"{maker.op} computes only what the crop after it keeps")


def _hoist_past_windows(rw: Rewriter, node: Node, maker: Node, window: Window) -> Rewrite | Skip | None:
    """Compute only the windows that the crop keeps, with the padding that remains around them."""
    source, reading = maker.inputs[0], stencil(rw, maker)
    if reading is not None:
        g = reading.geometry
        kernel, strides, dilations, pads = g.kernel, g.strides, g.dilations, g.pads
    else:
        kernel = tuple(maker.attrs["kernel_shape"])
        found = attributes.read_spatial_attributes(rw, maker, kernel)
        if not isinstance(found, attributes.Spatial):
            return None
        strides, dilations, pads = found.strides, found.dilations, found.pads
    rank, inner, around = len(kernel), {}, list(pads)
    for axis, (first, last) in window.items():
        a, size = axis - 2, rw.dim(source, axis)
        if not isinstance(size, int):
            return Skip("the size of its input is not known; make the input sizes static (--static)")
        low = strides[a] * first - pads[a]
        high = strides[a] * last - pads[a] + dilations[a] * (kernel[a] - 1) + 1
        begin, end = max(0, low), min(size, high)
        if max(begin - low, high - end) > dilations[a] * (kernel[a] - 1):
            return Skip("a window of the crop lies in the padding alone")
        around[a], around[a + rank] = begin - low, high - end
        if (begin, end) != (0, size):
            inner[axis] = (begin, end - 1)
    new, inputs = [], list(maker.inputs)
    if inner:
        inputs[0] = rw.new_variable(f"{source.name}_cropped", source, _crop_shape(inner))
        new.append(_make_slice(rw, source, inputs[0], inner))
    attrs = {k: v for k, v in maker.attrs.items() if k != "auto_pad"} | {"pads": around}
    new.append(Node(maker.op, maker.name, attrs, inputs, list(node.outputs), domain=maker.domain))
    return rw.replace([maker, node], new, f"{maker.op} computes only what the crop after it keeps")


def _read_window(rw: Rewriter, node: Node) -> Window | None:
    """The window of a Slice that crops spatial axes; None for any other node."""
    if rw.op(node) != "Slice" or rw.opset < 10 or (rw.rank(node.inputs[0]) or 0) < 3:
        return None
    window: Window = {}
    for axis, start, end, step in attributes.read_slice_parameters(rw, node) or []:
        size = rw.dim(node.inputs[0], axis)
        if axis < 2 or step != 1 or not isinstance(size, int):
            return None
        kept = range(size)[start:end]
        if not kept:
            return None
        if len(kept) < size:
            window[axis] = (kept[0], kept[-1])
    return window or None


def _crop_shape(window: Window) -> ShapeChange:
    return lambda shape: tuple(window[a][1] - window[a][0] + 1 if a in window else d for a, d in enumerate(shape))


def _make_slice(rw: Rewriter, source: Tensor, output: Tensor, window: Window) -> Node:
    values = {
        "starts": [a for a, _ in window.values()],
        "ends": [b + 1 for _, b in window.values()],
        "axes": list(window),
    }
    inputs = [rw.new_constant(f"{output.name}_{k}", np.array(v, np.int64)) for k, v in values.items()]
    return Node("Slice", rw.node_name(str(source.name), "_crop"), {}, [source, *inputs], [output])
