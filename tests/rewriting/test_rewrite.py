"""The driver and the pipeline: linear time, determinism, denied sites, names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from helpers import MODELS, eager, normal, ops, parse, reasons, run, same
from onnx import TensorProto, helper, numpy_helper

from pwopt.graph.files import from_proto
from pwopt.graph.view import View
from pwopt.passes import PASSES, CleanUp, FoldAffine
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.pipeline import Pipeline
from pwopt.rewriting.records import Outcome, Rewrite, Site, Skip


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


def test_the_same_input_gives_the_same_bytes_whatever_the_hash_seed(tmp_path: Path) -> None:
    script = (
        "import sys, pwopt; r = pwopt.optimize(sys.argv[1], cost='analytic', verify=False);"
        "sys.stdout.buffer.write(r.model.SerializeToString(deterministic=True) + r.report.to_json().encode())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script, str(MODELS / "network_in_network.onnx")],
            env={"PYTHONHASHSEED": seed, "PATH": "/usr/bin"},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(outputs) == 1


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


def test_sites_are_unique_and_skips_do_not_contradict_rewrites() -> None:
    model = from_proto(onnx.load(MODELS / "network_in_network.onnx"))
    outcome = Pipeline([p() for p in PASSES]).run(model.graph)
    sites = [str(s.site) for s in outcome.skips]
    assert len(set(sites)) == len(sites)


def test_every_pass_states_its_identity() -> None:
    for p in PASSES:
        identity = (p.__doc__ or "").split("\n\n")[0]
        assert "=" in identity or "becomes" in identity, p
        assert p.name
        assert p.policy in ("always", "if cheaper", "measured")


def test_the_order_of_untouched_nodes_is_kept() -> None:
    body = (
        "(double[2,4] x) => (double[N] y, double[N] z) { b = Exp(x) h = Mul(x, o) a = Neg(h) y = Add(a, b) z = Abs(b) }"
    )
    model = parse(body, o=np.ones(1))
    result, _, _ = run(model, CleanUp())
    assert [n.op_type for n in result.graph.node] == ["Exp", "Neg", "Add", "Abs"]


def test_graphsurgeon_links_are_whole_after_a_pass() -> None:
    model = from_proto(onnx.load(MODELS / "network_in_network.onnx"))
    Pipeline([p() for p in PASSES]).run(model.graph)
    for node in model.graph.nodes:
        assert all(any(o is node for o in t.outputs) for t in node.inputs)
        assert all([i is node for i in t.inputs] == [True] for t in node.outputs)
    count = len(model.graph.nodes)
    model.graph.cleanup().toposort()
    assert len(model.graph.nodes) == count


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


class Forgetful(dict[int, object]):
    """Keeps nothing."""

    def __setitem__(self, key: int, value: object) -> None:
        pass


@pytest.mark.parametrize("start", range(0, 60, 15))
def test_what_was_read_of_a_graph_is_never_stale(start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readings are remembered until the next edit: without that, every model comes out the same, byte for byte."""
    random = pytest.importorskip("strategies").random_sample
    construct = View.__init__

    def forgetful(view: View, *arguments: object, **options: object) -> None:
        construct(view, *arguments, **options)  # type: ignore[arg-type]
        view.readings = Forgetful()

    def rewritten(model: onnx.ModelProto) -> tuple[bytes, Outcome]:
        loaded = from_proto(model)
        outcome = Pipeline([eager(p) for p in PASSES]).run(loaded.graph, reserved=loaded.names())
        return loaded.to_proto().SerializeToString(deterministic=True), outcome

    for number in range(start, start + 15):
        model = random(Random(number)).model
        remembering = rewritten(model)
        with monkeypatch.context() as patch:
            patch.setattr(View, "__init__", forgetful)
            assert rewritten(model) == remembering
