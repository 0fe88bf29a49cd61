"""Definitions that a model repeats: pwopt takes the one that onnxruntime takes."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from helpers import open_session
from onnx import TensorProto, helper, numpy_helper

import pwopt

ort.set_default_logger_severity(4)
X = np.ones((2, 3), np.float32)


def tensor(value: float) -> onnx.TensorProto:
    return numpy_helper.from_array(np.full(3, value, np.float32), "c")


def constant(value: float) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["c"], value=tensor(value))


def make(nodes: list[onnx.NodeProto], held: list[float], outputs: tuple[str, ...] = ("y",)) -> onnx.ModelProto:
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [info("x", TensorProto.FLOAT, [2, 3])], [info(n, TensorProto.FLOAT, None) for n in outputs],
        [tensor(v) for v in held],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def run(model: onnx.ModelProto) -> list[np.ndarray]:
    return open_session(model).run(None, {"x": X})


TWICE = [helper.make_node("Mul", ["x", "c"], ["h"]), helper.make_node("Mul", ["h", "c"], ["y"])]


@pytest.mark.parametrize(
    ("model", "factor"),
    [
        (make(TWICE, [2, 3]), 9),
        (make([constant(2), TWICE[0], constant(3), TWICE[1]], []), 9),
        (make([constant(2), *TWICE], [3]), 4),
        (make([constant(2), *TWICE, constant(5)], [3, 4]), 25),
    ],
)
def test_the_last_definition_counts_and_a_constant_node_before_an_initializer(
    model: onnx.ModelProto, factor: float
) -> None:
    before = model.SerializeToString()
    result = pwopt.optimize(model, cost="analytic")
    assert model.SerializeToString() == before
    np.testing.assert_array_equal(run(model)[0], factor * X)
    np.testing.assert_array_equal(run(result.model)[0], factor * X)
    assert [n.op_type for n in result.model.graph.node] == ["Mul"]
    assert result.report.equivalence is not None
    assert result.report.equivalence.passed


def test_an_output_that_is_listed_twice() -> None:
    model = make(TWICE, [2], ("y", "y"))
    result = pwopt.optimize(model, cost="analytic")
    assert [o.name for o in result.model.graph.output] == ["y", "y"]
    assert all(np.array_equal(y, 4 * X) for y in run(result.model))


def test_other_tensors_are_defined_once() -> None:
    with pytest.raises(pwopt.ModelError, match="tensor 'h' is defined twice"):
        pwopt.load(make([TWICE[0], TWICE[0], TWICE[1]], [2]))
    with pytest.raises(pwopt.ModelError, match="tensor 'c' is defined twice"):
        pwopt.load(make([helper.make_node("Neg", ["x"], ["c"]), *TWICE], [2]))


def test_a_graph_without_outputs_is_refused_with_that_reason() -> None:
    model = make(TWICE, [2], ())
    with pytest.raises(pwopt.ModelError, match="the model has no outputs, so nothing that it computes can be used"):
        pwopt.load(model)
    with pytest.raises(pwopt.ModelError, match="the model has no outputs"):
        pwopt.load(model.SerializeToString())


@pytest.mark.parametrize(
    ("nodes", "weights", "kept"),
    [
        (["BatchNormalization x s s s v -> r", "Conv r w -> a", "Mul a k -> b", "Conv b u -> y"], "svwku", 1),
        (["MatMul m x -> a", "Neg a -> b", "Add b x -> y"], "m", None),
        (["Conv z w -> a", "Mul a k -> b", "Conv b u -> c", "Add c x -> y"], "wku", 2),
    ],
)
def test_an_input_without_a_declared_rank(nodes: list[str], weights: str, kept: int | None) -> None:
    generator = np.random.default_rng(0)
    sizes = {"s": (3,), "v": (3,), "w": (4, 3, 1, 1), "k": (4, 1, 1), "u": (5, 4, 1, 1), "m": (3, 3)}
    made = [helper.make_node(w[0], w[1 : w.index("->")], [w[-1]]) for w in map(str.split, nodes)]
    free = {"x", "z"} & {name for node in made for name in node.input}
    graph = helper.make_graph(
        made, "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None if n == "x" else [1, 3, 4, 4]) for n in sorted(free)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.abs(generator.normal(size=sizes[n])).astype(np.float32), n) for n in weights],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    result = pwopt.optimize(model, cost="analytic")
    if kept is not None:
        assert len(result.model.graph.node) == kept
        assert result.report.equivalence is not None
        assert result.report.equivalence.passed
