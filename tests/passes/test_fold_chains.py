from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from helpers import build, normal, ops, parse, reasons, rng, run, same, weight
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from pwopt.graph.files import from_proto
from pwopt.passes import FoldChains
from pwopt.rewriting.records import Site
from pwopt.rewriting.wording import format_increase
from pwopt.selecting.candidate_base import run_passes

X = normal(2, 4, 6, 6)
SIDE = "(double[2,4,6,6] x) => (double[N] y) "


def chain(widths: Sequence[int], bias: bool = True) -> onnx.ModelProto:
    """A chain of 1×1 convolutions of the given widths, in float64."""
    nodes, weights = [], []
    for i, (inn, out) in enumerate(itertools.pairwise(widths)):
        weights.append(numpy_helper.from_array(normal(out, inn, 1, 1, seed=i) / inn**0.5, f"w{i}"))
        weights.append(numpy_helper.from_array(normal(out, seed=i + 1), f"b{i}"))
        nodes.append(helper.make_node("Conv", [f"t{i}", f"w{i}", *([f"b{i}"] if bias else [])], [f"t{i + 1}"]))
    last = len(widths) - 1
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("t0", TensorProto.DOUBLE, ["N", widths[0], "H", "W"])],
        [helper.make_tensor_value_info(f"t{last}", TensorProto.DOUBLE, ["N", widths[-1], "H", "W"])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def cheapest(widths: Sequence[int]) -> int:
    """Multiply-adds per position of the best of all 2ⁿ⁻¹ cuts, by trying them."""
    inner = range(1, len(widths) - 1)
    cuts = itertools.chain.from_iterable(itertools.combinations(inner, k) for k in range(len(widths) - 1))
    return min(
        sum(a * b for a, b in itertools.pairwise([widths[0], *(widths[i] for i in cut), widths[-1]])) for cut in cuts
    )


def weights_of(model: onnx.ModelProto) -> int:
    return sum(weight(model, n.input[1]).size for n in model.graph.node)


@settings(max_examples=60)
@given(st.lists(st.integers(1, 12), min_size=2, max_size=7))
def test_the_cheapest_cut_is_found(widths: list[int]) -> None:
    model = chain(widths)
    result, _, _ = run(model, FoldChains())
    assert weights_of(result) == cheapest(widths)
    x = normal(1, widths[0], 2, 3)
    same(model, result, 1e-8, t0=x)


def test_greedy_would_miss_it() -> None:
    """1000→10→6→10→1000: joining neighbours first would lose the 6; the shortest path keeps only the 6."""
    result, _, _ = run(chain([100, 10, 6, 10, 100]), FoldChains())
    assert weights_of(result) == 100 * 6 + 6 * 100


def test_a_price_that_is_the_same_is_a_tie() -> None:
    """8→4→8 takes 64 multiply-adds, and so does 8→8: nothing would be gained even if nobody else read the middle."""
    body = "(double[3,8,5,5] x) => (double[N] y, double[N] z) { h = Conv(x, w) y = Conv(h, v) z = Relu(h) }"
    model = parse(body, w=normal(4, 8, 1, 1), v=normal(8, 4, 1, 1))
    assert reasons(run(model, FoldChains())[1]) == [
        "the intermediate 'h' has 2 consumers; folding 8→4→8 would cost as many multiply-adds (4,800), a tie"
    ]
    assert format_increase(10_000.0, 10_001.0) == "1.0001× the multiply-adds"


def test_a_bottleneck_stays_with_the_price_of_folding_it() -> None:
    model = chain([96, 16, 96])
    result, outcome, _ = run(model, FoldChains())
    assert result is model
    assert reasons(outcome) == ["folding 96→16→96 would cost 3.00× the multiply-adds"]


def test_the_price_in_multiply_adds_where_sizes_are_known() -> None:
    model = from_proto(chain([96, 16, 96]))
    outcome = run_passes(model, [FoldChains()], (), {"t0": (1, 96, 10, 10)})
    assert "(307,200 → 921,600)" in outcome.skips[0].reason


def test_a_map_of_low_rank_is_split_at_its_rank() -> None:
    """Two thirds of the middle channels are zero: the composed map has rank 4, not 12."""
    model = chain([16, 12, 16])
    w0 = weight(model, "w0").copy()
    w0[4:] = 0
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(w0, "w0"))
    w1 = weight(model, "w1").copy()
    big = chain([16, 20, 16])
    wide = np.zeros((20, 16, 1, 1))
    wide[:4] = w0[:4]
    big.graph.initializer[0].CopyFrom(numpy_helper.from_array(wide, "w0"))
    result, outcome, _ = run(big, FoldChains())
    assert weights_of(result) == 16 * 4 + 4 * 16
    assert "its rank" in outcome.rewrites[0].reason
    same(big, result, t0=normal(1, 16, 2, 3))
    assert w1.shape == (16, 12, 1, 1)


