"""Subnormal weights become zero."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import evaluate, normal, open_session, ops, parse, reasons, run, same, weight
from onnx import TensorProto, helper
from pruning import F, V, W, X, dead, subnormal

from pwopt.passes import DropDead

# Subnormal weights


def test_subnormal_weights_become_zero() -> None:
    pytest.importorskip("onnxruntime")
    model = parse(
        "(float[2,4,6,6] x) => (float[N] y) { [one] a = Conv(x, w, b) y = Relu(a) }",
        w=subnormal(),
        b=normal(7, dtype=F),
    )
    result, outcome, _ = run(model, DropDead())
    (rewrite,) = outcome.rewrites
    assert str(rewrite.site) == "drop-dead:a"
    assert rewrite.reason == "3 of 28 weights are below the smallest normal float32, and become zero"
    assert rewrite.removed == rewrite.added == ("Conv one",)
    expected = np.where(np.abs(subnormal()) < np.finfo(F).tiny, F(0), subnormal())
    np.testing.assert_array_equal(weight(result, "w"), expected)
    x = normal(2, 4, 6, 6, dtype=F)
    before, after = (open_session(m).run(None, {"x": x})[0] for m in (model, result))
    np.testing.assert_array_equal(before, after)


def test_a_weight_that_is_small_throughout_is_left_alone() -> None:
    model = parse("(float[2,4,6,6] x) => (float[N] y) { a = Conv(x, w) y = Relu(a) }", w=subnormal() * F(1e-37))
    assert np.any(weight(model, "w"))
    result, outcome, _ = run(model, DropDead())
    assert result is model
    assert not outcome.rewrites


def test_subnormal_float16_is_left_alone() -> None:
    half = subnormal().astype(np.float16)
    half[0, 1] = np.float16(1e-7)
    model = parse("(float16[2,4,6,6] x) => (float16[N] y) { a = Conv(x, w) y = Relu(a) }", w=half)
    result, outcome, _ = run(model, DropDead())
    assert result is model
    assert not outcome.rewrites


def test_a_filter_of_subnormal_weights_is_one_of_zeros() -> None:
    small = dead(normal(7, 4, 1, 1, dtype=F), rows=(1, 4), scale=1e-39)
    body = "(float[2,4,6,6] x) => (float[N] y) { a = Conv(x, w, b) r = Sigmoid(a) y = Conv(r, v) }"
    model = parse(body, w=small, b=normal(7, dtype=F), v=V.astype(F))
    result, outcome, _ = run(model, DropDead())
    assert weight(result, "w").shape == (5, 4, 1, 1)
    assert not any("to within" in r.reason for r in outcome.rewrites)
    same(model, result, 1e-5, x=X.astype(F))


def test_a_shared_weight_is_made_clean_for_all_maps_that_read_it() -> None:
    head = "(float[2,4,6,6] x, float[2,4,6,6] k) => (float[N] y, float[N] z) "
    model = parse(head + "{ [one] y = Conv(x, w) [two] z = Conv<pads=[1,1,1,1]>(k, w) }", w=subnormal())
    result, outcome, _ = run(model, DropDead())
    (rewrite,) = outcome.rewrites
    assert rewrite.removed == ("Conv one", "Conv two")
    assert [n.input[1] for n in result.graph.node] == ["w", "w"]
    assert np.sum(weight(result, "w") == 0) == 3


def test_what_is_no_map_reads_the_weight_as_it_was() -> None:
    """1 / w is finite for the smallest weights, and is not for zero."""
    small = normal(7, 4, 1, 1, dtype=F)
    small[0, 1] = 5e-39
    body = "(float[2,4,6,6] x) => (float[N] y, float[N] z) { a = Conv(x, u) r = Relu(a) e = Conv(r, v) q = Relu(e) y = Conv(q, w) z = Reciprocal(w) }"
    model = parse(body, w=small, u=W.astype(F), v=normal(4, 7, 1, 1, dtype=F))
    result, outcome, _ = run(model, DropDead())
    assert outcome.rewrites
    feeds = {"x": normal(2, 4, 6, 6, dtype=F)}
    np.testing.assert_array_equal(evaluate(result, **feeds)[1], evaluate(model, **feeds)[1])


def test_a_subnormal_weight_from_a_node() -> None:
    for before in (
        "{ w = Constant<value=float[2,2]{1.0,1e-40,2.0,3.0}>() y = MatMul(x, w) }",
        "{ i = Identity(w) y = MatMul(x, i) }",
    ):
        held = {"w": np.array([[1, 1e-40], [2, 3]], F)} if "Identity" in before else {}
        model = parse("(float[3,2] x) => (float[N] y) " + before, 17, 8, **held)
        result, outcome, _ = run(model, DropDead())
        assert "1 of 4 weights" in outcome.rewrites[0].reason
        assert ops(result) == {"MatMul": 1}
        np.testing.assert_array_equal(weight(result, result.graph.node[-1].input[1]), [[1, 0], [2, 3]])


def test_a_subnormal_weight_that_is_a_graph_output() -> None:
    model = parse("(float[3,2] x) => (float[N] y) { y = MatMul(x, w) }", w=np.array([[1, 1e-40], [2, 3]], F))
    model.graph.output.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [2, 2]))
    result, outcome, _ = run(model, DropDead())
    assert result is model
    assert reasons(outcome) == ["1 weights are subnormal, but 'w' is a graph output"]


def test_what_a_factor_makes_subnormal_is_not_in_the_weight() -> None:
    small = np.array([[1, 1e-30], [2, 3]], F)
    model = parse("(float[3,2] x) => (float[N] y) { y = Gemm<alpha=0.0000000001>(x, w) }", w=small)
    result, outcome, _ = run(model, DropDead())
    assert result is model, [r.reason for r in outcome.rewrites]


def test_subnormal_weights_go_even_where_channels_may_not() -> None:
    """The constant would overflow the next bias; the subnormal weight of the first map is another matter."""
    first = dead(normal(7, 4, 1, 1, dtype=F), (1,))
    first[0, 0] = 1e-40
    body = "(float[2,4,6,6] x) => (float[N] y) { a = Conv(x, w, b) y = Conv(a, v) }"
    model = parse(body, w=first, b=np.full(7, 1e38, F), v=np.full((5, 7, 1, 1), 10, F))
    result, outcome, _ = run(model, DropDead())
    assert "overflow" in " ".join(reasons(outcome))
    assert "1 of 28 weights are below" in " ".join(r.reason for r in outcome.rewrites)
    assert weight(result, "w").shape == first.shape
    assert weight(result, "w")[0, 0, 0, 0] == 0


# Random networks


def test_subnormal_weights_that_are_more_than_weights_stay() -> None:
    """What else reads them is not known to let them go."""
    weight = normal(4, 4, 1, 1, dtype=np.float32)
    weight[0, 0] = 1e-40
    model = parse("(float[1,4,3,3] x) => (float[N] y) { c = Conv(x, w) s = ReduceMax(w) y = Add(c, s) }", w=weight)
    result, outcome, _ = run(model, DropDead())
    assert result is model
    assert "other operators read 'w' too" in reasons(outcome)[0]


# What reveals small weights


@pytest.mark.parametrize("op", ["Ceil(a)", "Sign(a)", "Floor(a)", "Log(a)", "Mul(a, large)", "LpNormalization(a)"])
def test_subnormal_weights_stay_where_a_later_operator_reveals_them(op: str) -> None:
    small = np.array([1, 0.5, 1e-39, -1e-39], F).reshape(4, 1, 1, 1)
    held = {"large": np.float32(1e38)} if "large" in op else {}
    model = parse(f"(float[1,1,4,4] x) => (float[N] y) {{ a = Conv(x, w) y = {op} }}", w=small, **held)
    result, outcome, _ = run(model, DropDead())
    assert result is model
    (reason,) = reasons(outcome)
    assert reason.startswith("2 weights are subnormal, but ")
    assert op.partition("(")[0] in reason


def test_a_bias_hides_subnormal_weights_from_a_step() -> None:
    body = "(float[2,4,6,6] x) => (float[N] y) { a = Conv(x, w, b) y = Ceil(a) }"
    for bias, count in ((np.ones(7, F), 1), (np.zeros(7, F), 0)):
        _, outcome, _ = run(parse(body, w=subnormal(), b=bias), DropDead())
        assert len(outcome.rewrites) == count


@pytest.mark.parametrize("scale", [1e-30, 1e-39])
def test_filters_that_are_almost_zero_stay_before_a_step(scale: float) -> None:
    """A filter of zeros goes: a step gives the same for it."""
    small = dead(normal(7, 4, 1, 1, dtype=F), rows=(1, 4), scale=scale)
    body = "(float[2,4,6,6] x) => (float[N] y) { a = Conv(x, w) r = Relu(a) e = Conv(r, v) y = Sign(e) }"
    keep = np.stack([np.eye(7)[1], np.eye(7)[0]]).astype(F)[..., None, None]
    result, outcome, _ = run(parse(body, w=small, v=keep), DropDead())
    assert weight(result, "w").shape[0] >= 2
    assert any("Sign" in reason for reason in reasons(outcome))
    x = X.astype(F)
    np.testing.assert_array_equal(evaluate(result, x=x)[0], evaluate(parse(body, w=small, v=keep), x=x)[0])
