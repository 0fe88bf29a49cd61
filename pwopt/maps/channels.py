"""Channel analysis: which channels are the same constant for every input, and which may be removed.

The forward analysis follows constant channels (a filter of zeros gives its bias) through every operator that acts on
each channel alone. The backward analysis finds the removable channels: wherever a removable channel enters a dense map,
it is multiplied by zeros, or it is a constant that the bias of that map can absorb. Channels that must be kept or
removed together (residual sums, depthwise convolutions, gates) constrain each other until a fixpoint is reached.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pwopt.algebra import Array
from pwopt.algebra.unions import Unions
from pwopt.graph import attributes
from pwopt.graph.constants import evaluate
from pwopt.graph.ir import Node, Tensor, Variable
from pwopt.graph.operators import ACTIVATIONS, ARITHMETIC
from pwopt.graph.reasons import Reason
from pwopt.graph.view import View
from pwopt.maps import commute, forms, selections
from pwopt.maps.forms import Reading
from pwopt.maps.scans import LARGEST_INPUT, NEGLIGIBLE, Mask, Scanner
from pwopt.maps.small_numbers import SmallNumbers

#: Channel counts stay multiples of this as far as they are: onnxruntime's CPU provider keeps channels in blocks. A
#: MobileNetV2 pruned to odd widths runs at 0.6 times the speed of the whole one; to multiples of 4, 8 and 16, at
#: 1.06, 1.15 and 1.10 times (AVX-512).
CHANNEL_MULTIPLE = 8


@dataclass
class Channels:
    """The channels of one tensor.

    Attributes
    ----------
    tensor : Tensor
    axis : int
    value : array
        The value of each channel at every position and for every input; NaN if it varies.
    radius : array
        An upper bound of the deviation from that value, for inputs up to `LARGEST_INPUT`.
    size : array
        The magnitude of a channel that varies, for inputs of magnitude one; at most 1.
    gone : array of bool
        Whether it may be removed.
    """

    tensor: Tensor
    axis: int
    value: Array
    radius: Array
    size: Array
    gone: Mask = field(default_factory=lambda: np.zeros(0, bool))

    @property
    def constant(self) -> Mask:
        return ~np.isnan(self.value)


@dataclass(frozen=True)
class Link:
    """`count` channels of `a` from `start_a` on, each of which is kept or removed together with one of `b` from
    `start_b`."""

    a: Channels
    b: Channels
    start_a: int
    start_b: int
    count: int


@dataclass
class Flow:
    """How channels pass one operator: through a dense map, one by one along links, or not at all."""

    node: Node
    reading: Reading | None = None
    links: tuple[Link, ...] = ()
    dense: bool = False


class Analysis:
    """Facts about all channels of a graph.

    Attributes
    ----------
    alignment : int
        Channel counts that are multiples of it, or of one of its divisors, remain such multiples.
    of : dict of tensor id to Channels
    flows : list of Flow
    fixed : dict of tensor id to str
        Why the channels of a tensor cannot change: an operator that is neither a map nor a link uses them.
    multiplied : dict of tensor id to Reading
        Outputs of depthwise convolutions that make several channels of each.
    small : SmallNumbers
    """

    def __init__(self, view: View, scan: Scanner, alignment: int = CHANNEL_MULTIPLE) -> None:
        self.view, self.small, self.alignment = view, SmallNumbers(view, scan), alignment
        self.of: dict[Tensor, Channels] = {}
        self.flows: list[Flow] = []
        self.fixed: dict[Tensor, str] = {}
        self.multiplied: dict[Tensor, Reading] = {}
        self._joined: dict[Tensor, str] = {}
        self._at: dict[Tensor, list[int]] = {}
        covered: set[Node] = set()
        for node in view.nodes():
            if node not in covered:
                flow = self._forward(node)
                covered.update(n for n in flow.reading.nodes) if flow.reading is not None else None
                self.flows.append(flow)
        self._find_removable()

    # Forward: constants

    def _forward(self, node: Node) -> Flow:
        reading = forms.weighted(self.view, node) or forms.linear(self.view, node)
        if reading is not None and reading.weighted and reading.nodes[0] is node:
            return self._map(node, reading)
        if reading is not None and reading.kind == "diagonal":
            return self._diagonal(node, reading)
        op = self.view.op(node)
        if op == "Concat":
            return self._concat(node)
        if op == "Split":
            return self._split(node)
        if op in ARITHMETIC and self.view.opset >= 7:
            return self._pair(node, op)
        return self._alone(node, op)

    def _know(self, tensor: Tensor, axis: int, value: Array, radius: Array, size: Array) -> Channels:
        self.of[tensor] = Channels(tensor, axis, value, radius, np.minimum(size, 1.0))
        return self.of[tensor]

    def _map(self, node: Node, reading: Reading) -> Flow:
        g, scan = reading.geometry, self.small.scan(reading)
        if scan is None or reading.axis is None or self.view.is_shared(reading.weight_input):
            return Flow(node)
        source = self._input(reading.source, reading.axis, g.in_channels)
        value: Array = np.full(g.out_channels, np.nan)
        radius: Array = np.zeros(g.out_channels)
        tiny = self.small.find_vanishing(reading, scan)
        anchored = source is not None and bool(source.constant.any())
        if tiny.any() or anchored:
            linear = reading.load()
            value[tiny], radius[tiny] = linear.bias[tiny], scan.rows[tiny] * LARGEST_INPUT
            if anchored and source is not None and g.groups == 1:
                weight = self.small.flush(reading, linear.weight)
                taps = weight.reshape(*weight.shape[:2], -1)
                fixed = source.constant & ((source.value == 0) | (not g.padded and not g.transposed))
                still = ~np.any(np.abs(taps[:, ~fixed]).sum(-1), axis=1) & ~tiny
                value[still] = linear.bias[still] + taps[still][:, fixed].sum(-1) @ source.value[fixed]
                radius[still] = np.abs(taps[still][:, fixed]).sum(-1) @ source.radius[fixed]
            elif anchored and source is not None and self._depthwise(reading):
                taps = linear.weight.reshape(g.out_channels, -1)
                fixed = source.constant & ((source.value == 0) | (not g.padded and not g.transposed))
                value = np.where(fixed & ~tiny, linear.bias + taps.sum(1) * source.value, value)
                radius = np.where(fixed & ~tiny, np.abs(taps).sum(1) * source.radius, radius)
        output = self._know(reading.output, reading.axis, value, radius, scan.rows)
        if g.groups == 1:
            return Flow(node, reading, dense=True)
        links = (Link(source, output, 0, 0, g.in_channels),) if source is not None and self._depthwise(reading) else ()
        return Flow(node, reading, links)

    @staticmethod
    def _depthwise(reading: Reading) -> bool:
        g = reading.geometry
        return g.groups == g.in_channels == g.out_channels

    def _input(self, tensor: Tensor, axis: int | None, count: int | None = None) -> Channels | None:
        known = self.of.get(tensor)
        fits = known is not None and axis in (None, known.axis) and count in (None, len(known.value))
        return known if fits else None

    def _diagonal(self, node: Node, reading: Reading) -> Flow:
        source, linear = self._input(reading.source, reading.axis), reading.try_load()
        if source is None or linear is None:
            return Flow(node)
        wide = linear.broadcast(len(source.value))
        if len(wide.scale) != len(source.value):
            return Flow(node)
        value = np.where(wide.scale == 0, wide.bias, wide.scale * source.value + wide.bias)
        scale = np.abs(wide.scale)
        output = self._know(reading.output, source.axis, value, scale * source.radius, scale * source.size)
        return Flow(node, reading, (Link(source, output, 0, 0, len(value)),))

    def _concat(self, node: Node) -> Flow:
        axis = attributes.read_concat_axis(self.view, node)
        widths = [self.view.dim(t, axis) if axis is not None else None for t in node.inputs]
        if axis is None or not all(isinstance(w, int) for w in widths):
            return Flow(node)
        sizes = [w for w in widths if isinstance(w, int)]
        parts = [self._input(t, axis, w) for t, w in zip(node.inputs, sizes, strict=True)]
        value = np.concatenate([p.value if p else np.full(w, np.nan) for p, w in zip(parts, sizes, strict=True)])
        radius = np.concatenate([p.radius if p else np.zeros(w) for p, w in zip(parts, sizes, strict=True)])
        size = np.concatenate([p.size if p else np.ones(w) for p, w in zip(parts, sizes, strict=True)])
        if not any(parts) or len(set(node.inputs)) < len(node.inputs):
            return Flow(node)
        output = self._know(node.outputs[0], axis, value, radius, size)
        starts = np.cumsum([0, *sizes])
        links = [Link(p, output, 0, int(s), len(p.value)) for p, s in zip(parts, starts, strict=False) if p]
        whole = all(p is not None for p in parts)
        if whole:
            return Flow(node, None, tuple(links))
        self._joined[output.tensor] = Reason("{} {!r} joins channels of which nothing is known", node.op, node.name)
        return Flow(node, None, (*links, _stuck(output, parts, sizes)))

    def _split(self, node: Node) -> Flow:
        parts = selections.read_split(self.view, node)
        source = self._input(node.inputs[0], parts[0].axis) if parts else None
        if parts is None or source is None or not all(t.name for t in node.outputs):
            return Flow(node)
        links, start = [], 0
        for tensor, part in zip(node.outputs, parts, strict=True):
            count = part.geometry.out_channels
            here = slice(start, start + count)
            output = self._know(tensor, source.axis, source.value[here], source.radius[here], source.size[here])
            links.append(Link(source, output, start, 0, count))
            start += count
        return Flow(node, None, tuple(links))

    def _pair(self, node: Node, op: str) -> Flow:
        view, shape = self.view, self.view.shape(node.outputs[0])
        parts = [self._input(t, None) for t in node.inputs]
        known = [p for p in parts if p is not None]
        if not known or shape is None or len(set(node.inputs)) < len(node.inputs):
            return Flow(node)
        axis, count = known[0].axis, len(known[0].value)
        alike = all(
            p is not None and p.axis == axis and len(p.value) == count and view.rank(p.tensor) == len(shape)
            for p in parts
        )
        if not alike or view.dim(node.outputs[0], axis) != count:
            return Flow(node)
        a, b = known[0], known[-1]
        value: Array
        radius: Array
        size: Array
        if op in ("Add", "Sub", "Sum"):
            signs = [-1.0 if op == "Sub" and i else 1.0 for i in range(len(known))]
            value = np.sum([s * p.value for s, p in zip(signs, known, strict=True)], axis=0)
            radius = np.sum([p.radius for p in known], axis=0)
            size = np.asarray(np.max([p.size for p in known], axis=0), np.float64)
        elif op == "Div":
            value, radius, size = np.full(count, np.nan), np.zeros(count), a.size
        else:
            exact = (a.constant & b.constant) & (a.radius == 0) & (b.radius == 0)
            zero = ((a.value == 0) & (a.radius == 0)) | ((b.value == 0) & (b.radius == 0))
            value = np.where(zero, 0.0, np.where(exact, a.value * b.value, np.nan))
            radius, size = np.zeros(count), a.size * b.size
        output = self._know(node.outputs[0], axis, value, radius, size)
        return Flow(node, None, tuple(Link(p, output, 0, 0, count) for p in known))

    def _alone(self, node: Node, op: str) -> Flow:
        """Operators with one data input."""
        source = self._input(node.inputs[0], None) if node.inputs else None
        if source is None or len([t for t in node.outputs if t.name]) != 1:
            return Flow(node)
        value: Array
        radius: Array
        constant = source.constant
        if op in ACTIVATIONS:
            if any(self.view.elements(t) != 1 for t in node.inputs[1:] if t.name):
                return Flow(node)
            value, axis = np.full(len(constant), np.nan), source.axis
            if constant.any():
                value[constant] = self.evaluate(node, source.value[constant])
            steepest = self._lipschitz(node, op)
            radius = source.radius * steepest if np.isfinite(steepest) else np.where(source.radius == 0, 0.0, np.inf)
        else:
            rule = commute.rule(self.view, node)
            if rule is None or (rule.axes is not None and source.axis not in rule.axes) or not self._keeps(node, op):
                return Flow(node)
            axis = source.axis if rule.axes is None else rule.axes[source.axis]
            value = source.value if rule.shift else np.where(source.value == 0, 0.0, np.nan)
            radius = source.radius if rule.shift else np.where(source.radius == 0, 0.0, np.inf)
        value = np.where(np.isfinite(radius), value, np.nan)
        output = self._know(node.outputs[0], axis, value, np.where(np.isnan(value), 0.0, radius), source.size)
        return Flow(node, None, (Link(source, output, 0, 0, len(constant)),))

    def evaluate(self, node: Node, values: Array) -> Array:
        """The results of an elementwise operator; NaN where they are not known or not finite."""
        dtype = self.view.dtype(node.inputs[0])
        numbers = {t.name: self.view.raw(t) for t in node.inputs[1:] if t.name}
        if dtype is None or any(v is None for v in numbers.values()):
            return np.full(len(values), np.nan)
        feeds = {node.inputs[0].name: values.astype(dtype), **{k: v for k, v in numbers.items() if v is not None}}
        results = evaluate(node, feeds, self.view.opset)
        if isinstance(results, str):
            return np.full(len(values), np.nan)
        found = np.asarray(results[0], np.float64)
        return np.where(np.isfinite(found), found, np.nan)

    @staticmethod
    def _lipschitz(node: Node, op: str) -> float:
        steepness = {"LeakyRelu": ("alpha", 0.01), "Elu": ("alpha", 1.0), "HardSigmoid": ("alpha", 0.2)}.get(op)
        slope = abs(float(node.attrs.get(*steepness))) if steepness else 0.0
        return max(ACTIVATIONS[op], slope)

    def _keeps(self, node: Node, op: str) -> bool:
        """Whether the operator remains valid when channels are removed."""
        if op in ("Expand", "Tile", "PRelu"):
            return False
        if op in ("Resize", "Upsample"):
            return not attributes.is_resized_by_sizes(self.view, node)
        if op == "Squeeze":  # without axes, it would take a single channel along
            return attributes.read_axes(self.view, node) is not None
        return op != "Reshape" or (self.view.opset >= 5 and self.view.integers(node.inputs[1]) is not None)

    # Backward: which channels may go

    def _find_removable(self) -> None:
        view = self.view
        at: dict[Tensor, list[Flow]] = {}
        linked: set[tuple[Tensor, Node]] = set()
        for flow in self.flows:
            for link in flow.links:
                for end in (link.a, link.b):
                    at.setdefault(end.tensor, []).append(flow)
                    linked.add((end.tensor, flow.node))
        for known in self.of.values():
            if view.must_keep(known.tensor):
                self.fixed[known.tensor] = view.must_keep(known.tensor)
        read: list[tuple[Reading, Channels]] = []
        for flow in self.flows:
            through = flow.reading if flow.dense else None
            for t in (*flow.node.inputs, *(flow.reading.nodes[-1].outputs if flow.reading else flow.node.outputs)):
                side = self.of.get(t)
                if side is None or (t, flow.node) in linked or (through is not None and t is through.output):
                    continue
                if through is not None and t is through.source and self._enters(through, side):
                    read.append((through, side))
                elif flow.reading is not None and t is flow.reading.output and has_multiplier(flow.reading):
                    self.multiplied[t] = flow.reading
                else:
                    self.fixed.setdefault(
                        t, Reason("{} {!r} holds the channels of {!r}", flow.node.op, flow.node.name, t.name)
                    )
        for known in self.of.values():
            known.gone = np.full(len(known.value), known.tensor not in self.fixed.keys() | self.multiplied)
        for reading, side in read:
            if side.gone.any():
                side.gone &= self._absorbable(reading, side)
        pending = deque(self.flows)
        self._settle(pending, at)
        changed = True
        while changed:
            changed = False
            for known in self.of.values():
                spare = _spare(known.gone, self.alignment)
                if len(spare):
                    known.gone[spare] = False
                    self._settle(deque(at.get(known.tensor, ())), at)
                    changed = True

    @staticmethod
    def _settle(pending: deque[Flow], at: dict[Tensor, list[Flow]]) -> None:
        while pending:
            for link in pending.popleft().links:
                a = link.a.gone[link.start_a : link.start_a + link.count]
                b = link.b.gone[link.start_b : link.start_b + link.count]
                both = a & b
                for side, mask in ((link.a, a), (link.b, b)):
                    if not np.array_equal(mask, both):
                        mask[:] = both
                        pending.extend(at[side.tensor])

    def _enters(self, reading: Reading, source: Channels) -> bool:
        """Whether a dense map whose weights can be edited reads these channels."""
        mapped = self.small.scan(reading) is not None
        return mapped and reading.axis == source.axis and len(source.value) == reading.geometry.in_channels

    def _absorbable(self, reading: Reading, source: Channels) -> Mask:
        """Channels that a dense map does not need: the weights are zero, or its bias can absorb the constant."""
        scan, g = self.small.scan(reading), reading.geometry
        assert scan is not None
        unread = scan.columns == 0
        foldable = source.constant & ((source.value == 0) | (not g.padded and not g.transposed))
        return np.asarray(unread | (foldable & self._negligible(reading, source)))

    def _negligible(self, reading: Reading, source: Channels) -> Mask:
        """Channels whose deviation from their constants is too small to change any sum of the map in float32."""
        loose = source.constant & (source.radius > 0)
        linear = reading.try_load() if loose.any() else None
        if linear is None:
            return ~loose
        size = np.abs(linear.weight).reshape(*linear.weight.shape[:2], -1).sum(-1)
        others = size @ np.where(source.constant, 0.0, source.size) + np.abs(linear.bias)
        return np.asarray(~loose | np.all(size * source.radius <= NEGLIGIBLE * others[:, None], axis=0))

    def held(self, tensors: Iterable[Channels], but: Tensor | None = None) -> str:
        """Why these tensors cannot change channels, or ""; `but` may come from a map with a channel multiplier."""
        for t in (known.tensor for known in tensors):
            if t in self.fixed or t in self._joined:
                return self.fixed.get(t) or self._joined[t]
            if t in self.multiplied and t is not but:
                return Reason("{!r} comes from a depthwise convolution with a channel multiplier", t.name)
        return ""

    def flows_at(self, component: Sequence[Channels]) -> list[Flow]:
        """The operators that produce or read one of these tensors, in order."""
        if not self._at:
            for i, flow in enumerate(self.flows):
                nodes = flow.reading.nodes if flow.reading is not None else (flow.node,)
                for t in (t for n in nodes for t in (*n.inputs, *n.outputs)):
                    self._at.setdefault(t, []).append(i)
        return [self.flows[i] for i in sorted({i for c in component for i in self._at.get(c.tensor, ())})]

    def components(self) -> Iterator[list[Channels]]:
        """Sets of tensors whose channels are linked, in the order of their first operators."""
        sets = Unions[Tensor]()
        for flow in self.flows:
            for link in flow.links:
                sets.join(link.b.tensor, link.a.tensor)
        groups: dict[Tensor, list[Channels]] = {}
        for known in self.of.values():
            groups.setdefault(sets.root(known.tensor), []).append(known)
        yield from groups.values()


def has_multiplier(reading: Reading) -> bool:
    """Whether a map is a depthwise convolution with a channel multiplier."""
    g = reading.geometry
    return reading.kind == "conv" and 1 < g.groups == g.in_channels < g.out_channels


def _spare(gone: Mask, alignment: int) -> NDArray[np.intp]:
    """Removable channels that are kept, so that the count remains a multiple of the alignment and is not zero."""
    kept = int((~gone).sum())
    if kept == len(gone):
        return np.zeros(0, np.intp)
    block = math.gcd(len(gone), alignment)
    wanted = -(-max(kept, 1) // block) * block
    return np.flatnonzero(gone)[: wanted - kept]


def _stuck(output: Channels, parts: Sequence[Channels | None], sizes: Sequence[int]) -> Link:
    """A link that keeps the channels of those inputs of a Concat about which nothing is known."""
    fixed = np.concatenate([np.full(w, p is not None) for p, w in zip(parts, sizes, strict=True)])
    return Link(Channels(Variable(""), 0, output.value, output.radius, output.size, fixed), output, 0, 0, len(fixed))
