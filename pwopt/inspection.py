"""Every linear map of a model: its size, its chain, what pwopt would do with it and what not."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx

from pwopt import forms, runtime
from pwopt.compiler import concrete_sizes, run_pipeline, select_passes
from pwopt.cost import macs
from pwopt.graph import View
from pwopt.model import load
from pwopt.rewrite import Outcome

WEIGHTED = ("conv", "conv-transpose", "gemm", "matmul", "left-matmul")


@dataclass(frozen=True)
class MapInfo:
    """One linear map.

    Attributes
    ----------
    tensor : str
        Its output, which names it.
    op : str
    channels : str
        "in→out", with "/g" groups where there are some.
    kernel : tuple of int
    space : tuple of int or None
        Spatial size of the output at the representative input sizes.
    macs : int or None
    pointwise : bool
    chain : int or None
        Number of the chain of directly connected maps it belongs to, once scales and shifts are folded;
        None if it stands alone.
    decisions : tuple of str
        What would be done, and why not more.
    """

    tensor: str
    op: str
    channels: str
    kernel: tuple[int, ...]
    space: tuple[int, ...] | None
    macs: int | None
    pointwise: bool
    chain: int | None
    decisions: tuple[str, ...]


def inspect(
    model: str | os.PathLike[str] | onnx.ModelProto,
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> list[MapInfo]:
    """Look at every linear map of a model without changing it. Needs no onnxruntime.

    Parameters
    ----------
    model : path or onnx.ModelProto
    shapes : mapping of input name to sizes, optional
        For dynamic inputs; likely sizes otherwise.

    Returns
    -------
    list of MapInfo, in the file's order

    Examples
    --------
    >>> import pwopt
    >>> for m in pwopt.inspect("models/linear_sequence.onnx")[:2]:
    ...     print(m.channels, m.decisions[0])
    64→128 fold-chains: 64→128→192→128→32 is cheaper as one map
    128→192 fold-chains: 64→128→192→128→32 is cheaper as one map
    """
    original, edited = load(model), load(model)
    specs = runtime.input_specs(original.proto)
    runtime.check_shapes(specs, shapes or {})
    sizes = next(runtime.candidate_shapes(specs, shapes))
    _, outcome, _ = run_pipeline(edited, select_passes(None), (), sizes)
    view = View(original.graph, concrete_sizes(original.proto, sizes))
    chains = _chains(View(edited.graph))
    return [
        _describe(view, reading, outcome, chains)
        for node in view.nodes()
        if (reading := forms.linear(view, node)) is not None and reading.kind in WEIGHTED and len(reading.nodes) == 1
    ]


def _describe(view: View, reading: forms.Reading, outcome: Outcome, chains: Mapping[str, int]) -> MapInfo:
    g, size = reading.geometry, view.size_of(reading.output)
    tensor, decisions = _follow(reading.output.name, outcome)
    decisions += [
        f"{s.pass_name}: {s.reason}" for s in outcome.skips if s.tensor == tensor and s.pass_name == "fold-chains"
    ]
    return MapInfo(
        reading.output.name,
        reading.node.op,
        reading.channels + (f" /{g.groups}" if g.groups > 1 else ""),
        g.kernel,
        size[2:] if size is not None and reading.axis == 1 else size,
        macs(view, reading.node),
        g.taps == 1 and not g.transposed,
        chains.get(tensor),
        tuple(decisions),
    )


def _follow(tensor: str, outcome: Outcome) -> tuple[str, list[str]]:
    """The tensor that a map's successor produces, and what was done on the way."""
    decisions: list[str] = []
    for r in outcome.rewrites:
        became = dict(r.became).get(tensor)
        if became is None:
            continue
        decisions.append(f"{r.pass_name}: {r.reason}")
        tensor = became or tensor
    return tensor, list(dict.fromkeys(decisions))


def _chains(view: View) -> dict[str, int]:
    """Chain number of every map that reads another map's output directly, or is read so."""
    number: dict[str, int] = {}
    count = 0
    for node in view.nodes():
        reading = forms.linear(view, node)
        if reading is None or reading.kind not in WEIGHTED:
            continue
        before = forms.linear(view, view.producer(reading.source))
        if before is None or before.kind not in WEIGHTED:
            continue
        first = before.output.name
        if first not in number:
            count += 1
            number[first] = count
        number[reading.output.name] = number[first]
    return number
