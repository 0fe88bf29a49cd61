from __future__ import annotations

import helpers
import numpy as np
import onnx
import pytest
from helpers import build, normal, ops, reasons, run, same
from hypothesis import given, settings
from hypothesis import strategies as st

from pwopt.graph.files import from_proto
from pwopt.graph.shapes import infer
from pwopt.graph.view import View
from pwopt.maps.cost import measure
from pwopt.passes import FractionalStride, Polyphase
from pwopt.rewriting.driver import Pass

BOTH = [Polyphase, FractionalStride]
NEAREST = 'mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"'
UP = f"u = Resize<{NEAREST}>(x, , s) "
HEAD = "(double[2,4,5,7] x) => (double[N] y) "
BESIDE = "(double[2,4,5,7] x, double[2,3,10,14] z) => (double[N] y) "
CONSTANTS = {
    "s": np.array([1, 1, 2, 2], np.float32),
    "w": normal(6, 4, 3, 3),
    "b": normal(6),
    "d": normal(4, 1, 3, 3),
    "v": normal(6, 7, 3, 3),
}
X, Z = normal(2, 4, 5, 7), normal(2, 3, 10, 14, seed=1)


def eager(kind: type[Pass] = Polyphase) -> Pass:
    """The pass on maps of any size, whatever they save."""
    p = helpers.eager(kind)
    p.min_gain = -1e9  # type: ignore[attr-defined]
    return p


def macs(model: onnx.ModelProto) -> int:
    return measure(View(from_proto(model).graph)).macs


def test_four_phases_of_a_decoder() -> None:
    model = build(HEAD + f"{{ {UP} c = Conv<pads=[1,1,1,1]>(u, w, b) y = Relu(c) }}", CONSTANTS)
    result, outcome, _ = run(model, eager())
    assert ops(result) == {"Conv": 4, "Relu": 4, "Concat": 3, "Transpose": 3, "Reshape": 3}
    assert [list(n.attribute[2].ints) for n in result.graph.node if n.op_type == "Conv"] == [[2, 2]] * 4
    assert macs(result) * 36 == macs(model) * 16
    (rewrite,) = outcome.rewrites
    assert rewrite.certificate is not None
    assert rewrite.certificate.status == "tested"
    assert rewrite.reason == "3×3 4→6 after nearest upsampling by 2×2 becomes 4 smaller convolutions before it"
    same(model, result, x=X)


def test_one_transposed_convolution() -> None:
    model = build(HEAD + f"{{ {UP} c = Conv<pads=[1,1,1,1]>(u, w, b) y = Relu(c) }}", CONSTANTS)
    result, outcome, _ = run(model, eager(FractionalStride))
    assert ops(result) == {"ConvTranspose": 1, "Relu": 1}
    assert macs(result) * 36 == macs(model) * 16
    assert outcome.rewrites[0].certificate is not None
    assert outcome.rewrites[0].certificate.status == "certified"
    same(model, result, x=X)


def test_what_is_concatenated_is_read_in_phases() -> None:
    body = BESIDE + f"{{ {UP} k = Concat<axis=1>(u, z) c = Conv<pads=[1,1,1,1]>(k, v, b) y = Relu(c) }}"
    model = build(body, CONSTANTS)
    result, outcome, _ = run(model, eager())
    assert ops(result) == {"Conv": 8, "Add": 4, "Relu": 4, "Concat": 3, "Transpose": 3, "Reshape": 3}
    assert macs(result) * 7 * 36 == macs(model) * (4 * 16 + 3 * 36)
    held = [n.input[1] for n in result.graph.node if n.op_type == "Conv" and n.input[0] == "z"]
    assert len(set(held)) == 1  # the same weights, with other padding
    assert "(3 of them beside it)" in outcome.rewrites[0].signature
    same(model, result, x=X, z=Z)
    result, _, _ = run(model, eager(FractionalStride))
    assert ops(result) == {"ConvTranspose": 1, "Conv": 1, "Add": 1, "Relu": 1}
    same(model, result, x=X, z=Z)


