"""Nodes and tensors have types and identity, and graphs and passes of onnx-graphsurgeon work with them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from helpers import build, normal, ops, run, same

from pwopt.graph.ir import Constant, Graph, Node, Tensor, Variable, adopt, is_constant
from pwopt.graph.view import View
from pwopt.passes import FoldChains
from pwopt.rewriting import Pass, Rewrite, Rewriter

F = np.float32
CHAIN = "(float[N,3,H,W] x) => (float[N,5,H,W] y) { a = Conv(x, v) y = Conv(a, w) }"
WEIGHTS = {"v": normal(4, 3, 1, 1, dtype=F), "w": normal(5, 4, 1, 1, dtype=F)}
ROOT = Path(__file__).parents[2]

GOOD = """
from pwopt.graph.ir import Constant, Graph, Node, Tensor

def check(node: Node, tensor: Tensor, constant: Constant, graph: Graph) -> None:
    node.op, node.attrs, node.inputs[0].outputs, tensor.shape, constant.values, graph.nodes[0].outputs
"""
#: Of what the module imports, nothing else is read: that takes seconds.
SETTINGS = "[mypy]\nfollow_imports = skip\n[mypy-pwopt.graph.ir]\nfollow_imports = normal\n"
MISSPELLINGS = ["node.atrs", "node.input", "tensor.shap", "constant.value", "graph.node", "node.outputs[0].names"]


def test_nodes_and_tensors_are_equal_to_themselves_only() -> None:
    a, b = Variable("t", F, (1, 2)), Variable("t", F, (1, 2))
    first, second = Node("Relu", "n", {}, [a], [b]), Node("Relu", "n", {}, [a], [b])
    one, two = Constant("c", np.ones(3, F)), Constant("c", np.ones(3, F))
    for x, y in ((a, b), (first, second), (one, two), (Graph(), Graph())):
        assert x == x
        assert x != y
        assert len({x, y, x}) == 2


def test_adopt_keeps_the_objects_and_their_links() -> None:
    graph = gs.import_onnx(build(CHAIN, WEIGHTS))
    node, tensor = graph.nodes[0], graph.nodes[0].outputs[0]
    assert adopt(graph) is graph
    assert isinstance(graph, Graph)
    assert graph.nodes[0] is node
    assert isinstance(node, Node)
    assert isinstance(tensor, Variable)
    assert tensor.inputs[0] is node
    assert isinstance(node.inputs[1], Constant)
    assert all(isinstance(t, Tensor) for t in (*graph.inputs, *graph.outputs))
    assert adopt(graph) is graph  # again


def test_adopt_reaches_the_bodies_of_control_flow() -> None:
    body = gs.Graph([gs.Node("Identity", "inner", {}, [gs.Variable("a")], [gs.Variable("b")])])
    outer = gs.Graph([gs.Node("If", "outer", {"then_branch": body}, [gs.Variable("c")], [gs.Variable("d")])])
    adopt(outer)
    assert isinstance(body, Graph)
    assert isinstance(body.nodes[0], Node)
    assert isinstance(body.nodes[0].inputs[0], Variable)


def test_a_graph_of_graphsurgeon_is_rewritten() -> None:
    model = build(CHAIN, WEIGHTS)
    graph = gs.import_onnx(model)
    outcome = FoldChains().run(graph)
    assert len(outcome.rewrites) == 1
    assert [n.op for n in graph.nodes] == ["Conv"]
    result = gs.export_onnx(graph)
    result.ir_version = model.ir_version
    same(model, result, tolerance=1e-5, x=normal(2, 3, 4, 5, dtype=F))


class DoubleByAdding(Pass):
    """2x = x + x"""

    name = "double-by-adding"

    def match_and_rewrite(self, node: gs.Node, rw: Rewriter) -> Rewrite | None:
        if rw.op(node) != "Mul" or rw.uniform(node.inputs[1]) != 2:
            return None
        new = gs.Node("Add", node.name, {}, [node.inputs[0], node.inputs[0]], [node.outputs[0]])
        return rw.replace([node], [new], "a sum instead of a product")


class ScaleTwice(Pass):
    """4x = 2(2x)"""

    name = "scale-twice"

    def match_and_rewrite(self, node: gs.Node, rw: Rewriter) -> Rewrite | None:
        if rw.op(node) != "Mul" or rw.uniform(node.inputs[1]) != 4:
            return None
        two, middle = gs.Constant("two", np.array(2, F)), gs.Variable("middle", F, node.outputs[0].shape)
        assert rw.uniform(two) == 2
        first = gs.Node("Mul", "first", {}, [node.inputs[0], two], [middle])
        return rw.replace([node], [first, gs.Node("Mul", "second", {}, [middle, two], [node.outputs[0]])], "two steps")


def test_passes_may_make_nodes_and_tensors_of_graphsurgeon() -> None:
    model = build("(float[N,3] x) => (float[N,3] y) { y = Mul(x, c) }", {"c": np.array(4, F)})
    result, outcome, _ = run(model, ScaleTwice(), DoubleByAdding())
    assert len(outcome.rewrites) == 3
    assert ops(result) == {"Add": 2}
    same(model, result, tolerance=0, x=normal(2, 3, dtype=F))


def test_what_a_pass_adds_gets_types_and_identity() -> None:
    graph = adopt(gs.import_onnx(build("(float[3] x) => (float[3] y) { y = Relu(x) }", {})))
    view, (relu,) = View(graph), graph.nodes
    added = view.add(
        gs.Node("Mul", "m", {}, [gs.Variable("a"), gs.Constant("c", np.ones(3, F))], [gs.Variable("b")]), relu
    )
    assert isinstance(added, Node)
    assert [type(t) for t in (*added.inputs, *added.outputs)] == [Variable, Constant, Variable]
    assert view.readers(added.inputs[0]) == [added]


def test_a_variable_becomes_a_constant_in_place() -> None:
    tensor = Variable("t", F, (3,))
    reader = Node("Relu", "n", {}, [tensor], [Variable("y")])
    constant = tensor.to_constant(np.arange(3, dtype=F))
    assert constant is tensor
    assert is_constant(reader.inputs[0])
    assert reader.inputs[0].shape == (3,)
    assert reader.inputs[0].dtype == F


@pytest.mark.skipif(sys.version_info < (3, 11), reason="one version is enough for a type checker")
def test_a_misspelt_attribute_is_a_type_error(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    lines = "".join(f"    {m}\n" for m in MISSPELLINGS)
    (tmp_path / "snippet.py").write_text(GOOD + lines, encoding="utf-8")
    (tmp_path / "mypy.ini").write_text(SETTINGS, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "snippet.py"]
    environment = {**os.environ, "MYPYPATH": str(ROOT), "MYPY_CACHE_DIR": str(ROOT / ".mypy_cache" / "snippet")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    wrong = [line for line in done.stdout.splitlines() if "[attr-defined]" in line]
    first = GOOD.count("\n") + 1
    assert [int(line.split(":")[1]) for line in wrong] == list(range(first, first + len(MISSPELLINGS))), done.stdout
