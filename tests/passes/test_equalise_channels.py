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
        "e": normal(4, 2, 3, 3, seed=4, dtype=np.float32), "u": np.array([0.5, 2, 1, 0.1], np.float32).reshape(4, 1, 1),
        "v": normal(2, 8, 1, 1, seed=5, dtype=np.float32), "m": normal(4, 3, seed=6, dtype=np.float32),
        "flat": np.array([0, 4, -1]), "lines": np.array([0, 0, 6, 6]), "twice": np.array([1, 1, 2, 2], np.float32),
        "k": normal(3, 2, 1, 1, seed=7, dtype=np.float32),
    }  # fmt: skip
    weights |= {f"{name}2": weights[name] for name in "ack"}
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
        ("h = Conv(x, a, b) r = Sigmoid(h) p = Mul(h, r) y = Conv(p, c)", "float y"),
        ("h = Conv(x, a, b) q = Mul(h, h) y = Conv(q, c)", "float y"),
        ("h = Conv(x, a, b) r = Relu(h) q = Add(h, r) y = Conv(q, c)", "float y"),
        ("h = Conv(x, a, b) t = Transpose <perm = [0,2,1,3]> (h) y = Conv(t, v)", "float y"),
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


@pytest.mark.parametrize(
    ("between", "count"),
    [
        ("r = PRelu(h, u) y = Conv(r, c)", 1),
        ("r = Relu(h) f = Reshape(r, flat) i = Reshape(f, lines) y = Conv(i, c)", 1),
        ("r = Relu(h) t = Transpose <perm = [0,2,3,1]> (r) y = MatMul(t, m)", 1),
        ('r = Resize <mode = "linear"> (h, , twice) p = Relu(r) y = Conv(p, c)', 1),
        ("r = Relu(h) q = Concat <axis = 1> (o, r) y = Conv(q, v)", 2),
        ("r = Relu(h) q = Concat <axis = 1> (r, h) y = Conv(q, v)", 1),
        ("g = Sigmoid(o) r = Mul(h, g) y = Conv(r, c)", 1),
        ("d0, d1 = Split <axis = 1> (h) e0 = Conv(d0, k) e1 = Conv(d1, k2) y = Concat <axis = 1> (e0, e1)", 1),
        ("r = Relu(h) p = Conv(r, c) q = AveragePool <kernel_shape = [6,6]> (r) s = Conv(q, c2) y = Mul(p, s)", 1),
    ],
)  # fmt: skip
def test_scales_move_past_everything_that_commutes(between: str, count: int) -> None:
    proto = model(f"h = Conv(x, a, b) o = Conv(x, a2, b) {between}")
    result, outcome, _ = run(proto, eager(EqualiseChannels))
    assert len(outcome.rewrites) >= count
    assert ops(result) == ops(proto)
    x = normal(2, 3, 8, 8, seed=9, dtype=np.float32)
    assert np.array_equal(evaluate(result, x=x)[0], evaluate(proto, x=x)[0])


def test_every_reader_takes_part_in_the_range() -> None:
    proto = model("h = Conv(x, a, b) r = Relu(h) y = Conv(r, c) z = Conv <group = 4> (h, d)", "float y, float z")
    result, outcome, _ = run(proto, eager(EqualiseChannels))
    assert len(outcome.rewrites) == 1
    kept = {t.name: numpy_helper.to_array(t) for t in result.graph.initializer}
    first, dense, depthwise = (np.abs(kept[n.input[1]]) for n in result.graph.node if n.op_type == "Conv")
    after = np.maximum(dense.max((0, 2, 3)), depthwise.max((1, 2, 3)))
    assert np.all(np.abs(np.log2(first.max((1, 2, 3)) / after)) <= 1)