def test_what_would_be_larger_in_phases_is_added_at_last() -> None:
    """The second phase of a stencil without padding begins further on."""
    model = build(BESIDE + f"{{ {UP} k = Concat<axis=1>(u, z) c = Conv(k, v, b) y = Relu(c) }}", CONSTANTS)
    result, _, _ = run(model, eager())
    assert ops(result) == {"Conv": 5, "Add": 1, "Relu": 1, "Concat": 3, "Transpose": 3, "Reshape": 3}
    same(model, result, x=X, z=Z)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("order", ["u, z", "z, u", "z, u, z, t", "u, t"])
def test_channels_of_a_concat_in_any_order(kind: type[Pass], order: str) -> None:
    """Of two repetitions by 2 and by 4 remains one by 2, and one before it."""
    more = f"t = Resize<{NEAREST}>(q, , f) " if "t" in order else ""
    width = sum({"u": 4, "z": 3, "t": 2}[name] for name in order.split(", "))
    head = "(double[2,4,10,14] x, double[2,3,20,28] z, double[2,2,5,7] q) => (double[N] y) "
    body = head + f"{{ {UP} {more} k = Concat<axis=1>({order}) y = Conv<pads=[1,1,1,1]>(k, m, b) }}"
    constants = CONSTANTS | {"f": np.array([1, 1, 4, 4], np.float32), "m": normal(6, width, 3, 3)}
    model = build(body, constants)
    result, _, _ = run(model, eager(kind))
    assert ops(result)["Resize"] == ("t" in order)
    assert macs(result) < macs(model)
    same(model, result, x=normal(2, 4, 10, 14), z=normal(2, 3, 20, 28), q=normal(2, 2, 5, 7))


@pytest.mark.parametrize("kind", BOTH)
def test_activations_between_run_before(kind: type[Pass]) -> None:
    body = BESIDE + (
        f"{{ {UP} r = Sigmoid(u) k = Concat<axis=1>(r, z) a = LeakyRelu<alpha=0.3>(k) "
        "p = Clip(a, low, high) q = Clip(p, , high) y = Conv<pads=[1,1,1,1]>(q, v) }"
    )
    model = build(body, CONSTANTS | {"low": np.float64(-0.2), "high": np.float64(0.6)})
    result, _, _ = run(model, eager(kind))
    assert ops(result)["Resize"] == 0
    assert ops(result)["Sigmoid"] == 1
    assert ops(result)["LeakyRelu"] == 2
    assert ops(result)["Clip"] == 4
    same(model, result, x=X, z=Z)


def test_a_stride_of_the_factor_leaves_one_convolution() -> None:
    """Every other one of repeated positions is what was repeated: one phase, and nothing to put together."""
    model = build(HEAD + f"{{ {UP} c = Conv<pads=[1,1,1,1], strides=[2,2]>(u, w, b) y = Relu(c) }}", CONSTANTS)
    result, outcome, _ = run(model, eager())
    assert ops(result) == {"Conv": 1, "Relu": 1}
    assert "1 smaller convolution before" in outcome.rewrites[0].reason
    same(model, result, x=X)


def test_depthwise_convolutions() -> None:
    model = build(HEAD + f"{{ {UP} y = Conv<pads=[1,1,1,1], group=4>(u, d) }}", CONSTANTS)
    for kind in BOTH:
        result, _, _ = run(model, eager(kind))
        assert macs(result) * 36 == macs(model) * 16
        same(model, result, x=X)
    beside = BESIDE + f"{{ {UP} k = Concat<axis=1>(u, z) y = Conv<pads=[1,1,1,1], group=7>(k, g) }}"
    result, outcome, _ = run(build(beside, CONSTANTS | {"g": normal(7, 1, 3, 3)}), eager())
    assert not outcome.rewrites
    assert reasons(outcome) == ["its groups read parts of a Concat"]


