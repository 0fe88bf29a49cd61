"""Outputs behind thresholds, random operators and masks; sequences; half precision before float32 outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import normal, parse
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

import pwopt
from pwopt.cli import app
from pwopt.evidence.leaves import find_leaves
from pwopt.evidence.precision import find_coarsest_types
from pwopt.evidence.verify import verify

pytest.importorskip("onnxruntime")
F, H = np.float32, np.float16
STEPS = {
    "threshold": "a = Conv(x, w) g = Greater(a, t) y = Where(g, a, z)",
    "floor": "a = Conv(x, w) y = Floor(a)",
    "round": "a = Conv(x, w) y = Round(a)",
    "mask": "a = Conv(x, w) g = Greater(a, t) f = Cast<to = 10>(g) y = Mul(f, a)",
    "maximum": "a = Conv(x, w) k = Constant<value_ints = [40]>() y, i = TopK<axis = 3>(a, k)",
}


def behind(step: str, factor: float) -> onnx.ModelProto:
    weights = {"w": (normal(8, 8, 1, 1) / 3 * factor).astype(H), "t": H(0.7), "z": H(0)}
    body = f"(float16[1,8,64,64] x) => (float16[N,C,P,Q] y) {{ {STEPS[step]} }}"
    return parse(body, **{name: value for name, value in weights.items() if f"{name})" in body or f"{name}," in body})


@pytest.mark.parametrize("factor", [1.02, 1.3])
@pytest.mark.parametrize("step", STEPS)
def test_one_jump_excuses_no_others(step: str, factor: float) -> None:
    """A rounding moves single elements across a step; that says nothing of all the others."""
    found = verify(behind(step, 1), behind(step, factor), locate=False)
    assert found.verdict == "not equivalent"
    assert verify(behind(step, 1), behind(step, 1)).passed


@pytest.mark.parametrize("step", STEPS)
def test_jumps_that_rounding_explains_pass(step: str) -> None:
    """The same weights in another order of channels and back: other roundings, the same function."""
    order = np.random.default_rng(1).permutation(8)
    weights = (normal(8, 8, 1, 1) / 3).astype(H)
    graph = behind(step, 1)
    first = graph.graph.initializer[[t.name for t in graph.graph.initializer].index("w")]
    first.CopyFrom(numpy_helper.from_array(weights[:, order], "w"))
    graph.graph.node[0].input[0] = "xs"
    graph.graph.initializer.append(numpy_helper.from_array(order.astype(np.int64), "order"))
    graph.graph.node.insert(0, helper.make_node("Gather", ["x", "order"], ["xs"], axis=1))
    assert verify(behind(step, 1), graph).passed


RANDOM = "(float[2,8,4,4] x) => (float[N,C,P,Q] y, float[N,C,P,Q] a) { a = Conv(x, w) n = RandomNormalLike(a) y = Add(a, n) }"


@pytest.mark.parametrize("factor", [2.0, -1.0, 0.0, 1.0])
def test_random_outputs_are_not_comparable(factor: float) -> None:
    body = RANDOM.replace(", float[N,C,P,Q] a)", ")")
    weights = normal(8, 8, 1, 1, dtype=F)
    found = verify(parse(body, w=weights), parse(body, w=weights * F(factor)))
    assert not found.passed
    assert found.verdict == "not comparable"
    assert "different results in two runs" in next(iter(found.remarks()))


def test_other_outputs_of_a_random_model_are_compared(tmp_path: Path) -> None:
    weights = normal(8, 8, 1, 1, dtype=F)
    for name, factor in (("a", 1), ("b", 1), ("c", 1.01)):
        onnx.save(parse(RANDOM, w=weights * F(factor)), tmp_path / f"{name}.onnx")
    a, b, c = (str(tmp_path / f"{n}.onnx") for n in "abc")
    same = verify(a, b)
    assert [(o.name, o.passed, o.comparable) for o in same.outputs] == [("y", False, False), ("a", True, True)]
    assert verify(a, c).verdict == "not equivalent"
    report = tmp_path / "report.json"
    done = CliRunner().invoke(app, ["verify", a, b, "--report", str(report)])
    assert done.exit_code == 3
    assert "not comparable" in done.output
    assert '"comparable": false' in report.read_text(encoding="utf-8")
    assert CliRunner().invoke(app, ["verify", a, c]).exit_code == 1


def test_a_random_model_is_not_rewritten_unverified() -> None:
    model = parse(
        "(float[2,8,4,4] x) => (float[N,C,P,Q] y) { a = Conv(x, w) b = Conv(a, v) n = RandomNormalLike(b) y = Add(b, n) }",
        w=normal(8, 8, 1, 1, dtype=F), v=normal(8, 8, 1, 1, seed=1, dtype=F),
    )  # fmt: skip
    report = pwopt.optimize(model, cost="analytic").report
    assert report.rewrites == ()
    assert any("cannot be compared" in note for note in report.notes)
    assert pwopt.optimize(model, cost="analytic", verify=False).report.rewrites


def sequences(factor: float = 1.0, count: int = 2) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node("Conv", ["a", "v"], ["b"]),
        helper.make_node("SequenceConstruct", ["b", "x"][:count], ["s"]),
    ]
    weights = {"w": normal(4, 3, 1, 1, dtype=F), "v": normal(3, 4, 1, 1, seed=1, dtype=F) * F(factor)}
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 6, 6])],
        [helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def test_sequences_are_compared_by_element() -> None:
    result = pwopt.optimize(sequences(), cost="analytic")
    assert [n.op_type for n in result.model.graph.node] == ["Conv", "SequenceConstruct"]
    assert 0 < result.report.equivalence.outputs[0].max_abs < 1e-5
    assert verify(sequences(), sequences(1 + 1e-7)).passed
    assert not verify(sequences(), sequences(1.001)).passed
    other = verify(sequences(), sequences(count=1))
    assert (other.passed, other.outputs[0].reason) == (False, "the structure of the output differs")


def test_leaves() -> None:
    structure, leaves = find_leaves([{1: 0.5, 2: 0.25}, None, [np.ones(2, F)]])
    assert structure == ("sequence", ("map", 1, 2), "none", ("sequence", "tensor"))
    assert [leaf.tolist() for leaf in leaves] == [[0.5, 0.25], [1, 1]]
    assert find_leaves([])[0] != find_leaves(None)[0]


def test_a_model_without_finite_values_says_so() -> None:
    model = parse("(float[2] x) => (float[N] y) { z = Sub(x, x) y = Div(z, z) }")
    found = verify(model, model)
    assert found.verdict == "not comparable"
    assert "no finite value" in found.outputs[0].explain()


HALF = """(float[1,8,16] x) => (float[N,C,P] y) {
    h = Cast<to = 10>(x) a = MatMul(h, w) b = Relu(a) c = MatMul(b, v) y = Cast<to = 1>(c) }"""


def test_tolerance_follows_the_coarsest_type() -> None:
    w, v = (normal(16, 16, seed=s).astype(H) / H(4) for s in (0, 1))
    model = parse(HALF, w=w, v=v)
    assert find_coarsest_types(model) == {"y": np.dtype(H)}
    away = np.where(np.random.default_rng(0).random(v.shape) < 0.5, H(-np.inf), H(np.inf))
    nudged = parse(HALF, w=w, v=np.nextafter(v, away))
    found = verify(model, nudged)
    assert found.passed
    assert "float16" in found.outputs[0].reason
    assert not verify(model, parse(HALF, w=w, v=v * H(1.1))).passed
    assert not verify(model, nudged, rtol=1e-5, atol=1e-6).passed  # a given tolerance is used as it is


def test_half_precision_weights_do_not_coarsen_the_tolerance() -> None:
    body = "(float[4,16] x) => (float[N,C] y) { u = Cast<to = 1>(w) y = MatMul(x, u) }"
    assert find_coarsest_types(parse(body, w=normal(16, 16).astype(H))) == {"y": np.dtype(F)}


def test_a_mask_hides_no_wrong_weight() -> None:
    """What a mask lets through is compared; the rest is the same constant in both."""
    body = "(float[1,4,8,8] x) => (float[N,C,P,Q] y) { a = Conv(x, w) g = Less(x, t) y = Where(g, low, a) }"
    w, given = normal(4, 4, 1, 1, dtype=F), {"t": F(0), "low": F(np.finfo(F).min)}
    found = verify(parse(body, w=w, **given), parse(body, w=w * F(1.01), **given))
    assert found.verdict == "not equivalent"
