"""Which sums of parallel linear branches become one map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from branching import (
    D3,
    P1,
    SIDE,
    U1,
    W1,
    W3,
    WEIGHTS,
    B,
    Net,
    X,
    added,
    branches,
    build,
    check,
    cost,
    groups,
    untouched,
)
from helpers import normal, ops, reasons, run, same, weight
from hypothesis import given, settings
from hypothesis import strategies as st

from pwopt.algebra.geometry import Geometry, Refusal, add_geometry
from pwopt.graph.files import from_proto
from pwopt.graph.ir import Variable
from pwopt.maps.cost import Cost
from pwopt.maps.paths import Path
from pwopt.passes import FoldAffine, FoldChains, SumBranches, sum_branches
from pwopt.passes.sum_branches import Branch, Term, _find_cheapest
from pwopt.rewriting.wording import format_increase
from pwopt.selecting.candidate_base import run_passes

Z = normal(2, 4, 6, 6, seed=9)
BOTH = "(double[2,4,6,6] x, double[2,4,6,6] z) => (double[N] y) "


# Sums


@pytest.mark.parametrize(
    "sums",
    [
        "y = Add(a, b)",
        "y = Sub(a, b)",
        "y = Sum(a, b)",
        "p = Sub(x, a) y = Sub(p, b)",
        "p = Sub(x, b) y = Sub(a, p)",
        "p = Add(a, x) q = Sub(b, x) y = Sub(p, q)",
        "p = Sub(a, b) q = Neg(p) y = Sub(x, q)",
        "p = Mul(a, s) q = Div(b, s) o = Sub(s, x) y = Sum(p, q, o)",
        "p = Add(a, sc) y = Add(p, b)",
    ],
)
def test_signs_and_nesting(sums: str) -> None:
    check(added(sums), {"Conv": 1})


@pytest.mark.parametrize(
    "sums",
    [
        "p = Add(a, b) y = Add(p, r)",
        "p = Add(a, r) y = Add(p, b)",
        "p = Add(a, r) y = Add(b, p)",
        "p = Sub(r, a) y = Sub(p, b)",
        "p = Sub(a, r) y = Sub(b, p)",
        "p = Sub(a, b) y = Sub(r, p)",
        "y = Sum(a, r, b)",
        "p = Sum(r, b) y = Sub(a, p)",
    ],
)
def test_linear_branches_are_joined_beside_an_activation(sums: str) -> None:
    """One convolution and one sum are left."""
    model = build(added(sums))
    result, _, _ = run(model, SumBranches())
    assert ops(result) in ({"Conv": 1, "Relu": 1, "Add": 1}, {"Conv": 1, "Relu": 1, "Sub": 1})
    same(model, result, x=X)


@pytest.mark.parametrize(
    "sums", ["y = Sum(a, r, b, t)", "p = Sum(t, a, r) y = Add(p, b)", "p = Add(a, t) q = Add(r, b) y = Sub(q, p)"]
)
def test_linear_branches_are_joined_beside_several_activations(sums: str) -> None:
    """The terms stand in one Sum, or in Adds of two."""
    model = build(added(sums))
    result, outcome, _ = run(model, SumBranches())
    assert ops(result)["Conv"] == 1, reasons(outcome)
    assert cost(result).nodes <= cost(model).nodes
    same(model, result, x=X)


def test_an_inner_sum_with_another_reader_is_kept() -> None:
    """Its own branches may be joined, but not with branches of the outer sum."""
    observed = SIDE.replace(" y)", " y, double[N] o)")
    check(added("p = Add(a, b) o = Abs(p) y = Add(p, g)", observed), {"Conv": 2, "Add": 1, "Abs": 1})
    check(added("p = Add(a, r) o = Abs(p) y = Add(p, b)", observed), {"Conv": 2, "Add": 2, "Abs": 1, "Relu": 1})
    check(added("o = Add(a, r) y = Add(o, b)", observed), {"Conv": 2, "Add": 2, "Relu": 1})


def test_added_nodes_have_unique_names() -> None:
    model = build(added("p = Add(a, r) q = Sub(p, b) y = Add(q, t)"))
    for i, node in enumerate(model.graph.node):
        node.name = f"node{i}"
    result, outcome, _ = run(model, SumBranches())
    assert len(outcome.rewrites) == 1
    names = [n.name for n in result.graph.node]
    assert len(names) == len(set(names)) == 5
    assert all(names)
    assert outcome.rewrites[0].removed == ("Conv node0", "Conv node1", "Add node4", "Sub node5", "Add node6")
    assert outcome.rewrites[0].reason == "2 branches of 'x' become one map: Conv node0, Conv node1"


@pytest.mark.parametrize("sums", ["p = Sum(a, d, e) y = Add(b, p)", "p = Add(a, d) q = Sub(b, e) y = Add(p, q)"])
def test_two_origins(sums: str) -> None:
    model = build(added(sums, BOTH))
    result, _, _ = run(model, SumBranches())
    assert ops(result)["Conv"] == 2
    assert sum(ops(result).values()) == 3
    assert {n.input[0] for n in result.graph.node if n.op_type == "Conv"} == {"x", "z"}
    same(model, result, x=X, z=Z)


@pytest.mark.parametrize("flip", [False, True])
def test_forty_branches_are_joined_in_pieces(flip: bool) -> None:
    net = Net(2, 4, 3, 3)
    total = "x"
    for seed in range(40):
        term = net("Conv", "x", normal(4, 4, 1, 1, seed=seed))
        total = net("Add", *((term, total) if flip else (total, term)))
    model = net.model(total)
    result, _, _ = run(model, SumBranches())
    assert ops(result) == {"Conv": 1}
    same(model, result, x=X[..., :3, :3])


def test_a_constant_in_a_sum_of_several() -> None:
    check(added("y = Sum(a, sc, b)"), {"Conv": 1, "Add": 1})
    check(added("y = Sum(a, sc, b)"), {"Conv": 1}, SumBranches(), FoldAffine())


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1, 1)])
def test_scalars_of_every_shape(shape: tuple[int, ...]) -> None:
    check(added("p = Mul(x, s) q = Sub(s, p) y = Sub(q, a)"), {"Conv": 1}, s=np.full(shape, 0.7))


def test_broadcasting_sums_are_not_joined() -> None:
    """A scalar that adds an axis; one output channel, added to all four of the input, and the other way round."""
    untouched(added("p = Mul(x, s) y = Add(p, a)"), "Mul is not a linear map", s=np.full((1, 1, 1, 1, 1), 0.7))
    untouched(SIDE + "{ a = Conv(x, k) y = Add(a, x) }", "channels differ", k=W1[:1])
    body = "(double[2,1,6,6] x) => (double[N] y) { a = Conv(x, k) y = Add(a, x) }"
    untouched(body, "channels differ", k=W1[:, :1])


def test_branches_of_a_sum_that_is_broadcast() -> None:
    """A batch of one, added to a batch of three."""
    model = build(added("p = Add(a, b) y = Add(p, z)", "(double[1,4,6,6] x, double[3,4,6,6] z) => (double[N] y) "))
    result, _, _ = run(model, SumBranches())
    assert ops(result) == {"Conv": 1, "Add": 1}
    same(model, result, x=X[:1], z=normal(3, 4, 6, 6))


PARTIAL = [SumBranches(), FoldAffine(), SumBranches()]


def test_a_partial_sum_has_the_width_of_its_branches() -> None:
    """Not of the whole sum, which a constant may have enlarged: passes that follow read the shape."""
    side = "(double[2,3,4] x) => (double[N] y) "
    narrow = {"w": normal(4, 1), "u": normal(4, 1, seed=1), "k": normal(5)}
    body = side + "{ a = MatMul(x, w) b = MatMul(x, u) y = Sum(a, b, k) }"
    check(body, {"MatMul": 1, "Add": 1}, *PARTIAL, x=normal(2, 3, 4), **narrow)
    narrow = {"w1": W1[:1], "u1": U1[:1], "k": normal(5, 1, 1), "m": normal(5, 1, 1, seed=1)}
    body = SIDE + "{ a = Conv(x, w1) b = Conv(x, u1) p = Sum(a, b, k) y = Mul(p, m) }"
    check(body, {"Conv": 1, "Add": 1, "Mul": 1}, *PARTIAL, **narrow)


def test_a_partial_sum_has_the_rank_of_its_branches() -> None:
    """One constant acts on the batch of 2, but would on the 2 channels if the sum had the rank of the other one."""
    weights: dict[str, Any] = {
        "k": normal(2, 1, 1, 1),
        "m": normal(3, 1, 1, 1, 1),
        "w1": W1[:2],
        "u1": U1[:2],
        "v1": W1[2:],
    }
    body = SIDE + "{ a = Conv(x, w1) b = Conv(x, u1) d = Conv(x, v1) y = Sum(a, b, d, k, m) }"
    model = build(body, **weights)
    result, _, _ = run(model, *PARTIAL)
    assert ops(result)["Conv"] == 1
    same(model, result, x=X)


def test_a_partial_sum_of_dynamic_size_is_counted() -> None:
    body = added("y = Sum(b, g, r)", "(double[N,4,H,W] x) => (double[N,4,H,W] y) ")
    result = run_passes(from_proto(build(body)), [SumBranches()], (), {"x": (1, 4, 6, 6)})
    assert result.before == Cost(nodes=4, params=36, macs=2 * 16 * 36, unknown=0)
    assert result.after == Cost(nodes=3, params=20, macs=16 * 36, unknown=0)


@pytest.mark.parametrize("term", ["b", "r"])
@pytest.mark.parametrize("depth", [1, 2, 3, 8, 15, 16, 17, 30])
def test_a_sum_added_to_itself(depth: int, term: str) -> None:
    """s + s, repeated."""
    doubled = " ".join(f"s{i + 1} = Add(s{i}, s{i})" for i in range(depth))
    model = build(added(f"s0 = Add(a, {term}) {doubled} y = Neg(s{depth})"))
    result, _, _ = run(model, SumBranches())
    assert cost(result).nodes <= cost(model).nodes
    assert cost(result).macs <= cost(model).macs
    same(model, result, x=X)


@pytest.mark.parametrize("sums", ["y = Add(a, a)", "y = Sub(a, a)", "y = Sum(a, x, a)", "y = Sum(a, a, b)"])
def test_a_branch_that_is_read_twice(sums: str) -> None:
    for thin in (False, True):  # 4 → 1 → 4 costs 8 multiply-adds however often its result is added, 4 → 4 costs 16
        model = build(added(f"p = Conv(x, k) a = Conv(p, m) {sums}" if thin else sums), k=W1[:1], m=W1[:, :1])
        result, _, _ = run(model, SumBranches())
        assert cost(result).macs <= cost(model).macs
        assert cost(result).nodes <= cost(model).nodes
        same(model, result, x=X)


def test_the_input_is_a_branch() -> None:
    """x + Wx = (I + W)x, x − Wx = (I − W)x, D(x) + s·x"""
    result = check(added("y = Add(x, b)"), {"Conv": 1})
    np.testing.assert_allclose(weight(result, "w1")[:, :, 0, 0], np.eye(4) + W1[:, :, 0, 0])
    result = check(SIDE + f"{{ a = Conv<{P1}>(x, w3, c) y = Sub(x, a) }}", {"Conv": 1})
    np.testing.assert_allclose(weight(result, "w3")[:, :, 1, 1], np.eye(4) - W3[:, :, 1, 1])
    np.testing.assert_allclose(weight(result, "c"), -B)
    result = check(added("p = Mul(x, sc) y = Add(f, p)"), {"Conv": 1})
    assert groups(result) == [4]
    np.testing.assert_allclose(weight(result, "d3")[:, 0, 1, 1], D3[:, 0, 1, 1] + B)


def test_the_input_is_a_branch_of_products() -> None:
    side = "(double[4,4] x) => (double[N] y) "
    square = normal(4, 4)
    result = check(side + "{ a = MatMul(x, w) y = Add(x, a) }", {"MatMul": 1}, x=square)
    np.testing.assert_allclose(weight(result, "w"), WEIGHTS["w"] + np.eye(4))
    check(side + "{ a = MatMul(w, x) y = Sub(a, x) }", {"MatMul": 1}, x=square)
    check(side + "{ a = Gemm<transB=1>(x, w, c) y = Sub(x, a) }", {"Gemm": 1}, x=square)
    check(side + "{ a = MatMul(x, w) b = MatMul(u, x) y = Add(a, b) }", {"MatMul": 2, "Add": 1}, x=square)


@pytest.mark.parametrize("biased", [False, True])
def test_expandnet(biased: bool) -> None:
    """1×1 → k×k → 1×1, as a chain and beside a branch; a bias before the zero padding keeps the first apart."""
    weights: dict[str, Any] = {
        "k": normal(16, 4, 1, 1),
        "l": normal(16),
        "m": normal(16, 16, 3, 3),
        "n": normal(4, 16, 1, 1),
    }
    first = "Conv(x, k, l)" if biased else "Conv(x, k)"
    chain = SIDE + f"{{ a = {first} b = Conv<{P1}>(a, m) d = Conv(b, n)"
    model = build(chain + " y = Relu(d) }", **weights)
    result, _, _ = run(model, FoldChains())
    assert ops(result) == {"Conv": 1 + biased, "Relu": 1}
    same(model, result, 1e-8, x=X)
    model = build(chain + " e = Conv(x, w1) y = Add(d, e) }", **weights)
    result, outcome, _ = run(model, SumBranches())
    assert ops(result) == ({"Conv": 4, "Add": 1} if biased else {"Conv": 1}), reasons(outcome)
    same(model, result, 1e-8, x=X)


# Every sum


def add_branch(net: Net, spec: dict[str, Any], seed: int) -> str:
    kernel, dilation, biased, tensor = spec["kernel"], spec["dilation"], spec["biased"], "x"
    if spec["kind"] == "relu":
        tensor = net("Relu", tensor)
    if spec["kind"] == "chain":
        tensor = net("Conv", tensor, normal(8, 4, 1, 1, seed=seed + 1), *([normal(8)] if biased else []))
    if spec["kind"] in ("conv", "chain"):
        wide = 8 if spec["kind"] == "chain" else 4
        inputs = [normal(4, wide // spec["group"], kernel, kernel, seed=seed), *([normal(4)] if biased else [])]
        pads, dilations = [dilation * (kernel // 2)] * 4, [dilation] * 2
        tensor = net("Conv", tensor, *inputs, pads=pads, dilations=dilations, group=spec["group"])
    if spec["kind"] == "pool":
        pads = [kernel // 2] * 4
        tensor = net("AveragePool", tensor, kernel_shape=[kernel] * 2, pads=pads, count_include_pad=int(biased))
    if spec["scaled"]:
        tensor = net("Mul", tensor, np.full([(), (1,), (1, 1, 1, 1)][seed % 3], 0.5 + seed))
    if spec["shifted"]:
        tensor = net(["Add", "Sub"][seed % 2], tensor, normal(4, 1, 1, seed=seed))
    return tensor


@settings(max_examples=80)
@given(st.lists(branches(), min_size=2, max_size=4), st.data())
def test_every_sum_keeps_its_values_and_never_costs_more(specs: list[dict[str, Any]], data: st.DataObject) -> None:
    net = Net(1, 4, 5, 5)
    terms = [add_branch(net, spec, seed) for seed, spec in enumerate(specs)]
    while len(terms) > 1:
        count = data.draw(st.integers(2, len(terms)), label="terms")
        start = data.draw(st.integers(0, len(terms) - count), label="from")
        op = data.draw(st.sampled_from(["Add", "Sub", "Sum"]), label="op") if count == 2 else "Sum"
        terms[start : start + count] = [net(op, *terms[start : start + count])]
    model = net.model(net("Identity", terms[0]))
    result, _, _ = run(model, SumBranches())
    before, after = cost(model), cost(result)
    assert after.unknown == before.unknown == 0
    assert after.macs <= before.macs
    assert after.nodes <= before.nodes
    same(model, result, 1e-8, x=normal(1, 4, 5, 5, seed=11))
    convs = [s for s in specs if s["kind"] == "conv"]
    plain = all(s["kind"] in ("conv", "identity") and s["dilation"] == 1 for s in specs)
    if plain and any(s["group"] == 1 and s["kernel"] == max(c["kernel"] for c in convs) for s in convs):
        assert ops(result)["Conv"] == 1  # a dense one has a tap for every other's


def _branch(kernel: int, groups: int, stride: int, biased: bool, separate: float) -> Branch:
    pads = (kernel // 2,) * 2
    geometry = Geometry(4, 4, groups, (kernel,), (stride,), (1,), pads, biased=biased)
    tensor = Variable("x")
    return Branch((Term(Path(tensor, tensor, (), None, ""), 1.0),), geometry, separate)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.builds(
            _branch,
            st.sampled_from([1, 3, 5]),
            st.sampled_from([1, 2, 4]),
            st.sampled_from([1, 1, 1, 2]),
            st.booleans(),
            st.sampled_from([0.0, 16.0, 48.0, 80.0, 1000.0]),
        ),
        max_size=9,
    )
)
def test_branches_are_joined_as_if_every_pair_were_tried(branches: list[Branch]) -> None:
    assert _find_cheapest(branches) == cheapest_by_trying_all(branches)


def test_the_work_of_joining_grows_with_the_kinds_of_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(sum_branches, "add_geometry", lambda maps: calls.append(maps) or add_geometry(maps))
    joined, _ = _find_cheapest([_branch(1, 1, 1, False, 16.0) for _ in range(200)])
    assert joined is not None
    assert len(joined.terms) == 200
    assert len(calls) < 10


def cheapest_by_trying_all(branches: Sequence[Branch]) -> tuple[Branch | None, str]:
    """The definition of what `_find_cheapest` finds: every pair is tried in every step."""
    pool, reason = list(branches), "the branches are not linear maps with constant numbers"
    while True:
        best: tuple[float, int, int, Branch] | None = None
        for i, a in enumerate(pool):
            for j, b in enumerate(pool[:i]):
                geometry = add_geometry([b.geometry, a.geometry])
                if isinstance(geometry, Refusal):
                    reason = f"the branches cannot be merged: {geometry.reason}"
                    continue
                pair = Branch((*b.terms, *a.terms), geometry, a.separate + b.separate)
                saved = a.together + b.together - pair.together
                if saved < 0:
                    reason = (
                        f"merging the branches would cost {format_increase(a.together + b.together, pair.together)}"
                    )
                elif best is None or saved > best[0]:
                    best = (saved, i, j, pair)
        if best is None:
            break
        _, i, j, pair = best
        pool = [p for k, p in enumerate(pool) if k not in (i, j)] + [pair]
    joined = [b for b in pool if len(b.terms) > 1]
    return (joined[0], "") if joined else (None, reason)
