"""3-D convolutions as 2-D: a convolution over time becomes a sum of convolutions of shifted frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pwopt.algebra import Values
from pwopt.algebra.multirate import over_time
from pwopt.graph.ir import Constant, Node, Tensor
from pwopt.graph.operators import SOFTMAXES
from pwopt.graph.shapes import Shape
from pwopt.maps.cost import macs
from pwopt.maps.forms import Reading
from pwopt.maps.positions import pooling, stencil
from pwopt.rewriting.builder import Builder
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.layouts import BY_AXES, Arguments, InLayout, data_inputs, propagate_layout, rewrite_operator
from pwopt.rewriting.records import Rewrite, Skip
from pwopt.rewriting.regions import find_regions
from pwopt.rewriting.wording import format_count

#: Operators that compute the same on frames if only their axes change.
ALIKE = frozenset(BY_AXES) - SOFTMAXES - {"Split", "Slice", "PRelu"}


@dataclass(frozen=True)
class Images:
    """The layout (T, C, H, W), a batch of T images, for tensors (1, C, T, H, W)."""

    rank: int = 5
    suffix = "_frames"

    def axis(self, axis: int) -> int | None:
        return {1: 1, 2: 0, 3: 2, 4: 3}.get(axis % 5)

    def operand_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of a constant for one video. (The first axis of a constant is 1, as that of the outputs is.)"""
        if len(shape) < 3:
            return tuple(shape)
        full = (*(1,) * (5 - len(shape)), *shape)
        return (full[2], full[1], *full[3:]) if full[2] != 1 else (full[1], *full[3:])

    def convert(self, values: Values) -> Values:
        full = values.reshape((1,) * (5 - values.ndim) + values.shape)
        return np.ascontiguousarray(full[0].swapaxes(0, 1)).reshape(self.operand_shape(values.shape))

    def shape(self, shape: Shape) -> Shape:
        return (shape[2], shape[1], *shape[3:])

    def write_conversion(self, rw: Rewriter, source: Tensor, output: Tensor, *, enter: bool) -> list[Node]:
        """Swap channels and time; remove the first axis after that, or add it."""
        video = source if enter else output
        between = rw.new_variable(
            f"{output.name}_wide", video, (lambda s: (s[0], s[2], s[1], *s[3:])) if enter else (lambda s: s[1:])
        )
        swap = {"perm": [0, 2, 1, 3, 4] if enter else [1, 0, 2, 3]}
        axes = rw.new_constant(f"{output.name}_axes", np.array([0]))
        names = [rw.node_name(str(output.name), f"_{role}") for role in ("transpose", "axis")]
        return [
            Node("Transpose", names[0], swap, [source], [between]),
            Node("Squeeze" if enter else "Unsqueeze", names[1], {}, [between, axes], [output]),
        ]


class Frames(Pass):
    """y_t = Σ_j W_j ∗ x_{t + j}: a convolution over time and space is a sum of 2-D convolutions of shifted frames

    * Tensors are single videos of known size, (1, C, T, H, W). They become batches of T images, (T, C, H, W).
    * A region contains at least one convolution with a kernel of several positions in the plane. `lower-rank` handles
      regions without such kernels.
    * The operators around it join the region if they treat all frames alike: elementwise operators, normalisations,
      pooling in the plane, sums, Concat.

    onnxruntime's CPU provider has its blocked layout for 2-D convolutions only. Its depthwise 3-D convolutions run at
    2 G multiply-adds per second, its 2-D ones at 6 to 15. Examples are X3D (Feichtenhofer, 2020), (2+1)-D networks
    (Tran et al., 2018) and inflated 2-D networks (Carreira and Zisserman, 2017).
    """

    name = "frames"
    policy = "measured"
    pays_on = frozenset({"cpu", "other"})  # graphics cards have no blocked layout

    def start(self, rw: Rewriter) -> None:
        members = {n: (*n.inputs, *n.outputs) for n in rw.nodes() if rw.opset >= 13 and _fits(rw, n)}
        regions = find_regions({n: [t for t in ts if rw.producer(t) in members] for n, ts in members.items()})
        found = [(r, [n for n in r.nodes if _is_spatial(rw, n)]) for r in regions]
        self._roots = {spatial[0]: (region, spatial) for region, spatial in found if spatial}

    def select_nodes(self, nodes: Sequence[Node]) -> Sequence[Node]:
        return [node for node in nodes if node in self._roots]

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        if node not in self._roots:
            return None
        region, spatial = self._roots.pop(node)
        what = format_count(len(spatial), "3-D convolution")
        if not self.eager:
            return Skip(f"a region of {what} could run on frames; only measuring can tell")

        def write(member: Node, images: Images, in_layout: InLayout, outputs: list[Tensor]) -> Sequence[Node]:
            reading = stencil(rw, member)
            if reading is not None:
                return _Taps(rw, reading).write(in_layout(reading.source), outputs[0])
            if member.op == "GlobalAveragePool":
                return _pool_globally(rw, in_layout(member.inputs[0]), outputs[0])
            arguments = _arguments(rw, images, member)
            assert arguments is not None
            return rewrite_operator(rw, member, arguments, images, in_layout, outputs)

        work, size = sum(macs(rw, n) or 0 for n in region.nodes), rw.size_of(spatial[0].outputs[0])
        others = format_count(len(region.nodes) - len(spatial), "other operator")
        done = propagate_layout(
            rw, [(n, Images()) for n in region.nodes], write, f"{what} and {others} around it run on frames"
        )
        return done.with_signature(
            f"{what} in a region of {len(region.nodes)} with {work:,} multiply-adds, the first at {size}"
        )


