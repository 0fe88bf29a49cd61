"""Permutation absorption: the maps that read a channel shuffle take its permutation into their weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pwopt.algebra.linear import LinearMap
from pwopt.graph.ir import Node, Tensor
from pwopt.maps import emit, forms
from pwopt.maps.forms import Reading
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.records import Rewrite


class AbsorbShuffle(Pass):
    """W(Px) = (WP)x, D(Px) = P(D′x) with D′ = PᵀDP, for a permutation P of channels with several readers

    * Every reader of the shuffle is a map with dense weights, or a depthwise map that only such a map reads.
    * Weights are not shared, and the shuffle is no graph output.
    * No multiply-adds are added. `fold-chains` does the same for a shuffle with one reader.

    Bit-exact, because weights are only put into another order. The shuffle disappears with its last reader. The units
    with stride 2 of ShuffleNetV2 contain this pattern. (Ma et al., 2018)
    """

    name = "absorb-shuffle"
    context = 3  # a shuffle has up to three operators

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | None:
        reading = forms.weighted(rw, node)
        shuffle = None if reading is None else _find_shuffle(rw, reading)
        if reading is None or shuffle is None:
            return None
        readers = rw.readers(shuffle.output)
        alone = len(readers) == 1
        if rw.must_keep(shuffle.output) or not all(_can_absorb(rw, reader, shuffle) for reader in readers):
            return None
        if alone and _is_dense(reading):
            return None  # fold-chains does this
        old = [*(shuffle.nodes if alone else ()), *reading.nodes]
        reason = f"the shuffle of {shuffle.geometry.in_channels} channels moves into the weights"
        permutation = shuffle.load()
        if _is_dense(reading):
            written = _write(rw, reading, reading.load() @ permutation, shuffle.source, reading.output)
            return rw.replace(old, written.nodes, reason, written.residual)
        after = _find_after(rw, reading)
        assert after is not None
        middle = rw.new_variable(f"{reading.output.name}_unshuffled", reading.output)
        first = _write(rw, reading, _conjugate(reading.load(), permutation), shuffle.source, middle)
        second = _write(rw, after, after.load() @ permutation, middle, after.output)
        return rw.replace([*old, *after.nodes], [*first.nodes, *second.nodes], reason)


def _find_shuffle(rw: Rewriter, reading: Reading) -> Reading | None:
    """The permutation of channels that a map reads."""
    found = forms.linear(rw, rw.producer(reading.source))
    if found is None or found.kind != "selection" or found.axis != reading.axis or reading.turned:
        return None
    if found.output is not reading.source or found.geometry.in_channels != found.geometry.out_channels:
        return None
    linear = found.try_load()
    if linear is None or not np.array_equal(np.sort(_picks(linear)), np.arange(found.geometry.in_channels)):
        return None
    return found


def _picks(permutation: LinearMap) -> np.ndarray:
    """The input channel of each output channel."""
    return np.asarray(permutation.weight.reshape(permutation.geometry.out_channels, -1).argmax(1))


def _can_absorb(rw: Rewriter, node: Node, shuffle: Reading) -> bool:
    reading = forms.weighted(rw, node)
    if reading is None or reading.turned or reading.source is not shuffle.output or reading.axis != shuffle.axis:
        return False
    if rw.is_denied(node) or rw.is_shared(reading.weight_input):
        return False
    return _is_dense(reading) or (_is_depthwise(reading) and _find_after(rw, reading) is not None)


def _is_dense(reading: Reading) -> bool:
    return reading.geometry.groups == 1 and reading.geometry.in_channels > 1


def _is_depthwise(reading: Reading) -> bool:
    g = reading.geometry
    return g.groups == g.in_channels == g.out_channels and not g.transposed


def _find_after(rw: Rewriter, reading: Reading) -> Reading | None:
    """The dense map that alone reads the result of a depthwise map."""
    after = forms.weighted(rw, rw.sole_reader(reading.output))
    if after is None or after.turned or after.source is not reading.output or after.axis != reading.axis:
        return None
    return after if _is_dense(after) and not rw.is_shared(after.weight_input) else None


def _conjugate(depthwise: LinearMap, permutation: LinearMap) -> LinearMap:
    """Return PᵀDP: channel picks[o] of the input has the weights of channel o."""
    order = np.argsort(_picks(permutation))
    return replace(depthwise, weight=depthwise.weight[order], bias=depthwise.bias[order])


def _write(rw: Rewriter, reading: Reading, linear: LinearMap, source: Tensor, output: Tensor) -> emit.Written:
    return emit.write(rw, linear, reading, source, output, reading.axis)
