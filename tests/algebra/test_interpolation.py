"""The matrices of interpolation are those of onnxruntime's Resize, applied to unit vectors."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import open_session
from onnx import TensorProto, helper

from pwopt.algebra.interpolation import TRANSFORMATIONS, Interpolation, read_by_taps

CASES = list(
    itertools.product(["linear", "cubic"], TRANSFORMATIONS, [(5, 10), (6, 4), (7, 1), (1, 4), (9, 13), (8, 3)])
)


def resized(count: int, size: int, **attrs: Any) -> np.ndarray:
    """The columns that onnxruntime gives for unit vectors."""
    node = helper.make_node("Resize", ["x", "", "", "sizes"], ["y"], **attrs)
    shape = [1, 1, count, count]  # two axes, since onnxruntime has a kernel of its own for those
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, shape),
        helper.make_tensor_value_info("sizes", TensorProto.INT64, [4]),
    ]
    graph = helper.make_graph([node], "g", inputs, [onnx.ValueInfoProto(name="y")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    session = open_session(model)
    feeds = {"x": np.eye(count, dtype=np.float32)[None, None], "sizes": np.array([1, 1, size, count])}
    return np.asarray(session.run(None, feeds)[0])[0, 0]


@pytest.mark.parametrize(("mode", "transformation", "sizes"), CASES)
def test_the_matrix_is_what_onnxruntime_does_to_unit_vectors(
    mode: Any, transformation: str, sizes: tuple[int, int]
) -> None:
    count, size = sizes
    matrix = Interpolation(mode, transformation).matrix(count, size, float(np.float32(size / count)))
    expected = resized(count, size, mode=mode, coordinate_transformation_mode=transformation)
    np.testing.assert_allclose(matrix, expected, atol=3e-6)


@pytest.mark.parametrize("sizes", [(5, 10), (6, 4), (9, 13)])
def test_cubic_attributes(sizes: tuple[int, int]) -> None:
    count, size = sizes
    matrix = Interpolation("cubic", "half_pixel", -0.5, True).matrix(count, size, float(np.float32(size / count)))
    expected = resized(count, size, mode="cubic", cubic_coeff_a=-0.5, exclude_outside=1)
    np.testing.assert_allclose(matrix, expected, atol=3e-6)


def test_rows_sum_to_one() -> None:
    for mode, transformation, (count, size) in CASES:
        matrix = Interpolation(mode, transformation).matrix(count, size, size / count)  # type: ignore[arg-type]
        np.testing.assert_allclose(matrix.sum(axis=1), 1)


def test_an_unknown_transformation_is_an_error() -> None:
    with pytest.raises(ValueError, match="tf_crop_and_resize"):
        Interpolation("linear", "tf_crop_and_resize").matrix(2, 4, 2.0)


@pytest.mark.parametrize(
    ("taps", "stride", "dilation", "pads"), [(3, 1, 1, (1, 1)), (3, 2, 1, (0, 2)), (2, 1, 3, (0, 0)), (3, 3, 2, (2, 1))]
)
def test_what_taps_read(taps: int, stride: int, dilation: int, pads: tuple[int, int]) -> None:
    """A convolution of an interpolated axis is a sum over taps of products with the small axis."""
    numbers = np.random.default_rng(0)
    matrix, x, w = Interpolation("linear").matrix(5, 13, 2.6), numbers.normal(size=5), numbers.normal(size=taps)
    padded = np.pad(matrix @ x, pads)
    reach = dilation * (taps - 1) + 1
    expected = [padded[p : p + reach : dilation] @ w for p in range(0, len(padded) - reach + 1, stride)]
    found = read_by_taps(matrix, taps, stride, dilation, pads)
    assert found.shape == (taps, len(expected), 5)
    np.testing.assert_allclose(np.einsum("k,kpc,c", w, found, x), expected, atol=1e-12)


def test_a_kernel_longer_than_the_axis_reads_nothing() -> None:
    assert read_by_taps(np.eye(2), 4, 1, 1, (0, 0)).shape == (4, 0, 2)
