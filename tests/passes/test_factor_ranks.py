from __future__ import annotations

import numpy as np
import pytest
from helpers import evaluate, normal, ops, parse, run, same
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from pwopt.algebra.linear import LinearMap
from pwopt.algebra.ranks import factor, low_rank
from pwopt.passes import FactorRanks, FoldChains


def of_rank(rank: int, out: int, *rest: int) -> np.ndarray:
    return (normal(out, rank) @ normal(rank, int(np.prod(rest)), seed=1)).reshape(out, *rest)


def test_a_pointwise_map() -> None:
    model = parse(
        "(double[2,16,5,7] x) => (double[N] y) { y = Conv(x, w, b) }", w=of_rank(3, 12, 16, 1, 1), b=normal(12)
    )
    result, outcome, _ = run(model, FactorRanks(), FoldChains())
    assert [t.dims[:2] for t in result.graph.initializer if len(t.dims) == 4] == [[3, 16], [12, 3]]
    assert outcome.rewrites[0].macs_after * 12 * 16 == outcome.rewrites[0].macs_before * 3 * (12 + 16)
    same(model, result, x=normal(2, 16, 5, 7))


def test_dead_channels_stay_dead() -> None:
    """A row or a column of zeros has factors of zeros, not of what the decomposition rounds."""
    w = of_rank(3, 12, 16, 1, 1)
    w[5], w[:, 7] = 0, 0
    model = parse("(double[2,16,5,7] x) => (double[N] y) { y = Conv(x, w) }", w=w)
    result, _, _ = run(model, FactorRanks())
    first, second = (numpy_helper.to_array(t) for t in result.graph.initializer if len(t.dims) == 4)
    assert not first[:, 7].any()
    assert not second[5].any()
    same(model, result, x=normal(2, 16, 5, 7))


def test_a_stencil_keeps_its_taps_first() -> None:
    body = "(double[2,8,9,7] x) => (double[N] y) { y = Conv<pads=[1,1,1,1], strides=[2,1]>(x, w) }"
    model = parse(body, w=of_rank(5, 10, 8, 3, 3))
    result, _, _ = run(model, FactorRanks())
    assert [n.attribute[2].ints for n in result.graph.node if n.op_type == "Conv"] == [[3, 3], [1, 1]]
    same(model, result, x=normal(2, 8, 9, 7))


@pytest.mark.parametrize("flip", [0, 1])
def test_matrix_products(flip: int) -> None:
    w = of_rank(2, 12, 9)
    gemm = parse(
        f"(double[5,9] x) => (double[N] y) {{ y = Gemm<transB={flip}>(x, w, b) }}", w=w if flip else w.T, b=normal(12)
    )
    result, _, _ = run(gemm, FactorRanks())
    assert ops(result) == {"Gemm": 2}
    same(gemm, result, x=normal(5, 9))
    matmul = parse("(double[3,5,9] x) => (double[N] y) { p = MatMul(x, w) y = Add(p, b) }", w=w.T, b=normal(12))
    result, _, _ = run(matmul, FactorRanks())
    assert ops(result) == {"MatMul": 2, "Add": 1}
    same(matmul, result, x=normal(3, 5, 9))


@pytest.mark.parametrize(
    ("w", "attributes"),
    [
        (normal(12, 16, 1, 1), ""),  # of full rank
        (of_rank(7, 12, 16, 1, 1), ""),  # 7 · (12 + 16) > 12 · 16
        (of_rank(3, 12, 16, 1, 1) + 1e-6 * normal(12, 16, 1, 1, seed=5), ""),  # nearly of low rank
        (np.stack([of_rank(1, 6, 8, 1, 1)] * 2).reshape(12, 8, 1, 1), "<group=2>"),
    ],
)
def test_refusals(w: np.ndarray, attributes: str) -> None:
    model = parse(f"(double[2,16,5,7] x) => (double[N] y) {{ y = Conv{attributes}(x, w) }}", w=w)
    assert run(model, FactorRanks())[0] is model


@pytest.mark.parametrize("size", [1e-5, 1e-7, 1e-12])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_channel_of_small_numbers_keeps_its_answers(size: float, axis: int) -> None:
    """It counts as much as the others, because a later map may enlarge it, or its input may be large."""
    w = of_rank(2, 24, 16)
    w[(5, slice(None)) if axis == 0 else (slice(None), 5)] = size * normal(16 if axis == 0 else 24, seed=7)
    model = parse("(float[8,16] x) => (float[N,24] y) { y = MatMul(x, w) }", w=w.T.astype(np.float32))
    result, outcome, _ = run(model, FactorRanks())
    assert outcome.rewrites[0].reason == "its 24×16 weights have rank 3, so two thin maps replace it"
    x = normal(8, 16, dtype=np.float32)
    if axis == 1:
        x[:, 5] /= size
    (expected,), (found,) = evaluate(model, x=x), evaluate(result, x=x)
    gap = np.abs(found - expected).max(axis=0) / np.abs(expected).max(axis=0)
    assert gap.max() < 1e-5


def test_a_channel_of_small_numbers_may_make_the_rank_too_high() -> None:
    w = of_rank(6, 12, 16)
    w[5] = 1e-9 * normal(16, seed=7)
    model = parse("(float[8,16] x) => (float[N,12] y) { y = MatMul(x, w) }", w=w.T.astype(np.float32))
    assert run(model, FactorRanks())[0] is model


def test_a_certificate_sees_a_channel_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(linear: LinearMap, relative_error: float) -> tuple[LinearMap, LinearMap]:
        weight = linear.weight.copy()
        weight[5] = 0
        return factor(LinearMap.of(linear.geometry, weight), relative_error)

    monkeypatch.setattr("pwopt.passes.factor_ranks.factor", lose)
    w = of_rank(2, 24, 16)
    w[5] = 1e-9 * normal(16, seed=7)
    model = parse("(float[8,16] x) => (float[N,24] y) { y = MatMul(x, w) }", w=w.T.astype(np.float32))
    with pytest.raises(AssertionError, match="status='failed'"):
        run(model, FactorRanks())


def test_half_precision_is_left_alone() -> None:
    w = of_rank(2, 12, 16, 1, 1).astype(np.float16)
    model = parse("(float16[2,16,5,7] x) => (float16[N] y) { y = Conv(x, w) }", w=w)
    assert run(model, FactorRanks())[0] is model


def test_a_shared_weight_is_left_alone() -> None:
    body = "(double[2,12,5,7] x) => (double[N] y) { r = Conv(x, w) s = Relu(r) y = Conv(s, w) }"
    model = parse(body, w=of_rank(2, 12, 12, 1, 1))
    assert run(model, FactorRanks())[0] is model


@settings(max_examples=80)
@given(st.integers(4, 60), st.integers(4, 60), st.data())
def test_low_ranks_are_not_missed(rows: int, columns: int, data: st.DataObject) -> None:
    most = (rows * columns - 1) // (rows + columns)
    rank = data.draw(st.integers(1, max(1, most)))
    scales = 10 ** np.linspace(0, data.draw(st.floats(0, 3)), rank)
    matrix = (normal(rows, rank) * scales @ normal(rank, columns, seed=1)).astype(np.float32).astype(np.float64)
    assert most == 0 or low_rank(matrix, 2.0**-24)


def test_full_ranks_are_told_without_a_decomposition() -> None:
    assert not low_rank(normal(64, 96), 2.0**-24)
    assert not low_rank(np.zeros((8, 8)), 2.0**-24)