SPELLINGS = [
    ('Resize<mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor">(x, , s)', 17, True),
    ('Resize<mode="nearest">(x, , s)', 17, True),
    ('Resize<mode="nearest", coordinate_transformation_mode="pytorch_half_pixel">(x, , s)', 13, True),
    ('Resize<mode="nearest", nearest_mode="round_prefer_ceil">(x, , s)', 13, True),
    ('Resize<mode="nearest", coordinate_transformation_mode="align_corners">(x, , s)', 13, True),
    ('Resize<mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor">(x, , , o)', 17, True),
    ('Resize<mode="nearest">(x, s)', 10, True),
    ('Upsample<mode="nearest">(x, s)', 9, True),
    ('Upsample<mode="nearest", scales=[1.0,1.0,2.0,2.0]>(x)', 7, True),
    ('Resize<mode="nearest", nearest_mode="floor">(x, , s)', 13, False),
    ('Resize<mode="nearest", nearest_mode="ceil">(x, , s)', 13, False),
    ('Resize<mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="ceil">(x, , s)', 13, False),
    ('Resize<mode="linear">(x, , s)', 17, False),
    ('Resize<mode="cubic">(x, , s)', 17, False),
    ('Resize<mode="nearest">(x, , h)', 17, False),
    ('Resize<mode="nearest">(x, , n)', 17, False),
    ('Resize<mode="nearest">(x, , m)', 17, False),
    ('Resize<mode="nearest", keep_aspect_ratio_policy="not_larger", axes=[2,3]>(x, , , p)', 18, True),
    ('Resize<mode="nearest", keep_aspect_ratio_policy="not_smaller", axes=[2,3]>(x, , , p)', 18, False),
    ('Resize<mode="nearest", keep_aspect_ratio_policy="not_larger">(x, , , o)', 18, False),
    ('Upsample<mode="linear">(x, s)', 9, False),
]


@pytest.mark.parametrize(("call", "opset", "repeats"), SPELLINGS)
def test_what_repeats_positions_is_found_by_evaluation(call: str, opset: int, repeats: bool) -> None:
    """In whatever words; what interpolates, shifts by half a position, or grows by a fraction or backwards does not."""
    constants = CONSTANTS | {
        "o": np.array([2, 4, 10, 14]),
        "p": np.array([11, 14]),
        "h": np.array([1, 1, 1.5, 2], np.float32),
        "n": np.array([1, 2, 1, 1], np.float32),
        "m": np.array([1, 2, 2, 2], np.float32),
        "w": normal(6, 8 if ", n)" in call or ", m)" in call else 4, 3, 3),
    }
    model = build(HEAD + f"{{ u = {call} y = Conv<pads=[1,1,1,1]>(u, w) }}", constants, opset=opset)
    result, outcome, _ = run(model, eager())
    assert len(outcome.rewrites) == repeats
    if opset > 10:  # onnx's reference evaluator knows no older ones
        same(model, result, x=X)


def test_one_position_is_repeated_by_any_interpolation() -> None:
    body = '(double[2,4,1,1] x) => (double[N] y) { u = Resize<mode="linear">(x, , s) y = Conv<pads=[1,1,1,1]>(u, w) }'
    model = build(body, CONSTANTS | {"s": np.array([1, 1, 3, 4], np.float32)})
    result, _, _ = run(model, eager())
    assert ops(result)["Resize"] == 0
    same(model, result, x=normal(2, 4, 1, 1))


