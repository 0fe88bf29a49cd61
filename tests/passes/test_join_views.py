from __future__ import annotations

import numpy as np
import onnx
import pytest
from helpers import normal, ops, parse, run, same

from pwopt.passes import CleanUp, JoinViews


def test_reshapes_in_a_row_are_one() -> None:
    body = "(double[2,12] x) => (double[N] y) { a = Reshape(x, p) b = Reshape(a, q) y = Neg(b) }"
    model = parse(body, p=np.array([2, 3, 4]), q=np.array([6, 4]))
    result, outcome, _ = run(model, JoinViews(), CleanUp())
    assert ops(result) == {"Reshape": 1, "Neg": 1}
    assert [r.reason for r in outcome.rewrites] == ["Reshape and Reshape become one Reshape"]


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("{ t = Transpose<perm=[0,2,1,3]>(x) y = Transpose<perm=[3,0,1,2]>(t) }", {"Transpose": 1}),
        ("{ t = Transpose<perm=[0,2,3,1]>(x) u = Transpose<perm=[0,3,1,2]>(t) y = Neg(u) }", {"Neg": 1}),
        ("{ t = Reshape(x, a) y = Reshape(t, b) }", {"Reshape": 1}),
        ("{ t = Flatten<axis=2>(x) u = Unsqueeze(t, o) y = Reshape(u, b) }", {"Reshape": 1}),
        ("{ t = Transpose<perm=[0,2,1,3]>(x) u = Transpose<perm=[3,0,1,2]>(t) v = Neg(t) y = Sub(u, s) w = Add(v, s) }",
         {"Transpose": 2, "Neg": 1, "Sub": 1, "Add": 1}),  # somebody else reads what is between
        ("{ t = Reshape(x, a) y = Reshape(t, z) }", {"Reshape": 1}),  # a 0 copies a size of t
        ("{ t = Transpose(x) y = Transpose<perm=[3,0,1,2]>(t) }", {"Transpose": 1}),  # an order that is not written down
        ("{ t = Transpose<perm=[0,2,1,3]>(x) y = Reshape(t, b) }", {"Transpose": 1, "Reshape": 1}),
    ],
)  # fmt: skip
def test_what_changes_the_order_or_the_shape_twice(body: str, left: dict[str, int]) -> None:
    names = {
        "a": np.array([6, 20]),
        "b": np.array([5, -1]),
        "o": np.array([1]),
        "z": np.array([0, 4, 5]),
        "s": np.ones(1),
    }
    used = {k: v for k, v in names.items() if any(f" {k}{end}" in body for end in (",", ")"))}
    ends = "(double[2,3,4,5] x) => (double[N] y" + (", double[N] w) " if " w = " in body else ") ")
    model = parse(ends + body, **used)
    result, _, _ = run(model, JoinViews(), CleanUp())
    assert ops(result) == left
    same(model, result, 0.0, x=normal(2, 3, 4, 5))


@pytest.mark.parametrize(
    ("allowzero", "first", "left"),
    [
        (1, "Reshape(x, p)", {"Shape": 2, "Concat": 1, "Reshape": 1}),
        (0, "Reshape(x, p)", {"Shape": 2, "Concat": 1, "Reshape": 2}),  # B may be 0, which copies a size of r
        (1, "Transpose<perm=[1,0,2]>(x)", {"Shape": 2, "Concat": 1, "Reshape": 1}),
        (0, "Transpose<perm=[1,0,2]>(x)", {"Shape": 2, "Concat": 1, "Transpose": 1, "Reshape": 1}),
    ],
)
def test_a_computed_target_stays_if_none_of_its_entries_copies_a_size(
    allowzero: int, first: str, left: dict[str, int]
) -> None:
    body = f"""{{ b = Shape<end=1>(x) c = Shape<start=2>(x) t = Concat<axis=0>(one, c, b) r = {first}
        y = Reshape<allowzero={allowzero}>(r, t) }}"""
    named = {"one": np.array([1]), **({"p": np.array([-1])} if " p)" in first else {})}
    model = parse(f"(double[B,1,C] x) => (double[N,M,K] y) {body}", **named)
    result, _, _ = run(model, JoinViews())
    assert ops(result) == left
    for size in (2, 0):
        if size or allowzero:
            same(model, result, 0.0, x=normal(size, 1, 12))


