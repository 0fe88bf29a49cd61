"""Scale, bias and normalisation folding: they become part of the linear maps before or after them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from pwopt.algebra import Array, Values
from pwopt.algebra.geometry import Refusal, RefusedError, compose_geometry
from pwopt.algebra.linear import LinearMap, compose
from pwopt.graph.dtypes import FLOATING, cancellation, range_of
from pwopt.graph.ir import Node, Tensor
from pwopt.graph.operators import VIEWS, WEIGHTED_OPERATORS
from pwopt.graph.provenance import credit
from pwopt.graph.reasons import Reason
from pwopt.maps import commute, emit, forms, idioms
from pwopt.maps.commute import Affine
from pwopt.maps.forms import Reading
from pwopt.maps.small_numbers import find_pole
from pwopt.rewriting.driver import Pass, Rewriter, describe
from pwopt.rewriting.records import Rewrite, Skip

#: How much the constants of a model may grow, relative to their size, when maps get copies of shared weights.
UNSHARED = 1 / 20
#: How many operators a scale may move past. Real models need a handful.
MAX_REACH = 32


@dataclass
class Plan:
    """What absorbs a scale and shift.

    Attributes
    ----------
    after, before : list of (Reading, Affine)
        Maps that absorb it on their output side, or on their input side.
    constants : list of (Tensor, Affine)
        Constants that absorb it.
    changed : list of Tensor
        Tensors whose values change, so that they need new names.
    steps : int
        Operators visited so far.
    combined : bool
        Whether an operator that combines elements lies between.
    """

    after: list[tuple[Reading, Affine]] = field(default_factory=list)
    before: list[tuple[Reading, Affine]] = field(default_factory=list)
    constants: list[tuple[Tensor, Affine]] = field(default_factory=list)
    changed: list[Tensor] = field(default_factory=list)
    steps: int = 0
    combined: bool = False

    def maps(self) -> list[Reading]:
        return [r for r, _ in (*self.after, *self.before)]


@dataclass(frozen=True)
class Edits:
    """A plan in numbers: the new operators of each map, the new value of each constant, and bytes of copied weights."""

    maps: tuple[tuple[Reading, emit.Written], ...]
    constants: tuple[tuple[Tensor, Values, float], ...]
    copied: int

    @property
    def residual(self) -> float:
        """The largest relative rounding error."""
        return max((*(w.residual for _, w in self.maps), *(error for *_, error in self.constants)), default=0.0)


class FoldAffine(Pass):
    """A(Wx + b) = (AW)x + Ab and W(Ax + t) + b = (WA)x + (Wt + b) for diagonal A

    * A is a BatchNormalization, or a Mul, Div, Add, Sub or Neg by a constant per channel.
    * It folds into the map before it, or else into every map that reads it. It moves through operators that commute
      with it (Concat, pooling, Resize, Transpose, …: `pwopt.maps.commute`). Constants on the way, such as positional
      tables, absorb their part.
    * A LayerNormalization over the last axis and an InstanceNormalization absorb it in their own scale and bias.
    * A shift does not fold forward through zero padding. A scale does.
    * Two scales and shifts that meet no map become one BatchNormalization.
    * The number of operators decreases. A shared weight is copied only if reading the copy costs less than the removed
      operator, and if the model grows by at most 5 %.

    Batch normalisation: Ioffe and Szegedy (2015). Every compiler has this fusion for single patterns. Heads that share
    convolutions but not normalisations between levels need the copies (Tan et al., "EfficientDet", 2020).
    """

    name = "fold-affine"

    def __init__(self) -> None:
        #: Bytes by which copies of shared weights may still enlarge the model; set at the first start.
        self._spare: int | None = None

    def start(self, rw: Rewriter) -> None:
        self._spare = int(UNSHARED * rw.stored) if self._spare is None else self._spare
        self._fused = idioms.fused_by_runtime(rw)

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        reading = forms.read(rw, node)
        if isinstance(reading, Refusal):
            return Skip(Reason("{} stays: {}", node.op, reading.reason)) if node.op == "BatchNormalization" else None
        if reading is None or not reading.geometry.diagonal or len(reading.nodes) > 1 or reading.turned:
            return None
        if node in self._fused:
            return Skip(f"it belongs to a {self._fused[node]} that onnxruntime runs as one operator")
        normalised = _fold_into_normalisation(rw, reading)
        if normalised is not None:
            return normalised
        affine = Affine(reading.load().at_rank(0), reading.axis)
        up, down = Plan(), Plan()
        obstacle = "there is a constant" if rw.constant(reading.source) is not None else rw.other_uses(reading.source)
        obstacle_before = obstacle or self._lift(rw, reading.source, affine, up)
        if not obstacle_before:
            done = rw.attempt(self._fold, rw, reading, up)
            if isinstance(done, Rewrite):
                return done
            obstacle_before = done.reason
        obstacle_after = rw.must_keep(reading.output) or self._sink(rw, reading.output, affine, down)
        if not obstacle_after:
            done = rw.attempt(self._fold, rw, reading, down)
            if isinstance(done, Rewrite):
                return done
            obstacle_after = done.reason
        if node.op != "BatchNormalization" and not _is_beside_map(rw, reading):
            return None
        return Skip(Reason("before it, {}; after it, {}", obstacle_before, obstacle_after))

    def _lift(self, rw: Rewriter, tensor: Tensor, affine: Affine, plan: Plan) -> str:
        """Plan to apply `affine` above `tensor`, which has one reader; returns why not, or ""."""
        producer = rw.producer(tensor)
        plan.steps += 1
        if rw.constant(tensor) is not None:
            return self._plan_constant(rw, tensor, affine, plan)
        if producer is None:
            return "there is no operator"
        if plan.steps > MAX_REACH:
            return f"more than {MAX_REACH} operators lie between"
        reading = forms.read(rw, producer)
        if isinstance(reading, Reading) and reading.kind in emit.WRITERS and producer not in self._fused:
            return self._plan_map(reading, affine, plan, after=True)
        alternatives = commute.lift(rw, producer, affine)
        if isinstance(alternatives, Refusal):
            if isinstance(reading, Refusal) and rw.is_a(producer, "Conv", "ConvTranspose", "MatMul"):
                return Reason("{} cannot absorb it: {}", producer.op, reading.reason)
            return alternatives.reason
        reason = ""
        for moves in alternatives:
            combined = plan.combined or rw.op(producer) in commute.COMBINING
            trial = Plan([*plan.after], [*plan.before], [*plan.constants], [*plan.changed], plan.steps, combined)
            reason = ""
            for source, moved in moves:
                if moved.scales or moved.shifts:
                    trial.changed.append(source)
                    reason = _find_other_uses(rw, source) or self._lift(rw, source, moved, trial)
                plan.steps = trial.steps
                if reason:
                    break
            if not reason:
                plan.after, plan.before = trial.after, trial.before
                plan.constants, plan.changed, plan.combined = trial.constants, trial.changed, trial.combined
                return ""
        return reason

    @staticmethod
    def _plan_constant(rw: Rewriter, tensor: Tensor, affine: Affine, plan: Plan) -> str:
        """Add a constant to the plan if it can absorb `affine`; returns why not, or ""."""
        if rw.is_shared(tensor):
            return Reason("the constant {!r} is shared", tensor.name)
        plan.changed = [t for t in plan.changed if t is not tensor]
        plan.constants.append((tensor, affine))
        return ""

    def _sink(self, rw: Rewriter, tensor: Tensor, affine: Affine, plan: Plan) -> str:
        """Plan that every reader of `tensor` absorbs `affine`; returns why one cannot, or ""."""
        plan.steps += 1
        if plan.steps > MAX_REACH:
            return f"more than {MAX_REACH} operators lie between"
        readers = rw.readers(tensor)
        if not readers:
            return "nothing reads it"
        for reader in readers:
            reading = forms.linear(rw, reader, turned=True)
            if reading is not None and reading.source is tensor and reading.kind in emit.WRITERS:
                reason = self._plan_map(forms.weighted(rw, reader) or reading, affine, plan, after=False)
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
                reason = rw.must_keep(output) or self._sink(rw, output, moved, plan)
                if reason:
                    return reason
        return ""

    @staticmethod
    def _plan_map(reading: Reading, affine: Affine, plan: Plan, *, after: bool) -> str:
        """Add a map to the plan if it can absorb `affine` exactly; returns why not, or ""."""
        axis = reading.axis if after else reading.source_axis
        if axis is not None and affine.axis is not None and axis != affine.axis:
            return f"{reading.node.op} acts on axis {axis}, not {affine.axis}"
        if any(reading.node is other.node for other in plan.maps()):
            return f"{reading.node.op} would absorb it twice"
        g = reading.geometry
        if not g.diagonal:  # two scales and shifts can always be merged
            wide = affine.map.geometry.broadcast(g.out_channels if after else g.in_channels)
            composed = compose_geometry(wide, g) if after else compose_geometry(g, wide)
            if isinstance(composed, Refusal):
                return composed.reason
        (plan.after if after else plan.before).append((reading, affine))
        return ""

    def _count_copied_bytes(self, rw: Rewriter, reading: Reading, plan: Plan) -> int:
        """Bytes of the shared weights that a plan copies; refuses if copying does not pay."""
        weights = [r.weight_input for r in plan.maps() if r.weighted and rw.is_shared(r.weight_input)]
        if not weights:
            return 0
        names, copies = sorted({w.name for w in weights}), sum(rw.elements(w) or 0 for w in weights)
        shared = Reason("the weight {} is shared", Reason.list_names(names))
        size, dtype = rw.size_of(reading.output), rw.dtype(reading.output)
        if size is None or dtype is None or copies > 2 * math.prod(size):
            raise RefusedError(Reason("{}, and reading a copy would cost more than it saves", shared))
        if copies * dtype.itemsize > (self._spare or 0):
            raise RefusedError(Reason("{}, and the model would grow by more than {:.0%}", shared, UNSHARED))
        return copies * dtype.itemsize

    def _fold(self, rw: Rewriter, reading: Reading, plan: Plan) -> Rewrite:
        """Carry a plan out, or refuse before the first edit."""
        edits = self._prepare(rw, reading, plan)
        self._spare = (self._spare or 0) - edits.copied
        return _apply(rw, reading, plan, edits)

    def _prepare(self, rw: Rewriter, reading: Reading, plan: Plan) -> Edits:
        """Compute the numbers of a plan; refuse if they do not fit the type or if the plan does not pay."""
        for target, _ in plan.after:
            _require_accuracy(rw, target, reading)
        for target, _ in plan.before:
            _require_accuracy(rw, reading, target)
        direct = _is_direct(reading, plan)
        maps: list[tuple[Reading, emit.Written]] = []
        for side in (plan.after, plan.before):
            for target, affine in side:
                composed, dtype = _compose(rw, target, affine, after=side is plan.after), rw.dtype(target.output)
                if plan.combined and side is plan.after and affine.scales and dtype in FLOATING:
                    range_of(dtype).require_weights(composed.weight)
                axis = target.axis if target.axis is not None else affine.axis
                output = reading.output if direct else target.output
                source = reading.source if target.source is reading.output else target.source
                written = emit.write(rw, composed, target, source, output, axis)
                maps.append((target, written))
        copied, constants = self._count_copied_bytes(rw, reading, plan), _compose_constants(rw, plan)
        removed = 1 + sum(len(t.nodes) for t, _ in maps) - sum(len(w.nodes) for _, w in maps)
        if removed < 1 - _joins_views(rw, reading):
            raise RefusedError("merging them would not save an operator")
        if not maps and not constants:
            raise RefusedError("there is no map or constant to absorb it")
        return Edits(tuple(maps), tuple(constants), copied)


def _fold_into_normalisation(rw: Rewriter, reading: Reading) -> Rewrite | None:
    """Let the normalisation before a scale and shift apply them: s(γx + β) + t = (sγ)x + (sβ + t)"""
    before, rank = rw.producer(reading.source), rw.rank(reading.source)
    if before is None or rank is None or not rw.is_a(before, "LayerNormalization", "InstanceNormalization"):
        return None
    layer = before.op == "LayerNormalization"
    axis, first = (rank - 1, int(before.attrs.get("axis", -1)) % rank) if layer else (1, 1)
    others = any(t.name and (rw.readers(t) or rw.must_keep(t)) for t in before.outputs[1:])
    if first != axis or reading.axis not in (axis, None) or rw.other_uses(reading.source) or others:
        return None
    held = rw.optional_input(before, 2)
    gamma, beta = rw.value(before.inputs[1]), np.zeros(1) if held is None else rw.value(held)
    dtype, linear = rw.dtype(before.inputs[1]), reading.try_load()
    if gamma is None or beta is None or dtype is None or linear is None or gamma.ndim != 1:
        return None
    if np.any(beta) and not _is_exact(linear.scale) and find_pole(rw, reading.output) is not None:
        return None  # as in _require_accuracy
    if len(linear.scale) not in (1, len(gamma)):
        return None
    exact = gamma * linear.scale, np.broadcast_to(beta * linear.scale + linear.bias, gamma.shape)
    low = [emit.round_values(v, dtype) for v in exact]
    names = [f"{reading.output.name}_{role}" for role in ("factor", "bias")]
    inputs = [before.inputs[0], *(rw.new_constant(n, v) for n, v in zip(names, low, strict=True))]
    new = Node(before.op, before.name, dict(before.attrs), inputs, [reading.output])
    residual = max(emit.relative_rounding(v, e) for v, e in zip(low, exact, strict=True))
    reason = f"{describe(reading.node)} folds into {describe(before)}"
    return rw.replace([before, *reading.nodes], [new], reason, residual)


def _require_accuracy(rw: Rewriter, inner: Reading, outer: Reading) -> None:
    """Refuse to merge s·(x + a) into s·x + s·a before a division.

    If x is close to −a, then x + a is exact (Sterbenz, 1974), but s·x is rounded, and cancels. The relative error has
    no bound. It matters only to a division, a logarithm or a root. Scales that are powers of two are exact.
    """
    if not (inner.geometry.diagonal and outer.geometry.diagonal):
        return
    first, second = inner.try_load(), outer.try_load()
    if first is None or second is None or not np.any(first.bias) or not _is_exact(first.scale):
        return
    if _is_exact(second.scale) and not np.any(second.bias):
        return
    pole = find_pole(rw, outer.output)
    if pole is not None:
        raise RefusedError(f"the sum may cancel, and {describe(pole)} would amplify the rounding error")


def _is_exact(scale: Array) -> bool:
    """Whether these are powers of two, so that products with them are not rounded."""
    return bool(np.all(np.abs(np.frexp(scale)[0]) == 0.5))


def _is_direct(reading: Reading, plan: Plan) -> bool:
    """Whether only the map right before the scale and shift absorbs it, on its output side."""
    return len(plan.after) == 1 and plan.after[0][0].output is reading.source


def _apply(rw: Rewriter, reading: Reading, plan: Plan, edits: Edits) -> Rewrite:
    """Carry a plan out."""
    absorbers = [
        *(describe(t.node) for t, _ in edits.maps),
        *(Reason("the constant {!r}", t.name) for t, *_ in edits.constants),
    ]
    reason = f"{describe(reading.node)} folds into {' and '.join(absorbers[:3])}" + " and more" * (len(absorbers) > 3)
    if _is_direct(reading, plan):
        ((target, written),) = edits.maps
        return rw.replace([*target.nodes, reading.node], written.nodes, reason, edits.residual)
    records = [rw.replace(target.nodes, written.nodes, reason) for target, written in edits.maps]
    for _, written in edits.maps:
        credit(written.nodes[-1], reading.nodes)
    for tensor, values, _ in edits.constants:
        (reader,) = rw.readers(tensor)
        if rw.producer(tensor) is None:  # the new constant may have the name of an initializer, not of a node's output
            rw.release_names([tensor.name])
        rw.reroute(tensor, rw.new_constant(tensor.name, values))
        credit(reader, reading.nodes)
        rw.enqueue_around(reader)
    if reading.node in rw and (rw.readers(reading.output) or rw.must_keep(reading.output)):
        rw.bypass(reading.node, reading.source, keep_output=bool(plan.after or edits.constants))
    elif reading.node in rw:
        rw.remove(reading.node)
    renamed = {tensor.name: rw.rename(tensor, "_unscaled") for tensor in plan.changed}
    done = Rewrite.of(reason, records, renamed)
    return replace(done, removed=(describe(reading.node), *done.removed), residual=edits.residual)


def _compose_constants(rw: Rewriter, plan: Plan) -> list[tuple[Tensor, Values, float]]:
    """The constants of a plan, with their new values and the largest relative rounding error."""
    found = []
    for tensor, affine in plan.constants:
        value, dtype = rw.value(tensor), rw.dtype(tensor)
        if value is None or dtype is None:
            raise RefusedError(Reason("the constant {!r} is not finite", tensor.name))
        shape = tuple(-1 if a == affine.axis else 1 for a in range(value.ndim))
        exact = value * affine.map.scale.reshape(shape) + affine.map.bias.reshape(shape)
        grows = np.abs(affine.map.scale) > 1
        range_of(dtype).require_shift(value * np.where(grows, affine.map.scale, 0.0).reshape(shape))
        low = emit.round_values(exact, dtype)
        found.append((tensor, low, emit.relative_rounding(low, exact)))
    return found


def _find_other_uses(rw: Rewriter, tensor: Tensor) -> str:
    """`View.other_uses` without the operators that only read the shape, which a scale or a shift does not change."""
    readers = [r for r in rw.readers(tensor) if not rw.is_a(r, "Shape", "Size")]
    return rw.must_keep(tensor) if len(readers) == 1 else rw.other_uses(tensor)


def _joins_views(rw: Rewriter, reading: Reading) -> bool:
    """Whether a BatchNormalization stands between two Reshapes or similar, which merge once it is removed (LeViT)."""
    before, after = rw.producer(reading.source), rw.sole_reader(reading.output)
    inside = rw.is_a(before, *VIEWS) and rw.is_a(after, *VIEWS) and not _find_other_uses(rw, before.inputs[0])
    return inside and reading.node.op == "BatchNormalization"


def _is_beside_map(rw: Rewriter, reading: Reading) -> bool:
    """Whether a convolution or matrix product is its neighbour, so that a refusal is worth reporting."""
    neighbours = [rw.producer(reading.source), *rw.readers(reading.output)]
    return any(n is not None and rw.op(n) in WEIGHTED_OPERATORS for n in neighbours)


def _compose(rw: Rewriter, target: Reading, affine: Affine, *, after: bool) -> LinearMap:
    linear = target.load()
    precision = cancellation(rw.dtype(target.output))
    diagonal = affine.map
    return compose(diagonal, linear, precision) if after else compose(linear, diagonal, precision)