def test_pointwise_before_and_after_a_stencil() -> None:
    body = SIDE + "{ a = Conv(x, u) b = Conv<pads=[1,1,1,1]>(a, w) y = Conv(b, v) }"
    model = parse(body, u=normal(40, 4, 1, 1), w=normal(40, 40, 3, 3), v=normal(5, 40, 1, 1))
    result, _, _ = run(model, FoldChains())
    assert ops(result) == {"Conv": 1}
    same(model, result, 1e-7, x=X)


def test_a_bias_before_padding_is_refused() -> None:
    body = SIDE + "{ a = Conv(x, u, c) y = Conv<pads=[1,1,1,1]>(a, w) }"
    model = parse(body, u=normal(40, 4, 1, 1), c=normal(40), w=normal(5, 40, 3, 3))
    result, outcome, _ = run(model, FoldChains())
    assert result is model
    assert "zero padding" in reasons(outcome)[0]


def test_strided_pointwise_maps() -> None:
    body = SIDE + "{ a = Conv<strides=[2,2]>(x, u, c) y = Conv<strides=[1,2]>(a, w) }"
    model = parse(body, u=normal(40, 4, 1, 1), c=normal(40), w=normal(5, 40, 1, 1))
    result, _, _ = run(model, FoldChains())
    assert ops(result) == {"Conv": 1}
    same(model, result, x=X)


def test_a_depthwise_stencil_is_not_made_dense() -> None:
    body = SIDE + "{ a = Conv<group=4>(x, d) y = Conv(a, w) }"
    model = parse(body, d=normal(4, 1, 3, 3), w=normal(8, 4, 1, 1))
    result, outcome, _ = run(model, FoldChains())
    assert result is model
    assert "would cost" in reasons(outcome)[0]


def test_gemm_and_matmul_chains() -> None:
    body = "(double[3,4] x) => (double[N] y) { a = Gemm<transB=1>(x, u, c) b = MatMul(a, v) y = Gemm(b, w, d) }"
    model = parse(body, u=normal(9, 4), c=normal(9), v=normal(9, 9), w=normal(9, 5), d=normal(5))
    result, _, _ = run(model, FoldChains())
    assert ops(result) == {"Gemm": 1}
    same(model, result, x=normal(3, 4))
    body = "(double[2,3,4] x) => (double[N] y) { a = MatMul(x, u) b = Add(a, c) d = MatMul(b, w) y = Add(d, e) }"
    model = parse(body, u=normal(4, 9), c=normal(9), w=normal(9, 5), e=normal(5))
    result, _, _ = run(model, FoldChains())
    assert ops(result) == {"MatMul": 1, "Add": 1}
    same(model, result, x=normal(2, 3, 4))