def test_a_target_that_is_its_own_data_stays() -> None:
    model = parse(
        "(int64[1,2] x) => (int64[A,B] y) { r = Reshape(x, p) y = Reshape<allowzero=1>(r, r) }", p=np.array([2])
    )
    assert ops(run(model, JoinViews())[0]) == {"Reshape": 2}


KEYS = """h = Neg(x) s = Shape(h) d = Slice(s, m1, far) l = Slice(s, m2, m1) b = Slice(s, low, m2)
    t = Concat<axis=0>(m1, l, d) r = Reshape(h, t) p = Transpose<perm=[0,2,1]>(r) u = Concat<axis=0>(b, d, l) q = Reshape(p, u) y = Neg(q)"""
ENDS = {"m1": np.array([-1]), "m2": np.array([-2]), "far": np.array([2**63 - 1]), "low": np.array([-(2**63)])}


@pytest.mark.parametrize(
    "inputs", ["double[B,4,S,16] x", "double[B,H,S,16] x", "double[2,4,3,16] x", "double[B,H,S,D] x"]
)
def test_the_keys_of_attention_as_the_dynamo_exporter_turns_them(inputs: str) -> None:
    model = parse(f"({inputs}) => (double[A,B2,C,D2] y) {{ {KEYS} }}", **ENDS)
    result, outcome, _ = run(model, JoinViews(), CleanUp())
    assert ops(result) == {"Neg": 2, "Transpose": 1}
    assert (
        next(r.reason for r in outcome.rewrites if r.pass_name == "join-views")
        == "Reshape, Transpose and Reshape become one Transpose"
    )
    for size in ((2, 4, 3, 16), (1, 4, 5, 16)):
        if "2,4,3" not in inputs or size == (2, 4, 3, 16):
            same(model, result, 0.0, x=normal(*size))


@pytest.mark.parametrize(
    "body",
    [
        "r = Reshape(x, a) p = Transpose<perm=[0,2,1]>(r) y = Reshape(p, c)",  # (2·4, 3, 5) → (8, 5, 3) → (4, 2, 5, 3)
        "r = Reshape(x, b) p = Transpose<perm=[1,0]>(r) y = Reshape(p, d)",  # two axes on either side are joined
        "r = Reshape(x, a) p = Transpose<perm=[0,2,1]>(r) n = Neg(p) z = Reshape(p, e) y = Add(z, z)",
    ],
)
def test_views_that_do_not_restore_what_was_joined_stay(body: str) -> None:
    shapes = {"a": [8, 3, 5], "b": [8, 15], "c": [4, 2, 5, 3], "d": [3, 5, 2, 4], "e": [2, 4, 5, 3]}
    used = {k: np.array(v) for k, v in shapes.items() if f", {k})" in body}
    outputs = "double[M] y, double[K] n" if " n = " in body else "double[M] y"
    model = parse(f"(double[2,4,3,5] x) => ({outputs}) {{ {body} }}", **used)
    result, _, _ = run(model, JoinViews())
    assert ops(result)["Reshape"] == 2
    same(model, result, 0.0, x=normal(2, 4, 3, 5))


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("f = Flatten<axis=2>(h) y = Reshape(f, s)", {"Neg": 1}),
        ("f = Flatten<axis=2>(h) k = Shape(h) r = Reshape(f, k) y = Exp(r)", {"Neg": 1, "Exp": 1}),
        ("f = Unsqueeze(h, o) r = Squeeze(f, o) y = Exp(r)", {"Neg": 1, "Exp": 1}),
        ("f = Reshape(h, w) r = Flatten<axis=2>(f) y = Exp(r)", {"Neg": 1, "Reshape": 1, "Exp": 1}),
        ("f = Unsqueeze(h, o) r = Squeeze(f, z) y = Exp(r)", {"Neg": 1, "Exp": 1}),  # both have one entry
        ("f = Unsqueeze(h, o) r = Reshape(f, v) y = Exp(r)", {"Neg": 1, "Reshape": 1, "Exp": 1}),
    ],
)
def test_views_that_meet(body: str, left: dict[str, int]) -> None:
    shapes = {"s": [-1, 3, 4], "o": [1], "z": [0], "w": [0, 3, 2, 2], "v": [-1, 12, 1]}
    used = {k: np.array(v) for k, v in shapes.items() if f", {k})" in body}
    inputs = "(double[1,3,4] x)" if "z)" in body else "(double[N,3,4] x)"
    model = parse(f"{inputs} => (double[A,B,C] y) {{ h = Neg(x) {body} }}", **used)
    result, _, _ = run(model, JoinViews(), CleanUp())
    assert ops(result) == left
    same(model, result, 0.0, x=normal(1, 3, 4))


