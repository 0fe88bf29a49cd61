"""Changes the channels of tensors: fewer, more, or in another order, with the weights of all maps around them."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pwopt.algebra.geometry import RefusedError
from pwopt.algebra.linear import LinearMap
from pwopt.algebra.unions import Unions
from pwopt.graph.ir import Node, Tensor
from pwopt.graph.shapes import set_channels
from pwopt.maps import emit, forms
from pwopt.maps.channels import Analysis, Channels, Link
from pwopt.maps.cost import macs
from pwopt.maps.forms import Reading
from pwopt.rewriting.driver import Rewriter
from pwopt.rewriting.records import Rewrite

#: The old channel at each position of a tensor; −1 for a new channel, for which maps have zeros.
Take = NDArray[np.intp]


@dataclass(frozen=True)
class Run:
    """Channels `start` to `stop` of a tensor. Runs of the same kind are the same channels of different tensors."""

    start: int
    stop: int
    kind: int


def find_runs(analysis: Analysis, component: Sequence[Channels]) -> dict[Tensor, list[Run]]:
    """Split the channels of the tensors of a component into runs that no Concat, Split or sum of them divides."""
    cuts = {c.tensor: {0, len(c.value)} for c in component}
    links = [link for flow in analysis.flows_at(component) for link in flow.links if _is_within(link, cuts)]
    at: dict[Tensor, list[Link]] = {}
    for link in links:
        at.setdefault(link.a.tensor, []).append(link)
        at.setdefault(link.b.tensor, []).append(link)
    pending = deque(links)
    while pending:
        link = pending.popleft()
        ends = [(end.tensor, start) for end, start in ((link.a, link.start_a), (link.b, link.start_b))]
        inside = {cut - start for t, start in ends for cut in cuts[t] if 0 <= cut - start <= link.count}
        for t, start in ends:
            new = {start + cut for cut in inside} - cuts[t]
            cuts[t] |= new
            pending.extend(at[t] if new else ())
    number = {run: i for i, run in enumerate((t, start) for t, found in cuts.items() for start in found)}
    kinds = Unions[int]()
    for link in links:
        for cut in cuts[link.a.tensor]:
            if link.start_a <= cut < link.start_a + link.count:
                other = number[link.b.tensor, cut - link.start_a + link.start_b]
                kinds.join(number[link.a.tensor, cut], other)
    return {
        t: [Run(start, stop, kinds.root(number[t, start])) for start, stop in itertools.pairwise(sorted(found))]
        for t, found in cuts.items()
    }


def find_first_producer(rw: Rewriter, component: Sequence[Channels]) -> Node | None:
    """The first operator that computes one of these tensors; None if they are all graph inputs or constants."""
    producers = (node for c in component if (node := rw.producer(c.tensor)) is not None)
    return min(producers, key=rw.position, default=None)


def _is_within(link: Link, tensors: Collection[Tensor]) -> bool:
    return link.a.tensor in tensors and link.b.tensor in tensors


def rechannel(
    rw: Rewriter,
    analysis: Analysis,
    component: Sequence[Channels],
    takes: Mapping[Tensor, Take],
    reason: str,
    suffix: str,
    but: Node | None = None,
) -> Rewrite:
    """Change the channels of tensors, and the weights of the maps that compute or read them.

    Parameters
    ----------
    rw : Rewriter
    analysis : Analysis
        Of the present graph.
    component : sequence of Channels
        Tensors that are linked to each other, and to no others.
    takes : mapping of Tensor to array of int
        The old channel at each new position. Linked tensors must have the same. A channel that is left out must be
        removable: if its value is known, the biases of its readers take it over.
    reason : str
    suffix : str
        Appended to the names of the tensors, whose values change.
    but : Node, optional
        An operator that the caller replaces.

    Returns
    -------
    Rewrite

    Raises
    ------
    RefusedError
        If a map cannot take the change over. The graph is unchanged then.
    """
    edits = _find_edits(rw, component, analysis, takes, but)
    for reading, linear in edits:
        emit.check(rw, linear, reading, reading.source, reading.axis)
    macs_before = sum(macs(rw, n) or 0 for r, _ in edits for n in r.nodes)
    for c in component:
        rw.reshape(c.tensor, set_channels(c.axis, len(takes[c.tensor])))
    written = []
    for reading, linear in edits:
        nodes = emit.write(rw, linear, reading, reading.source, reading.output, reading.axis)
        written.append((reading, nodes))
    _resize(rw, component, analysis, takes)
    records = [rw.replace(r.nodes, w.nodes, "", w.residual) for r, w in written]
    renamed = {str(c.tensor.name): rw.rename(c.tensor, suffix) for c in component}
    return replace(Rewrite.of(reason, records, renamed), macs_before=macs_before)


def _find_edits(
    rw: Rewriter, component: Sequence[Channels], analysis: Analysis, takes: Mapping[Tensor, Take], but: Node | None
) -> list[tuple[Reading, LinearMap]]:
    """The maps that read or compute one of the tensors, each with its new map."""
    edits: list[tuple[Reading, LinearMap]] = []
    for flow in analysis.flows_at(component):
        reading = flow.reading
        touched = reading is not None and (reading.source in takes or reading.output in takes)
        if reading is None or not touched or flow.node is but:
            continue
        current = forms.linear(rw, rw.producer(reading.output))  # another component may have rewritten it
        if current is None or current.source is not reading.source:
            raise RefusedError("its neighbourhood has changed; it is looked at again in the next round")
        edited = _edit(rw, current, analysis, takes)
        if edited is not None:
            edits.append((current, edited))
    return edits


def _take(values: NDArray[Any], take: Take, axis: int = 0) -> NDArray[Any]:
    """Take slices, with zeros for new ones."""
    return np.where(
        (take >= 0).reshape(-1, *(1,) * (values.ndim - 1 - axis)), np.take(values, np.maximum(take, 0), axis), 0.0
    )


def _edit(rw: Rewriter, reading: Reading, analysis: Analysis, takes: Mapping[Tensor, Take]) -> LinearMap | None:
    """The map between the new channels; None if it does not change."""
    linear = reading.load()
    g, weight, bias = linear.geometry, linear.weight, linear.bias
    moved = np.zeros_like(bias)
    source, output = takes.get(reading.source), takes.get(reading.output)
    if reading.weighted and g.groups == 1:
        weight = analysis.small.flush(reading, weight)
        if source is not None:
            value = np.nan_to_num(analysis.of[reading.source].value)
            value[source[source >= 0]] = 0.0
            through = weight.reshape(*weight.shape[:2], -1).sum(-1)
            shift = through @ value
            bias, moved, weight = bias + shift, np.abs(shift), _take(weight, source, 1)
        if output is not None:
            bias, moved, weight = _take(bias, output), _take(moved, output), _take(weight, output)
        g = replace(g, out_channels=weight.shape[0], in_channels=weight.shape[1])
        return LinearMap.of(g, weight, bias, moved)
    if output is None or reading.axis is None or len(weight) != len(analysis.of[reading.output].value):
        return None  # a scale and a shift for all channels alike
    count = len(output)
    g = replace(g, out_channels=count, in_channels=count, groups=count)
    return LinearMap.of(g, _take(weight, output), _take(bias, output))


def _resize(rw: Rewriter, component: Sequence[Channels], analysis: Analysis, takes: Mapping[Tensor, Take]) -> None:
    """Update the channel counts in the arguments of Split and Reshape."""
    for flow in analysis.flows_at(component):
        node = flow.node
        if node not in rw or not any(t in takes for t in node.outputs):
            continue
        if rw.op(node) == "Split":
            counts = [len(takes[t]) if t in takes else rw.dim(t, analysis.of[t].axis) for t in node.outputs]
            if rw.opset < 13:
                rw.set_attributes(node, split=counts)
                continue
            rw.set_attributes(node, num_outputs=None)
            sizes = rw.new_constant(f"{node.outputs[0].name}_sizes", np.array(counts, np.int64))
            rw.set_input(node, 1, sizes)
        elif rw.op(node) == "Reshape":
            source, output = analysis.of[node.inputs[0]], analysis.of[node.outputs[0]]
            old = rw.integers(node.inputs[1]) or []
            copied = not node.attrs.get("allowzero", 0)
            new = [len(source.value) if d == 0 and a == source.axis and copied else d for a, d in enumerate(old)]
            new[output.axis] = -1 if old[output.axis] == -1 else len(takes[output.tensor])
            if new != old:
                shape: Tensor = rw.new_constant(f"{node.outputs[0].name}_shape", np.array(new, np.int64))
                rw.set_input(node, 1, shape)