@pytest.mark.parametrize("first", ["Gemm<transA=1>(x, u, c)", "Gemm<transA=1, transB=1, alpha=0.5>(x, ut, c)"])
@pytest.mark.parametrize("rest", ["y = Gemm(a, w, d)", "b = MatMul(a, w) y = Add(b, d)"])
def test_a_gemm_that_transposes_begins_a_chain(first: str, rest: str) -> None:
    given = {"u": normal(4, 9), "ut": normal(9, 4), "c": normal(9), "w": normal(9, 5), "d": normal(5)}
    model = build(f"(double[4,3] x) => (double[N] y) {{ a = {first} {rest} }}", given)
    result, _, _ = run(model, FoldChains())
    assert ops(result) == {"Gemm": 1}
    same(model, result, x=normal(4, 3))


def test_a_gemm_that_transposes_ends_a_chain_before_it() -> None:
    body = "(double[4,4] x) => (double[N] y) { a = Gemm(x, u) b = Gemm<transA=1>(a, w) y = Gemm(b, v) }"
    model = parse(body, u=normal(4, 9), w=normal(4, 9), v=normal(9, 4))
    result, _, _ = run(model, FoldChains())
    assert [sum(a.name == "transA" and a.i for a in n.attribute) for n in result.graph.node] == [0, 1]
    same(model, result, x=normal(4, 4))


def test_a_gemm_that_transposes_is_split_at_its_rank() -> None:
    """Only the first of the two maps transposes."""
    thin = normal(30, 2) @ normal(2, 40)
    model = parse(
        "(double[20,3] x) => (double[N] y) { a = Gemm<transA=1>(x, u) y = Gemm(a, w) }", u=normal(20, 30), w=thin
    )
    result, _, _ = run(model, FoldChains())
    assert [sum(a.name == "transA" and a.i for a in n.attribute) for n in result.graph.node] == [1, 0]
    assert weights_of(result) == 20 * 2 + 2 * 40
    same(model, result, x=normal(20, 3))


def test_a_product_before_a_gemm_that_transposes_acts_on_the_other_axis() -> None:
    body = "(double[4,4] x) => (double[M,N] y) { h = MatMul(x, v) y = Gemm<transA=1>(h, w) }"
    model = parse(body, v=normal(4, 4), w=normal(4, 4, seed=1))
    result, _, _ = run(model, FoldChains())
    assert result is model


def test_a_gemm_that_adds_a_table_stays_and_says_so() -> None:
    for body in ("a = Gemm(x, u) y = Gemm(a, w, c)", "a = Gemm(x, u, b) y = Gemm(a, w)"):
        given = {"u": normal(4, 9), "w": normal(9, 5), "c": normal(3, 5), "b": normal(3, 9)}
        model = build(f"(double[3,4] x) => (double[N] y) {{ {body} }}", given)
        result, outcome, _ = run(model, FoldChains())
        assert result is model
        assert "Gemm stays: its bias differs between rows" in reasons(outcome)


def test_products_on_different_axes_are_not_a_chain() -> None:
    body = "(double[2,4,4] x) => (double[N] y) { a = MatMul(x, u) y = MatMul(w, a) }"
    model = parse(body, u=normal(4, 4), w=normal(4, 4))
    result, outcome, _ = run(model, FoldChains())
    assert result is model
    assert "different axes" in reasons(outcome)[0]


def test_a_transposed_convolution_takes_pointwise_maps() -> None:
    body = SIDE + "{ a = Conv(x, u) b = ConvTranspose<strides=[2,2]>(a, w, c) y = Conv(b, v, d) }"
    model = parse(body, u=normal(20, 4, 1, 1), w=normal(20, 20, 2, 2), c=normal(20), v=normal(3, 20, 1, 1), d=normal(3))
    result, _, _ = run(model, FoldChains())
    assert ops(result) == {"ConvTranspose": 1}
    same(model, result, 1e-8, x=X)


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ("(double[2,4,6,6] x) => (double[N] y, double[N] a) { a = Conv(x, u) y = Conv(a, w) }", "graph output"),
        (
            "(double[2,4,6,6] x) => (double[N] y, double[N] z) { a = Conv(x, u) y = Conv(a, w) z = Relu(a) }",
            "2 consumers",
        ),
        ("(double[2,4,6,6] x) => (double[N] y) { a = Conv(x, u) b = Relu(a) y = Conv(b, w) }", ""),
    ],
)
def test_refusals(body: str, word: str) -> None:
    model = parse(body, u=normal(9, 4, 1, 1), w=normal(2, 9, 1, 1))
    result, outcome, _ = run(model, FoldChains())
    assert result is model
    assert word in " ".join(reasons(outcome))
    assert bool(reasons(outcome)) == bool(word)


