"""Positions that a crop throws away are not computed."""

from __future__ import annotations

import math

import numpy as np

from pwopt.graph import attributes
from pwopt.graph.ir import Node, Tensor
from pwopt.graph.shapes import Change
from pwopt.maps.positions import pooling, positionwise, spread, stencil
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.records import Rewrite, Skip

#: First and last position of a crop along each spatial axis that it cuts.
Window = dict[int, tuple[int, int]]


class HoistCrop(Pass):
    """C(f(x, y)) = f(Cx, Cy) for elementwise f, C(Wx) = W′(C′x) for a k×k map or a pooling.

    C is a Slice of spatial axes in steps of 1, C′ keeps the positions that the windows of C's positions reach, and
    what they reach outside becomes the padding of W′. Centre crops of U-Nets (Ronneberger et al., 2015), cut borders.
    """

    name = "hoist-crop"
    policy = "if cheaper"

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        window = _window(rw, node)
        maker = rw.producer(node.inputs[0]) if window else None
        if window is None or maker is None or len(maker.outputs) != 1:
            return None
        reading = stencil(rw, maker)
        windows = pooling(rw, maker) or (reading is not None and not reading.geometry.pointwise)
        if not windows and not positionwise(rw, maker):
            return None
        crowd = rw.crowd(node.inputs[0])
        if crowd:
            return Skip(f"what it crops is needed whole: {crowd}")
        return self._before_windows(rw, node, maker, window) if windows else self._before_each(rw, node, maker, window)

    @staticmethod
    def _before_each(rw: Rewriter, node: Node, maker: Node, window: Window) -> Rewrite | Skip:
        """The crop moves to every input that has positions, if that is not more to crop than is saved."""
        rank = (rw.rank(node.outputs[0]) or 2) - 2
        whole = [t for t in maker.inputs if rw.constant(t) is None and spread(rw, t, rank)]
        small, large = (math.prod(rw.size_of(t) or (0,)) for t in (node.outputs[0], node.inputs[0]))
        if (len(whole) - 1) * 2 * small >= (len(whole) + 1) * (large - small):
            return Skip(f"cropping the {len(whole)} inputs of {maker.op} would cost more than it saves")
        crops, made = {}, []
        for t in dict.fromkeys(whole):
            crops[t] = rw.new_variable(f"{t.name}_cropped", t, _cropped(window))
            made.append(_slice(rw, t, crops[t], window))
        inputs = [crops.get(t, t) for t in maker.inputs]
        moved = Node(maker.op, maker.name, dict(maker.attrs), inputs, list(node.outputs), domain=maker.domain)
        return rw.replace([maker, node], [*made, moved], f"{maker.op} computes only what the crop after it keeps")

    @staticmethod
    def _before_windows(rw: Rewriter, node: Node, maker: Node, window: Window) -> Rewrite | Skip | None:
        """A convolution or pooling computes the window only, with the padding that is left there."""
        source, reading = maker.inputs[0], stencil(rw, maker)
        if reading is not None:
            kernel = reading.geometry.kernel
            spatial: object = (reading.geometry.strides, reading.geometry.dilations, reading.geometry.pads)
        else:
            kernel = tuple(maker.attrs["kernel_shape"])
            found = attributes.spatial_attributes(rw, maker, kernel)
            spatial = tuple(found)[:3] if isinstance(found, attributes.Spatial) else None
        if not isinstance(spatial, tuple):
            return None
        strides, dilations, pads = spatial
        rank, inner, around = len(kernel), {}, list(pads)
        for axis, (first, last) in window.items():
            a, size = axis - 2, rw.dim(source, axis)
            if not isinstance(size, int):
                return Skip("the size of what it crops is not known; --static settles it")
            low = strides[a] * first - pads[a]
            high = strides[a] * last - pads[a] + dilations[a] * (kernel[a] - 1) + 1
            begin, end = max(0, low), min(size, high)
            if max(begin - low, high - end) > dilations[a] * (kernel[a] - 1):
                return Skip("a window of the crop lies in the padding alone")
            around[a], around[a + rank] = begin - low, high - end
            if (begin, end) != (0, size):
                inner[axis] = (begin, end - 1)
        made, inputs = [], list(maker.inputs)
        if inner:
            inputs[0] = rw.new_variable(f"{source.name}_cropped", source, _cropped(inner))
            made.append(_slice(rw, source, inputs[0], inner))
        attrs = {k: v for k, v in maker.attrs.items() if k != "auto_pad"} | {"pads": around}
        made.append(Node(maker.op, maker.name, attrs, inputs, list(node.outputs), domain=maker.domain))
        return rw.replace([maker, node], made, f"{maker.op} computes only what the crop after it keeps")


def _window(rw: Rewriter, node: Node) -> Window | None:
    """What a Slice keeps of each spatial axis that it cuts; None if it is no such crop."""
    if rw.op(node) != "Slice" or rw.opset < 10 or (rw.rank(node.inputs[0]) or 0) < 3:
        return None
    window: Window = {}
    for axis, start, end, step in attributes.slice_parameters(rw, node) or []:
        size = rw.dim(node.inputs[0], axis)
        if axis < 2 or step != 1 or not isinstance(size, int):
            return None
        kept = range(size)[start:end]
        if not kept:
            return None
        if len(kept) < size:
            window[axis] = (kept[0], kept[-1])
    return window or None


def _cropped(window: Window) -> Change:
    return lambda shape: tuple(window[a][1] - window[a][0] + 1 if a in window else d for a, d in enumerate(shape))


def _slice(rw: Rewriter, source: Tensor, output: Tensor, window: Window) -> Node:
    values = {
        "starts": [a for a, _ in window.values()],
        "ends": [b + 1 for _, b in window.values()],
        "axes": list(window),
    }
    inputs = [rw.new_constant(f"{output.name}_{k}", np.array(v, np.int64)) for k, v in values.items()]
    return Node("Slice", rw.node_name(str(source.name), "_crop"), {}, [source, *inputs], [output])
