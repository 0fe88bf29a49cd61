"""Polyphase decomposition: a convolution after nearest upsampling runs on the positions before it."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from pwopt.algebra.geometry import Geometry, Refusal
from pwopt.algebra.linear import LinearMap
from pwopt.algebra.multirate import Moved, fractional, phase, phase_counts
from pwopt.graph.ir import Node, Tensor
from pwopt.graph.reasons import Reason
from pwopt.graph.shapes import set_channels
from pwopt.maps.cost import ELEMENT, macs
from pwopt.maps.forms import Reading
from pwopt.maps.positions import stencil
from pwopt.maps.resampling import Composition, Part, composition, repeat_less
from pwopt.rewriting.builder import Builder
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.interleaving import Interleaving, check_interleaving, count_moved
from pwopt.rewriting.records import Rewrite, Skip
from pwopt.rewriting.steps import Step, read_activation
from pwopt.rewriting.wording import format_count

#: The fixed cost of an operator in multiply-adds: 5 µs, at 50 G multiply-adds per second.
OPERATOR = 250_000
#: The largest number of phases. Each needs a convolution.
MAX_CONVOLUTIONS = 16


class _AfterUpsampling(Pass):
    """Convolutions that read upsampled channels, and perhaps others."""

    policy = "measured"
    #: The smallest ratio of saved to additional cost for a race, and for a rewrite without measuring.
    min_gain: ClassVar[float] = 0.25
    sure_gain: ClassVar[float] = 2.0

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
        refusal = check_interleaving(rw, reading.output)
        if refusal is not None:
            return Skip(refusal.reason)
        return self.resample(rw, _Resampling(rw, reading, found))

    def resample(self, rw: Rewriter, resampling: _Resampling) -> Rewrite | Skip | None:
        raise NotImplementedError

    def load_if_worth(
        self, rw: Rewriter, resampling: _Resampling, after: float, spent: float
    ) -> LinearMap | Skip | None:
        """The numbers of the convolution, if the rewrite may pay; else None, or a reason worth reporting."""
        saved = (macs(rw, resampling.reading.node) or 0) - after
        if saved <= self.min_gain * spent:
            return None
        if rw.is_shared(resampling.reading.weight_input):
            return Skip(Reason("the weight {!r} is shared", resampling.reading.weight_input.name))
        if not self.eager and saved <= self.sure_gain * spent:
            return Skip(f"{resampling.what} could run before the upsampling; only measuring can tell")
        return resampling.reading.load()


class Polyphase(_AfterUpsampling):
    """(w ∗ Ux)[r·q + j] = (w_j ∗ x)[q] for nearest upsampling U by r; w_j[o] = Σ w[k] over all k, ⌊(j + d·k − b)/r⌋ = o

    * A Resize or Upsample repeats positions by whole factors, perhaps followed by activations and a Concat.
    * Zero padding is the same before and after the upsampling (`algebra.multirate` has the proof).
    * There are at most 16 phases, and the rewrite saves more than the additional operators cost.

    After nearest upsampling, several taps of a kernel read the same number: four outputs after upsampling by 2×2 need
    16 products, not 36. Each phase j of the output is a smaller convolution of x. The phases are interleaved at the
    end. Other inputs of a Concat are read in phases as well, by convolutions of stride r, so that sums and activations
    run before the interleaving.

    This is the polyphase form, by the noble identities (Vaidyanathan, "Multirate Systems and Filter Banks", 1993). The
    pattern occurs in decoders (Ronneberger et al., "U-Net", 2015), generators, super-resolution (Wang et al.,
    "ESRGAN", 2018) and text detection (Liao et al., "DBNet", 2020).
    """

    name = "polyphase"
    operators = frozenset({"Conv"})

    def resample(self, rw: Rewriter, resampling: _Resampling) -> Rewrite | Skip | None:
        counts = phase_counts(resampling.geometry, resampling.factors)
        if isinstance(counts, Refusal):
            return Skip(counts.reason)
        if math.prod(counts) > MAX_CONVOLUTIONS:
            return Skip(
                f"{resampling.what} would become {math.prod(counts)} convolutions (the limit is {MAX_CONVOLUTIONS})"
            )
        phases = _Phases.of(resampling, counts)
        size = rw.size_of(resampling.reading.output)
        if size is None:
            return None
        spent = ELEMENT * count_moved(size) * phases.several + 5 * OPERATOR * math.prod(counts)
        linear = self.load_if_worth(
            rw, resampling, phases.weights * math.prod(size) / size[1] / math.prod(counts), spent
        )
        if not isinstance(linear, LinearMap):
            return linear
        step = read_activation(rw, resampling.reading.output) if phases.several else None
        phases.write(linear, step)
        count = len(phases.upsampled)
        reason = f"{resampling.what} becomes {format_count(count, 'smaller convolution')} before it"
        return resampling.finish(reason, "in phases", step)


class FractionalStride(_AfterUpsampling):
    """w ∗ Ux = v ⋆ x for nearest upsampling U by r, where ⋆ is a transposed convolution and v = w ∗ (1, …, 1), r ones

    * The preconditions are those of `polyphase`, without the limit on phases.

    One transposed convolution takes as many multiply-adds as the phases of `polyphase`. It pays for large factors, for
    which `polyphase` needs many convolutions. If both apply, they are raced against each other.
    """

    name = "fractional-stride"
    operators = frozenset({"Conv"})

    def resample(self, rw: Rewriter, resampling: _Resampling) -> Rewrite | Skip | None:
        form = fractional(resampling.geometry, resampling.factors)
        if isinstance(form, Refusal):
            return Skip(form.reason)
        size, places = rw.size_of(resampling.reading.output), rw.size_of(resampling.reading.source)
        if size is None or places is None:
            return None
        near = resampling.weights(resampling.geometry, repeated=False)
        small = math.prod(places) / places[1] / math.prod(resampling.factors)
        after = resampling.weights(form.geometry, repeated=True) * small + near * math.prod(size) / size[1]
        linear = self.load_if_worth(rw, resampling, after, 3 * ELEMENT * math.prod(size) * bool(near) + 3 * OPERATOR)
        if not isinstance(linear, LinearMap):
            return linear
        if not self.eager:
            return Skip(f"{resampling.what} could be a transposed convolution; only measuring can tell")
        upsampled, beside = resampling.select(linear, repeated=True), resampling.select(linear, repeated=False)
        output = resampling.reading.output
        terms = [output] if beside is None else [rw.new_variable(f"{output.name}_{i}", output) for i in ("far", "near")]
        assert upsampled is not None
        resampling.add_map(form.load(upsampled), resampling.reading, resampling.find_source(repeated=True), terms[0])
        if beside is not None:
            resampling.add_map(beside, resampling.reading, resampling.find_source(repeated=False), terms[1])
            resampling.add_node("Add", terms, output)
        return resampling.finish(
            f"{resampling.what} becomes one transposed convolution", "as one transposed convolution", None
        )


@dataclass
class _Resampling(Builder):
    """A convolution, the composition of its input, and the operators that replace it."""

    reading: Reading
    found: Composition

    @property
    def geometry(self) -> Geometry:
        return self.reading.geometry

    @property
    def factors(self) -> tuple[int, ...]:
        return self.found.factors

    @property
    def what(self) -> str:
        kernel, factors = "×".join(map(str, self.geometry.kernel)), "×".join(map(str, self.factors))
        return f"{kernel} {self.reading.channels} after nearest upsampling by {factors}"

    def parts(self, repeated: bool) -> list[Part]:
        return [p for p in self.found.parts if (p.repeated is not None) == repeated]

    def channels(self, repeated: bool) -> int:
        return sum(p.count for p in self.parts(repeated))

    def weights(self, geometry: Geometry, repeated: bool) -> int:
        """Weights of a convolution with this geometry on the upsampled channels, or on the others."""
        return replace(geometry, in_channels=self.channels(repeated)).weights

    def select(self, linear: LinearMap, repeated: bool) -> LinearMap | None:
        """The map of the upsampled channels, with the bias, or of the others; None if there are none."""
        if len(self.parts(repeated)) in (0, len(self.found.parts)):
            return linear if self.parts(repeated) else None
        mask = np.concatenate([np.full(p.count, (p.repeated is not None) == repeated) for p in self.found.parts])
        geometry = replace(linear.geometry, in_channels=int(mask.sum()))
        return LinearMap.of(geometry, linear.weight[:, mask], linear.bias if repeated else None)

    def find_source(self, repeated: bool) -> Tensor:
        """The input of that map, before the upsampling."""
        tensors = [self._find_origin(p) for p in self.parts(repeated)]
        if len(tensors) == 1:
            return tensors[0]
        role = "before" if repeated else "beside"
        joined = self.rw.new_variable(
            f"{self.reading.output.name}_{role}", tensors[0], set_channels(1, self.channels(repeated))
        )
        self.add_node("Concat", tensors, joined, axis=1)
        return joined

    def _find_origin(self, part: Part) -> Tensor:
        """A part of the Concat before the upsampling by `factors`, with its activations."""
        tensor = part.tensor
        if part.repeated is not None:
            tensor = part.repeated.source
            remaining = tuple(a // b for a, b in zip(part.repeated.repeats, self.factors, strict=True))
            if any(f > 1 for f in remaining):
                self.nodes.append(repeat_less(self.rw, part.repeated, tensor, remaining))
                tensor = self.nodes[-1].outputs[0]
        for node in reversed(part.steps):
            result = self.rw.new_variable(f"{node.outputs[0].name}_part", tensor)
            self.add_step(Step((node,), node.outputs[0], ()), tensor, result)
            tensor = result
        return tensor

    def finish(self, reason: str, form: str, step: Step | None) -> Rewrite:
        near = self.channels(repeated=False)
        beside = f" ({near} of them beside it)" if near else ""
        kind = f"after upsampling by {'×'.join(map(str, self.factors))} {form}"
        signature = f"{kind}: {self.what}{beside} at {self.rw.size_of(self.reading.source)}"
        old = [*self.found.nodes, self.reading.node, *(step.nodes if step is not None else ())]
        return self.rw.replace(old, self.nodes, reason, self.residual).with_signature(signature)


@dataclass(frozen=True)
class _Phases:
    """The phases of the output of a convolution.

    Attributes
    ----------
    resampling : _Resampling
    counts : tuple of int
        The number of phases along each axis.
    upsampled, beside : tuple of Moved
        For each phase, the convolution of the upsampled channels, and that of the others. `beside` is empty if its
        phases would take more multiply-adds than one convolution whose result is added at the end.
    """

    resampling: _Resampling
    counts: tuple[int, ...]
    upsampled: tuple[Moved, ...]
    beside: tuple[Moved, ...]

    @classmethod
    def of(cls, resampling: _Resampling, counts: tuple[int, ...]) -> _Phases:
        g, ones = resampling.geometry, (1,) * resampling.geometry.rank
        places = list(itertools.product(*map(range, counts)))
        upsampled, beside = (tuple(phase(g, r, counts, place) for place in places) for r in (resampling.factors, ones))
        strided = all(m.geometry.kernel == g.kernel for m in beside)
        return cls(resampling, counts, upsampled, beside if strided else ())

    @property
    def several(self) -> bool:
        return len(self.upsampled) > 1

    @property
    def weights(self) -> int:
        """Multiply-adds for one position of every phase."""
        total = sum(self.resampling.weights(m.geometry, repeated=True) for m in self.upsampled)
        return total + len(self.upsampled) * self.resampling.weights(self.resampling.geometry, repeated=False)

    def write(self, linear: LinearMap, step: Step | None) -> None:
        """Add the operators, with the activation after the convolution."""
        resampling, rw = self.resampling, self.resampling.rw
        output = resampling.reading.output if step is None else step.output
        upsampled, beside = resampling.select(linear, repeated=True), resampling.select(linear, repeated=False)
        assert upsampled is not None
        source = resampling.find_source(repeated=True)
        other = None if beside is None else (beside, resampling.find_source(repeated=False))
        strided, late = (other, None) if self.beside else (None, other)
        inner = (
            output
            if late is None
            else rw.new_variable(f"{resampling.reading.output.name}_far", resampling.reading.output)
        )
        together = Interleaving(rw, inner, self.counts)
        results: list[Tensor] = []
        weight: Tensor | None = None
        for i, moved_map in enumerate(self.upsampled):
            result = together.phase(f"phase{i}", resampling.geometry.out_channels) if self.several else inner
            terms = [result]
            if strided is not None:
                terms = [together.phase(f"{role}{i}", resampling.geometry.out_channels) for role in ("far", "near")]
                conv = resampling.add_map(self.beside[i].load(strided[0]), resampling.reading, strided[1], terms[1])
                # All phases have the same weight; only their padding differs.
                conv.inputs[1] = weight = conv.inputs[1] if weight is None else weight
            resampling.add_map(moved_map.load(upsampled), resampling.reading, source, terms[0])
            if len(terms) > 1:
                resampling.add_node("Add", terms, result)
            results.append(result)
            if step is not None and late is None:
                results[-1] = together.phase(f"active{i}", resampling.geometry.out_channels)
                resampling.add_step(step, result, results[-1])
        if self.several:
            resampling.nodes += together.write(results)
        if late is not None:
            self._add_beside(inner, *late, output, step)

    def _add_beside(self, inner: Tensor, beside: LinearMap, other: Tensor, output: Tensor, step: Step | None) -> None:
        """Add one convolution of the other channels, the sum, and the activation."""
        resampling, rw = self.resampling, self.resampling.rw
        near = rw.new_variable(f"{resampling.reading.output.name}_near", resampling.reading.output)
        resampling.add_map(beside, resampling.reading, other, near)
        total = output if step is None else rw.new_variable(f"{output.name}_sum", output)
        resampling.add_node("Add", [near, inner], total)
        if step is not None:
            resampling.add_step(step, total, output)
