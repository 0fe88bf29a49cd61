"""Operators that only move numbers fold into quantised weights, bit by bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from helpers import open_session, ops, reasons, run
from onnx import TensorProto, helper, numpy_helper

from pwopt.passes.fold_quantised import FoldQuantised

Q = np.random.default_rng(0).integers(-99, 99, (6, 4)).astype(np.int8)


def make(
    op: str, extra: dict[str, np.ndarray], attributes: dict[str, Any], scale: np.ndarray, axis: int = 0
) -> onnx.ModelProto:
    """x plus the moved weight; the weight has one scale, or one per row or column."""
    zero = np.zeros(scale.shape, np.int8) + np.int8(3)
    held = {"q": Q, "scale": scale.astype(np.float32), "zero": zero, **extra}
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], axis=axis),
        helper.make_node(op, ["d", *extra], ["w"], **attributes),
        helper.make_node("Abs", ["w"], ["v"]),
        helper.make_node("Add", ["x", "v"], ["y"]),
    ]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [info("x", TensorProto.FLOAT, [1])], [info("y", TensorProto.FLOAT, ["A", "B"])],
        [numpy_helper.from_array(v, n) for n, v in held.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def output(model: onnx.ModelProto) -> np.ndarray:
    session = open_session(model)
    return np.asarray(session.run(None, {"x": np.ones(1, np.float32)})[0])


ONE, ROWS, COLUMNS = np.array(0.1), np.linspace(0.1, 1, 6), np.linspace(0.1, 1, 4)


@pytest.mark.parametrize(
    ("op", "extra", "attributes", "scale", "axis"),
    [
        ("Transpose", {}, {"perm": [1, 0]}, ONE, 0),
        ("Transpose", {}, {}, ROWS, 0),
        ("Transpose", {}, {"perm": [1, 0]}, COLUMNS, -1),
        ("Transpose", {}, {"perm": [0, 1]}, COLUMNS, 1),
        ("Reshape", {"s": np.array([3, 8])}, {}, ONE, 0),
        ("Gather", {"i": np.array([3, 1])}, {"axis": 1}, ONE, 0),
        ("Slice", {"a": np.array([1]), "b": np.array([3])}, {}, ONE, 0),
    ],
)
def test_the_weight_is_moved(
    op: str, extra: dict[str, np.ndarray], attributes: dict[str, Any], scale: np.ndarray, axis: int
) -> None:
    model = make(op, extra, attributes, scale, axis)
    result, outcome, _ = run(model, FoldQuantised())
    assert ops(result) == {"DequantizeLinear": 1, "Abs": 1, "Add": 1}
    assert [r.certificate.status for r in outcome.rewrites if r.certificate is not None] != ["failed"]
    np.testing.assert_array_equal(output(result), output(model))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.graph.node.append(helper.make_node("Neg", ["d"], ["z"])), "has 2 consumers"),
        (lambda m: m.graph.node.append(helper.make_node("Neg", ["q"], ["z"])), "is shared"),
    ],
)
def test_a_weight_with_other_readers_stays(change: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pwopt.passes.fold_quantised.NEGLIGIBLE_BYTES", 0)
    model = make("Transpose", {}, {}, ONE)
    change(model)
    model.graph.output.append(helper.make_tensor_value_info("z", 1 if "consumers" in reason else 3, [6, 4]))
    result, outcome, _ = run(model, FoldQuantised())
    assert ops(result)["Transpose"] == 1
    assert [reason in r for r in reasons(outcome)] == [True]


def test_a_small_shared_weight_is_stored_twice() -> None:
    model = make("Transpose", {}, {}, ONE)
    model.graph.node.append(helper.make_node("Neg", ["q"], ["z"]))
    model.graph.output.append(helper.make_tensor_value_info("z", 3, [6, 4]))
    result, _, _ = run(model, FoldQuantised())
    assert ops(result) == {"DequantizeLinear": 1, "Abs": 1, "Add": 1, "Neg": 1}
    np.testing.assert_array_equal(output(result), output(model))


def test_scales_per_row_do_not_survive_a_reshape() -> None:
    model = make("Reshape", {"s": np.array([3, 8])}, {}, ROWS)
    result, outcome, _ = run(model, FoldQuantised())
    assert ops(result)["Reshape"] == 1
    assert reasons(outcome) == ["Reshape moves the axis along which the scales differ"]


def test_a_quantised_input_stays() -> None:
    model = make("Transpose", {}, {}, ONE)
    del model.graph.initializer[0]
    model.graph.input.append(helper.make_tensor_value_info("q", TensorProto.INT8, [6, 4]))
    result, outcome, _ = run(model, FoldQuantised())
    assert ops(result)["Transpose"] == 1
    assert not outcome.skips
