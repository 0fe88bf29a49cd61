"""Rank reduction: 1-D and 3-D convolutions run as 2-D ones, those on single positions as matrix products."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from pwopt.algebra import Values
from pwopt.graph import attributes
from pwopt.graph.ir import Constant, Node, Tensor
from pwopt.graph.operators import POOLS, REDUCTIONS
from pwopt.graph.shapes import Shape
from pwopt.maps.cost import macs
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.layouts import (
    BY_AXES,
    Arguments,
    Converter,
    InLayout,
    convert_constant,
    data_inputs,
    lazy_array,
    propagate_layout,
    reduce_axes,
    register_in,
    rewrite_operator,
)
from pwopt.rewriting.records import Rewrite, Skip
from pwopt.rewriting.regions import find_regions
from pwopt.rewriting.wording import format_count

#: The smallest number of convolutions in a region that is lowered without measuring. In smaller ones, the changes of
#: shape may cost more than they save.
MIN_CONVOLUTIONS = 3


@dataclass(frozen=True)
class RankLayout:
    """A layout of another rank.

    (N, C, L) becomes (N, C, 1, L). (N, C, T, H, W) becomes (N, C, T, H·W). (N, C, 1, 1) becomes (N, C).

    Attributes
    ----------
    rank : int
        Before the lowering.
    plane : tuple of int
        H and W for rank 5, unless all planes are single positions; else empty. The operator must not change them.
    """

    rank: int
    plane: tuple[int, ...] = ()
    suffix = "_2d"

    def axis(self, axis: int) -> int | None:
        axis += self.rank if axis < 0 else 0
        return {3: {0: 0, 1: 1, 2: 3}, 4: {0: 0, 1: 1}, 5: {0: 0, 1: 1, 2: 2}}[self.rank].get(axis)

    def spatial(self, values: Sequence[int], neutral: int) -> list[int] | None:
        """Numbers for each spatial axis, such as strides; None if they are not neutral in the plane."""
        if self.rank == 4:
            return None
        if self.rank == 3:
            return [neutral, *values]
        return [values[0], neutral] if all(v == neutral for v in values[1:]) else None

    def pads(self, values: Sequence[int]) -> list[int] | None:
        half = len(values) // 2
        begins, ends = self.spatial(values[:half], 0), self.spatial(values[half:], 0)
        return None if begins is None or ends is None else [*begins, *ends]

    def every(self, values: Sequence[float], neutral: float) -> list[float] | None:
        """Numbers for each axis of the tensor; None if they are not neutral in the plane."""
        if self.rank == 4:
            return None
        if self.rank == 3:
            return [*values[:2], neutral, values[2]]
        return [*values[:3], neutral] if all(v == neutral for v in values[3:]) else None

    def operand_shape(self, shape: Sequence[int]) -> tuple[int, ...] | None:
        """The shape in which a constant broadcasts as before; None if there is none."""
        if self.rank == 3:
            return tuple(shape) if len(shape) < 2 else (*shape[:-1], 1, shape[-1])
        if len(shape) < 2:
            return tuple(shape) if all(d == 1 for d in shape) else None
        if self.rank == 4:
            return tuple(shape[:-2]) if tuple(shape[-2:]) == (1, 1) else None
        plane = tuple(shape[-2:])
        return (*shape[:-2], plane[0] * plane[1]) if plane in ((1, 1), self.plane) else None

    def convert(self, values: Values) -> Values:
        shape = self.operand_shape(values.shape)
        assert shape is not None
        return values.reshape(shape)

    def shape(self, shape: Shape) -> Shape:
        if self.rank == 3:
            return (*shape[:2], 1, shape[2])
        if self.rank == 4:
            return shape[:2]
        h, w = shape[3:]
        return (*shape[:3], h * w if isinstance(h, int) and isinstance(w, int) else None)

    def write_conversion(self, rw: Rewriter, source: Tensor, output: Tensor, *, enter: bool) -> list[Node]:
        axes = np.array([2, 3] if self.rank == 4 else [2], np.int64)
        if self.rank == 5:
            video = source if enter else output
            h, w = (d for d in (rw.dim(video, 3), rw.dim(video, 4)) if isinstance(d, int))
            shape = np.array([0, 0, 0, h * w] if enter else [0, 0, 0, h, w], np.int64)
            name = rw.node_name(str(output.name), "_reshape")
            return [Node("Reshape", name, {}, [source, rw.new_constant(f"{output.name}_shape", shape)], [output])]
        op = "Unsqueeze" if enter == (self.rank == 3) else "Squeeze"
        name = rw.node_name(str(output.name), f"_{op.lower()}")
        if rw.opset < 13:
            return [Node(op, name, {"axes": axes.tolist()}, [source], [output])]
        return [Node(op, name, {}, [source, rw.new_constant(f"{output.name}_axes", axes)], [output])]


class LowerRank(Pass):
    """f(x) = squeeze(f₂(unsqueeze(x))) where f₂ computes f on tensors of another rank

    * A region of 1-D convolutions on (N, C, L) runs on (N, C, 1, L).
    * A region of 3-D convolutions with kernels (k, 1, 1) on (N, C, T, H, W) runs on (N, C, T, H·W).
    * A region of 1×1 convolutions on (N, C, 1, 1) runs as matrix products on (N, C).
    * A region contains at least one convolution. One Unsqueeze, Squeeze or Reshape stands at each entry and each exit.

    The sums and their numbers stay the same. onnxruntime's CPU provider has its blocked layout for 2-D convolutions
    only. Examples are audio networks (Kriman et al., "QuartzNet", 2020) and the pointwise parts of video networks
    (Feichtenhofer, "X3D", 2020).
    """

    name = "lower-rank"
    policy = "measured"

    def start(self, rw: Rewriter) -> None:
        self._lowerings = _find_lowerings(rw)
        tensors = {n: (*n.inputs, *n.outputs) for n in self._lowerings}
        regions = find_regions({n: [t for t in ts if rw.producer(t) in tensors] for n, ts in tensors.items()})
        found = [(r, [n for n in r.nodes if n.op in ("Conv", "ConvTranspose")]) for r in regions]
        self._roots = {convolutions[0]: (region, convolutions) for region, convolutions in found if convolutions}

    def select_nodes(self, nodes: Sequence[Node]) -> Sequence[Node]:
        return [node for node in nodes if node in self._roots]

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        if node not in self._roots:
            return None
        region, convolutions = self._roots.pop(node)
        count, rank = len(convolutions), self._lowerings[node].rank - 2
        if not self.eager and rank == 2:
            single = format_count(count, "convolution")
            return Skip(f"{single} of single positions could run as matrix products; only measuring can tell")
        if not self.eager and count < MIN_CONVOLUTIONS:
            several = format_count(count, f"{rank}-D convolution")
            return Skip(f"a region of {several} may save less than its changes of shape cost; only measuring can tell")
        return _lower(rw, [(n, self._lowerings[n]) for n in region.nodes], convolutions)


def _lower(rw: Rewriter, members: Sequence[tuple[Node, RankLayout]], convolutions: Sequence[Node]) -> Rewrite:
    work, size = sum(macs(rw, n) or 0 for n, _ in members), rw.size_of(convolutions[0].outputs[0])
    rank = members[0][1].rank
    what = format_count(len(convolutions), f"{rank - 2}-D convolution")
    signature = f"{what} in a region of {len(members)}"
    signature += f" with {work:,} multiply-adds, the first at {size}"

    def write(node: Node, low: RankLayout, in_layout: InLayout, outputs: list[Tensor]) -> list[Node]:
        arguments = _arguments(rw, low, node)
        assert arguments is not None
        return rewrite_operator(rw, node, arguments, low, in_layout, outputs)

    where = "as matrix products" if rank == 4 else "in 2-D"
    others = format_count(len(members) - len(convolutions), "other operator")
    reason = f"{what} and {others} around them run {where}"
    return propagate_layout(rw, members, write, reason).with_signature(signature)


def _find_lowerings(rw: Rewriter) -> dict[Node, RankLayout]:
    """The operators that can be lowered, each with its layout."""
    found = {node: _find_lowering(rw, node) for node in rw.nodes()}
    return {n: low for n, low in found.items() if low is not None and _arguments(rw, low, n) is not None}


def _find_lowering(rw: Rewriter, node: Node) -> RankLayout | None:
    """The layout for the inputs and outputs of a node; None if their ranks differ or have no lowering."""
    read = data_inputs(rw, node)
    tensors = [*read, *(t for t in node.outputs if t.name)]
    ranks = {rw.rank(t) for t in tensors}
    if len(ranks) != 1 or not read:
        return None
    rank = ranks.pop()
    if rank == 3:
        return RankLayout(3)
    if rank == 4:
        return RankLayout(4) if _have_one_position(rw, tensors) else None
    if rank != 5:
        return None
    planes = {tuple(rw.dim(t, a) for a in (3, 4)) for t in tensors} - {(1, 1)}
    plane = tuple(d for d in (planes.pop() if len(planes) == 1 else ()) if isinstance(d, int) and d > 0)
    return RankLayout(5, plane) if len(plane) != 1 and (plane or _have_one_position(rw, tensors)) else None


def _have_one_position(rw: Rewriter, tensors: Iterable[Tensor]) -> bool:
    """Whether the last two axes of all tensors have size 1."""
    return all((rw.dim(t, -2), rw.dim(t, -1)) == (1, 1) for t in tensors)


CONVERTERS: dict[str, Converter[RankLayout]] = dict(BY_AXES)
converts = register_in(CONVERTERS)


def _arguments(rw: Rewriter, low: RankLayout, node: Node) -> Arguments | None:
    """The arguments of an operator in a layout; None if it cannot run in it."""
    converter = CONVERTERS.get(rw.op(node))
    return None if converter is None else converter(rw, low, node)


@converts("Conv", "ConvTranspose")
def _convert_convolution(rw: Rewriter, low: RankLayout, node: Node) -> Arguments | None:
    weight = rw.constant(node.inputs[1])
    if weight is None or "output_shape" in node.attrs:
        return None
    if low.rank == 4:
        return _convert_to_product(rw, node, weight)
    shape = low.spatial(list(weight.shape[2:]), 1)
    attrs = _convert_window(low, node)
    if shape is None or attrs is None:
        return None
    attrs["kernel_shape"] = shape

    def load() -> Values:
        raw = rw.raw(weight)
        assert raw is not None
        return raw.reshape(*raw.shape[:2], *shape)

    return Arguments(attrs, {1: load})


def _convert_to_product(rw: Rewriter, node: Node, weight: Constant) -> Arguments | None:
    """A convolution of a single position as a Gemm, y = x·Wᵀ + b."""
    plain = node.op == "Conv" and node.attrs.get("group", 1) == 1
    if not plain or any(k != 1 for k in weight.shape[2:]) or rw.opset < 11:  # an older Gemm needs a bias
        return None
    return Arguments({"transB": 1}, {1: convert_constant(rw, RankLayout(4), weight)}, "Gemm")


@converts(*POOLS)
def _convert_pooling(_rw: Rewriter, low: RankLayout, node: Node) -> Arguments | None:
    attrs = _convert_window(low, node)
    if attrs is None or len(node.outputs) > 1:
        return None
    kernel = low.spatial(node.attrs["kernel_shape"], 1)
    return None if kernel is None else Arguments({**attrs, "kernel_shape": kernel})


def _convert_window(low: RankLayout, node: Node) -> dict[str, object] | None:
    """The attributes of a convolution or pooling in a layout; None if its windows extend into the plane."""
    attrs: dict[str, object] = dict(node.attrs)
    for key, neutral in (("strides", 1), ("dilations", 1), ("output_padding", 0)):
        if key in node.attrs:
            attrs[key] = low.spatial(node.attrs[key], neutral)
    if "pads" in node.attrs:
        attrs["pads"] = low.pads(node.attrs["pads"])
    return None if any(v is None for v in attrs.values()) else attrs


@converts(
    "BatchNormalization", "InstanceNormalization", "GroupNormalization", "GlobalAveragePool", "GlobalMaxPool",
    "GlobalLpPool",
)  # fmt: skip
def _convert_per_channel(_rw: Rewriter, low: RankLayout, node: Node) -> Arguments | None:
    if low.rank == 4 and node.op != "BatchNormalization":
        return None
    return Arguments(dict(node.attrs)) if node.attrs.get("spatial", 1) else None


@converts(*REDUCTIONS)
def _convert_reduction(rw: Rewriter, low: RankLayout, node: Node) -> Arguments | None:
    axes = attributes.read_axes(rw, node) or ()
    whole_plane = {3, 4} <= set(axes)
    return reduce_axes(rw, node, sorted({min(a, 3) for a in axes})) if whole_plane else BY_AXES[node.op](rw, low, node)


@converts("Resize", "Upsample")
def _convert_resize(rw: Rewriter, low: RankLayout, node: Node) -> Arguments | None:
    odd = node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize" or "axes" in node.attrs
    if odd or node.attrs.get("mode", "nearest") == "cubic":
        return None
    if attributes.is_resized_by_sizes(rw, node):
        sizes = rw.integers(node.inputs[3])
        mapped = None if sizes is None or low.rank == 5 else low.every(sizes, 1)
        return None if mapped is None else Arguments(dict(node.attrs), {3: lazy_array(mapped, np.int64)})
    index = 1 if node.op == "Upsample" or rw.opset < 11 else 2
    scales = rw.value(node.inputs[index]) if len(node.inputs) > index else None
    mapped = None if scales is None or scales.size != low.rank else low.every(scales.tolist(), 1.0)
    return None if mapped is None else Arguments(dict(node.attrs), {index: lazy_array(mapped, np.float32)})


@converts("Pad")
def _convert_pad(rw: Rewriter, low: RankLayout, node: Node) -> Arguments | None:
    found = attributes.read_pad_parameters(rw, node)
    if found is None or len(node.inputs) > 3:
        return None
    pads, half = found[0], low.rank
    begins, ends = low.every(pads[:half], 0), low.every(pads[half:], 0)
    if begins is None or ends is None:
        return None
    if rw.opset < 11:
        return Arguments({**node.attrs, "pads": [*begins, *ends]})
    return Arguments(dict(node.attrs), {1: lazy_array([*begins, *ends], np.int64)})
