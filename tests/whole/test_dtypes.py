"""Every floating-point type is folded in float64 and rounded once; what is no finite real number is left alone."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from helpers import normal, ops, parse, reasons, run, weight
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("onnxruntime")
from judge import runtime, widened

import pwopt
from pwopt.passes import PASSES, FoldAffine, FoldChains

F = np.float32
TYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float": np.float32, "double": np.float64}


@pytest.mark.parametrize(("name", "dtype"), TYPES.items(), ids=TYPES)
def test_a_chain_is_multiplied_in_float64_and_rounded_once(name: str, dtype: Any) -> None:
    body = f"({name}[2,4,3,3] x) => ({name}[N] y) {{ a = Conv(x, u) b = Conv(a, v, c) d = Mul(b, s) y = Conv(d, w) }}"
    numbers = {
        "u": normal(8, 4, 1, 1),
        "v": normal(8, 8, 1, 1),
        "c": normal(8),
        "s": normal(8, 1, 1),
        "w": normal(4, 8, 1, 1),
    }
    held = {n: v.astype(dtype) for n, v in numbers.items()}
    model = parse(body, 22, 10, **held)
    result, _, _ = run(model, FoldAffine(), FoldChains())
    assert ops(result) == {"Conv": 1}
    u, v, c, s, w = (held[n].astype(np.float64) for n in "uvcsw")
    last = w[:, :, 0, 0] * s[:, 0, 0]
    found, shift = (numpy_helper.to_array(t) for t in result.graph.initializer)
    assert found.dtype == shift.dtype == dtype
    eps = float(ml_dtypes.finfo(dtype).eps)
    exact, magnitude = last @ v[:, :, 0, 0] @ u[:, :, 0, 0], abs(last) @ abs(v[:, :, 0, 0]) @ abs(u[:, :, 0, 0])
    assert np.all(abs(found[:, :, 0, 0].astype(np.float64) - exact) <= 2 * eps * magnitude)
    assert np.all(abs(shift.astype(np.float64) - last @ c) <= 2 * eps * (abs(last) @ abs(c)))


@pytest.mark.parametrize(("name", "dtype"), TYPES.items(), ids=TYPES)
def test_one_product_is_the_nearest_number(name: str, dtype: Any) -> None:
    u, v = normal(8, 4).astype(dtype), normal(4, 8, seed=1).astype(dtype)
    model = parse(f"({name}[2,4] x) => ({name}[N] y) {{ a = MatMul(x, v) y = MatMul(a, u) }}", 22, 10, u=u, v=v)
    result, _, _ = run(model, FoldChains())
    assert ops(result) == {"MatMul": 1}
    exact = v.astype(np.float64) @ u.astype(np.float64)
    found = numpy_helper.to_array(result.graph.initializer[0])
    if dtype is np.float64:
        np.testing.assert_allclose(found, exact, rtol=1e-15)
    else:
        np.testing.assert_array_equal(found, exact.astype(dtype))


@pytest.mark.parametrize(("name", "dtype"), TYPES.items(), ids=TYPES)
def test_every_pass_keeps_the_type_and_the_answers(name: str, dtype: Any) -> None:
    body = f"""({name}[1,6,8,8] x) => ({name}[N] y, {name}[M] z) {{
        p = Mul(x, s) a = Conv(p, u) b = Conv<pads=[1,1,1,1]>(x, k) c = Add(a, b) d = BatchNormalization(c, g, h, h, o)
        e = Conv(d, v) f = AveragePool<kernel_shape=[2,2], strides=[2,2]>(e) y = Conv(f, w) z = MatMul(e, m) }}"""
    numbers = {
        "s": normal(6, 1, 1), "u": normal(6, 6, 1, 1), "k": normal(6, 6, 3, 3) / 3, "g": normal(6), "h": normal(6), "o": np.ones(6),
        "v": normal(12, 6, 1, 1) / 3, "w": normal(4, 12, 1, 1) / 3, "m": normal(8, 3),
    }  # fmt: skip
    model = parse(body, 22, 10, **{n: v.astype(dtype) for n, v in numbers.items()})
    result = pwopt.optimize(model, cost="analytic", verify=False, passes=[p.name for p in PASSES])
    assert not {"BatchNormalization", "Mul"} & {n.op_type for n in result.model.graph.node}
    assert {t.data_type for t in result.model.graph.initializer} <= {
        helper.np_dtype_to_tensor_dtype(np.dtype(dtype)),
        TensorProto.INT64,
    }
    x = {"x": normal(1, 6, 8, 8, seed=9).astype(dtype)}
    eps = float(ml_dtypes.finfo(dtype).eps)
    for a, b in zip(widened(model)(x), widened(result.model)(x), strict=True):
        assert np.max(abs(a - b)) <= 8 * max(eps, 1e-6) * np.max(abs(a))


@pytest.mark.parametrize(
    ("name", "dtype", "scale", "word"),
    [
        ("float16", np.float16, 6e4, "overflow"),
        ("float16", np.float16, 6e-8, "underflows"),
        ("bfloat16", ml_dtypes.bfloat16, 3e38, "overflow"),
        ("float", np.float32, 3e38, "overflow"),
        ("float", np.float32, 1e-45, "underflows"),
        ("double", np.float64, 1e308, "overflow"),
    ],
)
def test_what_the_type_cannot_hold_is_refused(name: str, dtype: Any, scale: float, word: str) -> None:
    w = (normal(4, 4, 1, 1) * 0.01).astype(dtype) if scale < 1 else (3 + abs(normal(4, 4, 1, 1))).astype(dtype)
    s = np.full((4, 1, 1), scale).astype(dtype)
    model = parse(f"({name}[1,4,2,2] x) => ({name}[N] y) {{ a = Conv(x, w) y = Mul(a, s) }}", 22, 10, w=w, s=s)
    result, outcome, _ = run(model, FoldAffine())
    assert result is model
    assert any(word in r for r in reasons(outcome)), outcome.skips


def test_a_channel_that_would_vanish_is_refused_though_others_would_not() -> None:
    h = np.float16
    w, s = np.ones((4, 4, 1, 1), h), np.array([1, 1, 1, 6e-8], h).reshape(4, 1, 1)
    model = parse("(float16[1,4,2,2] x) => (float16[N] y) { a = Conv(x, w) y = Mul(a, s) }", w=w * h(0.1), s=s)
    result, outcome, _ = run(model, FoldAffine())
    assert result is model
    assert "a folded channel underflows float16" in reasons(outcome)[0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["u", "v", "c", "s"])
def test_weights_that_are_no_numbers_are_left_alone(bad: float, where: str) -> None:
    body = "(float[1,4,4,4] x) => (float[N] y) { a = Conv(x, u, c) b = Conv(a, v) d = Mul(b, s) e = Relu(d) y = Conv(e, w) }"
    held = {
        "u": normal(8, 4, 1, 1),
        "v": normal(4, 8, 1, 1),
        "c": normal(8),
        "s": normal(4, 1, 1),
        "w": normal(4, 4, 1, 1),
    }
    held = {n: v.astype(F) for n, v in held.items()}
    held[where].flat[1] = bad
    model = parse(body, **held)
    result = pwopt.optimize(model, cost="analytic", verify=False, passes=[p.name for p in PASSES]).model
    kept = {t.name for t in result.graph.initializer}
    assert where in kept
    np.testing.assert_array_equal(weight(result, where), held[where])
    x = {"x": normal(1, 4, 4, 4, dtype=F)}
    np.testing.assert_allclose(runtime(result)(x)[0], runtime(model)(x)[0], rtol=1e-4, atol=1e-5)


def quantised(form: str) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    w8 = rng.integers(-99, 99, (4, 4, 1, 1), np.int8)
    scale, point, zero = F(0.02), np.uint8(128), np.int8(0)
    if form == "QDQ":
        return parse(
            """(float[1,4,5,5] x) => (float[N] y) { a = QuantizeLinear(x, s, z) b = DequantizeLinear(a, s, z)
            w = DequantizeLinear(v, s, o) c = Conv(b, w) d = Relu(c) e = QuantizeLinear(d, s, z) y = DequantizeLinear(e, s, z) }""",
            v=w8, s=scale, z=point, o=zero,
        )  # fmt: skip
    if form == "QLinear":
        return parse(
            """(float[1,4,5,5] x) => (float[N] y) { a = QuantizeLinear(x, s, z) b = QLinearConv(a, s, z, v, s, o, s, z)
            c = QLinearConv(b, s, z, v, s, o, s, z) y = DequantizeLinear(c, s, z) }""",
            v=w8, s=scale, z=point, o=zero,
        )  # fmt: skip
    w8 = w8.view(np.uint8)  # signed weights are newer in onnxruntime
    return parse(
        """(float[1,4,5,5] x) => (float[N] y) { a, s, z = DynamicQuantizeLinear(x) b = ConvInteger(a, v, z)
        c = Cast<to=1>(b) d = Mul(c, s) y = Mul(d, t) }""",
        v=w8, t=scale,
    )  # fmt: skip


@pytest.mark.parametrize("form", ["QDQ", "QLinear", "ConvInteger"])
def test_quantised_models_come_through_unharmed(form: str) -> None:
    model = quantised(form)
    for passes in (None, [p.name for p in PASSES]):
        result = pwopt.optimize(model, cost="analytic", passes=passes)
        assert result.model is model
        assert any(note.startswith("Not touched, since folding would round integers") for note in result.report.notes)
    assert not pwopt.optimize(parse("(float[2] x) => (float[2] y) { y = Relu(x) }"), cost="analytic").report.notes


def test_what_is_not_quantised_around_it_still_folds() -> None:
    model = quantised("QDQ")
    more = parse(
        "(float[1,4,5,5] y) => (float[N] t) { r = Conv(y, u) t = Mul(r, k) }", u=normal(4, 4, 1, 1, dtype=F), k=F(2)
    )
    model.graph.node.extend(more.graph.node)
    model.graph.initializer.extend(more.graph.initializer)
    model.graph.output[0].CopyFrom(more.graph.output[0])
    result = pwopt.optimize(model, cost="analytic")
    assert ops(result.model)["Mul"] == 0
    assert ops(result.model)["DequantizeLinear"] == 3
