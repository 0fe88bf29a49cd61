"""Declared shapes behind operators that nothing else knows: trusted, reported, and checked when the model runs."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from helpers import normal, ops
from onnx import TensorProto, helper, numpy_helper

import pwopt

TRUSTED = "Declared output shapes were trusted, since nothing else gives them (CDist)"


def make(declared: list[int | str]) -> onnx.ModelProto:
    """Two maps behind a CDist of onnxruntime's domain, whose output is declared; x has 6 rows, the table 8."""
    info = helper.make_tensor_value_info
    nodes = [
        helper.make_node("CDist", ["x", "table"], ["d"], domain="com.microsoft", metric="sqeuclidean"),
        helper.make_node("MatMul", ["d", "v"], ["a"]),
        helper.make_node("MatMul", ["a", "w"], ["y"]),
    ]
    constants = {"table": normal(8, 3), "v": normal(8, 5, seed=1), "w": normal(5, 4, seed=2)}
    graph = helper.make_graph(
        nodes, "g", [info("x", TensorProto.FLOAT, [6, 3])], [info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(v.astype(np.float32), n) for n, v in constants.items()],
        value_info=[info("d", TensorProto.FLOAT, declared)],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


@pytest.mark.parametrize(
    ("verify", "checked"), [(True, "they are right on every sample"), (False, "no run checked them")]
)
def test_a_trusted_declaration_is_reported(verify: bool, checked: str) -> None:
    result = pwopt.optimize(make([6, 8]), cost="analytic", verify=verify)
    assert ops(result.model) == {"CDist": 1, "MatMul": 1}
    assert f"{TRUSTED}; {checked}." in result.report.notes


def test_a_wrong_declaration_is_ignored() -> None:
    result = pwopt.optimize(make([1, 6, 8]), cost="analytic")
    assert "The declared shape 1×6×8 of 'd' was ignored, since the model computes 6×8." in result.report.notes
    assert not any(note.startswith("Declared output shapes were trusted") for note in result.report.notes)
    assert ops(result.model) == {"CDist": 1, "MatMul": 2}


def test_without_a_declaration_the_report_says_what_is_missing() -> None:
    model = make([6, 8])
    del model.graph.value_info[:]
    result = pwopt.optimize(model, cost="analytic", verify=False)
    assert ops(result.model) == {"CDist": 1, "MatMul": 2}
    reasons = {s.tensor: s.reason for s in result.report.skips if s.pass_name == "fold-chains"}
    assert reasons["a"] == "MatMul stays: the output shape of CDist is unknown; declare it in value_info"
    assert reasons["y"] == reasons["a"]
