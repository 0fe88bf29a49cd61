"""The stencil, the groups and the price of a sum; adapters; refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from branching import D3, P1, SIDE, W1, W3, WEIGHTS, Net, X, added, attribute, build, check, cost, groups, untouched
from helpers import normal, ops, reasons, run, same, weight
from onnx import TensorProto, helper

from pwopt.passes import SumBranches
from pwopt.rewriting.records import Site

# Stencils, groups and prices


@pytest.mark.parametrize(
    ("first", "second", "strides"),
    [
        (P1, "pads=[0,0,0,0]", [1, 1]),
        ("pads=[2,2,2,2], dilations=[2,2]", "pads=[0,0,0,0]", [1, 1]),
        ('auto_pad="SAME_UPPER"', "strides=[1,1]", [1, 1]),
        (f"{P1}, strides=[2,2]", "strides=[2,2]", [2, 2]),
        (f"{P1}, strides=[1,3]", "strides=[1,3]", [1, 3]),
        ("pads=[0,0,2,2]", "pads=[0,0,0,0]", [1, 1]),
        ("pads=[2,0,0,2]", "pads=[0,0,0,0]", [1, 1]),
    ],
)
def test_kernels_align(first: str, second: str, strides: list[int]) -> None:
    result = check(SIDE + f"{{ a = Conv<{first}>(x, w3) b = Conv<{second}>(x, u1) y = Add(a, b) }}", {"Conv": 1})
    assert attribute(result.graph.node[0], "kernel_shape") == [3, 3]
    assert attribute(result.graph.node[0], "strides") == strides


@pytest.mark.parametrize(
    ("pair", "expected"), [((1, 1), 1), ((2, 2), 2), ((4, 4), 4), ((4, 2), 2), ((2, 4), 2), ((1, 4), 1)]
)
def test_groups(pair: tuple[int, int], expected: int) -> None:
    k, m = (normal(4, 4 // g, 3, 3, seed=g) for g in pair)
    convs = f"a = Conv<{P1}, group={pair[0]}>(x, k) b = Conv<{P1}, group={pair[1]}>(x, m, c)"
    result = check(SIDE + f"{{ {convs} y = Sum(a, b, x) }}", {"Conv": 1}, k=k, m=m)
    assert groups(result) == [expected]
    assert weight(result, result.graph.node[0].input[1]).shape == (4, 4 // expected, 3, 3)


def test_coprime_groups_are_joined_if_that_is_not_dearer() -> None:
    side = "(double[2,6,5,5] x) => (double[N] y) { a = Conv<group=2>(x, k) b = Conv<group=3>(x, m) "
    weights = {"k": normal(6, 3, 1, 1), "m": normal(6, 2, 1, 1), "n": normal(6, 3, 1, 1, seed=1)}
    untouched(side + "y = Add(a, b) }", "merging the branches would cost 1.20× the multiply-adds", **weights)
    body = side + "d = Conv<group=2>(x, n) y = Sum(a, b, d) }"
    result = check(body, {"Conv": 2, "Add": 1}, x=normal(2, 6, 5, 5), **weights)
    assert groups(result) == [2, 3]


def test_what_is_refused_by_price() -> None:
    """Depthwise 3×3 + dense 1×1 (36 + 16 → 144 multiply-adds), 3×3 + dilated 3×3 (2·9 → 25 taps), 1×1 + pooling."""
    dearer = "merging the branches would cost {:.2f}× the multiply-adds"
    untouched(added("y = Add(f, g)"), dearer.format(144 / 52))
    untouched(added("e = Conv<pads=[2,2,2,2], dilations=[2,2]>(x, u3) y = Add(a, e)"), dearer.format(25 / 18))
    untouched(added(f"p = {POOL} y = Add(p, b)"), dearer.format(9))
    untouched(added("y = Sum(b, x, r)"), "merging the branches would not save an operator")


POOL = "AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1>(x)"


def test_average_pooling_is_free_beside_a_stencil_of_its_size() -> None:
    result = check(added(f"p = {POOL} y = Sub(a, p)"), {"Conv": 1})
    np.testing.assert_allclose(weight(result, "w3"), W3 - np.eye(4)[:, :, None, None] / 9)
    check(added(f"p = {POOL} y = Add(f, p)"), {"Conv": 1})
    strided = "a = Conv<strides=[2,2]>(x, w4) p = AveragePool<kernel_shape=[4,4], strides=[2,2]>(x)"
    check(SIDE + f"{{ {strided} y = Add(a, p) }}", {"Conv": 1})
    fewer = POOL.replace(", count_include_pad=1", "")
    untouched(added(f"p = {fewer} y = Add(a, p)"), "average fewer elements")


def test_the_cheap_ones_are_joined_and_the_dear_ones_stay_apart() -> None:
    """Two depthwise 3×3 and two dense 1×1: two convolutions."""
    sums = f"h = Conv<{P1}, group=4>(x, k) p = Add(f, b) q = Add(h, g) y = Add(p, q)"
    result = check(added(sums), {"Conv": 2, "Add": 1}, k=D3 + 1)
    assert groups(result) == [1, 4]


def test_selections_are_branches() -> None:
    """W₁x[:2] + W₂x[2:] = (W₁ W₂)x; a permutation beside a dense map."""
    body = SIDE + "{ p = Slice(x, i, j, k) q = Slice(x, j, l, k) a = Conv(p, w1) b = Conv(q, u1) y = Add(a, b) }"
    numbers = {"i": np.array([0]), "j": np.array([2]), "k": np.array([1]), "l": np.array([4])}
    check(body, {"Conv": 1}, w1=W1[:, :2], u1=W1[:, 2:], **numbers)
    check(added("p = Gather<axis=1>(x, i) y = Add(p, b)"), {"Conv": 1}, i=np.array([2, 1, 0, 3]))


# Adapters

LORA: dict[str, Any] = {
    "w": normal(8, 8), "b": normal(8, seed=1), "l": normal(8, 2, seed=2), "m": normal(2, 8, seed=3), "s": np.float64(0.5)
}  # fmt: skip

ROWS = normal(2, 3, 8)
MERGED = LORA["w"] + 0.5 * LORA["l"] @ LORA["m"]


@pytest.mark.parametrize(
    "adapter",
    [
        "e = MatMul(d, m) f = Mul(e, s) y = Add(p, f)",
        "f = Mul(d, s) e = MatMul(f, m) y = Add(e, p)",
        "e = MatMul(d, m) f = Mul(s, e) g = Identity(f) y = Add(p, g)",
        "e = MatMul(d, m) f = Mul(e, s) g = Neg(f) y = Sub(p, g)",
    ],
)
def test_an_unmerged_adapter(adapter: str) -> None:
    """x·W + b + s·((x·A)·B) = x·(W + s·AB) + b (Hu et al., 2021)"""
    body = f"(double[2,3,8] x) => (double[N] y) {{ h = MatMul(x, w) p = Add(h, b) d = MatMul(x, l) {adapter} }}"
    result = check(body, {"MatMul": 1, "Add": 1}, x=ROWS, **LORA)
    np.testing.assert_allclose(weight(result, "w"), MERGED)


def test_an_unmerged_adapter_without_bias() -> None:
    body = "(double[2,3,8] x) => (double[N] y) { h = MatMul(x, w) d = MatMul(x, l) e = MatMul(d, m) y = Add(h, e) }"
    check(body, {"MatMul": 1}, x=ROWS, **LORA)


def test_an_unmerged_adapter_of_rows() -> None:
    side = "(double[3,8] x) => (double[N] y) "
    body = side + "{ p = Gemm(x, w, b) d = Gemm(x, l) e = Gemm<alpha=0.5>(d, m) y = Add(p, e) }"
    np.testing.assert_allclose(weight(check(body, {"Gemm": 1}, x=ROWS[0], **LORA), "w"), MERGED)
    flipped = LORA | {name: LORA[name].T.copy() for name in "wlm"}
    body = body.replace("Gemm(", "Gemm<transB=1>(").replace("alpha", "transB=1, alpha")
    np.testing.assert_allclose(weight(check(body, {"Gemm": 1}, x=ROWS[0], **flipped), "w"), MERGED.T)
    body = side + "{ h = MatMul(x, w) p = Add(h, b) d = MatMul(x, l) e = MatMul(d, m) f = Mul(e, s) y = Add(p, f) }"
    check(body, {"Gemm": 1}, x=ROWS[0], **LORA)


def test_an_adapter_that_something_else_reads_stays() -> None:
    """Its inner features are used: merging would have to keep them."""
    side = "(double[2,3,8] x) => (double[N] y, double[N] d) "
    untouched(side + "{ h = MatMul(x, w) d = MatMul(x, l) e = MatMul(d, m) y = Add(h, e) }", "'d' is a graph", **LORA)


def test_adapters_in_a_transformer() -> None:
    """Adapters on Q and V, none on K: six products remain, the four projections and attention's two."""
    net = Net(2, 5, 8)

    def project(tensor: str, seed: int, adapter: bool = False) -> str:
        whole = net("Add", net("MatMul", tensor, normal(8, 8, seed=seed)), normal(8, seed=seed + 1))
        if not adapter:
            return whole
        inner = net("MatMul", tensor, normal(8, 2, seed=seed + 2))
        return net("Add", whole, net("Mul", net("MatMul", inner, normal(2, 8, seed=seed + 3)), np.asarray(2.0)))

    def heads(tensor: str, *perm: int) -> str:
        return net("Transpose", net("Reshape", tensor, np.array([0, 0, 2, 4])), perm=perm)

    q, k, v = project("x", 10, adapter=True), project("x", 20), project("x", 30, adapter=True)
    scores = net("Mul", net("MatMul", heads(q, 0, 2, 1, 3), heads(k, 0, 2, 3, 1)), np.asarray(0.5))
    mixed = net("MatMul", net("Softmax", scores, axis=-1), heads(v, 0, 2, 1, 3))
    merged = net("Reshape", net("Transpose", mixed, perm=[0, 2, 1, 3]), np.array([0, 0, 8]))
    model = net.model(net("Add", "x", project(merged, 40)))
    result, outcome, _ = run(model, SumBranches())
    assert len(outcome.rewrites) == 2
    assert ops(result)["MatMul"] == 6
    assert {tuple(t.dims) for t in result.graph.initializer if len(t.dims) == 2} == {(8, 8)}
    assert cost(result).nodes == cost(model).nodes - 2 * 4
    same(model, result, x=normal(2, 5, 8))


