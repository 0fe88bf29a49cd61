from __future__ import annotations

import numpy as np
import onnx
import pytest
from helpers import normal, ops, parse, reasons, run, same
from onnx import helper

import pwopt
from pwopt.graph.constants import NEGLIGIBLE_BYTES
from pwopt.passes import CleanUp, MergeEqual, ShareConstants

TWICE = "(double[2,3,4] x) => (double[N] y) {{ h = Neg(x) {} y = Add(a, b) }}"


@pytest.mark.parametrize(
    ("body", "weights"),
    [
        ("a = Relu(h) b = Relu(h)", {}),
        ("a = Mul(h, p) b = Mul(h, q)", {"p": np.float64(2), "q": np.float64(2)}),
        ("a = Transpose<perm=[0,2,1]>(h) c = Transpose<perm=[0,2,1]>(h) b = Exp(c)", {}),
        ("p = Constant<value = double {2.0}>() q = Constant<value = double {2.0}>() a = Mul(h, p) b = Mul(h, q)", {}),
        ("c = Relu(h) d = Relu(h) a = Exp(c) b = Exp(d)", {}),
        ("a, c = Split<axis=1>(h, s) b, d = Split<axis=1>(h, t)", {"s": np.array([1, 2]), "t": np.array([1, 2])}),
    ],
)
def test_what_is_computed_twice_is_computed_once(body: str, weights: dict[str, np.ndarray]) -> None:
    model = parse(TWICE.format(body), **weights)
    before = len([n for n in model.graph.node if n.op_type != "Constant"])
    result, outcome, _ = run(model, MergeEqual(), CleanUp())
    assert sum(ops(result).values()) == before - len([r for r in outcome.rewrites if r.pass_name == "merge-equal"])
    assert len({(n.op_type, *n.input) for n in result.graph.node}) == len(result.graph.node)
    same(model, result, 0.0, x=normal(2, 3, 4))


@pytest.mark.parametrize(
    ("body", "weights"),
    [
        ("a = Softmax<axis=1>(h) b = Softmax<axis=2>(h)", {}),
        ("a = Mul(h, p) b = Mul(h, q)", {"p": np.float64(2), "q": np.float64(3)}),
        ("a = Mul(h, p) b = Mul(h, q)", {"p": np.float64(0.0), "q": np.float64(-0.0)}),
        ("a = Add(h, p) b = Add(h, q)", {"p": np.float64(2), "q": np.full(1, 2.0)}),  # another shape
        ("a = RandomNormalLike(h) b = RandomNormalLike(h)", {}),
        ("a = Bernoulli(h) b = Bernoulli(h)", {}),
        ("a = Dropout(h, p, t) b = Dropout(h, p, t)", {"p": np.float64(0.5), "t": np.array(True)}),
        ("a = Sub(h, x) b = Sub(x, h)", {}),
        ("a = Relu(h) b = Neg(h)", {}),
    ],
)
def test_what_is_another_computation_stays(body: str, weights: dict[str, np.ndarray]) -> None:
    model = parse(TWICE.format(body), **weights)
    assert run(model, MergeEqual())[0] is model


def test_operators_of_others_stay() -> None:
    model = parse("(float[2] x) => (float[N] y) { a = Neg(x) b = Neg(x) y = Add(a, b) }")
    for node in model.graph.node[:2]:
        node.domain = "custom"
    model.opset_import.append(helper.make_opsetid("custom", 1))
    assert not MergeEqual().run(pwopt.load(model).graph).rewrites


def test_outputs_keep_their_names() -> None:
    model = parse(
        "(double[2] x) => (double[N] y, double[N] z) { y = Exp(x) b = Exp(x) c = Exp(x) z = Neg(b) d = Neg(c) }"
    )
    result, _, _ = run(model, MergeEqual(), CleanUp())
    assert ops(result) == {"Exp": 1, "Neg": 1}
    late = parse("(double[2] x) => (double[N] y, double[N] z) { b = Exp(x) y = Exp(x) z = Neg(b) }")
    result, _, _ = run(late, MergeEqual())
    assert [(n.op_type, list(n.output)) for n in result.graph.node] == [("Exp", ["y"]), ("Neg", ["z"])]


def test_results_that_must_both_stay_visible_are_computed_once() -> None:
    both = parse("(double[2] x) => (double[N] y, double[N] z) { y = Exp(x) z = Exp(x) }")
    result, _, _ = run(both, MergeEqual(), CleanUp())
    assert [(n.op_type, list(n.input), list(n.output)) for n in result.graph.node] == [
        ("Exp", ["x"], ["y"]),
        ("Identity", ["y"], ["z"]),
    ]
    same(both, result, x=normal(2))
    moved = parse("(double[2,3] x) => (double[N,M] y, double[N,M] z) { y = Transpose(x) z = Transpose(x) }")
    result, outcome, _ = run(moved, MergeEqual())
    assert result is moved
    assert "both results must stay visible" in reasons(outcome)[0]


