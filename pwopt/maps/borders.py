"""Paddings as linear maps: of channels, and of positions."""

from __future__ import annotations

import math

import numpy as np

from pwopt.algebra import Array
from pwopt.algebra.geometry import Geometry, pointwise_geometry
from pwopt.algebra.linear import LinearMap
from pwopt.graph import attributes
from pwopt.graph.ir import Node, Tensor
from pwopt.graph.shapes import as_fixed
from pwopt.graph.view import View
from pwopt.maps.forms import Reading, Result, load_implied, reads


@reads("Pad")
def read_pad(view: View, node: Node) -> Result:
    """Padding of channels is a selection with a bias; padding of positions is a map with a border."""
    found = attributes.read_pad_parameters(view, node)
    if found is None:
        return None
    pads, mode, constant = found
    rank = len(pads) // 2
    axes = [a for a in range(rank) if pads[a] or pads[a + rank]]
    if mode != "constant" or not axes or constant is None or min(pads) < 0:
        return None
    axis = min(axes[0], 1)
    channels = view.dim(node.inputs[0], axis)
    if not isinstance(channels, int) or channels < 1:
        return None
    if axes[0] >= 2:
        around = (*pads[2:rank], *pads[rank + 2 :])
        return _border((node,), node.inputs[0], around, np.full(channels, constant))
    if len(axes) != 1:
        return None
    before, total = pads[axis], pads[axis] + channels + pads[axis + rank]
    geometry = pointwise_geometry(total, channels, biased=bool(constant))

    def padded() -> LinearMap:
        picks = np.full(total, -1)
        picks[before : before + channels] = np.arange(channels)
        selection = LinearMap.selection(picks.tolist(), channels)
        return LinearMap.of(geometry, selection.weight, np.where(picks < 0, constant, 0.0))

    return Reading((node,), node.inputs[0], geometry, axis, "selection", None, load_implied(geometry, padded))


def _border(nodes: tuple[Node, ...], source: Tensor, pads: tuple[int, ...], fill: Array) -> Reading:
    """A border around a feature map that holds `fill`, one number per channel."""
    channels, ones = len(fill), (1,) * (len(pads) // 2)
    geometry = Geometry(channels, channels, channels, ones, ones, ones, pads)
    padding = LinearMap.of(geometry, np.ones(channels))
    return Reading(nodes, source, geometry, 1, "border", None, lambda: padding, fill if fill.any() else None)


#: The most elements of a tensor whose positions are tracked one by one.
MAX_FOLLOWED = 1 << 22


@reads("ScatterND", "Transpose")
def read_overwritten_border(view: View, node: Node) -> Result:
    """A Pad whose border is then overwritten with one number per channel.

    Exporters write assignments to slices (``y[:, :, :p] = b``) as ScatterND between Transposes. Diverse branch blocks
    (Ding et al., 2021) use them to pad with the value that their normalisation gives for zero.
    """
    chain, scatters = [node], 0
    while view.op(chain[-1]) != "Pad":
        scatters += view.op(chain[-1]) == "ScatterND"
        before = view.producer(chain[-1].inputs[0])
        if not view.is_a(before, "Pad", "ScatterND", "Transpose", "Identity") or view.other_uses(chain[-1].inputs[0]):
            return None
        if len(chain) > 16:
            return None
        chain.append(before)
    chain.reverse()
    pad = read_pad(view, chain[0])
    shape, before_pad = as_fixed(view.shape(chain[0].outputs[0])), as_fixed(view.shape(chain[0].inputs[0]))
    if not scatters or not isinstance(pad, Reading) or pad.kind != "border" or shape is None or before_pad is None:
        return None
    if math.prod(shape) > MAX_FOLLOWED or math.prod(before_pad) == 0:
        return None
    begins = pad.geometry.pads[: pad.geometry.rank]
    inside = (slice(None), slice(None), *(slice(b, b + n) for b, n in zip(begins, before_pad[2:], strict=True)))
    places = np.full(shape, -1)
    places[inside] = np.arange(math.prod(before_pad)).reshape(before_pad)
    values = np.zeros(shape)
    values += 0.0 if pad.fill is None else pad.fill.reshape(-1, *(1,) * pad.geometry.rank)
    original = places.copy()
    for step in chain[1:]:
        if step.op == "Transpose":
            perm = step.attrs.get("perm")
            places, values = np.transpose(places, perm), np.transpose(values, perm)
        elif step.op == "ScatterND":
            indices, updates = view.raw(step.inputs[1]), view.value(step.inputs[2])
            if indices is None or updates is None or step.attrs.get("reduction", "none") != "none":
                return None
            at = tuple(np.moveaxis(indices, -1, 0))
            places, values = places.copy(), values.copy()
            places[at], values[at] = -1, updates
    if places.shape != original.shape or not np.array_equal(places, original):
        return None
    outside = np.moveaxis(places, 1, 0).reshape(shape[1], -1) < 0
    border = np.moveaxis(values, 1, 0).reshape(shape[1], -1)[outside].reshape(shape[1], -1)
    if np.any(border != border[:, :1]):
        return None
    return _border(tuple(chain), chain[0].inputs[0], pad.geometry.pads, border[:, 0])
