from __future__ import annotations

import numpy as np
import onnx
import pytest
from helpers import evaluate, ops, parse
from onnx import TensorProto, helper, numpy_helper

import pwopt
from pwopt.graph.calls import inline
from pwopt.graph.functions import MAX_INLINED, count_expanded, functions
from pwopt.selecting.inlining import inline_functions
from pwopt.selecting.pass_list import resolve_passes

BRANCHES = """If (k) <then_branch = a () => (float[N,4] z) { p = Mul(h, two) q = Add(p, w) z = Relu(q) },
                       else_branch = b () => (float[N,4] z) { z = Identity(h) }>"""


def optimised(model: onnx.ModelProto, **options: object) -> onnx.ModelProto:
    result = pwopt.optimize(model, cost="analytic", verify=False, **options).model
    onnx.checker.check_model(result, full_check=True)
    return result


def branching(condition: str, inputs: str = "float[N,4] x") -> onnx.ModelProto:
    body = f"({inputs}) => (float[N,4] y) {{ h = Exp(x) {condition} y = {BRANCHES} }}"
    weights = {
        "one": np.array([1]),
        "axis": np.array(1),
        "four": np.array(4),
        "two": np.float32(2),
        "w": np.ones(4, np.float32),
    }
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g {body}')
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), n) for n, v in weights.items())
    return model


@pytest.mark.parametrize(
    ("condition", "taken"),
    [
        ("k = Equal(one, one)", True),
        ("c = Equal(one, one) k = Not(c)", False),
        ("s = Shape(x) d = Gather(s, axis) k = Equal(d, four)", True),
        ("s = Shape(x) d = Gather(s, axis) c = Sub(d, four) k = Cast<to=9>(c)", False),
        ("s = Size(w) c = Less(s, four) k = Not(c)", True),
    ],
)
def test_an_if_whose_condition_is_settled_is_its_branch(condition: str, taken: bool) -> None:
    model = branching(condition)
    result = optimised(model)
    assert ops(result) == ({"Exp": 1, "Mul": 1, "Add": 1, "Relu": 1} if taken else {"Exp": 1})
    assert [o.name for o in result.graph.output] == ["y"]
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    np.testing.assert_array_equal(evaluate(result, x=x)[0], evaluate(model, x=x)[0])


@pytest.mark.parametrize(
    ("condition", "inputs"),
    [
        ("", "float[N,4] x, bool k"),
        ("s = Shape(x) d = Gather(s, zero) k = Equal(d, four)", "float[N,4] x, int64 zero"),
        ("m = ReduceMax<keepdims=0>(x) k = Greater(m, two)", "float[N,4] x"),
    ],
)
def test_an_if_whose_condition_is_open_stays(condition: str, inputs: str) -> None:
    assert ops(optimised(branching(condition, inputs)))["If"] == 1


def test_a_denied_if_stays() -> None:
    model = branching("k = Equal(one, one)")
    assert ops(optimised(model, deny=["clean-up:y"]))["If"] == 1


def test_names_inside_and_outside_do_not_meet() -> None:
    """Two Ifs with the same names inside, one of which captures what the other makes; and one in another."""
    body = """(float[2] x) => (float[2] y) { h = Exp(x) k = Equal(one, one)
        g = If (k) <then_branch = a () => (float[2] z) { p = Neg(h) z = Abs(p) }, else_branch = b () => (float[2] z) { z = Identity(h) }>
        y = If (k) <then_branch = c () => (float[2] z) { p = Cos(g) z = If (k) <then_branch = e () => (float[2] z) { z = Sin(p) }, else_branch = f () => (float[2] z) { z = Exp(h) }> }, else_branch = d () => (float[2] z) { z = Identity(h) }> }"""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g {body}')
    model.graph.initializer.append(numpy_helper.from_array(np.array(1), "one"))
    result = optimised(model)
    assert [n.op_type for n in result.graph.node] == ["Exp", "Neg", "Abs", "Cos", "Sin"]
    x = np.array([0.5, -2], np.float32)
    np.testing.assert_array_equal(evaluate(result, x=x)[0], evaluate(model, x=x)[0])


