from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import normal, ops, parse, same
from onnx import TensorProto, helper

import pwopt
from pwopt.cli import app
from pwopt.graph.functions import nodes_within
from pwopt.graph.names import name_nodes


def names(model: onnx.ModelProto) -> list[str]:
    inside = [f.node for f in model.functions]
    return [n.name for nodes in (model.graph.node, *inside) for n in nodes_within(nodes)]


def branching() -> onnx.ModelProto:
    """Nameless operators in a graph, in the bodies of an If, and in a function; one name that would be given is there."""
    output = helper.make_tensor_value_info("r", TensorProto.FLOAT, ["N"])
    bodies = [helper.make_graph([helper.make_node(op, ["a"], ["r"])], op, [], [output]) for op in ("Neg", "Neg")]
    model = parse("(float[2] x, bool c) => (float[N] y, float[N] z) { a = Relu(x) b = Exp(a) z = Abs(b) y = Neg(a) }")
    node = model.graph.node
    node[1].name = "Relu_a"
    node[3].CopyFrom(helper.make_node("If", ["c"], ["y"], then_branch=bodies[0], else_branch=bodies[1]))
    node.append(helper.make_node("Twice", ["b"], ["w"], domain="mine"))
    model.opset_import.append(helper.make_opsetid("mine", 1))
    inner = [helper.make_node("Add", ["p", "p"], ["q"])]
    model.functions.append(helper.make_function("mine", "Twice", ["p"], ["q"], inner, [helper.make_opsetid("", 17)]))
    return model


def test_every_operator_gets_a_name_of_its_own() -> None:
    model = branching()
    named = name_nodes(model)
    assert names(named)[:2] == ["Relu_a_1", "Relu_a"]
    assert set(names(named)) == {"Relu_a_1", "Relu_a", "Abs_z", "If_y", "Neg_r", "Neg_r_1", "Twice_w", "Add_q"}
    assert len(set(names(named))) == len(names(named))
    assert sum(map(bool, names(model))) == 1
    assert name_nodes(named) is named
    onnx.checker.check_model(named, full_check=True)


@pytest.mark.parametrize("wanted", [False, True])
def test_names_on_request(wanted: bool, tmp_path: Path) -> None:
    body = "(float[1,4,6,6] x) => (float[N] y, float[M] z) { a = Conv(x, w) b = Mul(a, s) y = Relu(b) z = Exp(b) }"
    model = parse(body, w=normal(4, 4, 1, 1, dtype=np.float32), s=np.float32(2))
    result = pwopt.optimize(model, tmp_path / "b.onnx", cost="analytic", writing=pwopt.Writing(name_nodes=wanted)).model
    assert ops(result) == {"Conv": 1, "Relu": 1, "Exp": 1}
    assert set(names(result)) == ({"Conv_b", "Relu_y", "Exp_z"} if wanted else {""})
    assert onnx.load(tmp_path / "b.onnx").SerializeToString() == result.SerializeToString()
    same(model, result, 1e-5, x=normal(1, 4, 6, 6, dtype=np.float32))


def test_what_nothing_is_gained_on_is_named_all_the_same(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    onnx.save(parse("(float[2] x) => (float[N] y) { a = Relu(x) y = Exp(a) }"), tmp_path / "a.onnx")
    line = ["optimize", str(tmp_path / "a.onnx"), "-o", str(tmp_path / "b.onnx"), "--cost", "analytic", "--json"]
    done = CliRunner().invoke(app, [*line, "--name-nodes"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["rewrites"] == []
    assert names(onnx.load(tmp_path / "b.onnx")) == ["Relu_a", "Exp_y"]
