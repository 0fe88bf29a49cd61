"""Channels that are the same for every input, or that nobody needs, are removed: exact structured pruning."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs

from pwopt import emit, forms
from pwopt.channels import LARGEST_INPUT, Analysis, Channels, Scanner, flushed
from pwopt.forms import Reading
from pwopt.linear import LinearMap, Refusal
from pwopt.rewrite import Pass, Rewrite, Rewriter, Skip, describe


class DropDead(Pass):
    """W(x, v) + b = W′x + (W″v + b) for channels of constant value v; Wx = W′x for channels that meet zeros.

    Subnormal weights become zero (processors multiply them up to a hundred times slower). A filter of zeros, or one
    too small to change a float32 sum, gives a channel that is the same for every input: it is followed through
    activations, normalisations, depthwise convolutions, pooling, gates, sums and Concat (`pwopt.channels`) to the
    maps that read it, goes into their biases, and leaves every tensor on the way. So do channels that all their
    readers multiply by zero. Weight decay leaves both behind; for the sets of channels that must go together see
    Fang et al., "DepGraph" (2023).
    """

    name = "drop-dead"

    def __init__(self) -> None:
        self._scan = Scanner()

    def start(self, rw: Rewriter) -> None:
        self._pending: dict[int, tuple[list[Channels], Analysis]] = {}
        scans = [self._scan(rw, r) for n in rw.nodes() if (r := forms.weighted(rw, n)) is not None and r.nodes[0] is n]
        if not any(s.dead for s in scans if s is not None):
            return
        analysis = Analysis(rw, self._scan)
        for component in analysis.components():
            first = min(
                (m for c in component if (m := rw.producer(c.tensor)) is not None), key=rw.position, default=None
            )
            if first is not None:
                self._pending[id(first)] = (component, analysis)

    def match_and_rewrite(self, node: gs.Node, rw: Rewriter) -> Rewrite | Skip | None:
        if id(node) in self._pending:
            return self._prune(rw, *self._pending.pop(id(node)))
        reading = forms.weighted(rw, node)
        if reading is None or reading.nodes[0] is not node:
            return None
        return self._flush(rw, node, reading)

    def _flush(self, rw: Rewriter, node: gs.Node, reading: Reading) -> Rewrite | Skip | None:
        """Subnormal weights become zero, for all readers of the weight."""
        scan = self._scan(rw, reading)
        tensor = reading.weight_input
        raw = rw.raw(tensor)
        if scan is None or not scan.subnormal or raw is None:
            return None
        if rw.pinned(tensor):
            return Skip(f"{scan.subnormal:,} weights are subnormal, but {rw.pinned(tensor)}")
        readers = rw.readers(tensor)
        rw.release([tensor.name])
        clean = rw.new_constant(tensor.name, flushed(raw.astype(np.float64), raw.dtype).astype(raw.dtype))
        maker = rw.producer(tensor)
        rw.reroute(tensor, clean)
        if maker is not None:
            rw.remove(maker)
        names = tuple(describe(n) for n in readers)
        reason = (
            f"{scan.subnormal:,} of {raw.size:,} weights are below the smallest normal {raw.dtype}, and become zero"
        )
        return Rewrite(reason, names, names)

    def _prune(self, rw: Rewriter, component: list[Channels], analysis: Analysis) -> Rewrite | Skip:
        keep = {id(c.tensor): ~c.gone for c in component}
        edits: list[tuple[Reading, LinearMap]] = []
        for flow in analysis.flows:
            reading = flow.reading
            if reading is None or not (id(reading.source) in keep or id(reading.output) in keep):
                continue
            current = forms.linear(rw, rw.producer(reading.output))  # another component may have rewritten it
            if current is None or current.source is not reading.source:
                return Skip("its neighbourhood has changed; it is looked at again in the next round")
            pruned = self._pruned(rw, current, analysis, keep)
            if isinstance(pruned, Refusal):
                return Skip(pruned.reason)
            if pruned is not None:
                edits.append((current, pruned))
        reason = self._account(rw, component, analysis)
        before = {id(c.tensor): c.tensor.shape for c in component}
        for c in component:
            if c.tensor.shape is not None:
                c.tensor.shape = [int((~c.gone).sum()) if a == c.axis else d for a, d in enumerate(c.tensor.shape)]
        written = []
        for reading, linear in edits:
            nodes = emit.write(rw, linear, reading, reading.source, reading.output, reading.axis)
            if isinstance(nodes, Refusal):
                for c in component:
                    c.tensor.shape = before[id(c.tensor)]
                return Skip(f"channels could go, but {nodes.reason}")
            written.append((reading, nodes))
        _resize(rw, component, analysis)
        old_sizes = {name: size for c in component if (size := rw.sizes.get(name := str(c.tensor.name))) is not None}
        renamed = {}
        records = [rw.replace(r.nodes, w.nodes, "", w.residual) for r, w in written]
        for c in component:
            old = str(c.tensor.name)
            renamed[old] = rw.rename(c.tensor, "_pruned")
            if old in old_sizes:
                count = int((~c.gone).sum())
                rw.sizes[renamed[old]] = tuple(count if a == c.axis else d for a, d in enumerate(old_sizes[old]))
        return Rewrite(
            reason,
            tuple(name for r in records for name in r.removed),
            tuple(name for r in records for name in r.added),
            sum(r.macs_before for r in records),
            sum(r.macs_after for r in records),
            max((r.residual for r in records), default=0.0),
            tuple((a, renamed.get(b, b)) for r in records for a, b in r.became),
        )

    def _account(self, rw: Rewriter, component: list[Channels], analysis: Analysis) -> str:
        """How many channels went where."""
        gone = {id(c.tensor): c for c in component}
        made, ends = [], []
        for flow in analysis.flows:
            if flow.reading is None or not flow.dense:
                continue
            name, output = describe(flow.reading.node), gone.get(id(flow.reading.output))
            if output is not None:
                made.append(f"{name} {len(output.gone)} → {int((~output.gone).sum())}")
            source, scan = gone.get(id(flow.reading.source)), self._scan(rw, flow.reading)
            if source is None or scan is None:
                continue
            unread = source.gone & (scan.columns == 0)
            zero, held = (source.gone & ~unread & (source.value == 0)), source.gone & ~unread & (source.value != 0)
            radius = float(np.max(source.radius[source.gone & ~unread], initial=0.0))
            bound = f" (to within {radius:.1g} for inputs up to {LARGEST_INPUT:.1g})" if radius else ""
            parts = [
                (unread, "meet only zeros"),
                (zero, f"are zero{bound}"),
                (held, f"are constant{bound}, in its bias now"),
            ]
            ends += [f"of those that {name} reads, {int(m.sum())} {what}" for m, what in parts if m.any()]
        return f"channels: {_few(made, ', ')}; {_few(ends, '; ')}"

    def _pruned(
        self, rw: Rewriter, reading: Reading, analysis: Analysis, keep: dict[int, np.ndarray]
    ) -> LinearMap | Refusal | None:
        """The map without the channels that go; None if it stays as it is."""
        linear = reading.load()
        if isinstance(linear, Refusal):
            return linear
        g, weight, bias = linear.geometry, linear.weight, linear.bias
        source, output = keep.get(id(reading.source)), keep.get(id(reading.output))
        if reading.weighted and g.groups == 1:
            weight = flushed(weight, rw.dtype(reading.weight or reading.source))
            if source is not None:
                known = analysis.of[id(reading.source)]
                value = np.nan_to_num(np.where(source, 0.0, known.value))
                through = weight.reshape(*weight.shape[:2], -1).sum(-1)
                bias, weight = bias + through @ value, weight[:, source]
            if output is not None:
                bias, weight = bias[output], weight[output]
            g = replace(g, out_channels=weight.shape[0], in_channels=weight.shape[1])
            return LinearMap.of(g, weight, bias)
        if output is None or len(weight) != len(output):
            return None  # a scale and a shift for all channels alike
        count = int(output.sum())
        return LinearMap.of(
            replace(g, out_channels=count, in_channels=count, groups=count), weight[output], bias[output]
        )


def _resize(rw: Rewriter, component: list[Channels], analysis: Analysis) -> None:
    """Channel counts in the arguments of Split and Reshape."""
    gone = {id(c.tensor): c for c in component}
    for flow in analysis.flows:
        node = flow.node
        if node not in rw or not any(id(t) in gone for t in node.outputs):
            continue
        if rw.op(node) == "Split":
            counts = [
                int((~gone[id(t)].gone).sum()) if id(t) in gone else rw.dim(t, _axis(analysis, t)) for t in node.outputs
            ]
            if rw.opset < 13:
                node.attrs["split"] = counts
                continue
            node.attrs.pop("num_outputs", None)
            sizes = rw.new_constant(f"{node.outputs[0].name}_sizes", np.array(counts, np.int64))
            rw.set_input(node, 1, sizes)
        elif rw.op(node) == "Reshape":
            shape, known = rw.integers(node.inputs[1]) or [], gone[id(node.outputs[0])]
            if shape[known.axis] > 0:
                shape[known.axis] = int((~known.gone).sum())
                rw.set_input(node, 1, rw.new_constant(f"{node.outputs[0].name}_shape", np.array(shape, np.int64)))


def _axis(analysis: Analysis, tensor: gs.Tensor) -> int:
    return analysis.of[id(tensor)].axis


def _few(items: list[str], separator: str, most: int = 6) -> str:
    more = f"{separator}and {len(items) - most} more" if len(items) > most else ""
    return separator.join(items[:most]) + more
