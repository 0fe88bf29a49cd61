"""Constant folding computes what onnxruntime computes, or refuses."""

from collections.abc import Sequence

import numpy as np
import onnx
import onnxruntime
import pytest
from helpers import ops, same
from onnx import TensorProto, helper, numpy_helper

import pwopt
from pwopt.graph.constants import evaluate
from pwopt.graph.ir import Constant, Node, Variable, as_message
from pwopt.graph.operators import FOLDABLE
from pwopt.graph.shapes import infer

F, D, H, L = np.float32, np.float64, np.float16, np.int64
OPSETS = (1, 6, 7, 9, 10, 11, 12, 13, 14, 17, 18, 20, 21)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 3, 4)).astype(F)
SPECIAL = np.array([0.0, -0.0, 1.5, -1.5, 2.5, np.inf, -np.inf, np.nan, 1e30, 3e9, -3e9, 300], F)
INTEGERS = np.array([-7, -3, -1, 0, 1, 2, 7, -8], L)
DIVISORS = np.array([2, -2, 3, -3, 5, -5, 7, 2], L)
AXES: tuple[list[int], ...] = ([0], [-1], [0, 2], [2, 0], [-2, -1], [1, 0], [1, -1], [])
Inputs = Sequence[np.ndarray]


def runtime(op: str, attrs: dict[str, object], inputs: Inputs, opset: int, count: int) -> list[np.ndarray] | None:
    """What onnxruntime computes; None if it does not take the operator."""
    names = [f"i{k}" for k in range(len(inputs))]
    node = helper.make_node(op, names, [f"o{k}" for k in range(count)])
    node.attribute.extend(as_message(Node(op, "n", attrs)).attribute)
    values = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
        for n, v in zip(names, inputs, strict=True)
    ]
    graph = helper.make_graph([node], "one", values, [onnx.ValueInfoProto(name=n) for n in node.output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return list(session.run(None, dict(zip(names, inputs, strict=True))))
    except Exception:  # whatever the runtime raises for types and opsets that it does not take
        return None


def check(
    op: str, attrs: dict[str, object], *inputs: np.ndarray, count: int = 1, opsets: Sequence[int] = OPSETS
) -> int:
    """Compare folding with onnxruntime at some opsets; returns how often both computed something."""
    compared = 0
    for opset in opsets:
        constants = [Constant(f"i{k}", v) for k, v in enumerate(inputs)]
        node = Node(op, "n", dict(attrs), constants, [Variable(f"o{k}") for k in range(count)])
        found = evaluate(node, {c.name: c.values for c in constants}, opset)
        expected = None if isinstance(found, str) else runtime(op, attrs, inputs, opset, count)
        if expected is None:
            continue
        for a, b in zip(found, expected, strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape), (op, attrs, opset)
            np.testing.assert_allclose(a.astype(D), b.astype(D), 2e-3 if a.dtype == H else 1e-5, 1e-6)
        compared += 1
    return compared


CASES: dict[str, list[tuple[dict[str, object], tuple[np.ndarray, ...]]]] = {
    **{op: [({}, (SPECIAL,)), ({}, (X.astype(H),)), ({}, (INTEGERS,))] for op in ("Abs", "Neg")},
    **{op: [({}, (SPECIAL,)), ({}, (X,))] for op in ("Ceil", "Exp", "Floor", "Log", "Reciprocal", "Sqrt")},
    **{
        op: [({}, (X, X[:, :1])), ({}, (SPECIAL, SPECIAL[::-1].copy())), ({}, (INTEGERS, DIVISORS))]
        for op in ("Add", "Sub", "Mul", "Div", "Max", "Min")
    },
    "Mod": [({}, (INTEGERS, DIVISORS)), ({"fmod": 1}, (INTEGERS, DIVISORS)), ({"fmod": 1}, (X, X[:1]))],
    "Pow": [({}, (np.abs(X), X)), ({}, (INTEGERS, np.array(2, F))), ({}, (INTEGERS[4:6], -DIVISORS[:2]))],
    **{
        op: [({}, (INTEGERS, DIVISORS)), ({}, (SPECIAL, SPECIAL[::-1].copy()))]
        for op in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
    },
    **{op: [({}, (X > 0, X[:1] > 0.5))] for op in ("And", "Or", "Xor")},
    "Not": [({}, (X > 0,))],
    "Where": [({}, (X > 0, X, X[:1]))],
    "Cast": [({"to": to}, (v,)) for to in (1, 6, 7, 9, 10, 11) for v in (SPECIAL[:5], INTEGERS, X > 0, X.astype(H))],
    "Concat": [({"axis": a}, (X, X)) for a in (0, 2, -1)],
    "ConstantOfShape": [({}, (np.array(s, L),)) for s in ([2, 3], [0, 2], [])],
    "Expand": [({}, (X[:, :1], np.array(s, L))) for s in ([2, 3, 4], [5, 1, 3, 1], [1])],
    "Flatten": [({"axis": a}, (X,)) for a in (0, 1, 3, -1)],
    "Gather": [({"axis": a}, (X, np.array(i, L))) for a in (0, 1, -1) for i in (1, [0, -1], [[1]])],
    "GatherElements": [({"axis": 1}, (X[0, :2], np.array([[0, 2], [1, -1]], L)))],
    "GatherND": [({}, (X, np.array([[0, 1], [1, -1]], L))), ({"batch_dims": 1}, (X, np.array([[1], [-1]], L)))],
    "Range": [({}, tuple(np.array(v, t) for v in (0, 1, 0.3))) for t in (F, D)]
    + [({}, tuple(np.array(v, L) for v in (9, 0, -2)))],
    **{
        op: [
            case
            for axes in AXES
            for keep in (0, 1)
            for case in (
                ({"axes": axes, "keepdims": keep}, (X,)),
                ({"keepdims": keep}, (X, np.array(axes, L))),
                ({"noop_with_empty_axes": keep}, (INTEGERS.reshape(2, 2, 2), np.array(axes, L))),
            )
        ]
        + [({"keepdims": 0}, (SPECIAL,))]
        for op in ("ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum")
    },
    "Reshape": [({}, (X, np.array(s, L))) for s in ([6, 4], [0, -1], [2, 0, 2, 2])]
    + [({"allowzero": a}, (X[:, :0], np.array([[0, 0, 4], [3, 0]][a], L))) for a in (0, 1)],
    "Shape": [({}, (X,)), ({"start": -2}, (X,)), ({"start": 0, "end": -1}, (X,))],
    "Size": [({}, (X,))],
    "Slice": [({"starts": [1], "ends": [3], "axes": [-1]}, (X,)), ({"starts": [-2], "ends": [100]}, (X,))]
    + [
        ({}, (X, *(np.array([v], L) for v in limits)))
        for limits in ((0, 2, 0, 1), (-2, 100, 1, 1), (3, -100, 2, -1), (-1, -5, 2, -2), (2, 0, 2, 1))
    ],
    "Squeeze": [({"axes": a}, (X.reshape(1, 6, 1, 4, 1),)) for a in ([2], [2, 0], [-1], [0, -1], [])]
    + [({}, (X.reshape(1, 6, 1, 4, 1), np.array(a, L))) for a in ([2, 0], [-1, -3], [])]
    + [({}, (X[None],))],
    "Split": [({"axis": 1}, (X,)), ({"axis": 0, "num_outputs": 3}, (X.reshape(6, 4),))],
    "Tile": [({}, (X, np.array(r, L))) for r in ([2, 1, 1], [1, 0, 2])],
    "Transpose": [({}, (X,)), ({"perm": [2, 0, 1]}, (X,))],
    "Unsqueeze": [case for a in AXES[:-1] for case in (({"axes": a}, (X,)), ({}, (X, np.array(a, L))))],
}


@pytest.mark.parametrize("op", sorted(FOLDABLE))
def test_folding_computes_what_onnxruntime_computes(op: str) -> None:
    count = 3 if op == "Split" else 1
    assert sum(check(op, attrs, *inputs, count=count) for attrs, inputs in CASES[op])


@pytest.mark.parametrize(
    ("op", "attrs", "inputs", "words"),
    [
        ("ReduceMax", {"keepdims": 0}, (SPECIAL,), "NaN"),
        ("ReduceMin", {"keepdims": 0}, (SPECIAL,), "NaN"),
        ("Squeeze", {}, (X[None], np.zeros(0, L)), "empty list of axes"),
        ("Squeeze", {"axes": []}, (X[None],), "empty list of axes"),
    ],
)
def test_where_runtimes_disagree_nothing_is_folded(
    op: str, attrs: dict[str, object], inputs: tuple[np.ndarray, ...], words: str
) -> None:
    constants = [Constant(f"i{k}", v) for k, v in enumerate(inputs)]
    node = Node(op, "n", attrs, constants, [Variable("o")])
    found = evaluate(node, {c.name: c.values for c in constants}, 13 if len(inputs) > 1 else 11)
    assert isinstance(found, str)
    assert words in found


def around(nodes: list[onnx.NodeProto], shape: Sequence[int], opset: int, **constants: np.ndarray) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "around",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=7)


def compute(model: onnx.ModelProto, **feeds: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])


