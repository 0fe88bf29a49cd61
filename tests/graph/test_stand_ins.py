"""Shapes behind operators that onnx's inference does not know: what pwopt infers is what onnxruntime computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from helpers import open_session
from onnx import TensorProto, helper, numpy_helper

from pwopt.graph.operators import MICROSOFT_SAME_SHAPE
from pwopt.graph.shapes import find_declared, infer
from pwopt.graph.stand_ins import MICROSOFT, STAND_INS

#: Operators that only onnxruntime's GPU providers have.
GPU_ONLY = {
    "BiasAdd",
    "BiasDropout",
    "BiasSoftmax",
    "FusedMatMulActivation",
    "GemmFastGelu",
    "GroupNorm",
    "SkipGroupNorm",
}


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def bytes_(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 99, shape).astype(np.uint8)


S, Z = np.float32(0.05), np.uint8(3)
X = numbers(2, 5, 8)  # batch, length, width
IMAGE = numbers(1, 8, 6, 7)
BYTES = bytes_(1, 3, 4, 5)
#: Name → operator, free inputs, constants, attributes, outputs. A free input is None where it is left out.
CASES: dict[str, tuple[str, list[np.ndarray | None], list[np.ndarray | None], dict[str, Any], int]] = {
    **{op: (op, [X], [], {}, 1) for op in ("Gelu", "QuickGelu", "FastGelu")},
    "FastGelu with a bias": ("FastGelu", [X], [numbers(8)], {}, 1),
    "BiasGelu": ("BiasGelu", [X], [numbers(8)], {}, 1),
    "SkipLayerNormalization": ("SkipLayerNormalization", [X, X], [numbers(8), numbers(8), numbers(8)], {}, 4),
    "SkipSimplifiedLayerNormalization": ("SkipSimplifiedLayerNormalization", [X, X], [numbers(8)], {}, 4),
    "FusedConv": ("FusedConv", [IMAGE], [numbers(4, 4, 3, 3)], {"activation": "Relu", "group": 2, "strides": [2, 1]}, 1),
    "FusedGemm": ("FusedGemm", [numbers(3, 4)], [numbers(5, 4), numbers(5)], {"activation": "Relu", "transB": 1}, 1),
    "FusedMatMul": ("FusedMatMul", [X], [numbers(8, 3)], {"alpha": 0.5}, 1),
    "FusedMatMul by a transposed weight": ("FusedMatMul", [X], [numbers(3, 8)], {"transB": 1}, 1),
    "FusedMatMul of attention": ("FusedMatMul", [numbers(2, 4, 5, 8), numbers(2, 4, 7, 8)], [], {"transB": 1}, 1),
    "FusedMatMul of a transposed operand": ("FusedMatMul", [numbers(2, 5, 8), numbers(2, 5, 3)], [], {"transA": 1}, 1),
    "TransposeMatMul": ("TransposeMatMul", [X], [numbers(3, 8)], {"transB": 1}, 1),
    "DynamicQuantizeMatMul": ("DynamicQuantizeMatMul", [X], [bytes_(8, 3), np.array([S]), np.array([Z])], {}, 1),
    "MatMulNBits": ("MatMulNBits", [numbers(2, 32)], [bytes_(4, 1, 16), numbers(4)],
                    {"K": 32, "N": 4, "bits": 4, "block_size": 32}, 1),
    "Attention": ("Attention", [X], [numbers(8, 24), numbers(24)], {"num_heads": 2}, 1),
    "Attention of other widths": ("Attention", [X], [numbers(8, 20), numbers(20)],
                                  {"num_heads": 2, "qkv_hidden_sizes": [8, 8, 4]}, 1),
    "MultiHeadAttention": ("MultiHeadAttention", [X, numbers(2, 7, 8), numbers(2, 7, 8)], [], {"num_heads": 2}, 1),
    "GroupQueryAttention": ("GroupQueryAttention", [numbers(1, 5, 32), numbers(1, 5, 16), numbers(1, 5, 16), None, None],
                            [np.array([[4]], np.int32), np.array(5, np.int32)],
                            {"num_heads": 2, "kv_num_heads": 1}, 3),
    "EmbedLayerNormalization": ("EmbedLayerNormalization", [np.zeros((2, 5), np.int32), np.zeros((2, 5), np.int32)],
                                [numbers(9, 8), numbers(9, 8), numbers(2, 8), numbers(8), numbers(8)], {}, 2),
    "RotaryEmbedding": ("RotaryEmbedding", [numbers(1, 2, 5, 8), np.zeros(1, np.int64)], [numbers(9, 4), numbers(9, 4)], {}, 1),
    "Trilu": ("Trilu", [X], [], {}, 1),
    "QuantizeLinear": ("QuantizeLinear", [X], [S, Z], {}, 1),
    "DequantizeLinear": ("DequantizeLinear", [BYTES], [S, Z], {}, 1),
    "QLinearAdd": ("QLinearAdd", [BYTES], [S, Z, bytes_(3, 1, 1), S, Z, S, Z], {}, 1),
    "QLinearMul": ("QLinearMul", [BYTES], [S, Z, bytes_(3, 1, 1), S, Z, S, Z], {}, 1),
    "QLinearSigmoid": ("QLinearSigmoid", [BYTES], [S, Z, S, Z], {}, 1),
    "QLinearLeakyRelu": ("QLinearLeakyRelu", [BYTES], [S, Z, S, Z], {}, 1),
    "QLinearSoftmax": ("QLinearSoftmax", [BYTES], [S, Z, S, Z], {"axis": -1, "opset": 17}, 1),
    "QLinearGlobalAveragePool": ("QLinearGlobalAveragePool", [BYTES], [S, Z, S, Z], {"channels_last": 0}, 1),
    "LayerNormalization in ONNX's domain": ("LayerNormalization", [X], [numbers(8), numbers(8)], {"domain": "", "opset": 14}, 1),
    "SimplifiedLayerNormalization": ("SimplifiedLayerNormalization", [X], [numbers(8)], {"domain": ""}, 1),
    "GroupNormalization 18": ("GroupNormalization", [IMAGE], [numbers(2), numbers(2)],
                              {"domain": "", "num_groups": 2, "opset": 18}, 1),
    "GroupNormalization 21": ("GroupNormalization", [IMAGE], [numbers(8), numbers(8)],
                              {"domain": "", "num_groups": 2, "opset": 21}, 1),
    "MeanVarianceNormalization": ("MeanVarianceNormalization", [IMAGE], [], {"domain": ""}, 1),
    "LpNormalization": ("LpNormalization", [X], [], {"domain": ""}, 1),
}  # fmt: skip


def make(name: str) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """The operator alone; its free inputs have no declared sizes but those of the last axis."""
    op, free, constants, attributes, outputs = CASES[name]
    given = dict(attributes)
    domain, opset = given.pop("domain", MICROSOFT), given.get("opset", 17)
    if op != "QLinearSoftmax":
        given.pop("opset", None)
    feeds = {f"x{i}": value for i, value in enumerate(free) if value is not None}
    inputs = [f"x{i}" if value is not None else "" for i, value in enumerate(free)]
    weights = {f"w{i}": value for i, value in enumerate(constants) if value is not None}
    node = helper.make_node(op, [*inputs, *weights], [f"y{i}" for i in range(outputs)], domain=domain, **given)
    graph = helper.make_graph(
        [node], "one",
        [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for n, v in feeds.items()],
        [onnx.ValueInfoProto(name=f"y{i}") for i in range(outputs)],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in weights.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8), feeds


@pytest.mark.parametrize("name", CASES)
def test_shapes_and_types_are_those_that_onnxruntime_computes(name: str) -> None:
    model, feeds = make(name)
    session = open_session(model)
    results = session.run(None, feeds)
    types = infer(model)
    known = 0
    for i, result in enumerate(results):
        code, shape = types.get(f"y{i}", (0, None))
        if shape is not None:
            assert shape == result.shape
            assert helper.tensor_dtype_to_np_dtype(code) == result.dtype
            known += 1
    assert known >= 1
    assert types["y0"][1] is not None


def test_every_operator_of_the_tables_has_a_case() -> None:
    covered = {op for op, *_ in CASES.values()}
    assert (MICROSOFT_SAME_SHAPE | STAND_INS.keys()) - covered == GPU_ONLY | {"QLinearConcat"}


def test_a_quantised_concat() -> None:
    quantised = ["s", "z", "x", "s", "z", "x", "s", "z"]
    node = helper.make_node("QLinearConcat", quantised, ["y"], domain=MICROSOFT, axis=1)
    info = helper.make_tensor_value_info
    held = [numpy_helper.from_array(np.asarray(v), n) for n, v in (("s", S), ("z", Z))]
    graph = helper.make_graph(
        [node], "g", [info("x", TensorProto.UINT8, ["N", 3])], [info("y", TensorProto.UINT8, None)], held
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
    assert infer(helper.make_model(graph, opset_imports=opsets))["y"] == (TensorProto.UINT8, ("N", 6))


def model(nodes: list[onnx.NodeProto], declared: dict[str, list[Any]], x: list[Any] | None = None) -> onnx.ModelProto:
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [info("x", TensorProto.FLOAT, x)], [info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(numbers(4, 3, 5, 5), "w")],
        value_info=[info(n, TensorProto.FLOAT, shape) for n, shape in declared.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("my", 1)])


MINE = helper.make_node("Mine", ["x"], ["a"], domain="my")
RELU = helper.make_node("Relu", ["a"], ["y"])
CONV = helper.make_node("Conv", ["a", "w"], ["y"])


def test_a_declaration_behind_a_custom_operator_counts() -> None:
    proto = model([MINE, RELU], {"a": ["N", 3, "M", 8]}, ["N", 3, 8, 8])
    shape = infer(proto)["y"][1]
    assert shape is not None
    assert (shape[0], shape[1], shape[3]) == ("N", 3, 8)
    assert shape[2] != "M"  # no input has that size
    fixed = infer(proto, {"x": (2, 3, 8, 8)})["y"][1]
    assert fixed is not None
    assert (fixed[0], fixed[1], fixed[3]) == (2, 3, 8)


def test_a_declaration_behind_a_known_operator_does_not_count() -> None:
    relu = [helper.make_node("Relu", ["x"], ["a"]), RELU]
    proto = model(relu, {"a": [7, 7]}, ["N", 3])
    assert not find_declared(proto)
    assert infer(proto)["y"][1] == ("N", 3)


def test_a_weight_says_rank_and_channels() -> None:
    types = infer(model([MINE, CONV], {}, [1, 3, 8, 8]))
    assert types["a"] == (TensorProto.FLOAT, (None, 3, None, None))
    assert len(types["y"][1] or ()) == 4
    assert (types["y"][1] or ())[1] == 4
    undeclared = helper.make_node("Conv", ["x", "w"], ["y"])
    assert (infer(model([undeclared], {}, None))["y"][1] or ())[1:2] == (4,)


def test_functions_of_the_model_hide_operators_of_their_name() -> None:
    body = [helper.make_node("Transpose", ["p"], ["q"], perm=[1, 0])]
    proto = model([helper.make_node("Gelu", ["x"], ["a"], domain=MICROSOFT), RELU], {}, [2, 3])
    opset = [helper.make_opsetid("", 17)]
    proto.functions.append(helper.make_function(MICROSOFT, "Gelu", ["p"], ["q"], body, opset))
    proto.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    assert infer(proto)["y"][1] == (3, 2)
