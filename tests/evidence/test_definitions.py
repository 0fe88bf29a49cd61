"""Definitions of operators for certificates, against onnxruntime, where onnx's reference evaluator differs from it."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import open_session
from onnx import TensorProto, helper, numpy_helper

from pwopt.evidence.evaluation import Side, UnfitError
from pwopt.graph.files import from_proto
from pwopt.graph.journal import State
from pwopt.graph.view import View

ort = pytest.importorskip("onnxruntime")
RNG = np.random.default_rng(0)
X = RNG.standard_normal((1, 3, 4, 5)).astype(np.float32)
PLANE = RNG.standard_normal((1, 2, 15, 12)).astype(np.float32)
THIN = RNG.standard_normal((1, 3, 1, 5)).astype(np.float32)


def check(op: str, opset: int, x: np.ndarray, *constants: np.ndarray | None, **attributes: Any) -> None:
    """Evaluate one operator both ways."""
    names = [f"c{i}" if c is not None else "" for i, c in enumerate(constants)]
    graph = helper.make_graph(
        [helper.make_node(op, ["x", *names], ["y"], **attributes)], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [onnx.ValueInfoProto(name="y")],
        [numpy_helper.from_array(c, n) for n, c in zip(names, constants, strict=True) if c is not None],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    (expected,) = open_session(model, optimise=False).run(None, {"x": x})
    read = from_proto(model).graph
    side = Side(View(read), [State.of(n) for n in read.nodes])
    found = side.run({read.inputs[0]: x.astype(np.float64)}, None)[read.outputs[0]]
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axes", [[0, 2], [1, 3], [3, 1], [2, 0], [0, 1]])
def test_unsqueeze(axes: list[int]) -> None:
    check("Unsqueeze", 11, X, axes=axes)
    check("Unsqueeze", 13, X, np.array(axes))


def test_squeeze() -> None:
    for opset in (11, 13):
        check("Squeeze", opset, THIN)
    check("Squeeze", 11, THIN, axes=[0, 2])
    check("Squeeze", 13, THIN, np.array([0, -2]))
    check("Squeeze", 13, THIN, np.array([], np.int64))


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax", "Hardmax"])
@pytest.mark.parametrize("opset", [11, 13])
def test_softmax(op: str, opset: int) -> None:
    check(op, opset, X)
    for axis in (0, 1, 2, 3, -1):
        check(op, opset, X, axis=axis)


def test_lp_normalization() -> None:
    for axis, p in itertools.product((0, 1, -1), (1, 2)):
        check("LpNormalization", 13, X, axis=axis, p=p)


def test_indices_of_a_scalar() -> None:
    for value in (0.0, 3.0):
        check("NonZero", 13, np.array(value, np.float32))
    check("NonZero", 13, np.round(X))


@pytest.mark.parametrize("pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (2, 1), (4, 3), (3, 3)])
def test_automatic_padding(pad: str, kernel: int, stride: int) -> None:
    weights = np.random.default_rng(1).standard_normal((3, 2, kernel, kernel)).astype(np.float32)
    check("Conv", 13, PLANE, weights, strides=[stride] * 2, auto_pad=pad)
    for op in ("MaxPool", "AveragePool"):
        check(op, 13, PLANE, kernel_shape=[kernel] * 2, strides=[stride] * 2, auto_pad=pad)


@pytest.mark.parametrize("pad", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 4), (2, 5), (1, 5), (1, 2)])
def test_padding_that_crops_has_no_certificate(pad: str, kernel: int, stride: int) -> None:
    """onnxruntime crops one position less than half of what exceeds the kernel, in some cases."""
    with pytest.raises(UnfitError, match="exceeds its kernel"):
        check("Conv", 13, PLANE, np.ones((3, 2, kernel, kernel), np.float32), strides=[stride] * 2, auto_pad=pad)


TRANSFORMS = ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel", "tf_half_pixel_for_nn")


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("mode", ["linear", "cubic", "round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
def test_resize(transform: str, mode: str) -> None:
    rule = {"mode": mode} if mode in ("linear", "cubic") else {"mode": "nearest", "nearest_mode": mode}
    for scales in ((2, 2), (0.5, 0.6), (1.5, 0.75), (0.6, 3)):
        given = np.array([1, 1, *scales], np.float32)
        check("Resize", 11, X, np.array([], np.float32), given, coordinate_transformation_mode=transform, **rule)
    sizes = np.array([1, 3, 7, 3])
    if transform != "tf_half_pixel_for_nn":
        check("Resize", 13, X, None, None, sizes, coordinate_transformation_mode=transform, **rule)


def test_the_reference_evaluator_is_not_used_where_it_is_wrong() -> None:
    with pytest.raises(UnfitError, match="known to be wrong for LpPool"):
        check("LpPool", 18, PLANE, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)
    weights = np.ones((2, 3, 2, 2), np.float32)
    with pytest.raises(UnfitError, match="known to be wrong for ConvTranspose"):
        check("ConvTranspose", 13, PLANE, weights, strides=[5, 5], auto_pad="SAME_UPPER")
    with pytest.raises(UnfitError, match="known to be wrong for Resize"):
        given = np.array([1, 1, 0.6, 0.6], np.float32)
        attrs = {"mode": "cubic", "antialias": 1, "coordinate_transformation_mode": "align_corners"}
        check("Resize", 18, X, None, given, **attrs)


@pytest.mark.parametrize("attrs", [{"cubic_coeff_a": -0.5}, {"exclude_outside": 1}, {"axes": [3, 2]}])
def test_cubic_resize(attrs: dict[str, Any]) -> None:
    scales = [2, 1.5] if "axes" in attrs else [1, 1, 1.5, 2]
    check("Resize", 18, X, None, np.array(scales, np.float32), mode="cubic", **attrs)


@pytest.mark.parametrize("size", [1, 3, 5, 9])
def test_lrn(size: int) -> None:
    check("LRN", 13, X, size=size, alpha=0.1, beta=0.6, bias=2.0)
