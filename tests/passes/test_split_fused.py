"""Fused operators of onnxruntime's own domain are split, and everything around them folds."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from helpers import normal, open_session, ops, run
from onnx import TensorProto, helper, numpy_helper

import pwopt
from pwopt.passes.split_fused import SplitFused

Node = tuple[str, str, str, dict[str, Any]]


def make(nodes: list[Node], weights: dict[str, np.ndarray], shape: list[int], opset: int = 17) -> onnx.ModelProto:
    """A model of operators, inputs and outputs; names that begin with "Fused" belong to com.microsoft."""
    made = [
        helper.make_node(op, read.split(), out.split(), domain="com.microsoft" if op.startswith("Fused") else "", **a)
        for op, read, out, a in nodes
    ]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        made, "g", [info("x", TensorProto.FLOAT, shape)], [info("y", TensorProto.FLOAT, [None] * len(shape))],
        [numpy_helper.from_array(v.astype(np.float32), n) for n, v in weights.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def outputs(model: onnx.ModelProto, **feeds: np.ndarray) -> list[np.ndarray]:
    return open_session(model).run(None, feeds)


WEIGHTS = {"w": normal(6, 4, 3, 3), "b": normal(6), "z": normal(1, 6, 3, 3), "u": normal(4, 6), "t": normal(6, 4)}
IMAGE, ROWS = [1, 4, 5, 5], [3, 4]


@pytest.mark.parametrize(
    ("node", "shape", "expected"),
    [
        (("FusedConv", "x w b", {"activation": "Relu"}), IMAGE, {"Conv": 1, "Relu": 1}),
        (("FusedConv", "x w b z", {"activation": "Tanh"}), IMAGE, {"Conv": 1, "Add": 1, "Tanh": 1}),
        (("FusedConv", "x w b", {"activation": "Clip", "activation_params": [-1.0, 0.5]}), IMAGE,
         {"Conv": 1, "Clip": 1}),
        (("FusedConv", "x w", {"activation": "LeakyRelu", "activation_params": [0.1], "strides": [2, 2]}), IMAGE,
         {"Conv": 1, "LeakyRelu": 1}),
        (("FusedConv", "x w", {"activation": "HardSigmoid", "activation_params": [0.2, 0.4]}), IMAGE,
         {"Conv": 1, "HardSigmoid": 1}),
        (("FusedGemm", "x t b", {"activation": "Sigmoid", "transB": 1}), ROWS, {"Gemm": 1, "Sigmoid": 1}),
        (("FusedGemm", "x u", {"activation": "LeakyRelu", "activation_alpha": 0.2}), ROWS,
         {"Gemm": 1, "LeakyRelu": 1}),
        (("FusedMatMul", "x u", {}), ROWS, {"MatMul": 1}),
        (("FusedMatMul", "x u", {"alpha": 0.3}), ROWS, {"MatMul": 1}),
        (("FusedMatMul", "x t", {"transB": 1, "alpha": 0.3}), ROWS, {"MatMul": 1}),
    ],
)  # fmt: skip
def test_it_is_split(node: tuple[str, str, dict[str, Any]], shape: list[int], expected: dict[str, int]) -> None:
    op, read, attributes = node
    model = make([(op, read, "y", attributes)], {k: v for k, v in WEIGHTS.items() if k in read.split()}, shape)
    result, outcome, _ = run(model, SplitFused())
    assert ops(result) == expected
    assert [r.certificate.status for r in outcome.rewrites if r.certificate] in (["tested"], ["proved"])
    x = normal(*shape).astype(np.float32)
    np.testing.assert_allclose(outputs(result, x=x)[0], outputs(model, x=x)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        (("FusedConv", "x v", {"activation": "Relu"}), None),  # its weight is computed
        (("FusedConv", "x w", {"activation": "Softplus"}), "might not fuse Softplus"),
        (("FusedMatMul", "x u", {"transA": 1}), None),
        (("FusedMatMul", "x u", {"alpha": 0.5}), "is shared"),
    ],
)
def test_it_stays(node: tuple[str, str, dict[str, Any]], reason: str | None) -> None:
    op, read, attributes = node
    others: list[Node] = [("Abs", "w", "v", {}), ("Neg", "u", "q", {})]
    graph = pwopt.load(make([*others, (op, read, "y", attributes)], WEIGHTS, [1, 4, 5, 6])).graph
    outcome = SplitFused().run(graph)
    assert op in [n.op for n in graph.nodes]
    assert not outcome.rewrites
    assert [reason in s.reason for s in outcome.skips if reason is not None] == [True] * (reason is not None)


@pytest.mark.parametrize(
    ("nodes", "shape", "left"),
    [
        ([("Mul", "x k", "a", {}), ("FusedConv", "a w b", "y", {"activation": "Relu"})], IMAGE, {"Conv": 1, "Relu": 1}),
        ([("Conv", "x p", "a", {}), ("FusedConv", "a w b", "y", {"activation": "Relu"})], IMAGE,
         {"Conv": 1, "Relu": 1}),
        ([("MatMul", "x m", "a", {}), ("FusedMatMul", "a u", "y", {"alpha": 0.5})], ROWS, {"MatMul": 1}),
        ([("FusedMatMul", "x u", "a", {"alpha": 0.5}), ("Mul", "a s", "y", {})], ROWS, {"MatMul": 1}),
        ([("Gemm", "x m", "a", {}), ("FusedGemm", "a u", "y", {"activation": "Relu"})], ROWS, {"Gemm": 1, "Relu": 1}),
    ],
)  # fmt: skip
def test_chains_around_fused_operators_fold(nodes: list[Node], shape: list[int], left: dict[str, int]) -> None:
    weights = {**WEIGHTS, "k": normal(4, 1, 1), "p": normal(4, 4, 1, 1), "m": normal(4, 4), "s": normal(6)}
    used = {name for _, read, _, _ in nodes for name in read.split()}
    result = pwopt.optimize(make(nodes, {k: v for k, v in weights.items() if k in used}, shape), cost="analytic")
    assert ops(result.model) == left
    assert result.report.equivalence is not None
    assert result.report.equivalence.passed