def test_corners_that_are_aligned_repeat_at_some_sizes_only() -> None:
    """By 3, positions are repeated evenly only where there are few of them; nobody knows how many of H there are."""
    call = '{ u = Resize<mode="nearest", coordinate_transformation_mode="align_corners">(x, , s) y = Conv<pads=[1,1,1,1]>(u, w) }'
    for size, factors, repeats in (
        ("2,4,2,2", [3, 3], True),
        ("2,4,5,5", [3, 3], False),
        ("2,4,H,2", [3, 3], False),
        ("2,4,H,2", [1, 3], True),
    ):
        model = build(
            f"(double[{size}] x) => (double[N] y) {call}", CONSTANTS | {"s": np.array([1, 1, *factors], np.float32)}
        )
        _, outcome, _ = run(model, eager(), sizes={"x": (2, 4, 2, 2), "u": (2, 4, 6, 6), "y": (2, 6, 6, 6)})
        assert len(outcome.rewrites) == repeats


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("size", ["2,4,H,W", "N,4,H,W", "N,4,H,7", "N,4,5,W", "N,4,5,7"])
def test_sizes_that_are_not_known(kind: type[Pass], size: str) -> None:
    sizes = {"x": (2, 4, 5, 7), "u": (2, 4, 10, 14), "c": (2, 6, 10, 14), "y": (2, 6, 10, 14)}
    body = f"(double[{size}] x) => (double[N] y) {{ {UP} c = Conv<pads=[1,1,1,1]>(u, w, b) y = Relu(c) }}"
    model = build(body, CONSTANTS)
    result, outcome, _ = run(model, eager(kind), sizes=sizes)
    assert len(outcome.rewrites) == 1
    assert macs(result) < macs(model) or "H" in size or "W" in size or "N" in size
    for batch, height, width in ((2, 5, 7), (1, 1, 1), (3, 4, 6), (2, 5, 6), (2, 3, 7)):
        if ("H" in size or height == 5) and ("W" in size or width == 7) and ("N" in size or batch == 2):
            same(model, result, x=normal(batch, 4, height, width))


@pytest.mark.parametrize("size", ["N,4,H,W", "N,4,H,7", "N,4,5,W", "N,4,5,7"])
def test_an_empty_batch(size: str) -> None:
    pytest.importorskip("onnxruntime")
    from judge import widened  # onnx's evaluator has no Flatten of an empty batch

    body = f"(double[{size}] x) => (double[N] y) {{ {UP} y = Conv<pads=[1,1,1,1]>(u, w, b) }}"
    sizes = {"x": (2, 4, 5, 7), "u": (2, 4, 10, 14), "y": (2, 6, 10, 14)}
    result, outcome, _ = run(build(body, CONSTANTS), eager(), sizes=sizes)
    assert len(outcome.rewrites) == 1
    assert widened(result)({"x": normal(0, 4, 5, 7)})[0].shape == (0, 6, 10, 14)


def test_the_name_of_the_batch_is_kept_if_all_other_sizes_are_known() -> None:
    """onnxruntime fuses a later Add into a convolution only if it knows that both shapes are equal."""
    body = f"(double[N,4,5,7] x) => (double[M,6,10,14] y) {{ {UP} y = Conv<pads=[1,1,1,1]>(u, w, b) }}"
    sizes = {"x": (2, 4, 5, 7), "u": (2, 4, 10, 14), "y": (2, 6, 10, 14)}
    result, outcome, _ = run(build(body, CONSTANTS), eager(), sizes=sizes)
    assert len(outcome.rewrites) == 1
    assert infer(result)["y"][1] == ("N", 6, 10, 14)


def test_sizes_that_are_not_known_in_an_old_opset() -> None:
    """Shape had no start."""
    sizes = {"x": (2, 4, 5, 7), "u": (2, 4, 10, 14), "y": (2, 6, 10, 14)}
    call = UP.replace("(x, ,", "(x, nowhere,")
    body = f"(double[2,4,H,W] x) => (double[N] y) {{ {call} y = Conv<pads=[1,1,1,1]>(u, w) }}"
    model = build(body, CONSTANTS | {"nowhere": np.zeros(0, np.float32)}, opset=12)
    result, outcome, _ = run(model, eager(), sizes=sizes)
    assert len(outcome.rewrites) == 1
    assert ops(result)["Gather"] == 1
    for h, w in ((5, 7), (1, 1)):
        same(model, result, x=normal(2, 4, h, w))


