"""Maps behind an interleaving of phases run on the phases, which are put together at last."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from pwopt.algebra import Values
from pwopt.algebra.geometry import Geometry, Refusal
from pwopt.algebra.linear import LinearMap
from pwopt.algebra.multirate import on_phases, spread, spread_geometry
from pwopt.maps import emit, forms
from pwopt.maps.forms import Reading
from pwopt.maps.positions import stencil
from pwopt.maps.resampling import shuffled
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.interleaving import Interleaving, interleavable
from pwopt.rewriting.records import Rewrite, Skip
from pwopt.rewriting.steps import Step, activation, repeated
from pwopt.rewriting.wording import counted

#: How far a chain is followed.
MAX_LENGTH = 16
#: The most positions that one becomes.
MAX_PHASES = 64

#: The map to one row of phases, its columns side by side: of a map, and the number of the row.
Row = Callable[[LinearMap, int], LinearMap | Refusal]


@dataclass(frozen=True)
class _Stage:
    """A map to phases, or to as many positions as before, or an activation."""

    counts: tuple[int, ...]
    reading: Reading | None = None
    row: Row | None = None
    step: Step | None = None
    nodes: tuple[gs.Node, ...] = ()


class SubPixel(Pass):
    """W·D(x) = D((I ⊗ W)x) and f(D(x)) = D(f(x)), where D puts phases together, and I ⊗ W is W on each of them.

    A pixel shuffle (DepthToSpace) after a convolution, and a transposed convolution whose kernel is its stride, are
    maps to phases that are put together at last. What follows and reads every position alone, activations, pointwise
    maps and further such transposed convolutions, runs on the phases before that, where they lie side by side as
    channels: one interleaving for all of them, in the form that onnxruntime's blocked layout has, which DepthToSpace is
    not.

    Sub-pixel convolution (Shi et al., 2016), super-resolution (Lim et al., "EDSR", 2017), text detection (Liao et al.,
    "DBNet", 2020).
    """

    name = "sub-pixel"
    policy = "measured"
    pays_on = frozenset({"cpu", "other"})  # graphics cards have no blocked layout

    def match_and_rewrite(self, node: gs.Node, rw: Rewriter) -> Rewrite | Skip | None:
        found = _transposed(rw, node) or _shuffle(rw, node)
        if found is None:
            return None
        source, stages = found
        stages += _followers(rw, stages[-1].nodes[-1].outputs[0])
        counts = tuple(math.prod(s) for s in zip(*(s.counts for s in stages), strict=True))
        output = stages[-1].nodes[-1].outputs[0]
        maps = [s.reading for s in stages if s.reading is not None]
        what = f"{counted(len(maps), 'map')} to {'×'.join(map(str, counts))} phases"
        refusal = interleavable(rw, output)
        if refusal is not None:
            return Skip(refusal.reason)
        if math.prod(counts) > MAX_PHASES:
            return Skip(f"{what} are too many")
        if not self.eager:
            return Skip(f"{what} could be put together at last; only measuring can tell")
        work = _Work(rw, Interleaving(rw, output, counts))
        for reading in maps:
            if rw.shared(reading.weight_input):
                return Skip(f"the weight {reading.weight_input.name!r} is shared")
        rows, columns = [source], 1
        for stage in stages:
            rows = work.on_rows(stage, rows, columns)
            columns *= stage.counts[-1]
        if work.refusal is not None:
            return Skip(work.refusal.reason)
        nodes = [*work.nodes, *work.together.write_rows(rows)]
        widths = "→".join(map(str, (maps[0].geometry.in_channels, *(m.geometry.out_channels for m in maps))))
        old = [n for s in stages for n in s.nodes]
        done = rw.replace(old, nodes, f"{what} ({widths}) are put together at last", work.residual)
        return done.signed(f"{what} of {widths} channels, {len(stages)} stages, at {rw.size_of(source)}")


def _transposed(rw: Rewriter, node: gs.Node) -> tuple[gs.Tensor, list[_Stage]] | None:
    stage = _spreading(rw, node)
    return None if stage is None or stage.reading is None else (stage.reading.source, [stage])


def _spreading(rw: Rewriter, node: gs.Node) -> _Stage | None:
    """A transposed convolution whose kernel is its stride; each row of its taps is a pointwise map."""
    reading = forms.linear(rw, node)
    if reading is None or reading.kind != "conv-transpose" or reading.geometry.rank not in (1, 2):
        return None
    if isinstance(spread_geometry(reading.geometry), Refusal):
        return None

    def row(linear: LinearMap, index: int) -> LinearMap | Refusal:
        whole = spread(linear)
        if isinstance(whole, Refusal):
            return whole
        width = linear.geometry.kernel[-1] * linear.geometry.out_channels
        return _outputs(whole, np.arange(index * width, (index + 1) * width))

    return _Stage(reading.geometry.kernel, reading, row, nodes=(node,))


def _outputs(linear: LinearMap, picked: Values) -> LinearMap:
    """Some of the outputs of an ungrouped map."""
    g = linear.geometry
    geometry = Geometry(len(picked), g.in_channels, 1, g.kernel, g.strides, g.dilations, g.pads)
    return LinearMap.of(geometry, linear.weight[picked], linear.bias[picked])


def _shuffle(rw: Rewriter, node: gs.Node) -> tuple[gs.Tensor, list[_Stage]] | None:
    """A convolution, perhaps an activation, and a pixel shuffle."""
    found = shuffled(rw, node)
    if found is None or rw.crowd(node.inputs[0]):
        return None
    counts, order = found
    maker = rw.producer(node.inputs[0])
    reading = None if maker is None else stencil(rw, maker)
    step = None
    if maker is not None and reading is None and maker.inputs:
        step, above = activation(rw, maker.inputs[0]), rw.producer(maker.inputs[0])
        if above is None or step is None or step.output is not node.inputs[0]:
            return None
        reading = stencil(rw, above)
    if reading is None or reading.geometry.groups > 1:
        return None
    stage = _Stage(counts, reading, lambda m, i: _outputs(m, order[i].reshape(-1)), nodes=reading.nodes)
    stages = [stage, *([_Stage((1, 1), step=step, nodes=step.nodes)] if step is not None else [])]
    return reading.source, [*stages, _Stage((1, 1), nodes=(node,))]


def _followers(rw: Rewriter, tensor: gs.Tensor) -> list[_Stage]:
    """What reads every position alone, one after the other."""
    stages: list[_Stage] = []
    while len(stages) < MAX_LENGTH:
        step, reader = activation(rw, tensor), rw.sole_reader(tensor)
        stage = None if reader is None else _spreading(rw, reader) or _pointwise(rw, reader, tensor)
        if step is not None:
            stage = _Stage((1,) * ((rw.rank(tensor) or 3) - 2), step=step, nodes=step.nodes)
        if stage is None:
            break
        stages.append(stage)
        tensor = stage.nodes[-1].outputs[0]
    return stages


def _pointwise(rw: Rewriter, node: gs.Node, source: gs.Tensor) -> _Stage | None:
    reading = stencil(rw, node)
    if reading is None or not reading.geometry.pointwise or reading.geometry.groups > 1 or reading.source is not source:
        return None
    return _Stage((1,) * reading.geometry.rank, reading, lambda m, _: m, nodes=(node,))


@dataclass
class _Work:
    """The operators that come, for phases row by row."""

    rw: Rewriter
    together: Interleaving
    nodes: list[gs.Node] = field(default_factory=list)
    residual: float = 0.0
    refusal: Refusal | None = None

    def on_rows(self, stage: _Stage, rows: list[gs.Tensor], columns: int) -> list[gs.Tensor]:
        """What a stage makes of each row, of which it may make several."""
        if stage.step is not None:
            return [self._active(stage.step, row) for row in rows]
        if stage.reading is None or stage.row is None:
            return rows
        linear = stage.reading.load()
        if isinstance(linear, Refusal):
            self.refusal = linear
            return rows
        parts = [stage.row(linear, i) for i in range(math.prod(stage.counts[:-1]))]
        return [self._mapped(stage.reading, part, row, columns) for row in rows for part in parts]

    def _active(self, step: Step, row: gs.Tensor) -> gs.Tensor:
        width = self.rw.dim(row, 1)
        assert isinstance(width, int)
        active = self.together.phase("active", width)
        self.nodes += repeated(self.rw, step, row, active)
        return active

    def _mapped(self, like: Reading, linear: LinearMap | Refusal, row: gs.Tensor, columns: int) -> gs.Tensor:
        """A map on each column, which lie side by side."""
        if isinstance(linear, Refusal):
            self.refusal = linear
            return row
        wide = on_phases(linear, columns) if columns > 1 else linear
        output = self.together.phase("phases", wide.geometry.out_channels)
        written = emit.write(self.rw, wide, like, row, output, 1, inherit=False)
        if isinstance(written, Refusal):
            self.refusal = written
            return row
        self.nodes += written.nodes
        self.residual = max(self.residual, written.residual)
        return output