@pytest.mark.parametrize(
    ("opset", "axes", "shape"),
    [(11, [-2, -1], (1, 4, 5, 6)), (11, [-2, -1], (1, 4, 4, 4)), (11, [1, 0], (2, 3, 4)), (7, [1, 0], (2, 3, 4))],
)
def test_a_constant_gets_several_axes(opset: int, axes: list[int], shape: tuple[int, ...]) -> None:
    nodes = [helper.make_node("Unsqueeze", ["w"], ["u"], axes=axes), helper.make_node("Mul", ["x", "u"], ["y"])]
    model = around(nodes, shape, opset, w=np.arange(1, 5, dtype=F))
    result = pwopt.optimize(model, cost="analytic", verify=False).model
    assert ops(result) == {"Mul": 1}
    x = RNG.normal(size=shape).astype(F)
    np.testing.assert_array_equal(compute(result, x=x), compute(model, x=x))


@pytest.mark.parametrize("opset", [7, 11, 13])
def test_a_squeeze_with_an_empty_list_of_axes_squeezes_all(opset: int) -> None:
    attributes = as_message(Node("Squeeze", "s", {"axes": []})).attribute if opset < 13 else []
    squeeze = helper.make_node("Squeeze", ["x"] if opset < 13 else ["x", "none"], ["s"])
    squeeze.attribute.extend(attributes)
    model = around([squeeze, helper.make_node("Relu", ["s"], ["y"])], (1, 3, 1, 4), opset, none=np.zeros(0, L))
    assert infer(model)["y"][1] == (3, 4)
    result = pwopt.optimize(model, cost="analytic", verify=False).model
    x = RNG.normal(size=(1, 3, 1, 4)).astype(F)
    np.testing.assert_array_equal(compute(result, x=x), compute(model, x=x))


