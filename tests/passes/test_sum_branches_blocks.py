"""Blocks that train with parallel branches become one convolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from branching import AROUND, W1, W3, Net, X, attribute, groups, scatter_border
from helpers import normal, ops, reasons, run, same, weight

from pwopt.passes import CleanUp, FoldAffine, FoldChains, SumBranches
from pwopt.rewriting.driver import Pass


@pytest.mark.parametrize("stride", [1, 2])
def test_repvgg(stride: int) -> None:
    """3×3, 1×1 and, without stride, the identity, each normalised."""
    net, strides = Net(2, 4, 6, 6), [stride, stride]
    branches = [net("Conv", "x", W3, pads=[1, 1, 1, 1], strides=strides), net("Conv", "x", W1, strides=strides), "x"]
    model = net.model(net.total(*(net.batch_norm(b, 4)[0] for b in branches[: 3 if stride == 1 else 2])))
    result, _, _ = run(model, FoldAffine(), SumBranches())
    assert ops(result) == {"Conv": 1}
    assert attribute(result.graph.node[0], "kernel_shape") == [3, 3]
    assert attribute(result.graph.node[0], "strides") == strides
    same(model, result, x=X)


@pytest.mark.parametrize("passes", [(SumBranches,), (FoldAffine, SumBranches)])
def test_mobileone_depthwise(passes: Sequence[type[Pass]]) -> None:
    """Over-parametrised depthwise 3×3, depthwise 1×1 and a normalised identity stay one depthwise convolution."""
    net = Net("N", 4, "H", "W")
    branches = [net("Conv", "x", normal(4, 1, 3, 3, seed=s), pads=[1, 1, 1, 1], group=4) for s in range(3)]
    branches += [net("Conv", "x", normal(4, 1, 1, 1), group=4), "x"]
    model = net.model(net("Relu", net.total(*(net.batch_norm(b, 4)[0] for b in branches))))
    result, _, _ = run(model, *(p() for p in passes))
    assert ops(result) == {"Conv": 1, "Relu": 1}
    assert groups(result) == [4]
    assert weight(result, result.graph.node[0].input[1]).shape == (4, 1, 3, 3)
    same(model, result, x=X)


def shift_border(net: Net, tensor: str, fill: np.ndarray) -> str:
    """x − b, padded with zeros, plus b."""
    wide = fill.reshape(-1, 1, 1)
    return net("Add", net("Pad", net("Sub", tensor, wide), AROUND), wide)


def value_border(net: Net, tensor: str, fill: np.ndarray) -> str:
    """Padding with one number."""
    return net("Pad", tensor, AROUND, np.asarray(fill[-1]))


Border = Callable[[Net, str, np.ndarray], str]
BORDERS: dict[str, Border] = {"shift": shift_border, "value": value_border, "scatter": scatter_border}


def diverse_branch_block(stride: int, border: Border, error: float = 0.0, dtype: type = np.float64) -> onnx.ModelProto:
    """k×k, 1×1, 1×1 → k×k and 1×1 → average (Ding et al., 2021), each normalised; 4 → 5 channels on 6×6.

    What lies between is padded with what the normalisation gives for zero, plus `error` in the last channel.
    """
    net, strides = Net(2, 4, 6, 6, dtype=dtype), [stride, stride]

    def between(out: int, seed: int) -> str:
        level = 0.3 if border is value_border else None
        middle, fill = net.batch_norm(net("Conv", "x", normal(out, 4, 1, 1, seed=seed)), out, level)
        fill[-1] += error
        return border(net, middle, fill)

    branches = [
        net("Conv", "x", normal(5, 4, 3, 3), pads=[1, 1, 1, 1], strides=strides),
        net("Conv", "x", normal(5, 4, 1, 1, seed=1), strides=strides),
        net("AveragePool", between(5, 4), kernel_shape=[3, 3], strides=strides),
        net("Conv", between(4, 2), normal(5, 4, 3, 3, seed=3), strides=strides),
    ]
    return net.model(net.total(*(net.batch_norm(b, 5)[0] for b in branches)))


#: Branches may come as they are, or with what surrounds them folded already.
FOLD = pytest.mark.parametrize("passes", [(SumBranches,), (FoldAffine, SumBranches, FoldChains, CleanUp)])


@FOLD
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("border", BORDERS)
def test_diverse_branch_block(border: str, stride: int, passes: Sequence[type[Pass]]) -> None:
    model = diverse_branch_block(stride, BORDERS[border])
    result, outcome, _ = run(model, *(p() for p in passes))
    assert ops(result) == {"Conv": 1}, reasons(outcome)
    assert attribute(result.graph.node[0], "kernel_shape") == [3, 3]
    assert attribute(result.graph.node[0], "pads") == [1, 1, 1, 1]
    same(model, result, x=X)


@FOLD
@pytest.mark.parametrize("border", BORDERS)
def test_diverse_branch_block_whose_border_is_rounded(border: str, passes: Sequence[type[Pass]]) -> None:
    """In float32 a border is its rounding of the normalisation's bias: what is left of b − v is rounding only."""
    model = diverse_branch_block(1, BORDERS[border], dtype=np.float32)
    result, outcome, _ = run(model, *(p() for p in passes))
    assert ops(result) == {"Conv": 1}, reasons(outcome)
    same(model, result, 1e-4, x=X.astype(np.float32))


@FOLD
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("border", BORDERS)
def test_a_border_that_is_not_the_bias_stays(border: str, dtype: type, passes: Sequence[type[Pass]]) -> None:
    model = diverse_branch_block(1, BORDERS[border], error=1e-2, dtype=dtype)
    result, outcome, _ = run(model, *(p() for p in passes))
    assert ops(result)["Conv"] == 4  # k×k and 1×1 are one
    assert "zero padding" in " ".join(reasons(outcome))
    same(model, result, 1e-9 if dtype is np.float64 else 1e-4, x=X.astype(dtype))


@FOLD
@pytest.mark.parametrize("options", [{"spoiled": 1e-2}, {"top": [1]}, {"top": [0, 1]}])
def test_a_border_with_one_other_number_or_a_gap_stays(options: dict[str, Any], passes: Sequence[type[Pass]]) -> None:
    """One position differs; the first row keeps its zeros; or the inside is overwritten as well."""
    model = diverse_branch_block(1, lambda *border: scatter_border(*border, **options))
    result, outcome, _ = run(model, *(p() for p in passes))
    assert ops(result)["ScatterND"] == 8
    assert ops(result)["Conv"] == 4
    assert "Transpose is not a linear map" in " ".join(reasons(outcome))
    same(model, result, x=X)
