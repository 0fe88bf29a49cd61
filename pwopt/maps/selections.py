"""Read selections of channels: Slice, Gather, Split, Concat, channel shuffles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pwopt.algebra.geometry import pointwise_geometry
from pwopt.algebra.linear import LinearMap
from pwopt.graph import attributes
from pwopt.graph.ir import Node, Tensor
from pwopt.graph.shapes import as_fixed
from pwopt.graph.values import read_extents
from pwopt.graph.view import View
from pwopt.maps.forms import Reading, Result, load_implied, reads


def selection(node: Node, source: Tensor, picks: Sequence[int], channels: int, axis: int) -> Reading:
    geometry = pointwise_geometry(len(picks), channels)
    load = load_implied(geometry, lambda: LinearMap.selection(picks, channels))
    return Reading((node,), source, geometry, axis, "selection", None, load)


@reads("Slice")
def read_slice(view: View, node: Node) -> Result:
    parameters = attributes.read_slice_parameters(view, node)
    if parameters is None or len(parameters) != 1:
        return None
    axis, start, end, step = parameters[0]
    channels = view.dim(node.inputs[0], axis)
    if not isinstance(channels, int):
        return None
    return selection(node, node.inputs[0], range(channels)[start:end:step], channels, axis)


@reads("Gather")
def read_gather(view: View, node: Node) -> Result:
    rank, axis = view.rank(node.inputs[0]), node.attrs.get("axis", 0)
    picks = view.integers(node.inputs[1])
    held = view.constant(node.inputs[1])
    if rank is None or picks is None or held is None or len(held.shape) != 1:
        return None
    axis += rank if axis < 0 else 0
    channels = view.dim(node.inputs[0], axis)
    if not isinstance(channels, int) or any(not -channels <= p < channels for p in picks):
        return None
    return selection(node, node.inputs[0], [p % channels for p in picks], channels, axis)


#: The most inputs of a Concat, and the most channels, that are read as a selection of one tensor.
MAX_PARTS, MAX_CHANNELS = 16, 1 << 16


@reads("Expand", "Tile")
def read_repetition(view: View, node: Node) -> Result:
    """Read a repetition along one axis as a selection, such as a grey image that is repeated for three channels."""
    before, after = read_extents(view, node.inputs[0]), read_extents(view, node.outputs[0])
    if before is None or after is None or len(before) != len(after):
        return None
    changed = [axis for axis, (b, a) in enumerate(zip(before, after, strict=True)) if b != a or b is None]
    if len(changed) != 1:
        return None
    channels, total = before[changed[0]], after[changed[0]]
    if not isinstance(channels, int) or not isinstance(total, int) or not channels or total % channels:
        return None
    if total > MAX_CHANNELS:
        return None
    picks = np.tile(np.arange(channels), total // channels).tolist()
    return selection(node, node.inputs[0], picks, channels, changed[0])


@reads("Concat")
def read_rearrangement(view: View, node: Node) -> Result:
    """Read a Concat of parts of one tensor as a selection, such as the reversed channels of an image."""
    axis = attributes.read_concat_axis(view, node)
    if axis is None or not 2 <= len(node.inputs) <= MAX_PARTS:
        return None
    total = view.dim(node.outputs[0], axis)
    if not isinstance(total, int) or total > MAX_CHANNELS:
        return None
    parts = [_read_part(view, node, t, axis) for t in node.inputs]
    sources = {part[0] for part in parts if part is not None}
    source = next(iter(sources), None)
    channels = None if source is None else view.dim(source, axis)
    if source is None or None in parts or len(sources) > 1 or not isinstance(channels, int):
        return None
    found = [part for part in parts if part is not None]
    picks = [c for _, entries, _ in found for c in entries or range(channels)]
    before = tuple(dict.fromkeys(n for _, _, n in found if n is not None))
    if not picks:
        return None
    return replace(selection(node, source, picks, channels, axis), nodes=(*before, node))


def _read_part(view: View, node: Node, tensor: Tensor, axis: int) -> tuple[Tensor, list[int], Node | None] | None:
    """(source, channels, operator) of one input of a Concat; no channels and no operator if it is the source itself.

    None if another operator than the Concat reads what the operator computes.
    """
    producer = view.producer(tensor)
    split = read_split(view, producer) if producer is not None and view.op(producer) == "Split" else None
    if producer is not None and split is not None and split[0].axis == axis:
        alone = all(view.sole_reader(t) is node for t in producer.outputs)
        index = next(i for i, t in enumerate(producer.outputs) if t is tensor)
        start = sum(r.geometry.out_channels for r in split[:index])
        entries = list(range(start, start + split[index].geometry.out_channels))
        return (producer.inputs[0], entries, producer) if alone else None
    if producer is not None and view.op(producer) == "Slice" and view.sole_reader(tensor) is node:
        parameters = attributes.read_slice_parameters(view, producer)
        channels = view.dim(producer.inputs[0], axis)
        if parameters is not None and len(parameters) == 1 and parameters[0][0] == axis and isinstance(channels, int):
            _, start, end, step = parameters[0]
            entries = list(range(channels)[start:end:step])
            return (producer.inputs[0], entries, producer) if entries else None
    return tensor, [], None


def read_split(view: View, node: Node) -> list[Reading] | None:
    """Read a Split with known sizes as one selection per output; None if one is empty."""
    axis, rank = node.attrs.get("axis", 0), view.rank(node.inputs[0])
    if rank is None:
        return None
    axis += rank if axis < 0 else 0
    channels = view.dim(node.inputs[0], axis)
    numbers = as_fixed([view.dim(t, axis) for t in node.outputs])
    if not isinstance(channels, int) or numbers is None or 0 in numbers or sum(numbers) != channels:
        return None
    starts = np.concatenate([[0], np.cumsum(numbers)]).tolist()
    return [
        selection(node, node.inputs[0], range(starts[i], starts[i + 1]), channels, axis) for i in range(len(numbers))
    ]


def read_concat(view: View, node: Node) -> list[Reading] | None:
    """Read a Concat as one map per input that adds channels of zeros; the output is their sum."""
    axis = attributes.read_concat_axis(view, node)
    widths = None if axis is None else as_fixed([view.dim(t, axis) for t in node.inputs])
    if axis is None or widths is None:
        return None
    starts, total = np.concatenate([[0], np.cumsum(widths)]).tolist(), sum(widths)
    return [
        selection(
            node, t, [c - starts[i] if starts[i] <= c < starts[i + 1] else -1 for c in range(total)], widths[i], axis
        )
        for i, t in enumerate(node.inputs)
    ]


@reads("Reshape")
def read_shuffle(view: View, node: Node) -> Result:
    """Read a channel shuffle as a permutation: Reshape to (N, g, C/g, …), Transpose that swaps g and C/g, Reshape
    back."""
    transpose = view.producer(node.inputs[0])
    if transpose is None or view.op(transpose) != "Transpose" or view.other_uses(node.inputs[0]):
        return None
    split = view.producer(transpose.inputs[0])
    if split is None or view.op(split) != "Reshape" or view.other_uses(transpose.inputs[0]):
        return None
    source = split.inputs[0]
    before, inner, after = (read_extents(view, t) for t in (source, split.outputs[0], node.outputs[0]))
    if before is None or inner is None or after is None or len(before) != len(after) or len(inner) != len(before) + 1:
        return None
    groups, width, channels = inner[1], inner[2], before[1]
    swap = [0, 2, 1, *range(3, len(inner))]
    if not isinstance(groups, int) or not isinstance(width, int) or not isinstance(channels, int):
        return None
    same_space = attributes.is_same_shape(
        [before[0], *before[2:]], [inner[0], *inner[3:]]
    ) and attributes.is_same_shape(before, after)
    if attributes.read_permutation(view, transpose) != swap or groups * width != channels or not same_space:
        return None
    picks = np.arange(channels).reshape(groups, width).T.reshape(-1)
    return replace(selection(node, source, picks.tolist(), channels, 1), nodes=(split, transpose, node))