REFUSED = [
    ("u = Resize<@>(x, , s) y = Conv<pads=[1,1,1,1]>(u, w) t = Relu(u)", "the intermediate 'u' has 2 consumers"),
    (
        "u = Resize<@>(x, , s) k = Concat<axis=1>(u, z) y = Conv<pads=[1,1,1,1]>(k, v) t = Relu(k)",
        "'k' has 2 consumers",
    ),
    ("u = Resize<@>(x, , s) r = Relu(u) y = Conv<pads=[1,1,1,1]>(r, w) t = Relu(r)", "'r' has 2 consumers"),
    ("u = Resize<@>(x, , s) y = Conv<pads=[1,1,1,1]>(u, w) t = Conv<pads=[1,1,1,1]>(x, w)", "'w' is shared"),
    ("u = Resize<@>(x, , s) y = Conv<pads=[1,1,0,0], strides=[3,3]>(u, w) t = Relu(x)", "a stride of 3 reads 2 equal"),
    ("u = Resize<@>(x, , s) y = Conv<pads=[1,1,0,0]>(u, w) t = Relu(x)", "does not have 2 positions for each"),
]


@pytest.mark.parametrize(("body", "reason"), REFUSED)
def test_refusals_have_reasons(body: str, reason: str) -> None:
    head = "(double[2,4,5,7] x, double[2,3,10,14] z) => (double[N] y, double[M] t) "
    model = build(f"{head}{{ {body.replace('@', NEAREST)} }}", CONSTANTS)
    result, outcome, _ = run(model, eager())
    assert result is model
    assert reason in reasons(outcome)[0]


@pytest.mark.parametrize(
    "between",
    [
        "m = Slice(u, starts, ends, axes)",
        "m = MaxPool<kernel_shape=[2,2]>(u)",
        "m = Add(u, e)",
        "m = Transpose<perm=[0,1,3,2]>(u)",
        "m = Concat<axis=2>(u, e)",
        "m = Pad(u, pads)",
        "m = Softmax<axis=3>(u)",
    ],
)
def test_what_looks_at_other_positions_stays_between(between: str) -> None:
    constants = CONSTANTS | {
        "starts": np.array([1]), "ends": np.array([9]), "axes": np.array([2]), "e": normal(2, 4, 10, 14),
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    }  # fmt: skip
    model = build(HEAD + f"{{ {UP} {between} y = Conv<pads=[1,1,1,1]>(m, w) }}", constants)
    assert run(model, eager())[0] is model


def test_scales_that_are_computed_stay() -> None:
    body = f"(double[2,4,5,7] x, float[4] s) => (double[N] y) {{ {UP} y = Conv<pads=[1,1,1,1]>(u, w) }}"
    model = build(body, {"w": CONSTANTS["w"]})
    assert run(model, eager())[0] is model


def test_a_weight_that_is_an_input_stays() -> None:
    body = f"(double[2,4,5,7] x, double[6,4,3,3] w) => (double[N] y) {{ {UP} y = Conv<pads=[1,1,1,1]>(u, w) }}"
    model = build(body, {"s": CONSTANTS["s"]})
    assert run(model, eager())[0] is model


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize(("call", "reason"), [(UP, ["its output is empty"]), (f"u = Resize<{NEAREST}>(x, , , o) ", [])])
def test_of_nothing_there_are_no_phases(kind: type[Pass], call: str, reason: list[str]) -> None:
    """An empty batch, as of a detector that found nothing; which nobody can make two of."""
    body = f"(double[0,4,5,7] x) => (double[N] y) {{ {call} y = Conv<pads=[1,1,1,1]>(u, w, b) }}"
    model = build(body, CONSTANTS | {"o": np.array([2, 4, 10, 14])})
    result, outcome, _ = run(model, eager(kind))
    assert result is model
    assert reasons(outcome) == reason


@pytest.mark.parametrize("kind", BOTH)
def test_no_positions_are_not_repeated(kind: type[Pass]) -> None:
    """Even if padding alone makes some: providers have no transposed convolution of nothing."""
    body = f"(double[2,4,0,7] x) => (double[N] y) {{ {UP} y = Conv<pads=[2,1,2,1]>(u, w, b) }}"
    model = build(body, CONSTANTS)
    assert run(model, eager(kind))[0] is model


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("known", [(), ("u",), ("y",)])
def test_what_is_not_known_to_be_cheaper_stays(kind: type[Pass], known: tuple[str, ...]) -> None:
    """The size of what is enlarged, or of the result."""
    model = build(f"(double[2,4,H,W] x) => (double[N] y) {{ {UP} y = Conv<pads=[1,1,1,1]>(u, w) }}", CONSTANTS)
    sizes = {"u": (2, 4, 10, 14), "y": (2, 6, 10, 14)}
    _, outcome, _ = run(model, eager(kind), sizes={name: sizes[name] for name in known})
    assert len(outcome.rewrites) == (kind is Polyphase and known == ("y",))
    assert len(run(model, eager(kind), sizes=sizes)[1].rewrites) == 1


