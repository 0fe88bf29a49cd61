"""Short videos as single images: every frame becomes a tensor of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from pwopt.algebra import Values
from pwopt.algebra.linear import LinearMap
from pwopt.algebra.multirate import over_time
from pwopt.graph.ir import Node, Tensor
from pwopt.graph.operators import SOFTMAXES
from pwopt.graph.reasons import Reason
from pwopt.graph.shapes import Shape
from pwopt.maps.cost import macs
from pwopt.maps.forms import Reading
from pwopt.maps.positions import pooling, stencil
from pwopt.rewriting.builder import Builder
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.layouts import BY_AXES, Arguments, data_inputs
from pwopt.rewriting.records import Rewrite, Skip
from pwopt.rewriting.regions import Region, find_regions
from pwopt.rewriting.wording import format_count

#: The largest number of frames of a tensor that becomes single frames.
MAX_FRAMES = 16
#: The largest number of operators that a region may become. Each one costs time when a session is created.
MAX_OPERATORS = 4096
#: Operators that compute the same on each frame if only their axes change.
ALIKE = frozenset(BY_AXES) - SOFTMAXES - {"Split", "Slice", "PRelu"}


@dataclass(frozen=True)
class Frame:
    """The layout (1, C, H, W) of one frame of a tensor (1, C, T, H, W)."""

    index: int
    rank: int = 5

    @property
    def suffix(self) -> str:
        return f"_frame{self.index}"

    def axis(self, axis: int) -> int | None:
        return {1: 1, 3: 2, 4: 3}.get(axis % 5)

    def operand_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of a constant for one frame, which has no axis of time."""
        return (*shape[:-3], *shape[-2:]) if len(shape) >= 3 else tuple(shape)

    def convert(self, values: Values) -> Values:
        return np.take(values, self.index if values.shape[-3] > 1 else 0, axis=-3) if values.ndim >= 3 else values

    def shape(self, shape: Shape) -> Shape:
        return (*shape[:2], *shape[3:])

    def write_conversion(self, rw: Rewriter, source: Tensor, output: Tensor, *, enter: bool) -> list[Node]:
        raise NotImplementedError("frames are converted together")


class UnrollFrames(Pass):
    """y_t = Σ_j W_j ∗ x_{t + j}, with a tensor of its own for every frame: 3-D convolutions are sums of 2-D ones

    * Tensors are single videos of known size, (1, C, T, H, W), with at most 16 frames.
    * A region contains at least one convolution with a kernel of several positions in the plane. A convolution whose
      padding in time exceeds its kernel stays.
    * The operators around it join the region if they treat all frames alike: elementwise operators, normalisations,
      pooling in the plane, sums, Concat. Means over time become means of frames.
    * A region becomes at most 4,096 operators.

    No frame is copied, shifted or padded in time, in contrast to `frames`. onnxruntime's CPU provider runs each
    convolution and the addition after it as one operator in its blocked layout. That needs channel counts that are
    multiples of 4, so races also try this pass together with `pad-channels`.
    """

    name = "unroll-frames"
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
        refusal = _find_limit(rw, region)
        if refusal:
            return Skip(Reason("a region of {} could run frame by frame, but {}", what, refusal))
        if not self.eager:
            return Skip(f"a region of {what} could run frame by frame; only measuring can tell")
        work, size = sum(macs(rw, n) or 0 for n in region.nodes), rw.size_of(spatial[0].outputs[0])
        others = format_count(len(region.nodes) - len(spatial), "other operator")
        count = max(_count_frames(rw, n.outputs[0]) for n in region.nodes)
        done = _unroll(rw, region, f"{what} and {others} around it run on each of {count} frames")
        return done.with_signature(
            f"{what} in a region of {len(region.nodes)} with {work:,} multiply-adds on {count} frames, "
            f"the first at {size}"
        )


def _is_spatial(rw: Rewriter, node: Node) -> bool:
    """Whether a node is a convolution whose kernel covers more than one position in the plane."""
    reading = stencil(rw, node)
    return reading is not None and any(k > 1 for k in reading.geometry.kernel[1:])


