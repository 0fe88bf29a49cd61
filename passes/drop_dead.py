"""Dead channel elimination: exact structured pruning of channels that are constant or that nothing needs."""

from __future__ import annotations

import numpy as np

from pwopt.algebra.geometry import Refusal
from pwopt.graph.ir import Node, Tensor
from pwopt.graph.reasons import Reason
from pwopt.maps import forms
from pwopt.maps.channels import CHANNEL_MULTIPLE, Analysis, Channels
from pwopt.maps.forms import Reading
from pwopt.maps.scans import LARGEST_INPUT, Scanner, flush_subnormals
from pwopt.maps.small_numbers import SmallNumbers
from pwopt.rewriting.driver import Pass, Rewriter, describe
from pwopt.rewriting.rechannel import find_first_producer, rechannel
from pwopt.rewriting.records import Rewrite, Skip


class DropDead(Pass):
    """W(x, v) + b = W′x + (W″v + b) for channels with a constant value v; Wx = W′x for channels with zero weights

    * A channel is constant if its filter is zero, or too small to change a float32 sum, or scaled by zero. An analysis
      follows it through activations, normalisations, depthwise convolutions, pooling, gates, sums and Concat
      (`pwopt.maps.channels`) to the maps that read it. Their biases take its value over.
    * A channel is unused if all its readers multiply it by zero.
    * Channels that sums and Concat tie together are removed together (Fang et al., "DepGraph", 2023).
    * A channel count that is a multiple of 8 stays one, for the runtime. If the pass is requested by name, it removes
      every dead channel.

    The pass also sets subnormal weights to zero, because processors multiply them up to a hundred times slower. Weight
    decay leaves dead channels and subnormal weights behind.
    Small weights stay where a later operator reveals them (`pwopt.maps.small_numbers`): for example, ⌈10⁻³⁹⌉ is 1.
    """

    name = "drop-dead"
    phase = "early"  # pad-channels adds channels of zeros on purpose
    context = 16  # what proves a channel constant may be far above

    def __init__(self) -> None:
        self._scan = Scanner()

    def start(self, rw: Rewriter) -> None:
        self._pending: dict[Tensor, tuple[list[Channels], Analysis]] = {}
        self._refused: dict[Tensor, str] = {}
        self._small = SmallNumbers(rw, self._scan)
        readings = [r for n in rw.nodes() if (r := forms.weighted(rw, n)) is not None and r.nodes[0] is n]
        scans = [self._scan(rw, r) for r in readings if not self._scan.sound(rw, r)]
        zero_scale = any(_has_zero_scale(rw, n) for n in rw.nodes())
        if not zero_scale and not any(s.dead for s in scans if s is not None):
            return
        analysis = Analysis(rw, self._scan, 1 if self.eager else CHANNEL_MULTIPLE)
        self._refused = analysis.small.refused
        for component in ([c for c in found if c.gone.any()] for found in analysis.components()):
            first = find_first_producer(rw, component)
            if first is not None:
                self._pending[first.outputs[0]] = (component, analysis)

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        reading = forms.weighted(rw, node)
        result = self._flush(rw, node, reading) if reading is not None and reading.nodes[0] is node else None
        if isinstance(result, Rewrite):
            rw.enqueue_around(node)
            return result
        for tensor in node.outputs:
            if tensor in self._pending:
                return self._prune(rw, *self._pending.pop(tensor))
        refused = "" if reading is None else self._refused.get(reading.output, "")
        return Skip(refused) if result is None and refused else result

    def _flush(self, rw: Rewriter, node: Node, reading: Reading) -> Rewrite | Skip | None:
        """Set subnormal weights to zero, for all readers of the weight."""
        scan = None if self._scan.sound(rw, reading) else self._scan(rw, reading)
        if scan is None or not scan.subnormal:
            return None
        tensor = reading.weight_input
        raw = rw.raw(tensor)
        if raw is None:
            return None
        low = flush_subnormals(raw.astype(np.float64), raw.dtype).astype(raw.dtype)
        if np.array_equal(low, raw):
            return None
        if rw.must_keep(tensor):
            return Skip(Reason("{:,} weights are subnormal, but {}", scan.subnormal, rw.must_keep(tensor)))
        maps = [(n, forms.weighted(rw, n)) for n in rw.readers(tensor)]
        readers = [n for n, r in maps if r is not None and r.weight_input is tensor]
        if len(readers) < len(rw.readers(tensor)):
            return Skip(
                Reason("{:,} weights are subnormal, but other operators read {!r} too", scan.subnormal, tensor.name)
            )
        observers = (self._small.find_observer(r) for _, r in maps if r is not None)
        observer = next(filter(None, observers), "")
        if observer:
            return Skip(Reason("{:,} weights are subnormal, but {}", scan.subnormal, observer))
        rw.release_names([tensor.name])
        clean = rw.new_constant(tensor.name, low)
        maker = rw.producer(tensor)
        rw.reroute(tensor, clean, readers)
        if maker is not None:
            rw.remove(maker)
        names = tuple(describe(n) for n in readers)
        reason = (
            f"{scan.subnormal:,} of {raw.size:,} weights are below the smallest normal {raw.dtype}, and become zero"
        )
        return Rewrite(reason, names, names)

    def _prune(self, rw: Rewriter, component: list[Channels], analysis: Analysis) -> Rewrite | Skip:
        takes = {c.tensor: np.flatnonzero(~c.gone) for c in component}
        reason = self._describe(rw, component, analysis)
        done = rw.attempt(rechannel, rw, analysis, component, takes, reason, "_pruned")
        return (
            Skip(Reason("dead channels could be removed, but {}", done.reason)) if isinstance(done, Refusal) else done
        )

    def _describe(self, rw: Rewriter, component: list[Channels], analysis: Analysis) -> str:
        """How many channels are removed where, and why."""
        gone = {c.tensor: c for c in component}
        changes, causes = [], []
        for flow in analysis.flows_at(component):
            if flow.reading is None or not flow.dense:
                continue
            name, output = describe(flow.reading.node), gone.get(flow.reading.output)
            if output is not None:
                changes.append(f"{name} {len(output.gone)} → {int((~output.gone).sum())}")
            source, scan = gone.get(flow.reading.source), analysis.small.scan(flow.reading)
            if source is None or scan is None:
                continue
            unread = source.gone & (scan.columns == 0)
            zero, constant = (source.gone & ~unread & (source.value == 0)), source.gone & ~unread & (source.value != 0)
            radius = float(np.max(source.radius[source.gone & ~unread], initial=0.0))
            bound = f" (to within {radius:.1g} for inputs up to {LARGEST_INPUT:.1g})" if radius else ""
            parts = [
                (unread, "are multiplied by zeros only"),
                (zero, f"are zero{bound}"),
                (constant, f"are constant{bound} and now part of its bias"),
            ]
            causes += [f"of those that {name} reads, {int(m.sum())} {what}" for m, what in parts if m.any()]
        return f"removed channels: {_shorten(changes, ', ')}; {_shorten(causes, '; ') or 'nothing reads them'}"


def _has_zero_scale(rw: Rewriter, node: Node) -> bool:
    """Whether a normalisation or a factor multiplies a channel by zero."""
    reading = forms.linear(rw, node) if rw.is_a(node, "BatchNormalization", "Mul") else None
    step = reading.try_load() if reading is not None and reading.kind == "diagonal" else None
    return step is not None and bool(np.any(step.scale == 0))


def _shorten(items: list[str], separator: str, most: int = 6) -> str:
    more = f"{separator}and {len(items) - most} more" if len(items) > most else ""
    return separator.join(items[:most]) + more