def test_a_branch_brings_its_weights_and_its_documentation() -> None:
    model = branching("k = Equal(one, one)")
    node = next(n for n in model.graph.node if n.op_type == "If")
    node.metadata_props.add(key="namespace", value="outer")
    body = next(a.g for a in node.attribute if a.name == "then_branch")
    body.initializer.append(numpy_helper.from_array(np.full(4, 3, np.float32), "w"))  # hides the one outside
    body.node[2].metadata_props.add(key="namespace", value="inner")
    result = optimised(model)
    last = result.graph.node[-1]
    assert {p.key: p.value for p in last.metadata_props}["namespace"] == "inner"
    assert "outer" in {p.key: p.value for p in last.metadata_props}["pwopt.folded"]
    held = {t.name: numpy_helper.to_array(t) for t in result.graph.initializer}
    add = next(n for n in result.graph.node if n.op_type == "Add")
    assert held[add.input[1]].tolist() == [3, 3, 3, 3]


def called(*bodies: list[onnx.NodeProto], opset: int = 17, outputs: int = 1) -> onnx.ModelProto:
    """Calls of functions F0, F1… one after the other; each takes a tensor and a weight."""
    made = [
        helper.make_function(
            "loc", f"F{i}", ["x", "w"], ["y"], body, [helper.make_opsetid("", opset), helper.make_opsetid("loc", 1)]
        )
        for i, body in enumerate(bodies)
    ]
    shape = ["N", 4, 8, 8]
    calls = [
        helper.make_node(f"F{i}", [f"h{i}", f"w{i}"], [f"h{i + 1}"], domain="loc", name=f"call{i}")
        for i in range(len(bodies))
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("h0", f"h{len(bodies)}")]
    weight = np.random.default_rng(0).normal(size=(4, 4, 1, 1)).astype(np.float32)
    graph = helper.make_graph(
        calls, "g", ends[:1], ends[1:], [numpy_helper.from_array(weight, f"w{i}") for i in range(len(bodies))]
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("loc", 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=made, ir_version=8)


def folds() -> list[onnx.NodeProto]:
    return [helper.make_node("Neg", ["x"], ["r"], name="inside"), helper.make_node("Conv", ["r", "w"], ["y"])]


def stays() -> list[onnx.NodeProto]:
    return [helper.make_node("Exp", ["x"], ["r"]), helper.make_node("Cos", ["r"], ["y"])]


def test_functions_are_inlined_where_a_rewrite_reaches_into_them() -> None:
    model = called(stays(), folds(), stays())
    result = optimised(model)
    assert list(functions(result)) == [("loc", "F0"), ("loc", "F2")]
    assert ops(result) == {"F0": 1, "Conv": 1, "F2": 1}
    x = np.random.default_rng(1).normal(size=(2, 4, 8, 8)).astype(np.float32)
    np.testing.assert_allclose(evaluate(result, h0=x)[0], evaluate(model, h0=x)[0], rtol=1e-5)


def test_functions_that_gain_nothing_stay() -> None:
    model = called(stays(), stays())
    assert optimised(model) is model


def test_what_calls_a_function_is_inlined_with_it() -> None:
    outer = [helper.make_node("F1", ["x", "w"], ["y"], domain="loc")]
    result = optimised(called(outer, folds()))
    assert not functions(result)
    assert "F0" not in ops(result)


def test_a_call_is_documented_where_it_was() -> None:
    model = called(folds())
    model.graph.node[0].metadata_props.add(key="namespace", value="block")
    result = optimised(model)
    assert any("block" in p.value for n in result.graph.node for p in n.metadata_props)


def test_a_function_of_another_opset_stays_a_call() -> None:
    model = called([helper.make_node("ReduceMean", ["x"], ["r"], axes=[1]), *folds()[1:]], opset=13)
    assert ops(optimised(model))["F0"] == 1


def test_a_tower_of_functions_is_not_inlined() -> None:
    """Each calls the next twice: the operators double with every floor."""
    floors = [
        [
            helper.make_node(f"F{i + 1}", ["x", "w"], ["r"], domain="loc"),
            helper.make_node(f"F{i + 1}", ["r", "w"], ["y"], domain="loc"),
        ]
        for i in range(40)
    ]
    model = called(*floors, folds())
    del model.graph.node[1:]
    model.graph.output[0].name = "h1"
    assert count_expanded(model) is None
    loaded = pwopt.load(model)  # infers shapes
    assert inline_functions(loaded, resolve_passes(), (), {}) is loaded


def test_functions_that_call_themselves_are_left_to_the_runtime() -> None:
    model = called([helper.make_node("F0", ["x", "w"], ["y"], domain="loc")])
    assert count_expanded(model) is None
    assert count_expanded(called(stays(), folds())) == 4
    assert MAX_INLINED > 4


def test_weights_are_not_copied_by_the_inliner() -> None:
    model = called(folds())
    result = inline(model, [("loc", "F0")])
    assert result.graph.initializer[0] == model.graph.initializer[0]


def test_a_model_without_functions_is_as_it_was() -> None:
    model = parse("(float[2] x) => (float[N] y) { y = Exp(x) }")
    assert optimised(model) is model


def leaky(name: str, reference: str, default: float | None) -> onnx.FunctionProto:
    """A function of a LeakyRelu whose slope is an attribute, with a default or without."""
    node = helper.make_node("LeakyRelu", ["x"], ["y"])
    node.attribute.add(name="alpha", ref_attr_name=reference, type=onnx.AttributeProto.FLOAT)
    defaults = [] if default is None else [helper.make_attribute(reference, default)]
    attributes = [reference] if default is None else []
    return helper.make_function(
        "my",
        name,
        ["x"],
        ["y"],
        [node],
        [helper.make_opsetid("", 17)],
        attributes=attributes,
        attribute_protos=defaults,
    )


def passing(references: int) -> onnx.FunctionProto:
    """A function that calls the one with a default, and passes on an attribute of its own."""
    call = helper.make_node("Leaky", ["x"], ["z"], domain="my")
    call.attribute.add(name="slope", ref_attr_name="outer", type=onnx.AttributeProto.FLOAT)
    other = helper.make_node("Elu", ["z"], ["y"])
    if references > 1:
        other.attribute.add(name="alpha", ref_attr_name="outer", type=onnx.AttributeProto.FLOAT)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("my", 1)]
    return helper.make_function("my", "Passing", ["x"], ["y"], [call, other], opsets, attributes=["outer"])