def test_a_shared_weight_is_refused() -> None:
    model = parse(SIDE + "{ a = Conv(x, u) b = Conv(a, u) y = Relu(b) }", u=normal(4, 4, 1, 1))
    result, outcome, _ = run(model, FoldChains())
    assert result is model
    assert "shared" in reasons(outcome)[0]


def test_a_denied_site_is_planned_around() -> None:
    model = chain([4, 9, 9, 9, 4])
    _, free, _ = run(model, FoldChains())
    assert [str(r.site) for r in free.rewrites] == ["fold-chains:t4"]
    result, outcome, _ = run(model, FoldChains(), denied={Site("fold-chains", "t4")})
    assert [str(r.site) for r in outcome.rewrites] == ["fold-chains:t3"]
    assert weights_of(result) == 4 * 9 + 9 * 4
    assert "denied by the user" in reasons(outcome)
    same(model, result, 1e-8, t0=normal(1, 4, 2, 2))


def test_multiply_adds_never_rise() -> None:
    for seed in range(20):
        widths = np.random.default_rng(seed).integers(1, 40, 8).tolist()
        model = from_proto(chain(widths))
        outcome = run_passes(model, [FoldChains()], (), {"t0": (1, widths[0], 3, 3)})
        assert outcome.after.macs <= outcome.before.macs
        assert sum(r.macs_before - r.macs_after for r in outcome.rewrites) == outcome.before.macs - outcome.after.macs


GROUPED = "(double[2,8,5,7] x) => (double[N] y) "
SHUFFLE = "r = Reshape(a, s) t = Transpose<perm=[0,2,1,3,4]>(r) p = Reshape(t, q)"