def _count_frames(rw: Rewriter, tensor: Tensor) -> int:
    count = rw.dim(tensor, 2)
    assert isinstance(count, int)
    return count


def _find_limit(rw: Rewriter, region: Region) -> str:
    """Which limit a region exceeds, as a clause; else ""."""
    tensors = dict.fromkeys(t for n in region.nodes for t in (*data_inputs(rw, n), n.outputs[0]))
    longest = max(_count_frames(rw, t) for t in tensors)
    if longest > MAX_FRAMES:
        return Reason("a tensor has {} frames, and at most {} are unrolled", longest, MAX_FRAMES)
    total = sum(_count_operators(rw, n) for n in region.nodes)
    if total > MAX_OPERATORS:
        return Reason("it would become {} operators, more than {}", total, MAX_OPERATORS)
    return ""


def _count_operators(rw: Rewriter, node: Node) -> int:
    """An upper bound of the number of operators that an operator becomes."""
    reading = stencil(rw, node)
    taps = 1 if reading is None else 2 * reading.geometry.kernel[0] - 1
    return taps * max(_count_frames(rw, t) for t in (*data_inputs(rw, node), node.outputs[0]))


def _fits(rw: Rewriter, node: Node) -> bool:
    """Whether an operator can run on single frames: its inputs and outputs are single videos of known size."""
    read = data_inputs(rw, node)
    if not read or any(t.name for t in node.outputs[1:]):
        return False
    for shape in (rw.shape(t) or () for t in (*read, node.outputs[0])):
        if len(shape) != 5 or shape[0] != 1 or not all(isinstance(d, int) and d > 0 for d in shape):
            return False
    reading = stencil(rw, node)
    if reading is not None:
        frames = _count_frames(rw, reading.source), _count_frames(rw, reading.output)
        every = (find_taps(reading, t, frames[0]) for t in range(frames[1]))
        return all(every) and reading.try_load() is not None
    return node.op == "GlobalAveragePool" or _pools_time(rw, node) or _arguments(rw, Frame(0), node) is not None


def find_taps(reading: Reading, frame: int, frames: int) -> list[tuple[int, int]]:
    """The taps of a convolution that reach a frame of the input, for one frame of the output.

    Parameters
    ----------
    reading : Reading
    frame : int
        The frame of the output.
    frames : int
        The number of frames of the input.

    Returns
    -------
    list of (int, int)
        Index of the tap, frame of the input. The tap comes first that reads the same frame, if there is one.
    """
    g = reading.geometry
    at = [(j, g.strides[0] * frame + g.dilations[0] * j - g.pads[0]) for j in range(g.kernel[0])]
    return sorted((tap for tap in at if 0 <= tap[1] < frames), key=lambda tap: tap[1] != frame)


def _arguments(rw: Rewriter, layout: Frame, node: Node) -> Arguments | None:
    """The arguments of an operator on one frame; None if it cannot run on frames."""
    op = rw.op(node)
    if op in ALIKE:
        return BY_AXES[op](rw, layout, node)
    if op == "BatchNormalization":
        return Arguments(dict(node.attrs))
    if pooling(rw, node) and not _pools_time(rw, node):
        return _in_plane(node)
    return None


def _pools_time(rw: Rewriter, node: Node) -> bool:
    """Whether an operator is a mean over windows of several frames, without padding in time."""
    if rw.op(node) != "AveragePool" or not pooling(rw, node):
        return False
    pads = node.attrs.get("pads", [0] * 6)
    window = (node.attrs["kernel_shape"][0], node.attrs.get("strides", [1])[0], node.attrs.get("dilations", [1])[0])
    return window != (1, 1, 1) and not pads[0] and not pads[3]


def _in_plane(node: Node) -> Arguments | None:
    """The arguments of pooling in the plane; None if its windows are not those of single frames."""
    attrs, pads = dict(node.attrs), list(node.attrs.get("pads", [0] * 6))
    windows = {key: list(attrs[key]) for key in ("kernel_shape", "strides", "dilations") if key in attrs}
    if any(v[0] != 1 for v in windows.values()) or pads[0] or pads[3]:
        return None
    return Arguments({**attrs, **{k: v[1:] for k, v in windows.items()}, "pads": [*pads[1:3], *pads[4:]]})


