"""Scales, shifts and normalisations fold into the linear maps before or after them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from pwopt.algebra import Values
from pwopt.algebra.geometry import Refusal, RefusedError, compose_geometry
from pwopt.algebra.linear import LinearMap, compose
from pwopt.graph.dtypes import cancelling
from pwopt.graph.ir import Node, Tensor
from pwopt.graph.operators import VIEWS, WEIGHTED_OPERATORS
from pwopt.graph.provenance import credit
from pwopt.maps import commute, emit, forms, idioms
from pwopt.maps.commute import Affine
from pwopt.maps.forms import Reading
from pwopt.rewriting.driver import Pass, Rewriter, describe
from pwopt.rewriting.records import Rewrite, Skip

#: By what part of its constants a model may grow, since maps that share a weight get weights of their own.
UNSHARED = 1 / 20
#: How many operators one scale may travel past; real models need a handful.
MAX_REACH = 32


@dataclass
class Plan:
    """Maps that take a scale and shift over, on their output or input side, constants that do, and what changes."""

    after: list[tuple[Reading, Affine]] = field(default_factory=list)
    before: list[tuple[Reading, Affine]] = field(default_factory=list)
    held: list[tuple[Tensor, Affine]] = field(default_factory=list)
    changed: list[Tensor] = field(default_factory=list)
    steps: int = 0

    def maps(self) -> list[Reading]:
        return [r for r, _ in (*self.after, *self.before)]


class FoldAffine(Pass):
    """A(Wx + b) = (AW)x + Ab and W(Ax + t) + b = (WA)x + (Wt + b) for diagonal A.

    BatchNormalization, and Mul, Div, Add, Sub, Neg by a constant per channel, fold into the map that feeds
    them, else into every map that reads them, through operators that let them pass (Concat, pooling,
    Resize, Transpose…: `pwopt.maps.commute`). Constants on the way, such as tables of positions, take their part. A
    shift in front of zero padding does not fold, a scale does. What neither side takes merges with its neighbour into
    one BatchNormalization. Only if operators disappear. A weight that others read too is copied if that is less to
    read than what the operator that goes reads and writes, and if the model grows little by it (heads that share
    convolutions between levels, but not normalisations: Tan et al., "EfficientDet", 2020).
    Ioffe and Szegedy, "Batch Normalization" (2015); bias fusion as in every compiler.
    """

    name = "fold-affine"

    def __init__(self) -> None:
        self._spare: int | None = None

    def start(self, rw: Rewriter) -> None:
        self._spare = int(UNSHARED * rw.stored) if self._spare is None else self._spare
        self._fused = idioms.fused_by_runtime(rw)

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        reading = forms.read(rw, node)
        if isinstance(reading, Refusal):
            return Skip(f"{node.op} stays: {reading.reason}") if node.op == "BatchNormalization" else None
        if reading is None or not reading.geometry.diagonal or len(reading.nodes) > 1 or reading.turned:
            return None
        if node in self._fused:
            return Skip(f"it belongs to a {self._fused[node]} that onnxruntime runs as one operator")
        affine = Affine(reading.load().at_rank(0), reading.axis)
        up, down = Plan(), Plan()
        alone = "there is a constant" if rw.constant(reading.source) is not None else rw.crowd(reading.source)
        up_refusal = alone or self._lift(rw, reading.source, affine, up)
        if not up_refusal:
            done = rw.attempt(self._apply, rw, reading, up)
            if isinstance(done, Rewrite):
                return done
            up_refusal = done.reason
        down_refusal = rw.pinned(reading.output) or self._sink(rw, reading.output, affine, down)
        if not down_refusal:
            done = rw.attempt(self._apply, rw, reading, down)
            if isinstance(done, Rewrite):
                return done
            down_refusal = done.reason
        if node.op != "BatchNormalization" and not _beside_a_map(rw, reading):
            return None
        return Skip(f"before it, {up_refusal}; after it, {down_refusal}")

    def _lift(self, rw: Rewriter, tensor: Tensor, affine: Affine, plan: Plan) -> str:
        """Plan for `affine` to be applied above `tensor`, which only one node reads; a reason if that fails."""
        producer = rw.producer(tensor)
        plan.steps += 1
        if rw.constant(tensor) is not None:
            return self._hold(rw, tensor, affine, plan)
        if producer is None:
            return "there is no operator"
        if plan.steps > MAX_REACH:
            return f"more than {MAX_REACH} operators lie between"
        reading = forms.read(rw, producer)
        if isinstance(reading, Reading) and reading.kind in emit.FORMS and producer not in self._fused:
            return self._take(rw, reading, affine, plan, after=True)
        alternatives = commute.lift(rw, producer, affine)
        if isinstance(alternatives, Refusal):
            if isinstance(reading, Refusal) and rw.is_a(producer, "Conv", "ConvTranspose", "MatMul"):
                return f"{producer.op} cannot take it: {reading.reason}"
            return alternatives.reason
        reason = ""
        for moves in alternatives:
            trial = Plan(list(plan.after), list(plan.before), [*plan.held], [*plan.changed], plan.steps)
            reason = ""
            for source, moved in moves:
                if moved.scales or moved.shifts:
                    trial.changed.append(source)
                    reason = _crowd(rw, source) or self._lift(rw, source, moved, trial)
                plan.steps = trial.steps
                if reason:
                    break
            if not reason:
                plan.after, plan.before = trial.after, trial.before
                plan.held, plan.changed = trial.held, trial.changed
                return ""
        return reason

    @staticmethod
    def _hold(rw: Rewriter, tensor: Tensor, affine: Affine, plan: Plan) -> str:
        """Add a constant that only one operator reads to the plan; a reason if it cannot take `affine` over."""
        if rw.shared(tensor):
            return f"the constant {tensor.name!r} is shared"
        plan.changed = [t for t in plan.changed if t is not tensor]
        plan.held.append((tensor, affine))
        return ""

    def _sink(self, rw: Rewriter, tensor: Tensor, affine: Affine, plan: Plan) -> str:
        """Plan for every reader of `tensor` to apply `affine` itself; a reason if one cannot."""
        plan.steps += 1
        if plan.steps > MAX_REACH:
            return f"more than {MAX_REACH} operators lie between"
        readers = rw.readers(tensor)
        if not readers:
            return "nothing reads it"
        for reader in readers:
            reading = forms.linear(rw, reader, turned=True)
            if reading is not None and reading.source is tensor and reading.kind in emit.FORMS:
                reason = self._take(rw, forms.weighted(rw, reader) or reading, affine, plan, after=False)
                if reader in self._fused:
                    reason = f"{reader.op} belongs to a {self._fused[reader]}"
                if reason:
                    return reason
                continue
            moves = commute.sink(rw, reader, tensor, affine)
            if isinstance(moves, Refusal):
                return moves.reason
            for output, moved in moves:
                if not moved.scales and not moved.shifts:
                    continue
                plan.changed.append(output)
                reason = rw.pinned(output) or self._sink(rw, output, moved, plan)
                if reason:
                    return reason
        return ""

    def _take(self, rw: Rewriter, reading: Reading, affine: Affine, plan: Plan, *, after: bool) -> str:
        """Add a map to the plan if it can take `affine` over exactly; a reason if not."""
        axis = reading.axis if after else reading.source_axis
        if axis is not None and affine.axis is not None and axis != affine.axis:
            return f"{reading.node.op} acts on axis {axis}, not {affine.axis}"
        if any(reading.node is other.node for other in plan.maps()):
            return f"{reading.node.op} would take it twice"
        g = reading.geometry
        if not g.diagonal:  # two scales and shifts always make one
            wide = affine.map.spread(g.out_channels if after else g.in_channels).geometry
            composed = compose_geometry(wide, g) if after else compose_geometry(g, wide)
            if isinstance(composed, Refusal):
                return composed.reason
        (plan.after if after else plan.before).append((reading, affine))
        return ""

    def _copied(self, rw: Rewriter, reading: Reading, plan: Plan) -> int:
        """Bytes of the shared weights that a plan copies; refused if that costs more than it saves."""
        weights = [r.weight_input for r in plan.maps() if r.weighted and rw.shared(r.weight_input)]
        if not weights:
            return 0
        listed, copies = ", ".join(sorted({repr(w.name) for w in weights})), sum(rw.elements(w) or 0 for w in weights)
        size, dtype = rw.size_of(reading.output), rw.dtype(reading.output)
        if size is None or dtype is None or copies > 2 * math.prod(size):
            raise RefusedError(f"the weight {listed} is shared, and a copy would be more to read than is saved")
        if copies * dtype.itemsize > (self._spare or 0):
            raise RefusedError(f"the weight {listed} is shared, and the model would grow by more than {UNSHARED:.0%}")
        return copies * dtype.itemsize

    def _apply(self, rw: Rewriter, reading: Reading, plan: Plan) -> Rewrite:
        """Carry a plan out, or refuse before anything is changed."""
        edits = []
        direct = len(plan.after) == 1 and plan.after[0][0].output is reading.source
        for side in (plan.after, plan.before):
            for target, affine in side:
                composed = _compose(rw, target, affine, after=side is plan.after)
                axis = target.axis if target.axis is not None else affine.axis
                output = reading.output if direct else target.output
                source = reading.source if target.source is reading.output else target.source
                written = emit.write(rw, composed, target, source, output, axis)
                edits.append((target, written))
        copied, held = self._copied(rw, reading, plan), _held(rw, plan)
        spared = 1 + sum(len(t.nodes) for t, _ in edits) - sum(len(w.nodes) for _, w in edits)
        if spared < 1 - _joins_views(rw, reading):
            raise RefusedError("merging them would not save an operator")
        if not direct and not edits and not held:
            raise RefusedError("nothing would take it over")
        self._spare = (self._spare or 0) - copied
        takers = [*(describe(t.node) for t, _ in edits), *(f"the constant {t.name!r}" for t, *_ in held)]
        reason = f"{describe(reading.node)} folds into {' and '.join(takers[:3])}" + " and more" * (len(takers) > 3)
        residual = max((*(w.residual for _, w in edits), *(lost for *_, lost in held)), default=0.0)
        if direct:
            ((target, written),) = edits
            return rw.replace([*target.nodes, reading.node], written.nodes, reason, residual)
        records = [rw.replace(target.nodes, written.nodes, reason) for target, written in edits]
        for _, written in edits:
            credit(written.nodes[-1], reading.nodes)
        for tensor, values, _ in held:
            (reader,) = rw.readers(tensor)
            if rw.producer(tensor) is None:  # else somebody makes it yet
                rw.release([tensor.name])
            rw.reroute(tensor, rw.new_constant(tensor.name, values))
            credit(reader, reading.nodes)
            rw.enqueue_around(reader)
        if reading.node in rw and (rw.readers(reading.output) or rw.pinned(reading.output)):
            rw.bypass(reading.node, reading.source, keep_output=bool(plan.after or held))
        elif reading.node in rw:
            rw.remove(reading.node)
        renamed = {tensor.name: rw.rename(tensor, "_unscaled") for tensor in plan.changed}
        done = Rewrite.of(reason, records, renamed)
        return replace(done, removed=(describe(reading.node), *done.removed), residual=residual)


def _held(rw: Rewriter, plan: Plan) -> list[tuple[Tensor, Values, float]]:
    """What constants hold once they have taken a scale and shift over, and by how much rounding changed that."""
    found = []
    for tensor, affine in plan.held:
        value, dtype = rw.value(tensor), rw.dtype(tensor)
        if value is None or dtype is None:
            raise RefusedError(f"the constant {tensor.name!r} is not finite")
        along = (
            (1,) * value.ndim
            if affine.axis is None
            else tuple(-1 if a == affine.axis else 1 for a in range(value.ndim))
        )
        exact = value * affine.map.scale.reshape(along) + affine.map.bias.reshape(along)
        low = emit.round_values(exact, dtype)
        found.append((tensor, low, emit.relative_rounding(low, exact)))
    return found


def _crowd(rw: Rewriter, tensor: Tensor) -> str:
    """`View.crowd`, but for those who only ask for its shape, which a scale or a shift leaves alone."""
    numbers = [r for r in rw.readers(tensor) if not rw.is_a(r, "Shape", "Size")]
    return rw.pinned(tensor) if len(numbers) == 1 else rw.crowd(tensor)


def _joins_views(rw: Rewriter, reading: Reading) -> bool:
    """Whether two changes of view meet where a BatchNormalization goes: together they are one, or nothing (LeViT)."""
    before, after = rw.producer(reading.source), rw.sole_reader(reading.output)
    inside = rw.is_a(before, *VIEWS) and rw.is_a(after, *VIEWS) and not _crowd(rw, before.inputs[0])
    return inside and reading.node.op == "BatchNormalization"


def _beside_a_map(rw: Rewriter, reading: Reading) -> bool:
    """Whether a convolution or matrix product feeds or reads it, so that a refusal is worth telling."""
    neighbours = [rw.producer(reading.source), *rw.readers(reading.output)]
    return any(n is not None and rw.op(n) in WEIGHTED_OPERATORS for n in neighbours)


def _compose(rw: Rewriter, target: Reading, affine: Affine, *, after: bool) -> LinearMap:
    linear = target.load()
    precision = cancelling(rw.dtype(target.output))
    diagonal = affine.map
    return compose(diagonal, linear, precision) if after else compose(linear, diagonal, precision)