def shuffled(groups: int) -> onnx.ModelProto:
    """ShuffleNet's grouped 1×1 → channel shuffle → grouped 1×1."""
    body = GROUPED + f"{{ a = Conv<group={groups}>(x, u, b) {SHUFFLE} y = Conv<group={groups}>(p, v) }}"
    weights = {"u": normal(8, 8 // groups, 1, 1), "v": normal(8, 8 // groups, 1, 1, seed=1), "b": normal(8)}
    return parse(body, s=np.array([2, groups, 8 // groups, 5, 7]), q=np.array([2, 8, 5, 7]), **weights)


def test_a_channel_shuffle_between_two_groups_folds() -> None:
    model = shuffled(2)
    result, outcome, _ = run(model, FoldChains())
    assert ops(result) == {"Conv": 1}
    assert outcome.rewrites[0].macs_after == outcome.rewrites[0].macs_before
    same(model, result, x=normal(2, 8, 5, 7))


def test_a_channel_shuffle_between_four_groups_costs_too_much() -> None:
    model = shuffled(4)
    result, outcome, _ = run(model, FoldChains())
    assert result is model
    assert any("4.00×" in r for r in reasons(outcome))


@pytest.mark.parametrize(
    ("selection", "extra"),
    [
        ("Gather<axis=1>(a, i)", {"i": np.array([5, 0, 0, 3])}),
        ("Slice(a, i, j, k, l)", {"i": np.array([7]), "j": np.array([-9]), "k": np.array([1]), "l": np.array([-2])}),
        ("Pad(a, i, c)", {"i": np.array([0, 1, 0, 0, 0, 2, 0, 0]), "c": np.float64(3)}),
        ("ReduceMean<axes=[1]>(a)", {}),
    ],
)
def test_selections_and_reductions_fold_into_the_map_before(selection: str, extra: dict[str, np.ndarray]) -> None:
    model = parse(GROUPED + f"{{ a = Conv(x, w, b) y = {selection} }}", w=normal(8, 8, 1, 1), b=normal(8), **extra)
    result, outcome, _ = run(model, FoldChains())
    fewer = "Pad" not in selection
    assert ops(result)["Conv"] == 1
    assert (sum(ops(result).values()) == 1) == fewer  # a Pad would make more rows
    assert len(outcome.rewrites) == fewer
    same(model, result, x=normal(2, 8, 5, 7))


def test_a_permutation_folds_into_the_map_after_it() -> None:
    body = GROUPED + "{ a = Gather<axis=1>(x, i) y = Conv<pads=[1,1,1,1]>(a, w) }"
    model = parse(body, w=normal(3, 8, 3, 3), i=rng().permutation(8))
    result, _, _ = run(model, FoldChains())
    assert ops(result) == {"Conv": 1}
    same(model, result, x=normal(2, 8, 5, 7))


def test_a_slice_does_not_fold_into_the_map_after_it() -> None:
    body = GROUPED + "{ a = Gather<axis=1>(x, i) y = Conv(a, w) }"
    model = parse(body, w=normal(3, 4, 1, 1), i=np.array([1, 3, 5, 7]))
    assert run(model, FoldChains())[0] is model


def test_a_permutation_of_a_depthwise_map_stays() -> None:
    body = GROUPED + "{ a = Conv<group=8>(x, w) y = Gather<axis=1>(a, i) }"
    model = parse(body, w=normal(8, 1, 3, 3), i=rng().permutation(8))
    assert run(model, FoldChains())[0] is model


@pytest.mark.parametrize("strides", [[1, 1], [2, 3]])
@pytest.mark.parametrize("inner", [[0, 0, 0, 0], [1, 0, 2, 1]])
def test_zero_padding_folds_into_the_convolution_after_it(strides: list[int], inner: list[int]) -> None:
    body = GROUPED + f"{{ a = Pad(x, i) y = Conv<pads={inner}, strides={strides}>(a, w, b) }}"
    model = parse(body, w=normal(3, 8, 3, 3), b=normal(3), i=np.array([0, 0, 1, 2, 0, 0, 0, 1]))
    result, _, _ = run(model, FoldChains())
    assert ops(result) == {"Conv": 1}
    same(model, result, x=normal(2, 8, 5, 7))


@pytest.mark.parametrize(
    "body",
    [
        "{ a = Pad(x, i, c) y = Conv(a, w) }",  # not with zeros
        "{ a = Conv(x, w, b) y = Pad(a, i) }",  # after a bias
        "{ a = Conv(x, w) p = Pad(a, i) r = Relu(p) y = Add(r, p) }",  # two readers; a padded map is fine, see below
    ],
)
def test_other_paddings_do_not_fold(body: str) -> None:
    weights = {"i": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "w": normal(8, 8, 3, 3)}
    weights |= {"c": np.float64(2)} if " c)" in body else {}
    weights |= {"b": normal(8)} if " b)" in body else {}
    model = parse(GROUPED + body, **weights)
    assert run(model, FoldChains())[0] is model


def test_expandnet() -> None:
    """1×1 → k×k → 1×1, without nonlinearity, is one k×k (Guo et al., 2020)."""
    body = "(double[2,4,6,6] x) => (double[N] y) { a = Conv(x, u) b = Conv<pads=[1,1,1,1]>(a, v, d) y = Conv(b, w, e) }"
    model = parse(body, u=normal(16, 4, 1, 1), v=normal(16, 16, 3, 3), w=normal(5, 16, 1, 1), d=normal(16), e=normal(5))
    result, _, _ = run(model, FoldChains())
    assert ops(result) == {"Conv": 1}
    same(model, result, x=X)
