from __future__ import annotations

import helpers
import numpy as np
import pytest
from helpers import build, normal, ops, reasons, run, same
from hypothesis import given, settings
from hypothesis import strategies as st

from pwopt.passes import Focus

BIG = np.array([2**63 - 1])
HEAD = "(double[2,3,8,12] x) => (double[N] y) "
CONSTANTS = {
    "o": np.array([0]), "i": np.array([1]), "e": BIG, "two": np.array([2]), "three": np.array([3]), "h": np.array([2]), "v": np.array([3]),
    "both": np.array([2, 3]), "oo": np.array([0, 0]), "oi": np.array([0, 1]), "io": np.array([1, 0]), "ii": np.array([1, 1]),
    "ee": np.array([2**31 - 1] * 2), "tt": np.array([2, 2]), "w": normal(5, 12, 3, 3), "b": normal(5), "p": normal(5, 12, 1, 1),
    "g": normal(8, 6, 3, 3), "u": normal(5, 6, 3, 3),
}  # fmt: skip
PAIRS = "a = Slice(x, oo, ee, both, tt) b1 = Slice(x, io, ee, both, tt) c = Slice(x, oi, ee, both, tt) d = Slice(x, ii, ee, both, tt) "
CHAIN = "".join(
    f"r{n} = Slice(x, {first}, e, h, two) {n} = Slice(r{n}, {second}, e, v, two) "
    for n, first, second in (("a", "o", "o"), ("b1", "i", "o"), ("c", "o", "i"), ("d", "i", "i"))
)
JOINED = "k = Concat<axis=1>(a, b1, c, d) "
X = normal(2, 3, 8, 12)


@pytest.mark.parametrize("blocks", [PAIRS + JOINED, CHAIN + JOINED, "k = SpaceToDepth<blocksize=2>(x) "])
@pytest.mark.parametrize("pads", [[1, 1, 1, 1], [0, 0, 0, 0], [0, 2, 1, 0]])
def test_focus_is_one_convolution_of_stride_2(blocks: str, pads: list[int]) -> None:
    model = build(HEAD + f"{{ {blocks} y = Conv<pads={pads}>(k, w, b) }}", CONSTANTS)
    result, outcome, _ = run(model, Focus())
    assert ops(result) == {"Conv": 1}
    (conv,) = result.graph.node
    given_attrs = {a.name: list(a.ints) for a in conv.attribute}
    assert given_attrs["kernel_shape"] == [6, 6]
    assert given_attrs["strides"] == [2, 2]
    assert given_attrs["pads"] == [2 * p for p in pads]
    assert outcome.rewrites[0].macs_after == outcome.rewrites[0].macs_before
    assert outcome.rewrites[0].certificate is not None
    assert outcome.rewrites[0].certificate.status == "certified"
    same(model, result, x=X)


def test_patch_merging_is_a_convolution_of_patches() -> None:
    model = build(HEAD + f"{{ {PAIRS}{JOINED} y = Conv(k, p) }}", CONSTANTS)
    result, _, _ = run(model, Focus())
    assert ops(result) == {"Conv": 1}
    assert list(helpers.weight(result, "p").shape) == [5, 3, 2, 2]
    same(model, result, x=X)


@pytest.mark.parametrize("perm", [[0, 1, 3, 5, 2, 4], [0, 3, 5, 1, 2, 4]])
def test_pixel_unshuffling(perm: list[int]) -> None:
    body = (
        HEAD + f"{{ s = Reshape(x, q) t = Transpose<perm={perm}>(s) k = Reshape(t, z) y = Conv<pads=[1,1,1,1]>(k, w) }}"
    )
    constants = CONSTANTS | {"q": np.array([2, 3, 4, 2, 6, 2]), "z": np.array([2, 12, 4, 6])}
    model = build(body, constants)
    result, _, _ = run(model, Focus())
    assert ops(result) == {"Conv": 1}
    same(model, result, x=X)


@pytest.mark.parametrize(("between", "reason"), [("s", "'s' has 2 consumers"), ("t", "'t' has 2 consumers")])
def test_a_pixel_unshuffling_that_others_look_into_stays(between: str, reason: str) -> None:
    body = (
        "(double[2,3,8,12] x) => (double[N] y, double[M] z) { s = Reshape(x, q) t = Transpose<perm=[0,1,3,5,2,4]>(s) "
        f"k = Reshape(t, z_) y = Conv<pads=[1,1,1,1]>(k, w) z = Abs({between}) }}"
    )
    model = build(body, CONSTANTS | {"q": np.array([2, 3, 4, 2, 6, 2]), "z_": np.array([2, 12, 4, 6])})
    result, outcome, _ = run(model, Focus())
    assert result is model
    assert reason in reasons(outcome)[0]


