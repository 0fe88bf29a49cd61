"""Targets: what a result becomes for the runtime that reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest
from helpers import build, evaluate, normal, ops, parse

from pwopt import optimize
from pwopt.errors import UsageError
from pwopt.graph.files import from_proto
from pwopt.graph.opset import convert_opset
from pwopt.optimizing.request import Request, Target
from pwopt.optimizing.targets import raise_opset

CONSTANTS = {"three": np.float32(3), "zero": np.float32(0), "six": np.float32(6)}
HARD_SWISH = "a = Add(h, three) b = Clip(a, zero, six) c = Mul(h, b) s = Div(c, six)"


def spelled(opset: int = 12, rest: str = "y = Relu(s)") -> onnx.ModelProto:
    model = build(
        f"(float[N,4,6,6] x) => (float y) {{ h = Conv(x, w) {HARD_SWISH} {rest} }}",
        {"w": normal(4, 4, 3, 3, dtype=np.float32), **{k: np.array(v) for k, v in CONSTANTS.items()}},
    )
    model.opset_import[0].version = opset
    return model


def optimised(model: onnx.ModelProto, **options: Any) -> onnx.ModelProto:
    return optimize(model, cost="analytic", **options).model


@pytest.mark.parametrize(
    ("target", "opset", "wanted"),
    [
        ("portable", 14, {"Conv": 1, "HardSwish": 1, "Relu": 1}),
        ("openvino", 14, {"Conv": 1, "HardSwish": 1, "Relu": 1}),
        ("onnxruntime-cpu", 12, {"Conv": 1, "HardSigmoid": 1, "Mul": 1, "Relu": 1}),
        ("onnxruntime-gpu", 12, {"Conv": 1, "HardSigmoid": 1, "Mul": 1, "Relu": 1}),
    ],
)
def test_hard_swish_takes_the_form_of_the_target(target: Target, opset: int, wanted: dict[str, int]) -> None:
    model = spelled()
    result = optimised(model, target=target)
    assert (ops(result), result.opset_import[0].version) == (wanted, opset)
    x = normal(2, 4, 6, 6, seed=1, dtype=np.float32)
    np.testing.assert_allclose(evaluate(result, x=x)[0], evaluate(model, x=x)[0], rtol=1e-5, atol=1e-5)


def test_the_opset_stays_without_a_reason() -> None:
    plain = parse("(float[N,4] x) => (float[N,4] y) { a = Relu(x) b = Neg(a) y = Neg(b) }")
    plain.opset_import[0].version = 12
    assert optimised(plain).opset_import[0].version == 12
    newer = spelled(15)
    assert optimised(newer).opset_import[0].version == 15
    assert optimised(spelled(), opset=13).opset_import[0].version == 13


def test_a_conversion_that_adds_operators_is_refused() -> None:
    model = from_proto(spelled(rest="y = Softmax <axis: int = 1> (s)"))  # over all axes but the first, before opset 13
    assert raise_opset(model, "portable", {}) is model
    last = from_proto(spelled(rest="y = Softmax <axis: int = 3> (s)"))
    raised = raise_opset(last, "portable", {})
    assert raised.opset == 14
    assert raise_opset(last, "onnxruntime-cpu", {}) is last


def test_a_model_with_operators_of_other_domains_is_converted() -> None:
    model = spelled(rest="y = BiasGelu (s, k)")
    model.graph.node[-1].domain = "com.microsoft"
    model.opset_import.add(domain="com.microsoft", version=1)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(6, np.float32), "k"))
    raised = raise_opset(from_proto(model), "portable", {})
    assert {entry.domain: entry.version for entry in raised.proto.opset_import} == {"": 14, "com.microsoft": 1}
    last = raised.proto.graph.node[-1]
    assert (last.domain, last.op_type, list(last.input)) == ("com.microsoft", "BiasGelu", ["s", "k"])


def test_subgraphs_and_functions_stay_in_their_opset() -> None:
    model = spelled(
        rest="y = If (t) <then_branch = g () => (float u) { u = Relu(s) }, else_branch = h () => (float v) { v = Neg(s) }>"
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "t"))
    loaded = from_proto(model)
    assert raise_opset(loaded, "portable", {}) is loaded


def test_given_ranks_keep_a_softmax_whole() -> None:
    model = parse("(float[N,4] x, int64[k] s) => (float y) { r = Reshape(x, s) y = Softmax <axis: int = 2> (r) }")
    model.opset_import[0].version = 12
    loaded = from_proto(model)
    assert ops(convert_opset(loaded, 14)) != {"Reshape": 1, "Softmax": 1}
    assert ops(convert_opset(loaded, 14, {"r": 3})) == {"Reshape": 1, "Softmax": 1}


def test_another_runtime_than_the_provider_is_not_timed() -> None:
    assert not Request(target="openvino").measured
    assert Request(target="onnxruntime-cpu").measured
    assert Request(target="openvino", provider="openvino").measured
    assert Request().measured
    with pytest.raises(UsageError, match="target is 'tflite', which is not one of: portable, onnxruntime-cpu"):
        Request(target="tflite")  # type: ignore[arg-type]
    assert get_args(Target)[0] == Request.target


def shuffled() -> onnx.ModelProto:
    """A channel shuffle with computed sizes between convolutions, as torch exports it."""
    constants = {"batch": 0, "two": 2, "half": 8, "all": 16, "third": 2, "fourth": 3}
    sizes = " ".join(f"{n} = Gather(shape, {i})" for n, i in (("n", "batch"), ("h", "third"), ("w", "fourth")))
    return build(
        f"(float[N,16,H,W] x) => (float y, float z) {{ a0 = Conv(x, v) a = Relu(a0) shape = Shape(a) {sizes} "
        "s0 = Concat <axis: int = 0> (n, two, half, h, w) b = Reshape(a, s0) c = Transpose <perm = [0,2,1,3,4]> (b) "
        "s1 = Concat <axis: int = 0> (n, all, h, w) d = Reshape(c, s1) y = Conv(d, u) z0 = Conv(d, t) z = Relu(z0) }",
        {"u": normal(16, 16, 1, 1, dtype=np.float32), "v": normal(16, 16, 1, 1, seed=1, dtype=np.float32),
         "t": normal(16, 16, 1, 1, seed=2, dtype=np.float32),
         **{k: np.array([v], np.int64) for k, v in constants.items()}},
    )  # fmt: skip


def test_a_channel_shuffle_moves_into_its_readers() -> None:
    assert ops(optimised(shuffled(), shapes={"x": (1, 16, 8, 8)})) == {"Conv": 3, "Relu": 2}


def test_a_channel_shuffle_counts_its_axis_from_the_end() -> None:
    result = optimised(shuffled(), shapes={"x": (1, 16, 8, 8)}, passes=["clean-up", "settle-shapes", "join-views"])
    axes = [a.i for n in result.graph.node if n.op_type == "Gather" for a in n.attribute]
    assert axes == [-3]  # OpenVINO 2026.4 folds a Gather along axis 1 into a convolution wrongly


@pytest.mark.parametrize("model", [spelled(), shuffled()], ids=["activation", "shuffle"])
def test_openvino_gives_the_same_answer(model: onnx.ModelProto, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    x = normal(1, *((4, 6, 6) if len(model.graph.output) == 1 else (16, 8, 8)), dtype=np.float32)
    counts = []
    for name, proto in (("a", model), ("b", optimised(model, shapes={"x": x.shape}))):
        onnx.save(proto, tmp_path / f"{name}.onnx")
        read = openvino.Core().read_model(tmp_path / f"{name}.onnx")
        read.reshape({"x": list(x.shape)})
        compiled = openvino.Core().compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        for found, wanted in zip(
            compiled.create_infer_request().infer({"x": x}).values(), evaluate(model, x=x), strict=True
        ):
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
        counts.append(len(compiled.get_runtime_model().get_ops()))
    assert counts[1] <= counts[0]
