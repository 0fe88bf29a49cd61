"""The driver: linear time, denied sites, order and names."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from helpers import normal, ops, parse, reasons, run, same
from onnx import TensorProto, helper, numpy_helper

from pwopt.graph.files import from_proto
from pwopt.graph.view import View
from pwopt.passes import CleanUp, FoldAffine
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.records import Rewrite, Site, Skip


class Counting(Pass):
    """Counts how often it is asked."""

    name = "counting"

    def __init__(self, inner: Pass) -> None:
        self.inner, self.asked = inner, 0

    def start(self, rw: Rewriter) -> None:
        self.inner.start(rw)

    def match_and_rewrite(self, node: gs.Node, rw: Rewriter) -> Rewrite | Skip | None:
        self.asked += 1
        return self.inner.match_and_rewrite(node, rw)


def long_chain(length: int) -> onnx.ModelProto:
    """Conv, Mul and Add by one shared scalar, Relu: four nodes, `length` times over."""
    nodes = []
    for i in range(length):
        nodes += [
            helper.make_node("Conv", [f"x{i}", f"w{i}"], [f"a{i}"]),
            helper.make_node("Mul", [f"a{i}", "s"], [f"b{i}"]),
            helper.make_node("Add", [f"b{i}", "s"], [f"c{i}"]),
            helper.make_node("Relu", [f"c{i}"], [f"x{i + 1}"]),
        ]
    weights = [numpy_helper.from_array(normal(2, 2, 1, 1, seed=i, dtype=np.float32), f"w{i}") for i in range(length)]
    graph = helper.make_graph(
        nodes,
        "long",
        [helper.make_tensor_value_info("x0", TensorProto.FLOAT, [1, 2, 4, 4])],
        [helper.make_tensor_value_info(f"x{length}", TensorProto.FLOAT, [1, 2, 4, 4])],
        [*weights, numpy_helper.from_array(np.float32(0.5), "s")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_the_driver_looks_at_each_node_a_bounded_number_of_times() -> None:
    asked = []
    for length in (100, 400):
        p = Counting(FoldAffine())
        model = from_proto(long_chain(length))
        p.run(model.graph)
        assert ops(model.to_proto()) == {"Conv": length, "Relu": length}
        asked.append(p.asked / (4 * length))
    assert asked[1] == pytest.approx(asked[0], rel=0.02)
    assert asked[1] < 4


def test_denied_sites_are_left_alone() -> None:
    body = (
        "(double[2,4,6,6] x) => (double[N] y) { h = Conv(x, w) k = Mul(h, s) r = Relu(k) g = Conv(r, u) y = Mul(g, s) }"
    )
    model = parse(body, w=normal(4, 4, 1, 1), u=normal(4, 4, 1, 1, seed=1), s=np.float64(2))
    result, outcome, _ = run(model, FoldAffine(), denied={Site("fold-affine", "y")})
    assert ops(result) == {"Conv": 2, "Relu": 1, "Mul": 1}
    assert [str(r.site) for r in outcome.rewrites] == ["fold-affine:k"]
    assert reasons(outcome) == ["denied by the user"]
    same(model, result, x=normal(2, 4, 6, 6))


def test_the_order_of_untouched_nodes_is_kept() -> None:
    body = (
        "(double[2,4] x) => (double[N] y, double[N] z) { b = Exp(x) h = Mul(x, o) a = Neg(h) y = Add(a, b) z = Abs(b) }"
    )
    model = parse(body, o=np.ones(1))
    result, _, _ = run(model, CleanUp())
    assert [n.op_type for n in result.graph.node] == ["Exp", "Neg", "Add", "Abs"]


def test_new_names_avoid_every_existing_one() -> None:
    model = parse(
        "(double[2,4,3,3] x) => (double[N] y) { h = Conv(x, w) y = Add(h, t) }",
        w=normal(4, 4, 1, 1),
        t=normal(4, 1, 1),
        y_bias=np.ones(3),
    )
    result, _, _ = run(model, FoldAffine())
    assert sorted(t.name for t in result.graph.initializer) == ["w", "y_bias", "y_bias_1"]


def test_a_node_that_reads_a_tensor_twice_is_one_reader() -> None:
    graph = from_proto(parse("(double[2,4] x) => (double[N] y) { a = Neg(x) y = Mul(a, a) }")).graph
    view = View(graph)
    assert view.sole_reader(graph.nodes[0].outputs[0]) is graph.nodes[1]
