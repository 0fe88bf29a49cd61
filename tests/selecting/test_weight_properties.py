"""The weights of pointwise maps against what they were made to be."""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers import MODELS, normal, parse

import pwopt
from pwopt.selecting.weight_properties import MAX_SPECTRUM_WEIGHTS, MapProperties, effective_rank, spectrum

ORTHOGONAL = np.linalg.qr(normal(6, 6))[0]


def only(w: np.ndarray, body: str = "y = Conv(x, w)", dtype: type = np.float64, **weights: np.ndarray) -> MapProperties:
    kind = "double" if dtype is np.float64 else "float"
    model = parse(f"({kind}[1,6,4,5] x) => ({kind}[N] y) {{ {body} }}", w=w.astype(dtype), **weights)
    (found,) = pwopt.properties(model).maps
    return found


@pytest.mark.parametrize(
    ("matrix", "kind"),
    [
        (np.eye(6)[[3, 1, 0, 5, 4, 2]], "permutation"),
        (np.eye(6)[[3, 3, 0]], "selection"),
        (np.eye(6)[[3, 1]] * np.array([[1], [0]]), "selection"),
        (np.diag(normal(6)), "diagonal"),
        (ORTHOGONAL, "orthogonal"),
        (normal(6, 2) @ normal(2, 6, seed=1), "low rank"),
        (normal(6, 6), "dense"),
    ],
)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_kinds(matrix: np.ndarray, kind: str, dtype: type) -> None:
    assert only(matrix[:, :, None, None], dtype=dtype).kind == kind


def test_figures_are_those_of_the_matrix() -> None:
    w = normal(4, 6)
    found = only(w[:, :, None, None])
    values = np.linalg.svd(w, compute_uv=False)
    np.testing.assert_allclose(found.singular_values, values)
    assert (found.rows, found.columns, found.groups, found.rank) == (4, 6, 1, 4)
    assert found.condition == pytest.approx(values[0] / values[-1])
    assert found.orthogonality_defect == pytest.approx(np.linalg.norm(w.T @ w - np.eye(6), 2))
    np.testing.assert_allclose(found.column_sums, w.sum(0))
    p = values / values.sum()
    assert found.effective_rank == pytest.approx(math.exp(-np.sum(p * np.log(p))))
    # 20 positions: 2·24 operations each; 6 + 4 channels in and out, 24 weights, 8 bytes each
    assert found.intensity == pytest.approx(2 * 20 * 24 / (8 * (20 * 10 + 24)))


def test_a_wide_map_keeps_no_norm_and_a_tall_isometry_does() -> None:
    assert only(ORTHOGONAL[:4, :, None, None]).orthogonality_defect == pytest.approx(1)
    tall = np.linalg.qr(normal(9, 6))[0]
    assert only(tall[:, :, None, None]).orthogonality_defect == pytest.approx(0, abs=1e-12)


def test_groups_are_blocks_of_one_matrix() -> None:
    w = normal(4, 3)
    found = only(w[:, :, None, None], body="y = Conv<group=2>(x, w)")
    whole = np.zeros((4, 6))
    whole[:2, :3], whole[2:, 3:] = w[:2], w[2:]
    np.testing.assert_allclose(found.singular_values, np.linalg.svd(whole, compute_uv=False))
    np.testing.assert_allclose(found.column_sums, whole.sum(0))
    assert (found.groups, found.rank) == (2, 4)


def test_dead_and_constant_channels() -> None:
    w = normal(4, 6)
    w[:, [1, 4]] = 0
    w[2] = 0
    found = only(w[:, :, None, None])
    assert (found.dead_inputs, found.constant_outputs, found.rank) == ((1, 4), (2,), 3)
    assert math.isinf(found.condition or 0) or (found.condition or 0) > 1e15
    zero = only(np.zeros((4, 6, 1, 1)))
    assert (zero.rank, zero.effective_rank) == (0, 0)


def test_effective_rank_counts_equal_values() -> None:
    assert effective_rank(np.ones(7)) == pytest.approx(7)
    assert effective_rank(np.array([1.0, 0, 0])) == pytest.approx(1)


def test_matrix_products_are_read_the_right_way_round() -> None:
    w = normal(6, 4)
    model = parse("(double[3,6] x) => (double[N] y) { y = MatMul(x, w) }", w=w)
    (found,) = pwopt.properties(model).maps
    assert (found.columns, found.rows) == (6, 4)
    np.testing.assert_allclose(found.column_sums, w.sum(1))


def test_what_is_too_large_has_no_spectrum() -> None:
    assert spectrum(np.broadcast_to(0.0, (1, 1, MAX_SPECTRUM_WEIGHTS + 1))) is None


def test_only_pointwise_maps_are_listed() -> None:
    found = pwopt.properties(MODELS / "network_in_network.onnx")
    assert [(m.columns, m.rows) for m in found] == [(96, 80), (80, 48), (64, 64), (64, 100)]
    assert found.shapes
