"""`pwopt.inspect`: list every linear map of a model, its rewrites, and the reasons against other rewrites."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pwopt.graph.files import Source, blame_model, load
from pwopt.graph.model import Model
from pwopt.graph.view import View
from pwopt.maps import forms
from pwopt.maps.cost import macs
from pwopt.passes import FoldChains
from pwopt.rewriting.driver import Pass
from pwopt.running.size_trials import Sizes
from pwopt.selecting.candidate_base import RewriteResult, run_passes
from pwopt.selecting.map_records import Listing, load_sized
from pwopt.selecting.pass_list import resolve_passes
from pwopt.selecting.shape_folding import infer_sizes


@dataclass(frozen=True)
class MapInfo:
    """One linear map.

    Attributes
    ----------
    tensor : str
        Its output, which identifies it.
    op : str
    channels : str
        "in→out", followed by "/g" for g groups.
    kernel : tuple of int
    space : tuple of int or None
        Spatial size of the output at the representative input sizes.
    macs : int or None
    single_tap : bool
        Whether its kernel has one tap. Such a map is pointwise, possibly with a stride.
    chain : int or None
        Number of its chain of maps that are directly connected once scales and shifts are folded. None if it is
        connected to no other map.
    decisions : tuple of str
        The rewrites that apply, and the reasons against others.
    """

    tensor: str
    op: str
    channels: str
    kernel: tuple[int, ...]
    space: tuple[int, ...] | None
    macs: int | None
    single_tap: bool
    chain: int | None
    decisions: tuple[str, ...]


class Inspection(Listing[MapInfo]):
    """The linear maps of a model."""

    def pointwise(self) -> Inspection:
        """Select the maps whose kernel has one tap."""
        return Inspection(tuple(m for m in self.maps if m.single_tap), self.shapes)


def inspect(
    model: Source,
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    plugins: Sequence[str | type[Pass] | Pass] = (),
) -> Inspection:
    """List every linear map of a model without changing it.

    onnxruntime is not needed. If it is installed, it is used to find sizes on which the model runs.

    Parameters
    ----------
    model : path, bytes, onnx.ModelProto, torch.onnx.ONNXProgram, onnx_ir.Model or Model
    shapes : mapping of input name to sizes, optional
        Sizes of dynamic inputs. By default, likely sizes are used.
    plugins : sequence of str, pass classes and passes, optional
        Passes in addition to pwopt's own, as for `optimize`.

    Returns
    -------
    Inspection
        Iterable over its maps.

    Raises
    ------
    UsageError, ModelError
        See `pwopt.errors`.

    Examples
    --------
    >>> import pwopt
    >>> for m in pwopt.inspect("models/linear_sequence.onnx").maps[:2]:
    ...     print(m.channels, m.chain, m.decisions[0])
    64→128 1 fold-chains: 64→128→192→128→32 is cheaper as one map
    128→192 1 fold-chains: 64→128→192→128→32 is cheaper as one map
    """
    original, sizes = load_sized(model, shapes)
    with blame_model(original.proto):
        path = Path(model) if isinstance(model, (str, os.PathLike)) else None
        return _describe_maps(original, load(model), load(model), sizes, resolve_passes(None, plugins, path))


def _describe_maps(original: Model, edited: Model, affine: Model, sizes: Sizes, passes: Sequence[Pass]) -> Inspection:
    result = run_passes(edited, passes, (), sizes)
    folded = run_passes(affine, [p for p in passes if not isinstance(p, FoldChains)], (), sizes)
    chains = _chains(View(affine.graph))
    view = View(original.graph, infer_sizes(original.proto, sizes))
    maps = []
    for node in view.nodes():
        reading = forms.linear(view, node)
        if reading is not None and reading.weighted and len(reading.nodes) == 1:
            chain = chains.get(_follow(reading.output.name, folded)[0])
            maps.append(_describe(view, reading, result, chain))
    return Inspection(tuple(maps), sizes)


def _describe(view: View, reading: forms.Reading, result: RewriteResult, chain: int | None) -> MapInfo:
    g, size = reading.geometry, view.size_of(reading.output)
    tensor, decisions = _follow(reading.output.name, result)
    decisions += [
        f"{s.pass_name}: {s.reason}" for s in result.skips if s.tensor == tensor and s.pass_name == "fold-chains"
    ]
    return MapInfo(
        reading.output.name,
        reading.node.op,
        reading.channels + (f" /{g.groups}" if g.groups > 1 else ""),
        g.kernel,
        size[2:] if size is not None and reading.axis == 1 else size,
        macs(view, reading.node),
        g.taps == 1 and not g.transposed,
        chain,
        tuple(decisions),
    )


def _follow(tensor: str, result: RewriteResult) -> tuple[str, list[str]]:
    """Follow a map's output through the rewrites; return the last tensor and the reasons of the rewrites."""
    decisions: list[str] = []
    for r in result.rewrites:
        became = dict(r.became).get(tensor)
        if became is None:
            continue
        decisions.append(f"{r.pass_name}: {r.reason}")
        tensor = became or tensor
    return tensor, list(dict.fromkeys(decisions))


def _chains(view: View) -> dict[str, int]:
    """Number the chains, and map the output of each map in a chain to the number."""
    number: dict[str, int] = {}
    count = 0
    for node in view.nodes():
        reading = forms.weighted(view, node)
        before = None if reading is None else forms.weighted(view, view.producer(reading.source))
        if reading is None or before is None:
            continue
        first = before.output.name
        if first not in number:
            count += 1
            number[first] = count
        number[reading.output.name] = number[first]
    return number