@pytest.mark.parametrize(
    ("shape", "perm", "back"),
    [
        ([2, 3, 4, 2, 6, 2], [0, 1, 5, 3, 2, 4], [2, 12, 4, 6]),  # columns before rows
        ([2, 6, 4, 2, 3, 2], [0, 1, 3, 5, 2, 4], [2, 24, 4, 3]),  # other channels
        ([2, 3, 2, 2, 12, 2], [0, 1, 3, 5, 2, 4], [2, 12, 2, 12]),  # other rows
        ([2, 3, 4, 2, 3, 4], [0, 1, 3, 5, 2, 4], [2, 12, 4, 6]),  # not as many as there are blocks
        ([2, 3, 4, 2, 6, 2], [0, 1, 3, 5, 2, 4], [2, 12, 6, 4]),  # put together otherwise
        ([2, 3, 4, 2, 6, 2], [0, 1, 3, 5, 2, 4], [2, 6, 8, 6]),
    ],
)
def test_other_changes_of_shape_stay(shape: list[int], perm: list[int], back: list[int]) -> None:
    body = HEAD + f"{{ s = Reshape(x, q) t = Transpose<perm={perm}>(s) k = Reshape(t, z) y = Conv(k, m) }}"
    constants = CONSTANTS | {"q": np.array(shape), "z": np.array(back), "m": normal(5, back[1], 1, 1)}
    model = build(body, constants)
    assert run(model, Focus())[0] is model


UNSHUFFLED = "t = Transpose<perm=[0,1,3,5,2,4]>(s) k = Reshape(t, z) y = Conv(k, w)"


@pytest.mark.parametrize(
    "body",
    [
        "(double[2,3,8,12] x) => (double[N] y) { k = Reshape(x, z) y = Conv(k, w) }",
        "(double[2,3,4,2,6,2] s) => (double[N] y) { @ }",
        "(double[2,3,4,2,6,2] x) => (double[N] y) { s = Relu(x) @ }",
        "(double[2,3,96] x) => (double[N] y) { s = Reshape(x, q) @ }",
        "(double[2,3,H,12] x) => (double[N] y) { s = Reshape(x, q) @ }",
        "(double[2,3,8,12] x, int64[6] q) => (double[N] y) { s = Reshape(x, q) @ }",
        "(double[2,3,8,12] x, int64[K] q) => (double[N] y) { s = Reshape(x, q) @ }",
        "(double[2,3,8,12] x, int64[4] z) => (double[N] y) { s = Reshape(x, q) @ }",
        "(double[2,3,8,12] x) => (double[N] y) { s = Reshape(x, q) t = Transpose<perm=[0,1,3,5,2,4]>(s) k = GatherND(t, places) y = Conv(k, w) }",
    ],
)
def test_what_is_not_known_to_be_a_pixel_unshuffling_stays(body: str) -> None:
    constants = {"q": np.array([2, 3, 4, 2, 6, 2]), "z": np.array([2, 12, 4, 6])}
    constants |= {"w": CONSTANTS["w"], "places": np.zeros((2, 12, 4, 6, 6), np.int64)}
    inputs = {name: value for name, value in constants.items() if f"] {name}" not in body}
    model = build(body.replace("@", UNSHUFFLED), inputs)
    assert run(model, Focus())[0] is model


def test_a_pixel_unshuffling_of_nothing_stays() -> None:
    """Nothing can be reshaped to as many images as anybody likes."""
    body = "(double[2,3,8,0] x) => (double[5,5,4,2] y) { s = Reshape<allowzero=1>(x, q) t = Transpose<perm=[0,1,3,5,2,4]>(s) "
    body += "k = Reshape<allowzero=1>(t, z) y = Conv<pads=[1,2,1,2]>(k, w) }"
    model = build(body, CONSTANTS | {"q": np.array([5, 3, 4, 2, 0, 2]), "z": np.array([5, 12, 4, 0])})
    assert run(model, Focus())[0] is model