@pytest.mark.parametrize("kind", BOTH)
def test_weights_whose_sum_overflows_stay(kind: type[Pass]) -> None:
    for value, done in ((4e4, 0), (1e4, 1)):
        body = f"(float16[1,1,4,4] x) => (float16[N] y) {{ {UP} y = Conv<pads=[1,1,1,1]>(u, w) }}"
        model = build(body, CONSTANTS | {"w": np.full((1, 1, 3, 3), value, np.float16)})
        _, outcome, _ = run(model, eager(kind))
        assert len(outcome.rewrites) == done
        assert done or reasons(outcome) == ["the folded weights overflow float16"]


@pytest.mark.parametrize("kind", BOTH)
def test_weights_that_are_not_finite_stay(kind: type[Pass]) -> None:
    model = build(HEAD + f"{{ {UP} y = Conv<pads=[1,1,1,1]>(u, w) }}", CONSTANTS | {"w": np.full((6, 4, 3, 3), np.inf)})
    result, outcome, _ = run(model, eager(kind))
    assert result is model
    assert reasons(outcome) == ["its weights are not finite"]


@pytest.mark.parametrize(
    "body",
    [
        "(double[2,4,H,7] x) => (double[N] y) { u = Resize<@>(x, , , o)",
        "(double[2,4,5,7] x) => (double[N] y) { u = Resize<@>(x, , z)",
        "(double[2,4,5,7] x, int64[4] o) => (double[N] y) { u = Resize<@>(x, , , o)",
        "(double[2,C,5,7] x) => (double[N] y) { u = Resize<@>(x, , s)",
        "(double[2,4,5,7] x, double g) => (double[N] y) { r = Resize<@>(x, , s) u = Clip(r, g)",
        "(double[2,4,35] z, int64[K] q) => (double[N] y) { x = Reshape(z, q) u = Resize<@>(x, , s)",
    ],
)
def test_what_is_not_known_to_be_repeated_stays(body: str) -> None:
    """Factors, channels or axes that nobody knows; or no positions are left."""
    constants = {"z": np.array([1, 1, 0, 2], np.float32)} | {
        "o": np.array([2, 4, 10, 14]),
        "s": CONSTANTS["s"],
        "w": CONSTANTS["w"],
        "flat": np.array([-1]),
    }
    held = {name: value for name, value in constants.items() if f"] {name}" not in body}
    model = build(f"{body.replace('@', NEAREST)} c = Conv<pads=[2,2,2,2]>(u, w) y = Reshape(c, flat) }}", held)
    assert run(model, eager(), sizes={"x": (2, 4, 5, 7), "u": (2, 4, 10, 14), "c": (2, 6, 12, 16)})[0] is model


def test_long_axes_are_not_evaluated() -> None:
    """Where it depends on the size of an axis whether positions are repeated."""
    call = 'u = Resize<mode="nearest", coordinate_transformation_mode="align_corners">(x, , s)'
    for size, repeats in ((512, 1), (513, 0)):
        model = build(
            f"(double[1,1,{size}] x) => (double[N] y) {{ {call} y = Conv<pads=[1,1]>(u, w) }}",
            {"s": np.array([1, 1, 2], np.float32), "w": normal(1, 1, 3)},
        )
        assert len(run(model, eager())[1].rewrites) == repeats


