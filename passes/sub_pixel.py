"""Sub-pixel convolution: maps after an interleaving of phases run on the phases, which are interleaved at the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pwopt.algebra import Values
from pwopt.algebra.geometry import Geometry, Refusal
from pwopt.algebra.linear import LinearMap
from pwopt.algebra.multirate import on_phases, phases_geometry, to_phases
from pwopt.graph.ir import Node, Tensor
from pwopt.graph.reasons import Reason
from pwopt.maps import forms
from pwopt.maps.forms import Reading
from pwopt.maps.positions import stencil
from pwopt.maps.resampling import read_depth_to_space
from pwopt.rewriting.builder import Builder
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.interleaving import Interleaving, check_interleaving
from pwopt.rewriting.records import Rewrite, Skip
from pwopt.rewriting.steps import Step, read_activation
from pwopt.rewriting.wording import format_count

#: The largest number of operators after the first map.
MAX_STEPS = 16
#: The largest number of positions that one position becomes.
MAX_POSITIONS = 64

#: Takes a map to phases and the number of a row of phases; returns the map to that row, with its columns side by side.
Row = Callable[[LinearMap, int], LinearMap]


@dataclass(frozen=True)
class _Stage:
    """A map to phases, a pointwise map (one phase), or an activation."""

    counts: tuple[int, ...]
    nodes: tuple[Node, ...]
    reading: Reading | None = None
    row: Row = lambda linear, _: linear
    step: Step | None = None


class SubPixel(Pass):
    """W·D(x) = D((I ⊗ W)x) and f(D(x)) = D(f(x)), where D interleaves phases and I ⊗ W is W on each phase

    * The first map computes phases: a convolution before a pixel shuffle (DepthToSpace), or a transposed convolution
      whose kernel equals its stride.
    * The operators after it read each position separately: activations, pointwise maps, further transposed convolutions
      without overlap. Nothing else reads the tensors between them, and no weight is shared.
    * One position becomes at most 64.

    The phases stay side by side as channels until the end. One interleaving then suffices, in a form that onnxruntime's
    blocked layout supports, unlike DepthToSpace. Examples are sub-pixel convolution (Shi et al., 2016),
    super-resolution (Lim et al., "EDSR", 2017) and text detection (Liao et al., "DBNet", 2020).
    """

    name = "sub-pixel"
    policy = "measured"
    pays_on = frozenset({"cpu", "other"})  # graphics cards have no blocked layout

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        first = _read_transposed(rw, node)
        stages = _read_shuffle(rw, node) if first is None else [first]
        if stages is None:
            return None
        stages += _find_followers(rw, stages[-1].nodes[-1].outputs[0], len(stages[-1].counts))
        counts = tuple(math.prod(s) for s in zip(*(s.counts for s in stages), strict=True))
        output = stages[-1].nodes[-1].outputs[0]
        maps = [s.reading for s in stages if s.reading is not None]
        what = f"{format_count(len(maps), 'map')} to {'×'.join(map(str, counts))} phases"
        refusal = check_interleaving(rw, output)
        if refusal is not None:
            return Skip(refusal.reason)
        if math.prod(counts) > MAX_POSITIONS:
            return Skip(f"{what} are too many (the limit is {MAX_POSITIONS})")
        if not self.eager:
            return Skip(f"{what} could be interleaved at the end; only measuring can tell")
        for reading in maps:
            if rw.is_shared(reading.weight_input):
                return Skip(Reason("the weight {!r} is shared", reading.weight_input.name))
        writer = _RowWriter(rw, Interleaving(rw, output, counts))
        rows, columns = [maps[0].source], 1
        for stage in stages:
            if stage.step is not None:
                rows = [writer.activate(stage.step, row) for row in rows]
            if stage.reading is None:
                continue
            linear = stage.reading.load()
            parts = [stage.row(linear, i) for i in range(math.prod(stage.counts[:-1]))]
            rows = [writer.apply(stage.reading, part, row, columns) for row in rows for part in parts]
            columns *= stage.counts[-1]
        nodes = [*writer.nodes, *writer.interleaving.write_rows(rows)]
        widths = "→".join(map(str, (maps[0].geometry.in_channels, *(m.geometry.out_channels for m in maps))))
        old = [n for s in stages for n in s.nodes]
        done = rw.replace(old, nodes, f"{what} ({widths}) are interleaved at the end", writer.residual)
        return done.with_signature(
            f"{what} of {widths} channels, {len(stages)} stages, at {rw.size_of(maps[0].source)}"
        )


def _read_transposed(rw: Rewriter, node: Node | None) -> _Stage | None:
    """A transposed convolution whose kernel equals its stride; each row of its taps is a pointwise map."""
    reading = forms.linear(rw, node)
    if reading is None or reading.geometry.rank not in (1, 2):
        return None
    if isinstance(phases_geometry(reading.geometry), Refusal):
        return None

    def row(linear: LinearMap, index: int) -> LinearMap:
        pointwise = to_phases(linear)
        width = linear.geometry.kernel[-1] * linear.geometry.out_channels
        return _select_outputs(pointwise, np.arange(index * width, (index + 1) * width))

    return _Stage(reading.geometry.kernel, reading.nodes, reading, row)


def _select_outputs(linear: LinearMap, selected: Values) -> LinearMap:
    """Some of the outputs of an ungrouped map."""
    g = linear.geometry
    geometry = Geometry(len(selected), g.in_channels, 1, g.kernel, g.strides, g.dilations, g.pads)
    return LinearMap.of(geometry, linear.weight[selected], linear.bias[selected])


def _read_shuffle(rw: Rewriter, node: Node) -> list[_Stage] | None:
    """A convolution, perhaps an activation, and a pixel shuffle; None for any other node."""
    if not rw.is_a(node, "DepthToSpace") or rw.other_uses(node.inputs[0]):
        return None
    maker, step = rw.producer(node.inputs[0]), None
    reading = stencil(rw, maker)
    if maker is not None and reading is None and maker.inputs:
        step = read_activation(rw, maker.inputs[0])
        reading = None if step is None else stencil(rw, rw.producer(maker.inputs[0]))
    if reading is None or reading.geometry.groups > 1:
        return None
    found = read_depth_to_space(node, reading.geometry.out_channels)
    if found is None:
        return None
    counts, order = found
    stage = _Stage(counts, reading.nodes, reading, lambda m, i: _select_outputs(m, order[i].reshape(-1)))
    stages = [stage, *([_Stage((1, 1), step.nodes, step=step)] if step is not None else [])]
    return [*stages, _Stage((1, 1), (node,))]


def _find_followers(rw: Rewriter, tensor: Tensor, rank: int) -> list[_Stage]:
    """The sequence of operators after a tensor that read each position separately."""
    stages: list[_Stage] = []
    while len(stages) < MAX_STEPS:
        step, reader = read_activation(rw, tensor), rw.sole_reader(tensor)
        stage = _read_transposed(rw, reader) or _read_pointwise(rw, reader)
        if step is not None:
            stage = _Stage((1,) * rank, step.nodes, step=step)
        if stage is None:
            break
        stages.append(stage)
        tensor = stage.nodes[-1].outputs[0]
    return stages


def _read_pointwise(rw: Rewriter, node: Node | None) -> _Stage | None:
    reading = stencil(rw, node)
    if reading is None or not reading.geometry.pointwise or reading.geometry.groups > 1:
        return None
    return _Stage((1,) * reading.geometry.rank, reading.nodes, reading)


@dataclass
class _RowWriter(Builder):
    """Writes operators for rows of phases."""

    interleaving: Interleaving

    def activate(self, step: Step, row: Tensor) -> Tensor:
        """Add an activation of one row."""
        width = self.rw.dim(row, 1)
        assert isinstance(width, int)
        active = self.interleaving.phase("active", width)
        self.add_step(step, row, active)
        return active

    def apply(self, like: Reading, linear: LinearMap, row: Tensor, columns: int) -> Tensor:
        """Add a map of each column of a row; the columns lie side by side as channels."""
        wide = on_phases(linear, columns) if columns > 1 else linear
        output = self.interleaving.phase("phases", wide.geometry.out_channels)
        self.add_map(wide, like, row, output)
        return output
