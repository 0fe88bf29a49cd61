from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from helpers import eager, normal, open_session, ops, parse, reasons, run

from pwopt.algebra.interpolation import TRANSFORMATIONS, Interpolation
from pwopt.passes import LowerResize

F = np.float32
SIZED = "(float[N,3,8,6] x) => (float[A,B,C,D] y) { y = Resize<%s>(x, , , z) }"
SCALED = "(float[N,3,8,6] x) => (float[A,B,C,D] y) { y = Resize<%s>(x, , z) }"


def on_onnxruntime(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = open_session(model)
    return np.asarray(session.run(None, {"x": x})[0])


def to(*sizes: int) -> np.ndarray:
    return np.array([1, 3, *sizes], np.int64)


@pytest.mark.parametrize(
    ("mode", "transformation", "size"),
    list(itertools.product(["linear", "cubic"], TRANSFORMATIONS, [(16, 12), (5, 9), (1, 6), (8, 15)])),
)
def test_every_mode_and_transformation(mode: str, transformation: str, size: tuple[int, int]) -> None:
    model = parse(
        f"(float[1,3,8,6] x) => (float[A,B,C,D] y) {{ y = Resize<mode='{mode}', "
        f"coordinate_transformation_mode='{transformation}'>(x, , , z) }}".replace("'", '"'), 19, z=to(*size)
    )  # fmt: skip
    result, outcome, _ = run(model, eager(LowerResize))
    assert ops(result) == {"MatMul": 2}, reasons(outcome)
    x = normal(1, 3, 8, 6, dtype=F)
    np.testing.assert_allclose(on_onnxruntime(result, x), on_onnxruntime(model, x), atol=1e-5)


@pytest.mark.parametrize("scales", [(2.0, 2.0), (1.5, 0.5), (1.0, 3.0)])
def test_scales_and_any_batch(scales: tuple[float, float]) -> None:
    model = parse(SCALED % 'mode="linear"', 17, z=np.array([1, 1, *scales], F))
    result, _, _ = run(model, eager(LowerResize))
    assert ops(result) == {"MatMul": 2}
    x = normal(4, 3, 8, 6, dtype=F)
    np.testing.assert_allclose(on_onnxruntime(result, x), on_onnxruntime(model, x), atol=1e-5)


def test_axes() -> None:
    model = parse(SCALED % 'mode="cubic", axes=[3, 2]', 18, z=np.array([2, 3], F))
    result, _, _ = run(model, eager(LowerResize))
    assert ops(result) == {"MatMul": 2}
    x = normal(2, 3, 8, 6, dtype=F)
    assert on_onnxruntime(result, x).shape == (2, 3, 24, 12)
    np.testing.assert_allclose(on_onnxruntime(result, x), on_onnxruntime(model, x), atol=1e-5)


@pytest.mark.parametrize(
    "body",
    [
        (SCALED % 'mode="nearest"'),
        (SCALED % 'mode="linear", antialias=1'),
        (SCALED % 'mode="linear", exclude_outside=1'),
        (SCALED % 'mode="linear"').replace("6]", "W]"),
        (SCALED % 'mode="linear"').replace("float[", "double["),
    ],
)
def test_what_matrices_do_not_describe_stays(body: str) -> None:
    model = parse(body, 18, z=np.array([1, 1, 2, 2], F))
    assert run(model, eager(LowerResize))[0] is model


def test_other_axes_stay() -> None:
    model = parse(SCALED % 'mode="linear"', 18, z=np.array([1, 2, 2, 2], F))
    assert run(model, eager(LowerResize))[0] is model


def test_a_policy_on_the_aspect_ratio_stays() -> None:
    model = parse(SIZED.replace("[N", "[1") % 'mode="linear", keep_aspect_ratio_policy="not_larger"', 18, z=to(20, 12))
    assert run(model, eager(LowerResize))[0] is model


def test_infinity_spreads_over_the_image_of_its_channel() -> None:
    """The rule for finite inputs: finite channels stay right beside others."""
    model = parse(SCALED % 'mode="linear"', 17, z=np.array([1, 1, 2, 2], F))
    result, _, _ = run(model, eager(LowerResize))
    x = normal(2, 3, 8, 6, dtype=F)
    x[0, 0, 2, 3] = np.inf
    expected, found = on_onnxruntime(model, x), on_onnxruntime(result, x)
    finite = np.isfinite(x).all(axis=(2, 3))
    np.testing.assert_allclose(found[finite], expected[finite], atol=1e-5)
    assert np.isnan(found[0, 0]).any()


def test_linear_interpolation_waits_for_a_race() -> None:
    body = '(float[1,3,64,64] x) => (float[A,B,C,D] y) { y = Resize<mode="%s">(x, , z) }'
    linear, cubic = (parse(body % mode, 17, z=np.array([1, 1, 2, 2], F)) for mode in ("linear", "cubic"))
    result, outcome, _ = run(linear, LowerResize())
    assert result is linear
    assert "only measuring can tell" in reasons(outcome)[0]
    assert ops(run(cubic, LowerResize())[0]) == {"MatMul": 2}


@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
def test_cubic_products_are_nearer_to_the_exact_result_than_the_kernel(transformation: str) -> None:
    """The kernel rounds positions to float32, so it is off by more, the further the positions are from the corner."""
    attributes = f'mode="cubic", coordinate_transformation_mode="{transformation}"'
    body = f"(float[1,1,40,40] x) => (float[A,B,C,D] y) {{ y = Resize<{attributes}>(x, , s) }}"
    model = parse(body, 19, s=np.array([1, 1, 4.75, 4.75], F))
    result, outcome, _ = run(model, eager(LowerResize))
    (rewrite,) = outcome.rewrites
    assert rewrite.residual <= 2.0**-24
    x = normal(1, 1, 40, 40, dtype=F)
    matrix = Interpolation("cubic", transformation).matrix(40, 190, 4.75)
    exact = matrix @ x[0, 0].astype(np.float64) @ matrix.T
    kernel, products = (np.abs(on_onnxruntime(m, x)[0, 0] - exact).max() / np.abs(exact).max() for m in (model, result))
    assert products < 5e-7
    assert kernel > 2 * products