# Refusals


@pytest.mark.parametrize(
    ("inputs", "outputs", "nodes", "word"),
    [
        ("", "", "a = Conv<strides=[2,2]>(x, w1) b = Conv(x, w4) y = Add(a, b)", "the strides differ"),
        (
            "",
            "",
            "a = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w3) b = Conv<pads=[1,1,0,0], strides=[2,2]>(x, u3) y = Add(a, b)",
            "the output sizes differ",
        ),
        ("", ", double[N] a", "a = Conv(x, w1) b = Conv(x, u1) y = Add(a, b)", "'a' is a graph output"),
        ("", ", double[N] q", "a = Conv(x, w1) q = Abs(a) b = Conv(x, u1) y = Add(a, b)", "'a' has 2 consumers"),
        ("", "", "a = Conv(x, w1) b = Conv(x, w1) y = Add(a, b)", "the weight 'w1' is shared"),
        ("", "", "a = Conv(x, w1) p = Relu(a) b = Conv(x, u1) y = Add(p, b)", "Relu is not a linear map"),
        (", double q", "", "a = Conv(x, w1) p = Mul(a, q) b = Conv(x, u1) y = Add(p, b)", "Mul is not a linear map"),
        (", double[4,4,1,1] q", "", "a = Conv(x, w1) b = Conv(x, q) y = Add(a, b)", "its weight is not a constant"),
        ("", "", "a = Conv(x, w1, c) p = Conv<pads=[1,1,1,1]>(a, w3) b = Conv(x, u1) y = Add(p, b)", "zero padding"),
        (
            "",
            "",
            "a = ConvTranspose<strides=[2,2]>(x, w1) b = ConvTranspose<strides=[2,2]>(x, u1) y = Add(a, b)",
            "transposed",
        ),
        (", double[2,4,6,6] z", "", "a = Conv(x, w1) b = Conv(z, u1) y = Add(a, b)", ""),
        ("", "", "a = Relu(x) b = Tanh(x) y = Add(a, b)", "Relu is not a linear map"),
    ],
)
def test_refusals(inputs: str, outputs: str, nodes: str, word: str) -> None:
    untouched(f"(double[2,4,6,6] x{inputs}) => (double[N] y{outputs}) {{ {nodes} }}", word)


