from __future__ import annotations

import numpy as np
import onnx
import pytest
from helpers import eager, normal, open_session, ops, parse, run

from pwopt.passes import LowerGroupNorm, LowerLRN, LowerResidual

F = np.float32


def on_onnxruntime(model: onnx.ModelProto, **feeds: np.ndarray) -> np.ndarray:
    return np.asarray(open_session(model, optimise=False).run(None, feeds)[0])


def lrn(attrs: str, shape: str = "2,7,5,4", kind: str = "float") -> onnx.ModelProto:
    return parse(f"({kind}[{shape}] x) => ({kind}[N] y) {{ y = LRN<{attrs}>(x) }}")


@pytest.mark.parametrize("beta", [0.5, 0.75, 1.0])
@pytest.mark.parametrize("size", [1, 3, 5, 21])
def test_lrn(beta: float, size: int) -> None:
    model = lrn(f"size={size}, alpha=0.02, beta={beta}, bias=1.5")
    result, _, _ = run(model, LowerLRN())
    assert "LRN" not in ops(result)
    assert ops(result)["Sqrt"] == {0.5: 1, 0.75: 2, 1.0: 0}[beta]
    x = normal(2, 7, 5, 4, dtype=F) * 20
    np.testing.assert_allclose(on_onnxruntime(result, x=x), on_onnxruntime(model, x=x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "model",
    [
        lrn("size=3, beta=0.6"),
        lrn("size=4"),
        lrn("size=3, alpha=-0.1"),
        lrn("size=3, bias=0.0"),
        lrn("size=3", "2,7,5"),
        lrn("size=3", "2,513,5,4"),
        lrn("size=3", "2,C,5,4"),
        lrn("size=3", kind="double"),
    ],
)
def test_other_lrns_stay(model: onnx.ModelProto) -> None:
    assert run(model, LowerLRN())[0] is model


def test_an_lrn_of_an_empty_image_stays() -> None:
    """onnxruntime refuses a convolution of no rows."""
    model = lrn("size=3", "2,7,0,4")
    assert run(model, LowerLRN())[0] is model


def group_norm(opset: int, shape: str = "2,6,5,4", groups: int = 3) -> onnx.ModelProto:
    count = 6 if opset >= 21 else groups
    body = (
        f"(float[{shape}] x) => (float[N] y) {{ y = GroupNormalization<num_groups={groups}, epsilon=0.01>(x, s, b) }}"
    )
    model = parse(body, opset, 10, s=normal(count, dtype=F), b=normal(count, seed=1, dtype=F))
    model.graph.output[0].type.CopyFrom(model.graph.input[0].type)  # onnx does not infer it
    return model


@pytest.mark.parametrize("opset", [18, 21])
@pytest.mark.parametrize("shape", ["2,6,5,4", "N,6,5,4", "N,6,H,W", "2,6,5"])
@pytest.mark.parametrize("groups", [1, 3, 6])
def test_group_norm(opset: int, shape: str, groups: int) -> None:
    model = group_norm(opset, shape, groups)
    result, _, _ = run(model, LowerGroupNorm())
    counts = ops(result)
    assert counts["InstanceNormalization"] == 1
    assert counts["Mul"] == counts["Add"] == (opset >= 21)
    assert counts["Shape"] == ("H" in shape)
    x = normal(2, 6, 5, 4, dtype=F) if shape.count(",") == 3 else normal(2, 6, 5, dtype=F)
    np.testing.assert_allclose(on_onnxruntime(result, x=x), on_onnxruntime(model, x=x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("opset", "shape"), [(21, "2,C,5,4"), (21, "2,6,0,4")])
def test_other_group_norms_stay(opset: int, shape: str) -> None:
    model = group_norm(opset, shape)
    assert run(model, LowerGroupNorm())[0] is model


NORM = "m = ReduceMean<axes=[-1]>(h) c = Sub(h, m) q = Mul(c, c) v = ReduceMean<axes=[-1]>(q) y = Div(c, v)"


@pytest.mark.parametrize("norm", ["y = LayerNormalization(h, s, t)", NORM], ids=["operator", "spelled"])
def test_a_residual_before_a_layer_normalisation(norm: str) -> None:
    weights = {"s": normal(8, dtype=F), "t": normal(8, dtype=F)} if "s, t" in norm else {}
    model = parse(f"(float[2,3,8] a, float[2,3,8] b) => (float[N] y) {{ h = Add(a, b) {norm} }}", 17, **weights)
    result, _, _ = run(model, eager(LowerResidual))
    assert ops(result)["Sum"] == 1
    assert ops(result)["Add"] == 0
    a, b = normal(2, 3, 8, dtype=F), normal(2, 3, 8, seed=1, dtype=F)
    assert np.array_equal(on_onnxruntime(result, a=a, b=b), on_onnxruntime(model, a=a, b=b))


@pytest.mark.parametrize(
    "body",
    [
        "(float[2,3,8] a) => (float[N] y) { h = Add(a, k) y = LayerNormalization(h, s) }",
        "(float[2,3,8] a, float[8] b) => (float[N] y) { h = Add(a, b) y = LayerNormalization(h, s) }",
        "(float[2,3,8] a, float[2,3,8] b) => (float[N] y) { h = Add(a, b) y = Relu(h) k = Neg(s) }",
        "(float[8] a, float[8] b) => (float[N] y) { h = Add(a, b) y = LayerNormalization(k, h) }",
    ],
)
def test_other_sums_stay(body: str) -> None:
    model = parse(body, 17, s=normal(8, dtype=F), **({"k": normal(8, dtype=F)} if "k)" in body or "(k" in body else {}))
    assert run(model, eager(LowerResidual))[0] is model