@pytest.mark.parametrize("size", ["2,3,H,W", "N,3,H,12"])
def test_sizes_that_are_not_known(size: str) -> None:
    """Whatever they are, the blocks fit each other."""
    body = f"(double[{size}] x) => (double[N] y) {{ {CHAIN}{JOINED} y = Conv<pads=[1,1,1,1]>(k, w, b) }}"
    model = build(body, CONSTANTS)
    sizes = {"x": (2, 3, 8, 12), "k": (2, 12, 4, 6), "y": (2, 5, 4, 6)}
    result, outcome, _ = run(model, Focus(), sizes=sizes)
    assert len(outcome.rewrites) == 1
    for h, w in ((8, 12), (2, 12), (6, 12)):
        same(model, result, x=normal(2, 3, h, w))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (PAIRS + JOINED + "y = Conv<pads=[1,1,1,1]>(k, w) t = Relu(k)", "'k' has 2 consumers"),
        (PAIRS + JOINED + "y = Conv<pads=[1,1,1,1]>(k, w) t = Conv(k, w)", "'k' has 2 consumers"),
        (PAIRS + JOINED + "y = Conv<pads=[1,1,1,1]>(k, w) t = Conv(j, w)", "the weight 'w' is shared"),
        (PAIRS + JOINED + "y = Conv<pads=[1,1,1,1]>(k, w) t = Abs(b1)", "'b1' has 2 consumers"),
        (PAIRS.replace("a =", "t =") + "k = Concat<axis=1>(t, b1, c, d) y = Conv(k, w)", "'t' is a graph output"),
        (CHAIN + JOINED + "y = Conv<pads=[1,1,1,1]>(k, w) t = Abs(rc)", "'rc' has 2 consumers"),
        (PAIRS + JOINED + "y = Conv(k, f) t = Relu(x)", "its weights are not finite"),
        (PAIRS + JOINED + "y = Conv<group=2>(k, g) t = Relu(x)", "its groups do not read all of the blocks"),
    ],
)
def test_refusals_have_reasons(body: str, reason: str) -> None:
    head = "(double[2,3,8,12] x, double[2,12,3,3] j) => (double[N] y, double[M] t) "
    model = build(f"{head}{{ {body} }}", CONSTANTS | {"f": np.full((5, 12, 3, 3), np.inf)})
    result, outcome, _ = run(model, Focus())
    assert result is model
    assert reason in reasons(outcome)[0]


@pytest.mark.parametrize(
    "blocks",
    [
        "k = Concat<axis=1>(x, x, x, x)",  # nothing is skipped
        "a = Slice(x, three2, ee, both, tt) b1 = Slice(x, three2, ee, both, tt) k = Concat<axis=1>(a, b1)",  # further on
        "a = Slice(x, o, end, h, two) c = Slice(x, i, end, h, two) k = Concat<axis=1>(a, c)",  # an end before the end
        "n = Slice(x, o, two, h) a = Slice(n, o, e, h, two) c = Slice(n, o, e, h, three) k = Concat<axis=1>(a, c)",  # other steps
        "a = Slice(x, o, e, h, two) r = Relu(x) c = Slice(r, i, e, h, two) k = Concat<axis=1>(a, c)",  # other tensors
        "a = Slice(x, o, e, h, two) c = Slice(x, i, e, h, two) k = Concat<axis=3>(a, c)",
        "f = Slice(x, o, e, i, two) a = Slice(f, o, e, h, two) c = Slice(f, i, e, h, two) k = Concat<axis=1>(a, c)",
    ],
)
def test_what_are_no_blocks_stays(blocks: str) -> None:
    constants = CONSTANTS | {"three2": np.array([2, 2]), "end": np.array([6])}
    channels = 12 if "x, x" in blocks else 3 if "axis=3" in blocks else 4 if "f =" in blocks else 6
    model = build(HEAD + "{ " + blocks + " y = Conv(k, m) }", constants | {"m": normal(5, channels, 1, 1)})
    result, outcome, _ = run(model, Focus())
    if "f = Slice" in blocks:  # of some channels only: the blocks are of those
        assert ops(result)["Slice"] == 1
        same(model, result, x=X)
    else:
        assert not outcome.rewrites


@pytest.mark.parametrize("known", ["k", "y"])
def test_what_is_not_known_to_be_cheaper_stays(known: str) -> None:
    """The size of what is gathered, or of the result."""
    model = build(f"(double[2,3,H,W] x) => (double[N] y) {{ {PAIRS}{JOINED} y = Conv(k, w) }}", CONSTANTS)
    sizes = {"k": (2, 12, 4, 6), "y": (2, 5, 2, 4)}
    assert run(model, Focus(), sizes={known: sizes[known]})[0] is model
    assert run(model, Focus(), sizes=sizes)[0] is not model