def test_automatic_padding_of_unknown_size() -> None:
    """At 6×6, SAME padding of a 3×3 with stride 2 is (0, 1); that is not the 1×1's."""
    nodes = '{ a = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(x, w3) b = Conv<strides=[2,2]>(x, u1) y = Add(a, b) }'
    untouched("(double[N,4,H,W] x) => (double[N] y) " + nodes, "automatic padding")
    untouched(SIDE + nodes, "the output sizes differ")


@pytest.mark.parametrize(("captured", "word"), [("a", "control-flow"), ("w1", "shared"), ("y", ""), ("x", "")])
def test_what_a_body_of_control_flow_reads(captured: str, word: str) -> None:
    """A branch and a weight must stay; the input and the sum do anyway."""
    model = build("(double[2,4,6,6] x, bool f) => (double[N] y) { a = Conv(x, w1) b = Conv(x, u1) y = Add(a, b) }")
    ends = [helper.make_tensor_value_info(name, TensorProto.DOUBLE, None) for name in "pq"]
    then = helper.make_graph([helper.make_node("Neg", [captured], ["p"])], "then", [], ends[:1])
    other = helper.make_graph([helper.make_node("Abs", [captured], ["q"])], "else", [], ends[1:])
    model.graph.node.append(helper.make_node("If", ["f"], ["o"], then_branch=then, else_branch=other))
    shape = [4, 4, 1, 1] if captured == "w1" else [2, 4, 6, 6]
    model.graph.output.append(helper.make_tensor_value_info("o", TensorProto.DOUBLE, shape))
    result, outcome, _ = run(model, SumBranches())
    assert (result is model) == bool(word)
    assert ops(result)["Conv"] == (2 if word else 1)
    assert word in " ".join(reasons(outcome))
    same(model, result, x=X, f=np.array(True))


