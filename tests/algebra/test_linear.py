"""The algebra against onnx's reference evaluator, on random maps of rank 1 to 3."""

from __future__ import annotations

import itertools
import operator

import numpy as np
import pytest
from helpers import normal
from hypothesis import assume, event, example, given, settings
from hypothesis import strategies as st
from linear_maps import apply
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from pwopt.algebra.geometry import Refusal, RefusedError, align_geometry, attempt, compose_geometry
from pwopt.algebra.linear import LinearMap, compose, hcat, split_inputs, stack
from pwopt.algebra.ranks import factor

CHANNELS = (1, 2, 4, 6)


def on_onnx(linear: LinearMap, x: np.ndarray) -> np.ndarray:
    """The map as an ONNX Conv in float64, by the reference evaluator: an implementation that is not ours."""
    g = linear.geometry
    node = helper.make_node(
        "Conv",
        ["x", "w", "b"],
        ["y"],
        kernel_shape=g.kernel,
        strides=g.strides,
        dilations=g.dilations,
        pads=g.pads,
        group=g.groups,
    )
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.DOUBLE, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.DOUBLE, None)],
        [numpy_helper.from_array(linear.weight, "w"), numpy_helper.from_array(linear.bias, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    return np.asarray(ReferenceEvaluator(model).run(None, {"x": x})[0])


@st.composite
def maps(draw: st.DrawFn, out: int, inn: int, rank: int) -> LinearMap:
    groups = draw(st.sampled_from([g for g in (1, 2, 3, 4, 6) if out % g == 0 and inn % g == 0]))
    small = 3 if rank < 3 else 2
    sizes = st.tuples(*[st.integers(1, small)] * rank)
    kernel = draw(sizes)
    pads = draw(st.one_of(st.just((0,) * 2 * rank), st.tuples(*[st.integers(0, 2)] * 2 * rank)))
    seed = draw(st.integers(0, 2**31))
    rng = np.random.default_rng(seed)
    bias = rng.normal(size=out) if draw(st.booleans()) else None
    return LinearMap.conv(
        rng.normal(size=(out, inn // groups, *kernel)),
        bias,
        groups=groups,
        strides=draw(st.tuples(*[st.integers(1, 2)] * rank)),
        dilations=draw(st.tuples(*[st.integers(1, 2)] * rank)),
        pads=pads,
    )


@st.composite
def chains(draw: st.DrawFn) -> tuple[LinearMap, LinearMap, np.ndarray]:
    rank = draw(st.integers(1, 3))
    inn, middle, out = (draw(st.sampled_from(CHANNELS)) for _ in range(3))
    space = draw(st.tuples(*[st.integers(9, 12) if rank < 3 else st.integers(7, 8)] * rank))
    x = np.random.default_rng(0).normal(size=(2, inn, *space))
    return draw(maps(middle, inn, rank)), draw(maps(out, middle, rank)), x


def padded_after_bias() -> tuple[LinearMap, LinearMap, np.ndarray]:
    rng = np.random.default_rng(0)
    first = LinearMap.conv(rng.normal(size=(2, 2, 1)), rng.normal(size=2))
    return first, LinearMap.conv(rng.normal(size=(2, 2, 3)), pads=(1, 1)), rng.normal(size=(1, 2, 9))


def padded_after_stencil() -> tuple[LinearMap, LinearMap, np.ndarray]:
    rng = np.random.default_rng(0)
    first = LinearMap.conv(rng.normal(size=(2, 2, 3)))
    return first, LinearMap.conv(rng.normal(size=(2, 2, 3)), pads=(1, 1)), rng.normal(size=(1, 2, 9))


@settings(max_examples=250)
@given(chains())
@example(padded_after_bias())
@example(padded_after_stencil())
def test_a_composition_is_exact_or_refused(chain: tuple[LinearMap, LinearMap, np.ndarray]) -> None:
    first, second, x = chain
    composed = attempt(operator.matmul, second, first)
    if isinstance(composed, Refusal):
        event("refused")
        return
    event("composed")
    middle = on_onnx(first, x)
    reach = [d * (k - 1) for d, k in zip(second.geometry.dilations, second.geometry.kernel, strict=True)]
    assume(all(s > r for s, r in zip(middle.shape[2:], reach, strict=True)))
    expected = on_onnx(second, middle)
    found = on_onnx(composed, x)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-9)
    np.testing.assert_allclose(apply(composed, x), expected, atol=1e-9)


@settings(max_examples=100)
@given(chains())
def test_a_composition_is_priced_without_its_numbers(chain: tuple[LinearMap, LinearMap, np.ndarray]) -> None:
    first, second, _ = chain
    geometry = compose_geometry(second.geometry, first.geometry)
    composed = attempt(operator.matmul, second, first)
    assert isinstance(geometry, Refusal) == isinstance(composed, Refusal)
    if isinstance(composed, LinearMap) and not isinstance(geometry, Refusal):
        assert composed.weight.size == geometry.weights == composed.geometry.weights


@pytest.mark.parametrize("chain", [padded_after_bias(), padded_after_stencil()])
def test_what_padding_forbids_is_refused_with_its_reason(chain: tuple[LinearMap, LinearMap, np.ndarray]) -> None:
    first, second, _ = chain
    with pytest.raises(RefusedError, match="padding"):
        second @ first


def test_separable_stencils_compose_per_axis() -> None:
    """1×3 then 3×1: each axis is padded by one of them only, so the 3×3 is exact at the border."""
    rng = np.random.default_rng(0)
    row = LinearMap.conv(rng.normal(size=(2, 2, 1, 3)), pads=(0, 1, 0, 1))
    column = LinearMap.conv(rng.normal(size=(2, 2, 3, 1)), rng.normal(size=2), pads=(1, 0, 1, 0))
    both = column @ row
    assert both.geometry.kernel == (3, 3)
    x = rng.normal(size=(1, 2, 6, 7))
    np.testing.assert_allclose(apply(both, x), apply(column, apply(row, x)), atol=1e-12)


@st.composite
def branches(draw: st.DrawFn) -> tuple[LinearMap, LinearMap, np.ndarray]:
    """Two maps of one input, half of the time aligned at their centres as in RepVGG."""
    rank, channels = draw(st.integers(1, 3)), draw(st.sampled_from(CHANNELS))
    x = np.random.default_rng(0).normal(size=(2, channels, *(8,) * rank))
    a, b = draw(maps(channels, channels, rank)), draw(maps(channels, channels, rank))
    if draw(st.booleans()):
        strides = draw(st.tuples(*[st.integers(1, 2)] * rank))
        a, b = (
            LinearMap.conv(
                m.weight[(..., *(slice(0, 2 * (k // 2) + 1) for k in m.geometry.kernel))],
                m.bias,
                groups=m.geometry.groups,
                strides=strides,
                dilations=m.geometry.dilations,
                pads=2
                * tuple(
                    d * ((min(k, 2 * (k // 2) + 1) - 1) // 2)
                    for d, k in zip(m.geometry.dilations, m.geometry.kernel, strict=True)
                ),
            )
            for m in (a, b)
        )
    return a, b, x


@settings(max_examples=250)
@given(branches())
def test_a_sum_is_exact_or_refused(pair: tuple[LinearMap, LinearMap, np.ndarray]) -> None:
    a, b, x = pair
    total = attempt(operator.add, a, b)
    if isinstance(total, Refusal):
        event("refused")
        return
    event("added")
    np.testing.assert_allclose(on_onnx(total, x), on_onnx(a, x) + on_onnx(b, x), atol=1e-9)


@settings(max_examples=100)
@given(branches())
def test_stack_and_hcat_are_exact_or_refused(pair: tuple[LinearMap, LinearMap, np.ndarray]) -> None:
    a, b, x = pair
    rows, columns, total = (attempt(operation, a, b) for operation in (stack, hcat, operator.add))
    assert isinstance(rows, Refusal) == isinstance(columns, Refusal) == isinstance(total, Refusal)
    if isinstance(rows, LinearMap) and isinstance(columns, LinearMap):
        ya, yb = on_onnx(a, x), on_onnx(b, x)
        np.testing.assert_allclose(on_onnx(rows, x), np.concatenate([ya, yb], 1), atol=1e-9)
        twice = np.concatenate([x, 2 * x], 1)
        np.testing.assert_allclose(on_onnx(columns, twice), ya + on_onnx(b, 2 * x), atol=1e-9)


def test_repvgg_block_is_one_convolution() -> None:
    rng = np.random.default_rng(0)
    k3 = LinearMap.conv(rng.normal(size=(4, 4, 3, 3)), pads=(1, 1, 1, 1))
    k1 = LinearMap.conv(rng.normal(size=(4, 4, 1, 1)))
    total = k3 + k1
    total = total + LinearMap.identity(4, rank=2)
    assert total.geometry.kernel == (3, 3)
    x = rng.normal(size=(1, 4, 5, 5))
    np.testing.assert_allclose(apply(total, x), apply(k3, x) + apply(k1, x) + x, atol=1e-12)


def test_depthwise_structure_is_kept() -> None:
    rng = np.random.default_rng(0)
    depthwise = LinearMap.conv(rng.normal(size=(6, 1, 3, 3)), groups=6, pads=(1, 1, 1, 1))
    scale = LinearMap.diagonal(rng.normal(size=6), rank=2)
    for composed in (scale @ depthwise, depthwise @ scale, depthwise + LinearMap.identity(6, rank=2)):
        assert composed.geometry.groups == 6
        assert composed.weight.size == 54


def test_grouped_structure_is_kept_through_a_diagonal() -> None:
    rng = np.random.default_rng(0)
    grouped = LinearMap.conv(rng.normal(size=(6, 2, 3)), groups=2)
    composed = grouped @ LinearMap.diagonal(rng.normal(size=4), rank=1)
    assert composed.geometry.groups == 2


@pytest.mark.parametrize(("g1", "g2"), list(itertools.product((1, 2, 3, 4, 6, 12), repeat=2)))
def test_every_pair_of_groupings(g1: int, g2: int) -> None:
    rng = np.random.default_rng(g1 * 20 + g2)
    first = LinearMap.conv(rng.normal(size=(12, 12 // g1, 1)), groups=g1)
    second = LinearMap.conv(rng.normal(size=(12, 12 // g2, 1)), groups=g2)
    composed = second @ first
    assert composed.geometry.groups == np.gcd(g1, g2)
    x = rng.normal(size=(1, 12, 3))
    np.testing.assert_allclose(apply(composed, x), apply(second, apply(first, x)), atol=1e-9)


@settings(max_examples=60)
@given(st.integers(1, 3), st.integers(1, 2), st.integers(0, 1), st.booleans(), st.integers(0, 10_000))
def test_transposed_maps_compose_with_pointwise_ones(k: int, s: int, p: int, before: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    assume(k > 2 * p)
    weight = rng.normal(size=(4, 6, k, k))  # ONNX: (in, out, *kernel)
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[s, s], pads=[p] * 4)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.DOUBLE, None)],
        [helper.make_tensor_value_info("y", TensorProto.DOUBLE, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])

    def transposed(x: np.ndarray) -> np.ndarray:
        return np.asarray(ReferenceEvaluator(model).run(None, {"x": x})[0])

    base = LinearMap.conv(weight.swapaxes(0, 1), strides=(s, s), pads=(p,) * 4)
    up = LinearMap.of(
        type(base.geometry)(6, 4, 1, (k, k), (s, s), (1, 1), (p,) * 4, transposed=True, output_padding=(0, 0)),
        base.weight,
    )
    x = rng.normal(size=(2, 4, 4, 5))
    np.testing.assert_allclose(apply(up, x), transposed(x), atol=1e-9)
    mix = LinearMap.pointwise(rng.normal(size=(4, 4) if before else (3, 6)), rank=2)
    composed = up @ mix if before else mix @ up
    expected = transposed(apply(mix, x)) if before else apply(mix, transposed(x))
    np.testing.assert_allclose(apply(composed, x), expected, atol=1e-9)


def test_a_bias_before_a_transposed_map_is_refused() -> None:
    base = LinearMap.conv(np.ones((2, 2, 2)))
    geometry = type(base.geometry)(2, 2, 1, (2,), (2,), (1,), (0, 0), transposed=True, output_padding=(0,))
    with pytest.raises(RefusedError, match="bias"):
        LinearMap.of(geometry, np.ones((2, 2, 2))) @ LinearMap.diagonal([1, 1], [1, 0], rank=1)


def test_selection_and_spread() -> None:
    x = np.arange(8.0).reshape(1, 4, 2)
    np.testing.assert_array_equal(apply(LinearMap.selection([2, 0, -1], 4), x)[0], [x[0, 2], x[0, 0], [0, 0]])
    wide = LinearMap.diagonal(2.0, 1.0).broadcast(4)
    np.testing.assert_array_equal(apply(wide, x), 2 * x + 1)


def test_rank_and_factor() -> None:
    rng = np.random.default_rng(0)
    low = LinearMap.conv(
        (rng.normal(size=(32, 3)) @ rng.normal(size=(3, 36))).reshape(32, 4, 3, 3), rng.normal(size=32)
    )
    first, second = factor(low, 1e-12)
    assert first.geometry.out_channels == 3
    assert first.weight.size + second.weight.size == 3 * (32 + 36)
    x = rng.normal(size=(1, 4, 6, 6))
    np.testing.assert_allclose(apply(second, apply(first, x)), apply(low, x), atol=1e-9)


def test_full_rank_is_not_factored() -> None:
    with pytest.raises(RefusedError, match="too high"):
        factor(LinearMap.pointwise(np.random.default_rng(0).normal(size=(8, 8))), 1e-12)


def test_unequal_strides_and_sizes_are_not_aligned() -> None:
    a = LinearMap.conv(np.ones((1, 1, 3)), pads=(1, 1))
    for b, word in (
        (LinearMap.conv(np.ones((1, 1, 3)), strides=(2,), pads=(1, 1)), "strides"),
        (LinearMap.conv(np.ones((1, 1, 3))), "sizes"),
    ):
        refused = align_geometry([a.geometry, b.geometry])
        assert isinstance(refused, Refusal)
        assert word in refused.reason


def test_numbers_that_do_not_fit_raise() -> None:
    with pytest.raises(ValueError, match="groups"):
        LinearMap.conv(np.ones((3, 1, 1)), groups=2)


@pytest.mark.parametrize("precision", [0.0, 2.0**-22])
def test_a_bias_that_cancels_to_rounding_is_zero(precision: float) -> None:
    bias = normal(4)
    first = LinearMap.pointwise(normal(4, 3), bias)
    back = LinearMap.diagonal(np.ones(4), -bias.astype(np.float32).astype(np.float64))
    composed = compose(back, first, precision)
    assert composed.geometry.biased == (precision == 0)
    off = compose(LinearMap.diagonal(np.ones(4), -bias * (1 + 1e-5)), first, precision)
    assert off.geometry.biased


def test_split_inputs_is_the_inverse_of_hcat() -> None:
    linear = LinearMap.conv(normal(5, 9, 3, 3), normal(5), pads=[1, 1, 1, 1])
    joined = hcat(*split_inputs(linear, [2, 3, 4]))
    np.testing.assert_array_equal(joined.weight, linear.weight)
    np.testing.assert_array_equal(joined.bias, linear.bias)


@pytest.mark.parametrize("strides", [(1, 1), (2, 3)])
def test_paddings_add_up_around_one_tap(strides: tuple[int, int]) -> None:
    first = LinearMap.conv(normal(4, 3, 1, 1), pads=[1, 0, 2, 3], strides=strides)
    second = LinearMap.conv(normal(5, 4, 3, 3), normal(5), pads=[2, 1, 0, 1], dilations=[1, 2])
    composed = second @ first
    x = normal(2, 3, 9, 11)
    np.testing.assert_allclose(apply(composed, x), apply(second, apply(first, x)), atol=1e-12)
