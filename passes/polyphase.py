"""Convolutions behind repeated positions, computed from what was repeated."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from pwopt.algebra.geometry import Geometry, Refusal
from pwopt.algebra.linear import LinearMap
from pwopt.algebra.multirate import Moved, fractional, phase, phase_counts
from pwopt.graph.ir import Node, Tensor
from pwopt.graph.shapes import channels
from pwopt.maps import emit
from pwopt.maps.cost import ELEMENT, macs
from pwopt.maps.forms import Reading
from pwopt.maps.positions import stencil
from pwopt.maps.resampling import Composition, Part, composition, repeated_less
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.interleaving import Interleaving, interleavable, moved
from pwopt.rewriting.records import Rewrite, Skip
from pwopt.rewriting.steps import Step, activation, repeated
from pwopt.rewriting.wording import counted

#: What an operator costs by itself, in multiply-adds: 5 µs, at 50 G of those per second.
OPERATOR = 250_000
#: The most phases: a convolution for each.
MAX_PHASES = 16


class _Upsampled(Pass):
    """Convolutions that read repeated positions, and what else they read."""

    policy = "measured"
    #: What must be saved, relative to what it costs, to be worth a race, and to be done without one.
    least: ClassVar[float] = 0.25
    sure: ClassVar[float] = 2.0

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        reading = stencil(rw, node)
        if reading is None or reading.geometry.taps == 1:
            return None
        found = composition(rw, reading.source)
        if isinstance(found, Refusal):
            return Skip(found.reason) if found.reason else None
        if all(f == 1 for f in found.factors):
            return None
        if reading.geometry.groups > 1 and len(found.parts) > 1:
            return Skip("its groups read parts of a Concat")
        refusal = interleavable(rw, reading.output)
        if refusal is not None:
            return Skip(refusal.reason)
        return self.resampled(rw, _Resampling(rw, reading, found))

    def resampled(self, rw: Rewriter, work: _Resampling) -> Rewrite | Skip | None:
        raise NotImplementedError

    def judged(self, rw: Rewriter, work: _Resampling, after: float, spent: float) -> LinearMap | Skip | None:
        """The numbers of the convolution, if what is saved is worth its price."""
        saved = (macs(rw, work.reading.node) or 0) - after
        if saved <= self.least * spent:
            return None
        if rw.is_shared(work.reading.weight_input):
            return Skip(f"the weight {work.reading.weight_input.name!r} is shared")
        if not self.eager and saved <= self.sure * spent:
            return Skip(f"{work.what} could be computed from what was repeated; only measuring can tell")
        return work.reading.load()


class Polyphase(_Upsampled):
    """(w ∗ Ux)[r·q + j] = (w_j ∗ x)[q] for a repetition U by r: w_j[o] = Σ w[k] over all k with ⌊(j + d·k − b)/r⌋ = o.

    Where positions were repeated, several taps of a stencil read the same number: 16 products for four outputs behind a
    repetition by 2 × 2, not 36. Each phase j of the output is a smaller stencil on what was repeated, and the phases
    are put together. What else is concatenated to it is read in phases as well, by convolutions of stride r, so that
    sums and activations come before that. Zeros outside are the same before and after a repetition
    (`algebra.multirate`).

    Decoders (Ronneberger et al., "U-Net", 2015), generators, super-resolution (Wang et al., "ESRGAN", 2018), text
    detection (Liao et al., "DBNet", 2020). Noble identities, polyphase form: Vaidyanathan, "Multirate Systems and
    Filter Banks", 1993.
    """

    name = "polyphase"

    def resampled(self, rw: Rewriter, work: _Resampling) -> Rewrite | Skip | None:
        counts = phase_counts(work.geometry, work.factors)
        if isinstance(counts, Refusal):
            return Skip(counts.reason)
        if math.prod(counts) > MAX_PHASES:
            return Skip(f"{work.what} would be {math.prod(counts)} convolutions")
        phases = _Phases.of(work, counts)
        size = rw.size_of(work.reading.output)
        if size is None:
            return None
        spent = ELEMENT * moved(size) * phases.several + 5 * OPERATOR * math.prod(counts)
        linear = self.judged(rw, work, phases.weights * math.prod(size) / size[1] / math.prod(counts), spent)
        if not isinstance(linear, LinearMap):
            return linear
        step = activation(rw, work.reading.output) if phases.several else None
        phases.write(linear, step)
        count = len(phases.far)
        reason = f"{work.what} is {counted(count, 'smaller convolution')} of what was repeated"
        return work.done(reason, "in phases", step)


class FractionalStride(_Upsampled):
    """w ∗ Ux = v ⋆ x for a repetition U by r, where ⋆ inserts r − 1 zeros between positions: v = w ∗ (1, …, 1), r ones.

    The same multiply-adds as `polyphase` in one transposed convolution. It pays for large factors, of which `polyphase`
    would make many convolutions; where both may act, they are raced against each other.
    """

    name = "fractional-stride"

    def resampled(self, rw: Rewriter, work: _Resampling) -> Rewrite | Skip | None:
        form = fractional(work.geometry, work.factors)
        if isinstance(form, Refusal):
            return Skip(form.reason)
        size, places = rw.size_of(work.reading.output), rw.size_of(work.reading.source)
        if size is None or places is None:
            return None
        near = work.weights(work.geometry, repeated=False)
        small = math.prod(places) / places[1] / math.prod(work.factors)
        after = work.weights(form.geometry, repeated=True) * small + near * math.prod(size) / size[1]
        linear = self.judged(rw, work, after, 3 * ELEMENT * math.prod(size) * bool(near) + 3 * OPERATOR)
        if not isinstance(linear, LinearMap):
            return linear
        if not self.eager:
            return Skip(f"{work.what} could be a transposed convolution; only measuring can tell")
        wide, beside = work.picked(linear, repeated=True), work.picked(linear, repeated=False)
        output = work.reading.output
        terms = [output] if beside is None else [rw.new_variable(f"{output.name}_{i}", output) for i in ("far", "near")]
        assert wide is not None
        work.map(form.load(wide), work.source(repeated=True), terms[0])
        if beside is not None:
            work.map(beside, work.source(repeated=False), terms[1])
            work.node("Add", terms, output)
        return work.done(f"{work.what} is one transposed convolution", "as one transposed convolution", None)


@dataclass
class _Resampling:
    """A convolution, what it reads, and the operators that come to replace it."""

    rw: Rewriter
    reading: Reading
    found: Composition
    nodes: list[Node] = field(default_factory=list)
    residual: float = 0.0

    @property
    def geometry(self) -> Geometry:
        return self.reading.geometry

    @property
    def factors(self) -> tuple[int, ...]:
        return self.found.factors

    @property
    def what(self) -> str:
        kernel, factors = "×".join(map(str, self.geometry.kernel)), "×".join(map(str, self.factors))
        return f"{kernel} {self.reading.channels} behind a repetition by {factors}"

    def parts(self, repeated: bool) -> list[Part]:
        return [p for p in self.found.parts if (p.repeated is not None) == repeated]

    def channels(self, repeated: bool) -> int:
        return sum(p.count for p in self.parts(repeated))

    def weights(self, geometry: Geometry, repeated: bool) -> int:
        """Multiply-adds for one position of such a stencil on the channels that were repeated, or on the others."""
        return replace(geometry, in_channels=self.channels(repeated)).weights

    def picked(self, linear: LinearMap, repeated: bool) -> LinearMap | None:
        """The map of the channels that were repeated, which has the bias, or of the others; None if there are none."""
        if len(self.parts(repeated)) in (0, len(self.found.parts)):
            return linear if self.parts(repeated) else None
        mask = np.concatenate([np.full(p.count, (p.repeated is not None) == repeated) for p in self.found.parts])
        geometry = replace(linear.geometry, in_channels=int(mask.sum()))
        return LinearMap.of(geometry, linear.weight[:, mask], linear.bias if repeated else None)

    def source(self, repeated: bool) -> Tensor:
        """What that map reads: from before the repetition, as far as the factors go."""
        tensors = [self._before(p) for p in self.parts(repeated)]
        if len(tensors) == 1:
            return tensors[0]
        role = "before" if repeated else "beside"
        joined = self.rw.new_variable(
            f"{self.reading.output.name}_{role}", tensors[0], channels(1, self.channels(repeated))
        )
        self.node("Concat", tensors, joined, axis=1)
        return joined

    def _before(self, part: Part) -> Tensor:
        tensor = part.tensor
        if part.repeated is not None:
            tensor = part.repeated.source
            left = tuple(a // b for a, b in zip(part.repeated.repeats, self.factors, strict=True))
            if any(f > 1 for f in left):
                self.nodes.append(repeated_less(self.rw, part.repeated, tensor, left))
                tensor = self.nodes[-1].outputs[0]
        for node in reversed(part.steps):
            made = self.rw.new_variable(f"{node.outputs[0].name}_part", tensor)
            self.nodes += repeated(self.rw, Step((node,), node.outputs[0], ()), tensor, made)
            tensor = made
        return tensor

    def map(self, linear: LinearMap, source: Tensor, output: Tensor) -> Node:
        """A convolution."""
        written = emit.write(self.rw, linear, self.reading, source, output, 1, inherit=False)
        self.nodes += written.nodes
        self.residual = max(self.residual, written.residual)
        return written.nodes[0]

    def node(self, op: str, inputs: Sequence[Tensor], output: Tensor, **attrs: object) -> None:
        name = self.rw.node_name(str(output.name), f"_{op.lower()}")
        self.nodes.append(Node(op, name, attrs, list(inputs), [output]))

    def done(self, reason: str, form: str, step: Step | None) -> Rewrite:
        near = self.channels(repeated=False)
        beside = f" ({near} of them beside it)" if near else ""
        kind = f"behind a repetition by {'×'.join(map(str, self.factors))} {form}"
        signature = f"{kind}: {self.what}{beside} at {self.rw.size_of(self.reading.source)}"
        old = [*self.found.nodes, self.reading.node, *(step.nodes if step is not None else ())]
        return self.rw.replace(old, self.nodes, reason, self.residual).with_signature(signature)


@dataclass(frozen=True)
class _Phases:
    """The phases of a convolution's output: of what was repeated, and of what is beside it.

    Attributes
    ----------
    work : _Resampling
    counts : tuple of int
    far, near : tuple of Moved
        For each phase; `near` is empty if its phases would take more multiply-adds than computing what is beside in
        one and adding it at last.
    """

    work: _Resampling
    counts: tuple[int, ...]
    far: tuple[Moved, ...]
    near: tuple[Moved, ...]

    @classmethod
    def of(cls, work: _Resampling, counts: tuple[int, ...]) -> _Phases:
        g, ones = work.geometry, (1,) * work.geometry.rank
        places = list(itertools.product(*map(range, counts)))
        far, near = (tuple(phase(g, r, counts, place) for place in places) for r in (work.factors, ones))
        strided = all(m.geometry.kernel == g.kernel for m in near)
        return cls(work, counts, far, near if strided else ())

    @property
    def several(self) -> bool:
        return len(self.far) > 1

    @property
    def weights(self) -> int:
        """Multiply-adds for one position of every phase."""
        total = sum(self.work.weights(m.geometry, repeated=True) for m in self.far)
        return total + len(self.far) * self.work.weights(self.work.geometry, repeated=False)

    def write(self, linear: LinearMap, step: Step | None) -> None:
        """The operators; the activation is taken along."""
        work, rw = self.work, self.work.rw
        output = work.reading.output if step is None else step.output
        wide, beside = work.picked(linear, repeated=True), work.picked(linear, repeated=False)
        assert wide is not None
        source = work.source(repeated=True)
        other = None if beside is None else (beside, work.source(repeated=False))
        strided, late = (other, None) if self.near else (None, other)
        inner = output if late is None else rw.new_variable(f"{work.reading.output.name}_far", work.reading.output)
        together = Interleaving(rw, inner, self.counts)
        results: list[Tensor] = []
        weight: Tensor | None = None
        for i, moved_far in enumerate(self.far):
            result = together.phase(f"phase{i}", work.geometry.out_channels) if self.several else inner
            terms = [result]
            if strided is not None:
                terms = [together.phase(f"{role}{i}", work.geometry.out_channels) for role in ("far", "near")]
                made = work.map(self.near[i].load(strided[0]), strided[1], terms[1])
                # The same numbers for each phase: just strides and padding differ.
                made.inputs[1] = weight = made.inputs[1] if weight is None else weight
            work.map(moved_far.load(wide), source, terms[0])
            if len(terms) > 1:
                work.node("Add", terms, result)
            results.append(result)
            if step is not None and late is None:
                results[-1] = together.phase(f"active{i}", work.geometry.out_channels)
                work.nodes += repeated(rw, step, result, results[-1])
        if self.several:
            work.nodes += together.write(results)
        if late is not None:
            self._added(inner, *late, output, step)

    def _added(self, inner: Tensor, beside: LinearMap, other: Tensor, output: Tensor, step: Step | None) -> None:
        """What is beside, computed in one, and the activation after the sum."""
        work, rw = self.work, self.work.rw
        near = rw.new_variable(f"{work.reading.output.name}_near", work.reading.output)
        work.map(beside, other, near)
        total = output if step is None else rw.new_variable(f"{output.name}_sum", output)
        work.node("Add", [near, inner], total)
        if step is not None:
            work.nodes += repeated(rw, step, total, output)