def test_shapes_that_old_inference_gets_wrong_are_corrected_or_unknown() -> None:
    relu = helper.make_node("Relu", ["s"], ["y"])
    unordered = around([helper.make_node("Squeeze", ["x"], ["s"], axes=[2, 0]), relu], (1, 3, 1, 4), 7)
    assert infer(unordered)["y"][1] == (3, 4)
    negative = around([helper.make_node("Squeeze", ["x"], ["s"], axes=[-2]), relu], (1, 3, 1, 4), 7)
    assert infer(negative).get("y", (0, None))[1] is None
    assert infer(around([helper.make_node("Squeeze", ["x"], ["s"], axes=[-2]), relu], (1, 3, 1, 4), 11))["y"][1] == (
        1,
        3,
        4,
    )


def test_an_empty_list_survives_a_rewrite() -> None:
    reduce = helper.make_node("ReduceSum", ["a"], ["y"], keepdims=0)
    reduce.attribute.add(name="axes", type=onnx.AttributeProto.INTS)
    nodes = [helper.make_node("Identity", ["x"], ["a"]), reduce]
    model = around(nodes, (2, 3), 11)
    result = pwopt.optimize(model, cost="analytic", verify=False).model
    assert ops(result) == {"ReduceSum": 1}
    same(model, result, tolerance=1e-6, x=X[0, :2, :3])
    assert as_message(Node("Upsample", "u", {"scales": []})).attribute[0].type == onnx.AttributeProto.FLOATS
    assert as_message(Node("Mine", "u", {"list": []}, domain="mine")).attribute[0].type == onnx.AttributeProto.INTS