@pytest.mark.parametrize("kind", BOTH)
def test_what_is_resized_by_one_or_constant_lies_beside(kind: type[Pass]) -> None:
    body = (
        BESIDE + f"{{ {UP} i = Resize<{NEAREST}>(z, , e) k = Concat<axis=1>(i, u, t) y = Conv<pads=[1,1,1,1]>(k, m) }}"
    )
    constants = CONSTANTS | {"e": np.ones(4, np.float32), "t": normal(2, 1, 10, 14), "m": normal(6, 8, 3, 3)}
    model = build(body, constants)
    result, outcome, _ = run(model, eager(kind))
    assert "(4 of them beside it)" in outcome.rewrites[0].signature
    same(model, result, x=X, z=Z)


@pytest.mark.parametrize(("count", "done"), [(8, 1), (9, 0)])
def test_only_so_many_activations_are_followed(count: int, done: int) -> None:
    steps = "".join(f"a{i + 1} = Tanh(a{i}) " for i in range(count)).replace("a0", "u")
    model = build(HEAD + f"{{ {UP} {steps} y = Conv<pads=[1,1,1,1]>(a{count}, w) }}", CONSTANTS)
    assert len(run(model, eager())[1].rewrites) == done


def test_what_is_repeated_less_has_sizes_that_are_not_known() -> None:
    """Not those of what it is made of."""
    body = f"(double[2,4,H,7] x, double[2,2,G,7] q) => (double[N] y) {{ {UP} t = Resize<{NEAREST}>(q, , f) k = Concat<axis=1>(u, t) y = Conv<pads=[1,1,1,1]>(k, m) }}"
    constants = CONSTANTS | {"f": np.array([1, 1, 4, 2], np.float32), "m": normal(6, 6, 3, 3)}
    sizes = {"u": (2, 4, 12, 14), "t": (2, 2, 12, 14), "k": (2, 6, 12, 14), "y": (2, 6, 12, 14)}
    model = build(body, constants)
    result, _, loaded = run(model, eager(), sizes=sizes)
    (less,) = [n.outputs[0] for n in loaded.graph.nodes if n.op == "Resize"]
    assert tuple(less.shape) == (2, 2, None, 7)
    same(model, result, x=normal(2, 4, 6, 7), q=normal(2, 2, 3, 7))


def test_pointwise_maps_are_left_to_others() -> None:
    model = build(HEAD + f"{{ {UP} y = Conv(u, p) }}", CONSTANTS | {"p": normal(6, 4, 1, 1)})
    assert run(model, eager())[0] is model


def test_many_phases_are_left_to_one_transposed_convolution() -> None:
    body = HEAD + f"{{ {UP} y = Conv<pads=[1,1,1,1]>(u, w) }}"
    model = build(body, CONSTANTS | {"s": np.array([1, 1, 8, 8], np.float32)})
    result, outcome, _ = run(model, eager())
    assert result is model
    assert reasons(outcome) == [
        "3×3 4→6 after nearest upsampling by 8×8 would become 64 convolutions (the limit is 16)"
    ]
    assert ops(run(model, eager(FractionalStride))[0]) == {"ConvTranspose": 1}


def wide(channels: int, size: int) -> onnx.ModelProto:
    body = f"(float[1,{channels},{size},{size}] x) => (float[N] y) {{ {UP} y = Conv<pads=[1,1,1,1]>(u, w) }}"
    return build(body, {"s": CONSTANTS["s"], "w": normal(channels, channels, 3, 3, dtype=np.float32)})


@pytest.mark.parametrize(("channels", "size", "done"), [(4, 8, 0), (16, 56, 0), (128, 14, 1)])
def test_without_a_clock_only_what_saves_much(channels: int, size: int, done: int) -> None:
    _, outcome, _ = run(wide(channels, size), Polyphase(), certifier=None)
    assert len(outcome.rewrites) == done
    assert not run(wide(channels, size), FractionalStride(), certifier=None)[1].rewrites


@pytest.mark.parametrize(("channels", "size", "done"), [(4, 8, 0), (16, 56, 1), (128, 14, 1)])
def test_what_saves_little_is_not_worth_a_race(channels: int, size: int, done: int) -> None:
    for kind in BOTH:
        assert len(run(wide(channels, size), helpers.eager(kind), certifier=None)[1].rewrites) == done