@pytest.mark.parametrize("name", ["w1", "c", "sc"])
def test_an_initializer_that_callers_may_override(name: str) -> None:
    model = build(SIDE + "{ a = Conv(x, w1, c) p = Mul(a, sc) b = Conv(x, u1) y = Add(p, b) }")
    assert ops(run(model, SumBranches())[0]) == {"Conv": 1}
    model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.DOUBLE, WEIGHTS[name].shape))
    result, outcome, _ = run(model, SumBranches())
    assert result is model
    assert "constant" in " ".join(reasons(outcome))


@pytest.mark.parametrize(("scale", "word"), [(4e4, "the folded weights overflow float16"), (1.0, "")])
def test_weights_that_overflow_their_type(scale: float, word: str) -> None:
    values = np.full((4, 4, 1, 1), scale, np.float16)
    body = "(float16[1,4,6,6] x) => (float16[N] y) { a = Conv(x, k) b = Conv(x, m) y = Add(a, b) }"
    model = build(body, k=values, m=values)
    result, outcome, _ = run(model, SumBranches())
    assert (result is model) == bool(word)
    assert reasons(outcome) == ([word] if word else [])


@pytest.mark.parametrize("sums", ["y = Add(b, g)", "y = Sum(b, g)"])
def test_before_opset_7_sums_broadcast_by_attribute(sums: str) -> None:
    for opset in (6, 7):
        model = build(added(sums), opset)
        assert (run(model, SumBranches())[0] is model) == (opset < 7)


def test_a_denied_sum_stays() -> None:
    model = build(added("p = Add(b, g) q = Relu(p) h = Conv(q, k) y = Add(q, h)"), k=W1 + 1)
    _, free, _ = run(model, SumBranches())
    assert [str(r.site) for r in free.rewrites] == ["sum-branches:p", "sum-branches:y"]
    result, outcome, _ = run(model, SumBranches(), denied={Site("sum-branches", "p")})
    assert [str(r.site) for r in outcome.rewrites] == ["sum-branches:y"]
    assert ops(result) == {"Conv": 3, "Add": 1, "Relu": 1}
    assert reasons(outcome) == ["denied by the user"]
