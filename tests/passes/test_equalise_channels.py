from __future__ import annotations

import numpy as np
import onnx
import pytest
from helpers import build, eager, evaluate, normal, ops, run
from onnx import numpy_helper

from pwopt.passes import PASSES
from pwopt.passes.equalise_channels import EqualiseChannels

UNEVEN = np.array([1, 64, 1 / 64, 4], np.float32)


def model(body: str, outputs: str = "float y") -> onnx.ModelProto:
    weights = {
        "a": normal(4, 3, 3, 3, dtype=np.float32) * UNEVEN.reshape(4, 1, 1, 1), "b": normal(4, seed=1, dtype=np.float32),
        "c": normal(5, 4, 1, 1, seed=2, dtype=np.float32), "d": normal(4, 1, 3, 3, seed=3, dtype=np.float32),
        "e": normal(4, 2, 3, 3, seed=4, dtype=np.float32),
    }  # fmt: skip
    return build(f"(float[N,3,8,8] x) => ({outputs}) {{ {body} }}", weights)


@pytest.mark.parametrize(
    "between",
    ["y = Conv(h, c)", "r = Relu(h) y = Conv(r, c)", "r = LeakyRelu <alpha = 0.3> (h) y = Conv <group = 4> (r, d)",
     "r = Relu(h) p = MaxPool <kernel_shape = [2,2]> (r) y = Conv <group = 2, pads = [1,1,1,1]> (p, e)",
     "r = Relu(h) p = GlobalAveragePool(r) y = Conv(p, c)"],
)  # fmt: skip
def test_ranges_agree_and_answers_are_the_same_bits(between: str) -> None:
    proto = model(f"h = Conv(x, a, b) {between}")
    result, outcome, _ = run(proto, eager(EqualiseChannels))
    assert len(outcome.rewrites) == 1
    assert ops(result) == ops(proto)
    x = normal(2, 3, 8, 8, seed=9, dtype=np.float32)
    assert np.array_equal(evaluate(result, x=x)[0], evaluate(proto, x=x)[0])
    kept = {t.name: numpy_helper.to_array(t) for t in result.graph.initializer}
    first, last = (kept[next(n for n in result.graph.node if o in n.output).input[1]] for o in
                   (result.graph.node[0].output[0], "y"))  # fmt: skip
    ranges = np.abs(first).reshape(4, -1).max(1)
    groups = 1 if last.shape[1] == 4 else 4 // last.shape[1]
    inputs = np.abs(last).reshape(groups, -1, last.shape[1], last[0, 0].size).max((1, 3)).reshape(-1)
    assert np.all(np.abs(np.log2(ranges / inputs)) <= 1)


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("h = Conv(x, a, b) r = Sigmoid(h) y = Conv(r, c)", "float y"),
        ("h = Conv(x, a, b) r = Clip(h) y = Conv(r, c)", "float y"),
        ("h = Conv(x, a, b) y = Conv(h, c)", "float y, float h"),
        ("h = Conv(x, a, b) y = Conv(h, c) z = Relu(h)", "float y, float z"),
    ],
)
def test_anything_else_stays(body: str, outputs: str) -> None:
    proto = model(body, outputs)
    assert not run(proto, eager(EqualiseChannels))[1].rewrites


def test_even_ranges_and_dead_channels_stay() -> None:
    proto = model("h = Conv(x, a, b) y = Conv(h, c)")
    once, _, _ = run(proto, eager(EqualiseChannels))
    assert not run(once, eager(EqualiseChannels))[1].rewrites
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.zeros((4, 3, 3, 3), np.float32), "a"))
    assert not run(proto, eager(EqualiseChannels))[1].rewrites


def test_it_runs_by_name_only() -> None:
    assert EqualiseChannels in PASSES
    assert EqualiseChannels.pays_on == frozenset()
    assert not run(model("h = Conv(x, a, b) y = Conv(h, c)"), EqualiseChannels())[1].rewrites