def _unroll(rw: Rewriter, region: Region, reason: str) -> Rewrite:
    """Replace the operators of a region by operators on single frames."""
    inside, frames = set(region.nodes), dict[Tensor, list[Tensor]]()
    records: list[tuple[Node, _Unrolling]] = []
    for node in region.nodes:
        made = _Unrolling(rw, frames)
        made.write(node)
        output = node.outputs[0]
        if rw.must_keep(output) or any(r not in inside for r in rw.readers(output)):
            made.leave(output)
        records.append((node, made))
    for node in region.nodes:
        for frame in frames[node.outputs[0]]:
            rw.inherit_site(frame, node.outputs[0])
    done = [rw.replace([node], made.nodes, "", made.residual) for node, made in records]
    joint = Rewrite.of(reason, done)
    became = {str(n.outputs[0].name): str(frames[n.outputs[0]][0].name) for n, _ in records}
    return replace(joint, became=tuple((dict(joint.became) | became).items()))


@dataclass
class _Unrolling(Builder):
    """The operators on single frames that replace one operator.

    Attributes
    ----------
    frames : dict
        Tensor of the region → its frames, shared by all operators of the region.
    """

    frames: dict[Tensor, list[Tensor]]
    _maps: dict[tuple[int, bool], Node] = field(default_factory=dict, init=False)

    def write(self, node: Node) -> None:
        output = node.outputs[0]
        count = _count_frames(self.rw, output)
        sources = {t: self._enter(t) for t in data_inputs(self.rw, node)}
        outputs = [self._new_frame(output, output, t) for t in range(count)]
        reading = stencil(self.rw, node)
        if reading is not None:
            taps = over_time(reading.load())
            for t, frame in enumerate(outputs):
                self._convolve(reading, taps, find_taps(reading, t, len(sources[reading.source])), frame)
        elif node.op == "GlobalAveragePool":
            self._average([self._pool(node, f, output) for f in sources[node.inputs[0]]], outputs[0])
        elif _pools_time(self.rw, node):
            self._pool_windows(node, sources[node.inputs[0]], outputs)
        else:
            self._repeat(node, sources, outputs)
        self.frames[output] = outputs

    def leave(self, video: Tensor) -> None:
        """Join the frames of a tensor that operators outside the region read."""
        axes = self.rw.new_constant(f"{video.name}_time", np.array([2]))
        parts = self.frames[video]
        if len(parts) == 1:
            self.add_node("Unsqueeze", [parts[0], axes], video)
            return
        wide = [self.rw.new_variable(f"{t.name}_wide", video, lambda s: (*s[:2], 1, *s[3:])) for t in parts]
        for part, made in zip(parts, wide, strict=True):
            self.add_node("Unsqueeze", [part, axes], made)
        self.add_node("Concat", wide, video, axis=2)

    def _enter(self, video: Tensor) -> list[Tensor]:
        """The frames of a tensor."""
        if video in self.frames:
            return self.frames[video]
        count = _count_frames(self.rw, video)
        axes = self.rw.new_constant(f"{video.name}_time", np.array([2]))
        wide = [video]
        if count > 1:
            wide = [
                self.rw.new_variable(f"{video.name}_wide{t}", video, lambda s: (*s[:2], 1, *s[3:]))
                for t in range(count)
            ]
            attrs = {"axis": 2} if self.rw.opset < 18 else {"axis": 2, "num_outputs": count}
            self.nodes.append(Node("Split", self.rw.node_name(str(video.name), "_frames"), attrs, [video], wide))
        self.frames[video] = [self._new_frame(video, video, t) for t in range(count)]
        for part, frame in zip(wide, self.frames[video], strict=True):
            self.add_node("Squeeze", [part, axes], frame)
        return self.frames[video]

    def _new_frame(self, name: Tensor, like: Tensor, index: int) -> Tensor:
        layout = Frame(index)
        return self.rw.new_variable(f"{name.name}{layout.suffix}", like, layout.shape)

    def _convolve(
        self, reading: Reading, taps: Sequence[LinearMap], at: Sequence[tuple[int, int]], out: Tensor
    ) -> None:
        """One frame of a convolution: the sum over the taps that reach a frame of its input."""
        total: Tensor | None = None
        for k, (j, source) in enumerate(at):
            last = k == len(at) - 1
            term = out if len(at) == 1 else self.rw.new_variable(f"{out.name}_tap{j}", out)
            # the first tap has the bias
            linear = LinearMap.of(taps[j].geometry, taps[j].weight, taps[0].bias * (k == 0))
            self._apply(linear, reading, (j, k == 0), self.frames[reading.source][source], term)
            if total is not None:
                after = out if last else self.rw.new_variable(f"{out.name}_sum{j}", out)
                self.add_node("Add", [term, total], after)
                term = after
            total = term

    def _apply(self, linear: LinearMap, like: Reading, key: tuple[int, bool], source: Tensor, output: Tensor) -> None:
        """Apply a map; all frames share its weights."""
        first = self._maps.get(key)
        if first is None:
            start = len(self.nodes)
            self.add_map(linear, like, source, output)
            if len(self.nodes) == start + 1:
                self._maps[key] = self.nodes[start]
            return
        name = self.rw.node_name(str(output.name), "_conv")
        self.nodes.append(Node(first.op, name, dict(first.attrs), [source, *first.inputs[1:]], [output]))

    def _average(self, terms: Sequence[Tensor], output: Tensor) -> None:
        self.add_node("Identity" if len(terms) == 1 else "Mean", terms, output)

    def _pool(self, node: Node, source: Tensor, output: Tensor, **attrs: object) -> Tensor:
        """Pooling of one frame in the plane."""
        plane = self.rw.shape(output)
        assert plane is not None
        made = self.rw.new_variable(f"{source.name}_pooled", source, lambda s: (*s[:2], *plane[3:]))
        self.add_node(node.op, [source], made, **attrs)
        return made

    def _pool_windows(self, node: Node, sources: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Means over windows of several frames: means of frames, each pooled in the plane."""
        attrs = node.attrs
        windows = {key: list(attrs[key]) for key in ("kernel_shape", "strides", "dilations") if key in attrs}
        length, stride, dilation = (windows.get(k, [1])[0] for k in ("kernel_shape", "strides", "dilations"))
        pads = list(attrs.get("pads", [0] * 6))
        plane: dict[str, object] = {**attrs, **{k: v[1:] for k, v in windows.items()}, "pads": [*pads[1:3], *pads[4:]]}
        plain = all(d == 1 for k, v in windows.items() if k != "dilations" for d in v[1:]) and not any(pads)
        pooled: dict[int, Tensor] = {}
        for t, output in enumerate(outputs):
            window = [stride * t + dilation * j for j in range(length)]
            for s in window:
                if s not in pooled:
                    pooled[s] = sources[s] if plain else self._pool(node, sources[s], node.outputs[0], **plane)
            self._average([pooled[s] for s in window], output)

    def _repeat(self, node: Node, sources: dict[Tensor, list[Tensor]], outputs: Sequence[Tensor]) -> None:
        """Repeat an operator on every frame. Frames share a constant that is the same for all of them."""
        made: dict[tuple[int, int], Tensor] = {}
        for t, output in enumerate(outputs):
            arguments = _arguments(self.rw, Frame(t), node)
            assert arguments is not None
            inputs: list[Tensor] = []
            for i, tensor in enumerate(node.inputs):
                if tensor in sources:
                    inputs.append(sources[tensor][t if len(sources[tensor]) > 1 else 0])
                elif i in arguments.constants:
                    held = self.rw.constant(tensor)
                    varies = held is not None and len(held.shape) >= 3 and held.shape[-3] > 1
                    key = (i, t if varies else 0)
                    if key not in made:
                        name = f"{node.outputs[0].name}_argument{i}" + (f"_frame{t}" if varies else "")
                        made[key] = self.rw.new_constant(name, arguments.constants[i]())
                    inputs.append(made[key])
                else:
                    inputs.append(tensor)
            name = self.rw.node_name(str(output.name), f"_{node.op.lower()}")
            self.nodes.append(Node(node.op, name, arguments.attrs, inputs, [output], domain=node.domain))