def test_the_phases_win_where_both_may_act() -> None:
    """The other one is raced first, so that the phases are raced against it."""
    from pwopt.selecting.groups import group_rewrites

    result, _, _ = run(wide(128, 14), *(helpers.eager(k) for k in BOTH), certifier=None)
    assert ops(result)["ConvTranspose"] == 0
    alone = [run(wide(128, 14), helpers.eager(k), certifier=None)[1].rewrites[0] for k in BOTH]
    assert [g.pass_name for g in group_rewrites(alone)] == ["fractional-stride", "polyphase"]


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[str, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Of any rank, stride, dilation, padding and groups, behind a repetition, perhaps with more beside it."""
    rank = draw(st.integers(1, 3))
    some = st.integers(1, 3)
    factors = [draw(some) for _ in range(rank)]
    size = [draw(st.integers(2, 4)) for _ in range(rank)]
    kernel = [draw(some) for _ in range(rank)]
    dilations = [draw(st.sampled_from([1, 1, 2])) for _ in range(rank)]
    strides = [draw(st.sampled_from([1, 1, 1, 2, 3])) for _ in range(rank)]
    pads = [draw(st.integers(0, 2)) for _ in range(2 * rank)]
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    beside = groups == 1 and draw(st.booleans())
    activation = draw(st.sampled_from(["", "Relu", "Sigmoid", "Tanh"]))
    after = draw(st.sampled_from(["", "Relu", "Sigmoid"]))
    width = 7 if beside else 4
    for a in range(rank):
        pads[a] += max(0, dilations[a] * (kernel[a] - 1) + 1 - size[a] * factors[a] - pads[a] - pads[a + rank])
    call = f"Conv<pads={pads}, strides={strides}, dilations={dilations}, group={groups}>"
    inner = "u = Resize<" + NEAREST + ">(x, , s) " + (f"r = {activation}(u) " if activation else "r = Identity(u) ")
    inner += "k = Concat<axis=1>(z, r) " if beside else "k = Identity(r) "
    inner += f"c = {call}(k, w, b) " + (f"y = {after}(c)" if after else "y = Identity(c)")
    free = draw(st.booleans())
    spaces = [f"A{a}" if free else str(n) for a, n in enumerate(size)]
    large = [f"B{a}" if free else str(n * r) for a, (n, r) in enumerate(zip(size, factors, strict=True))]
    inputs = f"double[2,4,{','.join(spaces)}] x" + (f", double[2,3,{','.join(large)}] z" if beside else "")
    seed = draw(st.integers(0, 9))
    constants = {
        "s": np.array([1, 1, *factors], np.float32),
        "w": normal(4, width // groups, *kernel, seed=seed),
        "b": normal(4, seed=seed + 1),
    }
    feeds = {"x": normal(2, 4, *size, seed=2)}
    if beside:
        feeds["z"] = normal(2, 3, *(n * r for n, r in zip(size, factors, strict=True)), seed=3)
    return f"({inputs}) => (double[N] y) {{ {inner} }}", constants, feeds


@given(convolutions(), st.sampled_from(BOTH))
@settings(max_examples=150)
def test_any_convolution(case: tuple[str, dict[str, np.ndarray], dict[str, np.ndarray]], kind: type[Pass]) -> None:
    """It stays what it was, whatever was done; and something is done wherever there are phases."""
    from pwopt.passes import CleanUp
    from pwopt.selecting.shape_folding import infer_sizes

    body, constants, feeds = case
    model = build(body, constants)
    sizes = infer_sizes(model, {name: value.shape for name, value in feeds.items()})
    result, outcome, _ = run(model, CleanUp(), eager(kind), sizes=sizes)
    if "group=1" in body or kind is Polyphase:  # onnx's reference evaluator has groups of transposed ones wrong
        same(model, result, **feeds)
    left = [s for s in outcome.skips if s.pass_name == kind.name]
    assert left or any(r.pass_name == kind.name for r in outcome.rewrites) or not _resampled(constants)


def _resampled(constants: dict[str, np.ndarray]) -> bool:
    """Whether anything was repeated, and a stencil reads it."""
    return bool(np.any(constants["s"] > 1)) and constants["w"][0, 0].size > 1