def calling(call: onnx.NodeProto, *defined: onnx.FunctionProto) -> onnx.ModelProto:
    graph = helper.make_graph(
        [call],
        "calling",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 4])],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("my", 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=defined, ir_version=9)


def slope_of(model: onnx.ModelProto) -> float:
    (node,) = (n for n in model.graph.node if n.op_type == "LeakyRelu")
    return float(next((a.f for a in node.attribute if a.name == "alpha"), 0.01))


@pytest.mark.parametrize(("given", "expected"), [({}, 0.3), ({"slope": 0.5}, 0.5)])
def test_a_call_without_an_attribute_gets_its_default(given: dict[str, float], expected: float) -> None:
    model = calling(helper.make_node("Leaky", ["x"], ["y"], domain="my", **given), leaky("Leaky", "slope", 0.3))
    result = inline(model, functions(model).keys())
    assert slope_of(result) == pytest.approx(expected)
    assert not model.graph.node[0].attribute or given  # the original stays as it was


def test_an_attribute_without_a_default_stays_absent() -> None:
    model = calling(helper.make_node("Leaky", ["x"], ["y"], domain="my"), leaky("Leaky", "slope", None))
    assert slope_of(inline(model, functions(model).keys())) == pytest.approx(0.01)


@pytest.mark.parametrize(("given", "expected"), [({}, 0.3), ({"outer": 0.5}, 0.5)])
def test_a_default_reaches_through_a_function_that_passes_the_attribute_on(
    given: dict[str, float], expected: float
) -> None:
    call = helper.make_node("Passing", ["x"], ["y"], domain="my", **given)
    model = calling(call, leaky("Leaky", "slope", 0.3), passing(1))
    assert slope_of(inline(model, functions(model).keys())) == pytest.approx(expected)


def test_a_function_whose_attribute_has_several_defaults_stays() -> None:
    call = helper.make_node("Passing", ["x"], ["y"], domain="my")
    model = calling(call, leaky("Leaky", "slope", 0.3), passing(2))
    with pytest.raises(ValueError, match="'outer' of 'Passing' has several defaults"):
        inline(model, functions(model).keys())
    result = pwopt.optimize(model, cost="analytic", verify=False).model
    assert [n.op_type for n in result.graph.node] == ["Passing"]


def test_a_default_is_kept_where_a_rewrite_reaches_into_the_function() -> None:
    inner = leaky("Leaky", "slope", 0.3)
    inner.node[0].input[0] = "a"
    inner.node.insert(0, helper.make_node("Identity", ["x"], ["a"]))
    model = calling(helper.make_node("Leaky", ["x"], ["y"], domain="my"), inner)
    result = pwopt.optimize(model, cost="analytic", verify=False).model
    assert [n.op_type for n in result.graph.node] == ["LeakyRelu"]
    assert slope_of(result) == pytest.approx(0.3)