def test_the_other_results_of_visible_ones_are_read_from_one() -> None:
    body = (
        "(double[4,4] x) => (double[2,4] b, double[2,4] d, double[1,1] y)"
        " { a, b = Split(x) c, d = Split(x) m = ReduceSum(a) n = ReduceSum(c) y = Add(m, n) }"
    )
    model = parse(body, opset=11)
    result, _, _ = run(model, MergeEqual())
    assert ops(result) == {"Split": 2, "ReduceSum": 1, "Add": 1}
    same(model, result, x=normal(4, 4))


def test_inputs_that_are_left_out_at_the_end_do_not_count() -> None:
    body = (
        "(double[5] x) => (double[N] y) { a = Clip(x, l) b = Clip(x, l, ) c = Clip(x, , l) d = Clip(x, , h)"
        " e = Sum(a, b) f = Sum(c, d) y = Mul(e, f) }"
    )
    model = parse(body.replace("l, )", "l)"), l=np.float64(-0.5), h=np.float64(0.5))
    for node in model.graph.node:
        if list(node.output) == ["b"]:
            node.input.append("")
    result, _, _ = run(model, MergeEqual())
    assert ops(result) == {"Clip": 3, "Sum": 2, "Mul": 1}
    same(model, result, x=normal(5))


def test_what_a_body_reads_keeps_its_name() -> None:
    body = "(double[2] x, bool k) => (double[N] y) { a = Exp(x) b = Exp(x) c = Neg(a) d = If (k) <then_branch = t () => (double[2] u) { u = Neg(b) }, else_branch = e () => (double[2] v) { v = Abs(b) }> y = Add(c, d) }"
    model = parse(body)
    result, _, _ = run(model, MergeEqual())
    assert ops(result)["Exp"] == 1
    for k in (True, False):
        same(model, result, 0.0, x=normal(2), k=np.array(k))


def test_the_other_ones_documentation_is_kept() -> None:
    model = parse("(double[2] x) => (double[N] y) { a = Exp(x) b = Exp(x) y = Add(a, b) }")
    for node, place in zip(model.graph.node, ("first", "second"), strict=False):
        node.metadata_props.add(key="namespace", value=place)
    result, _, _ = run(model, MergeEqual())
    props = {p.key: p.value for p in result.graph.node[0].metadata_props}
    assert props["namespace"] == "first"
    assert '"namespace": "second"' in props["pwopt.folded"]


BIG = NEGLIGIBLE_BYTES // 8 + 1


def two(p: np.ndarray, q: np.ndarray) -> onnx.ModelProto:
    return parse(f"(double[2,{BIG}] x) => (double[N] y) {{ a = Add(x, p) b = Exp(a) y = Mul(b, q) }}", p=p, q=q)


def test_equal_constants_are_stored_once() -> None:
    model = two(normal(BIG), normal(BIG))
    result, outcome, _ = run(model, ShareConstants())
    assert [t.name for t in result.graph.initializer] == ["p"]
    assert outcome.rewrites[0].growth == -8 * BIG
    same(model, result, 0.0, x=normal(2, BIG))


@pytest.mark.parametrize("other", [normal(BIG, seed=1), normal(BIG).reshape(1, -1), -0.0 * np.ones(BIG)])
def test_other_constants_stay(other: np.ndarray) -> None:
    first = np.zeros(BIG) if not other.any() else normal(BIG)
    model = two(first, other)
    assert run(model, ShareConstants())[0] is model


def test_an_overridable_constant_stays() -> None:
    model = two(normal(BIG), normal(BIG))
    model.graph.input.append(helper.make_tensor_value_info("q", onnx.TensorProto.DOUBLE, [BIG]))
    assert run(model, ShareConstants())[0] is model


def test_sharing_does_not_keep_weights_from_folding() -> None:
    """Two convolutions with the same weights, and normalisations of their own."""
    norm = {f"{k}{i}": normal(8, seed=5 * i + j) ** 2 + 0.5 for i in (0, 1) for j, k in enumerate("gbmv")}
    body = "(double[2,8,4,4] x) => (double[N] y) { a = Conv(x, w0) b = BatchNormalization(a, g0, b0, m0, v0) c = Relu(b) d = Conv(c, w1) e = BatchNormalization(d, g1, b1, m1, v1) y = Relu(e) }"
    model = parse(body, w0=normal(8, 8, 3, 3), w1=normal(8, 8, 3, 3), **norm)
    result = pwopt.optimize(model, cost="analytic", verify=False).model
    assert ops(result) == {"Conv": 2, "Relu": 2}
    same(model, result, x=normal(2, 8, 4, 4))