def test_one_block_is_read_by_a_stride() -> None:
    model = build(
        HEAD + "{ a = Slice(x, oo, ee, both, tt) k = Concat<axis=1>(a) y = Conv(k, m) }",
        CONSTANTS | {"m": normal(5, 3, 3, 3)},
    )
    result, outcome, _ = run(model, Focus())
    assert ops(result) == {"Conv": 1}
    assert outcome.rewrites[0].reason == "1 block of positions and a convolution become one 3×3 of stride 2×2"
    same(model, result, x=X)


def test_weights_of_equal_blocks_whose_sum_overflows_stay() -> None:
    body = "(float16[1,1,4,4] x) => (float16[N] y) { a = Slice(x, oo, ee, both, tt) k = Concat<axis=1>(a, a) y = Conv(k, m) }"
    for value, done in ((4e4, 0), (3e4, 1)):
        model = build(body, CONSTANTS | {"m": np.full((1, 2, 1, 1), value, np.float16)})
        _, outcome, _ = run(model, Focus())
        assert len(outcome.rewrites) == done
        assert done or reasons(outcome) == ["the folded weights overflow float16"]


def test_blocks_beside_each_other_stay() -> None:
    """Not as channels, but as columns."""
    body = "(double[2,4,8,12] x) => (double[N] y) { a = Slice(x, oo, ee, both, tt) c = Slice(x, oi, ee, both, tt) "
    model = build(body + "k = Concat<axis=3>(a, c) y = Conv(k, m) }", CONSTANTS | {"m": normal(5, 4, 1, 1)})
    assert run(model, Focus())[0] is model


def test_slices_that_begin_where_an_input_says_stay() -> None:
    body = f"(double[2,3,8,12] x, int64[2] oo) => (double[N] y) {{ {PAIRS}{JOINED} y = Conv(k, w) }}"
    model = build(body, {name: value for name, value in CONSTANTS.items() if name != "oo"})
    assert run(model, Focus())[0] is model


def test_few_blocks_of_many_positions_stay() -> None:
    """Most of the kernel would be zeros."""
    body = "(double[2,16,64,64] x) => (double[N] y) { a = Slice(x, oo, ee, both, tt) b1 = Slice(x, io, ee, both, tt) "
    constants = CONSTANTS | {"tt": np.array([8, 8]), "m": normal(64, 32, 3, 3)}
    model = build(body + "k = Concat<axis=1>(a, b1) y = Conv(k, m) }", constants)
    result, outcome, _ = run(model, Focus(), certifier=None)
    assert result is model
    assert "sparse kernel" in reasons(outcome)[0]


@given(st.data())
@settings(max_examples=60)
def test_any_blocks(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 3))
    steps = [data.draw(st.integers(1, 3)) for _ in range(rank)]
    offsets = [[data.draw(st.integers(0, r - 1)) for r in steps] for _ in range(data.draw(st.integers(2, 4)))]
    kernel = [data.draw(st.integers(1, 3)) for _ in range(rank)]
    pads = [data.draw(st.integers(0, 2)) for _ in range(2 * rank)]
    strides = [data.draw(st.integers(1, 3)) for _ in range(rank)]
    dilations = [data.draw(st.integers(1, 2)) for _ in range(rank)]
    inner = [d * (k - 1) + 1 + data.draw(st.integers(0, 3)) for d, k in zip(dilations, kernel, strict=True)]
    size = []
    for axis, (n, r) in enumerate(zip(inner, steps, strict=True)):
        low, high = max(o[axis] for o in offsets) - r + 1, min(o[axis] for o in offsets)
        size.append(r * n + data.draw(st.integers(low, high)))
    parts = "".join(f"p{i} = Slice(x, o{i}, ends, axes, steps) " for i in range(len(offsets)))
    joined = ", ".join(f"p{i}" for i in range(len(offsets)))
    head = f"(double[2,2,{','.join(map(str, size))}] x) => (double[N] y) "
    call = f"Conv<pads={pads}, strides={strides}, dilations={dilations}>(k, m, c)"
    constants = {f"o{i}": np.array(o) for i, o in enumerate(offsets)} | {
        "ends": np.array([2**31 - 1] * rank), "axes": np.arange(2, 2 + rank), "steps": np.array(steps),
        "m": normal(3, 2 * len(offsets), *kernel), "c": normal(3),
    }  # fmt: skip
    model = build(head + f"{{ {parts} k = Concat<axis=1>({joined}) y = {call} }}", constants)
    result, outcome, _ = run(model, Focus())
    assert len(outcome.rewrites) == 1 or "sparse" in reasons(outcome)[0]
    same(model, result, x=normal(2, 2, *size))
