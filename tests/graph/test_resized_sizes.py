"""Sizes after a Resize where onnx's inference and onnxruntime's kernel round differently."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from helpers import eager, normal, open_session, ops, parse, run

import pwopt
from pwopt.graph.disagreements import is_ambiguous
from pwopt.graph.shapes import infer
from pwopt.passes import LowerResize

ort = pytest.importorskip("onnxruntime")
F = np.float32
RESIZED = '(float[1,4,10,10] x) => (float[A,B,C,D] y) { r = Resize<mode="linear">(x, , s) y = Relu(r) }'


def on_onnxruntime(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    return np.asarray(open_session(model, optimise=False).run(None, {"x": x})[0])


def test_a_size_is_ambiguous_if_types_round_it_differently() -> None:
    assert is_ambiguous(10, 1.4)
    assert is_ambiguous(20, 0.7)
    assert not is_ambiguous(11, 1.4)
    assert not is_ambiguous(10, 1.5)
    assert not is_ambiguous(1 << 20, 0.25)
    assert is_ambiguous(10, float("nan"))
    assert is_ambiguous(10, float("inf"))


@pytest.mark.parametrize(
    ("scales", "sizes"),
    [
        ((1.5, 2.0), (1, 4, 15, 20)),
        ((1.4, 2.0), (1, 4, None, 20)),
        ((2.0, 0.7), (1, 4, 20, None)),
        ((1.4, 1.3), (1, 4, None, None)),
    ],
)
def test_only_ambiguous_sizes_are_unknown(scales: tuple[float, float], sizes: tuple[int | None, ...]) -> None:
    found = infer(parse(RESIZED, 17, s=np.array([1, 1, *scales], F)))
    for name in ("r", "y"):
        shape = found[name][1]
        assert shape is not None
        assert tuple(d if isinstance(d, int) else None for d in shape) == sizes


def test_the_axes_and_the_type_of_a_resize_are_respected() -> None:
    body = (
        '(float16[1,10,10,4] x) => (float16[A,B,C,D] y) { r = Resize<mode="linear", axes=[2, -3]>(x, , s) y = Relu(r) }'
    )
    shape = infer(parse(body, 18, s=np.array([1.4, 1.5], F)))["y"][1]
    assert shape is not None
    assert (shape[0], shape[1], shape[3]) == (1, 15, 4)
    assert not isinstance(shape[2], int)


@pytest.mark.parametrize("declared", [False, True])
@pytest.mark.parametrize("scale", [1.4, 1.3])
def test_a_slice_that_cuts_an_uncertain_position_remains(scale: float, declared: bool) -> None:
    """onnx infers 13 positions after 10 × 1.4, so the Slice to 13 seemed to do nothing."""
    end = round(10 * scale) - 1
    body = '(float[1,4,10,10] x) => (float[A,B,C,D] y) { r = Resize<mode="nearest">(x, , s) y = Slice(r, zero, end, axis) }'
    constants = {"zero": np.array([0]), "end": np.array([end]), "axis": np.array([2])}
    model = parse(body, 17, s=np.array([1, 1, scale, scale], F), **constants)
    if declared:
        model = onnx.shape_inference.infer_shapes(model)
    x = normal(1, 4, 10, 10, dtype=F)
    expected = on_onnxruntime(model, x)
    assert expected.shape == (1, 4, end, end + 1)
    result = pwopt.optimize(model, cost="analytic", verify=False).model
    np.testing.assert_array_equal(on_onnxruntime(result, x), expected)


def test_an_uncertain_size_is_not_written_as_a_product() -> None:
    model = parse(RESIZED, 17, s=np.array([1, 1, 1.4, 1.4], F))
    assert run(model, eager(LowerResize))[0] is model


def test_a_constant_of_uncertain_size_is_not_folded() -> None:
    body = '(float[1] x) => (float[A,B,C,D] y) { r = Resize<mode="linear">(c, , s) y = Mul(x, r) }'
    model = parse(body, 17, s=np.array([1, 1, 1.4, 1.4], F), c=normal(1, 1, 10, 10, dtype=F))
    result = pwopt.optimize(model, cost="analytic", verify=False).model
    assert ops(result)["Resize"] == 1
    assert on_onnxruntime(result, np.ones(1, F)).shape == (1, 1, 14, 14)