def test_views_between_an_input_and_an_output_stay() -> None:
    model = parse(
        "(double[N,3,4] x) => (double[A,B,C] y) { f = Flatten<axis=2>(x) y = Reshape(f, s) }", s=np.array([-1, 3, 4])
    )
    assert run(model, JoinViews())[0] is model


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("g = Gather<axis=1>(h, i) y = Unsqueeze(g, o)", {"Neg": 1, "Gather": 1}),
        ("g = Gather<axis=-1>(h, i) y = Unsqueeze(g, t)", {"Neg": 1, "Gather": 1}),
        ("g = Gather<axis=0>(h, z) u = Unsqueeze(g, a) y = Exp(u)", {"Neg": 1, "Exp": 1}),  # there is one
        ("g = Gather<axis=1>(h, i) y = Unsqueeze(g, a)", {"Neg": 1, "Gather": 1, "Unsqueeze": 1}),  # another axis
        ("g = Gather<axis=1>(h, l) y = Unsqueeze(g, o)", {"Neg": 1, "Gather": 1, "Unsqueeze": 1}),  # a list
        (
            "g = Gather<axis=1>(h, i) u = Unsqueeze(g, o) y = Add(u, g)",
            {"Neg": 1, "Gather": 1, "Unsqueeze": 1, "Add": 1},
        ),
    ],
)
def test_the_axis_that_gather_loses_is_put_back(body: str, left: dict[str, int]) -> None:
    given = {
        "i": np.array(2),
        "z": np.array(0),
        "l": np.array([1]),
        "o": np.array([1]),
        "t": np.array([2]),
        "a": np.array([0]),
    }
    used = {k: v for k, v in given.items() if f", {k})" in body}
    model = parse(f"(double[1,3,4] x) => (double[M] y) {{ h = Neg(x) {body} }}", **used)
    result, _, _ = run(model, JoinViews())
    assert ops(result) == left
    same(model, result, 0.0, x=normal(1, 3, 4))


def shuffle(back: str, *, constant: bool = False, swap: str = "0,2,1,3,4") -> onnx.ModelProto:
    """A channel shuffle of two groups as torch exports it for open sizes."""
    shape = """s = Shape(h) n = Slice(s, zero, one) e = Slice(s, two, four)
        a = Concat<axis=0>(n, two, three, e) b = Concat<axis=0>(n, six, e)"""
    given = {k: np.array([v]) for k, v in (("zero", 0), ("one", 1), ("two", 2), ("three", 3), ("four", 4), ("six", 6))}
    if constant:
        shape, given = "", {"a": np.array([2, 2, 3, 4, 5]), "b": np.array([2, 6, 4, 5])}
    body = f"h = Neg(x) {shape} r = Reshape(h, a) t = Transpose<perm=[{swap}]>(r) q = Reshape(t, {back}) y = Neg(q)"
    sizes = "2,6,4,5" if constant else "N,6,H,W"
    return parse(f"(double[{sizes}] x) => (double[A,B,C,D] y) {{ {body} }}", **given)


def test_a_channel_shuffle_of_open_sizes() -> None:
    model = shuffle("b")
    result, _, _ = run(model, JoinViews(), CleanUp())
    assert ops(result) == {"Neg": 2, "Gather": 1}
    for size in ((2, 6, 4, 5), (1, 6, 3, 3)):
        same(model, result, 0.0, x=normal(*size))