def _is_spatial(rw: Rewriter, node: Node) -> bool:
    """Whether a node is a convolution whose kernel covers more than one position in the plane."""
    reading = stencil(rw, node)
    return reading is not None and any(k > 1 for k in reading.geometry.kernel[1:])


def _fits(rw: Rewriter, node: Node) -> bool:
    """Whether an operator can run on frames: its inputs and outputs are single videos of known size."""
    read = data_inputs(rw, node)
    tensors = [*read, *(t for t in node.outputs if t.name)]
    sizes = [rw.shape(t) or () for t in tensors]
    if not read or any(len(s) != 5 or s[0] != 1 or not all(isinstance(d, int) and d > 0 for d in s) for s in sizes):
        return False
    reading = stencil(rw, node)
    if reading is not None:
        return reading.try_load() is not None
    return node.op == "GlobalAveragePool" or _arguments(rw, Images(), node) is not None


def _arguments(rw: Rewriter, images: Images, node: Node) -> Arguments | None:
    """The arguments of an operator on frames; None if it cannot run on them."""
    op = rw.op(node)
    if op in ALIKE:
        return BY_AXES[op](rw, images, node)
    if op == "BatchNormalization":
        return Arguments(dict(node.attrs))
    if pooling(rw, node):
        attrs = dict(node.attrs)
        windows = {key: list(attrs[key]) for key in ("kernel_shape", "strides", "dilations") if key in attrs}
        pads = list(attrs.get("pads", [0] * 6))
        if any(v[0] != 1 for v in windows.values()) or pads[0] or pads[3]:
            return None
        return Arguments({**attrs, **{k: v[1:] for k, v in windows.items()}, "pads": [*pads[1:3], *pads[4:]]})
    return None


def _pool_globally(rw: Rewriter, source: Tensor, output: Tensor) -> list[Node]:
    """Global average pooling of a video: the mean over space, then over frames."""
    each = rw.new_variable(f"{output.name}_each", source, lambda s: (*s[:2], 1, 1))
    pool = Node("GlobalAveragePool", rw.node_name(str(output.name), "_pool"), {}, [source], [each])
    name = rw.node_name(str(output.name), "_mean")
    if rw.opset < 18:
        return [pool, Node("ReduceMean", name, {"axes": [0], "keepdims": 1}, [each], [output])]
    axes = rw.new_constant(f"{output.name}_axes", np.array([0]))
    return [pool, Node("ReduceMean", name, {"keepdims": 1}, [each, axes], [output])]


@dataclass
class _Taps(Builder):
    """A convolution as a sum over its taps in time."""

    reading: Reading

    def write(self, source: Tensor, output: Tensor) -> list[Node]:
        linear, g = self.reading.load(), self.reading.geometry
        parts = over_time(linear)
        frames = self.rw.dim(output, 0)
        assert isinstance(frames, int)
        padded = self._pad(source, g.pads[0], g.pads[g.rank])
        total: Tensor | None = None
        for j, part in enumerate(parts):
            begin = g.dilations[0] * j
            shifted = source if self._is_aligned(begin, frames, source) else self._shift(padded, begin, frames)
            last = j == len(parts) - 1
            term = output if len(parts) == 1 else self.rw.new_variable(f"{output.name}_tap{j}", output)
            self.add_map(part, self.reading, shifted, term)
            if total is not None:
                after = output if last else self.rw.new_variable(f"{output.name}_sum{j}", output)
                self.add_node("Add", [total, term], after)
                term = after
            total = term
        return self.nodes

    def _is_aligned(self, begin: int, frames: int, source: Tensor) -> bool:
        """Whether a tap reads all frames without a shift."""
        g = self.reading.geometry
        return begin == g.pads[0] and g.strides[0] == 1 and frames == self.rw.dim(source, 0)

    def _pad(self, source: Tensor, before: int, after: int) -> Tensor:
        if not before and not after:
            return source
        frames = self.rw.dim(source, 0)
        assert isinstance(frames, int)
        padded = self.rw.new_variable(f"{source.name}_padded", source, lambda s: (frames + before + after, *s[1:]))
        self.add_node("Pad", [source, self._constant(padded, "pads", [before, 0, 0, 0, after, 0, 0, 0])], padded)
        return padded

    def _shift(self, padded: Tensor, begin: int, frames: int) -> Tensor:
        step = self.reading.geometry.strides[0]
        shifted = self.rw.new_variable(f"{padded.name}_shifted", padded, lambda s: (frames, *s[1:]))
        limits = {"starts": begin, "ends": begin + (frames - 1) * step + 1, "axes": 0, "steps": step}
        self.add_node("Slice", [padded, *(self._constant(shifted, k, [v]) for k, v in limits.items())], shifted)
        return shifted

    def _constant(self, tensor: Tensor, role: str, values: Sequence[int]) -> Constant:
        return self.rw.new_constant(f"{tensor.name}_{role}", np.array(values, np.int64))