def test_other_shuffles_stay() -> None:
    assert ops(run(shuffle("b", constant=True), JoinViews())[0])["Gather"] == 0  # nothing to compute
    assert ops(run(shuffle("a"), JoinViews())[0])["Reshape"] == 2  # another shape than before
    assert ops(run(shuffle("b", swap="0,2,1,4,3"), JoinViews())[0])["Reshape"] == 2  # moves positions too


@pytest.mark.parametrize("turn", ["Transpose<perm=[1,0]>(x)", "Transpose(x)"])
@pytest.mark.parametrize(
    ("gemm", "shape"),
    [
        ("Gemm(t, z)", (4, 3)),
        ("Gemm<transA=1, alpha=0.5>(t, z)", (3, 4)),
        ("Gemm<transB=1>(t, zt)", (4, 3)),
        ("Gemm(zt, t)", (5, 4)),
        ("Gemm<transA=1, transB=1>(z, t)", (4, 5)),
    ],
)
def test_gemm_transposes_by_itself(turn: str, gemm: str, shape: tuple[int, int]) -> None:
    inputs = f"(double[{shape[0]},{shape[1]}] x, double[4,5] z, double[5,4] zt)"
    model = parse(f"{inputs} => (double[M,N] y) {{ t = {turn} y = {gemm} }}")
    result, _, _ = run(model, JoinViews())
    assert ops(result) == {"Gemm": 1}
    same(model, result, x=normal(*shape), z=normal(4, 5), zt=normal(5, 4))


@pytest.mark.parametrize(
    "body",
    [
        "(double[4,3] x) => (double[M,N] y, double[P,Q] t) { t = Transpose(x) y = Gemm(t, x) }",
        "(double[4,3] x) => (double[M,N] y, double[P,Q] z) { t = Transpose(x) y = Gemm(t, x) z = Relu(t) }",
        "(double[4,4] x) => (double[M,N] y) { t = Transpose(x) y = Gemm(t, t) }",
        "(double[4,4] x) => (double[M,N] y) { t = Transpose<perm=[0,1]>(x) y = Gemm(t, x) }",
    ],
)
def test_a_transposition_that_others_read_stays_before_gemm(body: str) -> None:
    model = parse(body)
    assert run(model, JoinViews())[0] is model


def test_transpositions_around_layer_normalizations_meet() -> None:
    """Normalisations over channels as ConvNeXt's exporters write them; what lies between two of them has none."""
    head = "(double[2,5,4,3] x) => (double[M,N] y) { t = Transpose<perm=[0,2,3,1]>(x) l = LayerNormalization(t, s) "
    rest = "u = Transpose<perm=[0,3,1,2]>(l) v = Transpose<perm=[0,2,3,1]>(u) y = LayerNormalization(v, s) }"
    model = parse(head + rest, s=normal(5))
    result, _, _ = run(model, JoinViews(), CleanUp())
    assert ops(result) == {"Transpose": 1, "LayerNormalization": 2}
    same(model, result, x=normal(2, 5, 4, 3))


@pytest.mark.parametrize(
    ("size", "target", "left"),
    [
        ("2,3,4,1,1", [2, -1, 3], {"Reshape": 1}),
        ("2,3,4,1,5", [2, -1, 3], {"Transpose": 1, "Reshape": 1}),
        ("N,3,4,1,1", [-1, 4, 3], {"Reshape": 1}),
        ("N,3,4,K,1", [-1, 4, 3], {"Transpose": 1, "Reshape": 1}),
        ("2,3,4,1,1", [0, -1, 0], {"Transpose": 1, "Reshape": 1}),  # a 0 copies a size of the transposed tensor
    ],
)
def test_a_transpose_that_moves_axes_of_size_one(size: str, target: list[int], left: dict[str, int]) -> None:
    body = f"(double[{size}] x) => (double[A,B,C] y) {{ t = Transpose<perm=[0,3,4,1,2]>(x) y = Reshape(t, s) }}"
    model = parse(body, s=np.array(target))
    result, _, _ = run(model, JoinViews())
    assert ops(result) == left
    sizes = [int({"N": "2", "K": "1"}.get(d, d)) for d in size.split(",")]
    same(model, result, x=normal(*sizes))
