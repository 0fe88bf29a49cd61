from __future__ import annotations

import numpy as np
import onnx
import pytest
from helpers import normal, ops, parse, reasons, run, same

import pwopt
from pwopt.passes import CleanUp, SettleShapes

ONE, TWO, LAST = np.array([1]), np.array([2]), np.array([2**63 - 1])
#: The channel split of CSP blocks, as torch.chunk and Tensor.chunk come out, and other arithmetic on fixed sizes.
SPLITS: list[tuple[str, dict[str, np.ndarray]]] = [
    ("s = Shape(h) g = Gather(s, i) a = Add(g, i) d = Div(a, k) e = Mul(d, i) y = Slice(h, z, e, i)",
     {"i": ONE, "k": TWO, "z": np.array([0])}),
    ("s = Shape<start=1, end=2>(h) d = Div(s, k) y = Slice(h, z, d, i)", {"i": ONE, "k": TWO, "z": np.array([0])}),
    ("s = Shape(h) g = Gather(s, o) c = Cast<to=6>(g) d = Div(c, k) e = Cast<to=7>(d) u = Unsqueeze(e, z) y = Slice(h, z, u, i)",
     {"o": np.array(1), "i": ONE, "k": np.array(2, np.int32), "z": np.array([0])}),
    ("s = Shape(h) g = Slice(s, i, k) d = Sub(g, k) m = Mod(d, t) e = Max(m, i) y = Slice(h, z, e, i)",
     {"i": ONE, "k": TWO, "t": np.array([5]), "z": np.array([0])}),
    ("s = Shape(h) g = Slice(s, n, l) f = Cast<to=11>(g) q = Sqrt(f) y = Mul(h, q)", {"n": np.array([-3]), "l": np.array([-2])}),
]  # fmt: skip


@pytest.mark.parametrize(("body", "weights"), SPLITS)
def test_arithmetic_on_fixed_sizes_is_computed(body: str, weights: dict[str, np.ndarray]) -> None:
    model = parse(f"(double[N,6,H,W] x) => (double[A,B,C,D] y) {{ h = Neg(x) {body} }}", **weights)
    result, _, _ = run(model, SettleShapes(), CleanUp())
    assert set(ops(result)) <= {"Neg", "Slice", "Mul"}
    for size in ((2, 6, 4, 5), (1, 6, 3, 3)):
        same(model, result, 0.0, x=normal(*size))


@pytest.mark.parametrize("picked", [0, 2, 3])
def test_an_open_size_stays(picked: int) -> None:
    body = "(double[N,6,H,W] x) => (double[A,B,C,D] y) { s = Shape(x) g = Gather(s, i) d = Div(g, k) y = Slice(x, z, d, j) }"
    model = parse(body, i=np.array([picked]), k=TWO, z=np.array([0]), j=np.array([picked]))
    assert run(model, SettleShapes(), CleanUp())[0] is model


def target(*entries: str) -> str:
    """A Reshape to sizes of x (a digit is an axis) and numbers (n8), as exporters spell them."""
    lines = ["s = Shape(x)"]
    for i, entry in enumerate(entries):
        if not entry.startswith("n"):
            lines.append(f"g{i} = Gather(s, a{entry}) e{i} = Unsqueeze(g{i}, z)")
    parts = ", ".join(e if e.startswith("n") else f"e{i}" for i, e in enumerate(entries))
    return " ".join([*lines, f"t = Concat<axis=0>({parts})"])


def reshaped(attrs: str, *entries: str) -> onnx.ModelProto:
    numbers = {e: np.array([int(e[1:].replace("m", "-"))]) for e in entries if e.startswith("n")}
    axes = {f"a{e}": np.array(int(e)) for e in entries if not e.startswith("n")}
    body = f"(double[N,L,12] x) => (double[A,B,C] y) {{ {target(*entries)} r = Reshape{attrs}(x, t) y = Neg(r) }}"
    return parse(body, opset=19, z=np.array([0]), **numbers, **axes)


@pytest.mark.parametrize(
    ("entries", "written"),
    [
        (("0", "1", "n3", "n4"), [0, 0, 3, 4]),
        (("0", "nm1", "n4"), [0, -1, 4]),
        (("0", "n12", "1"), None),  # of an empty batch, onnxruntime refuses a −1 beside a 0
        (("0", "n4", "n3", "1"), None),  # a size that moves, beside one that stays
        (("1", "n4", "n3", "0"), None),  # two sizes that move
        (("nm1", "n12"), [-1, 12]),
        (("0", "1", "n12"), [0, 0, 12]),
    ],
)
@pytest.mark.parametrize("attrs", ["", "<allowzero=1>"])
def test_sizes_that_stay_are_copied(entries: tuple[str, ...], written: list[int] | None, attrs: str) -> None:
    model = reshaped(attrs, *entries)
    result, _, _ = run(model, SettleShapes(), CleanUp())
    x = normal(2, 3, 12)
    if written is None:
        assert ops(result)["Shape"] == 1
    elif written == [0, 0, 12]:
        assert ops(result) == {"Neg": 1}
    else:
        assert ops(result) == {"Reshape": 1, "Neg": 1}
        shape = next(n for n in result.graph.node if n.op_type == "Reshape").input[1]
        held = next(onnx.numpy_helper.to_array(t) for t in result.graph.initializer if t.name == shape)
        assert held.tolist() == written
    same(model, result, 0.0, x=x)


def test_a_size_that_moves_may_be_left_open_beside_numbers() -> None:
    body = "(double[N,12] x) => (double[A,B] y) { s = Shape(x) g = Slice(s, z, o) t = Concat<axis=0>(n, g) r = Reshape(x, t) y = Neg(r) }"
    model = parse(body, z=np.array([0]), o=ONE, n=np.array([12]))
    result, _, _ = run(model, SettleShapes(), CleanUp())
    assert ops(result) == {"Reshape": 1, "Neg": 1}
    same(model, result, 0.0, x=normal(3, 12))


def test_a_zero_that_means_nothing_stays_with_allowzero() -> None:
    body = "(double[N,L,0] x) => (double[A,B] y) { s = Shape(x) g = Slice(s, z, o) t = Concat<axis=0>(g, z) y = Reshape<allowzero=1>(x, t) }"
    model = parse(body, z=np.array([0]), o=ONE)
    assert run(model, SettleShapes())[0] is model


def test_a_size_of_another_input_is_another_size() -> None:
    """Callers may give inputs that share the name of a dimension different sizes: onnxruntime does not mind."""
    body = "(double[N,12] x, double[N,3] z) => (double[A,B,C] y) { s = Shape(z) g = Slice(s, o, k) t = Concat<axis=0>(g, u, v) y = Reshape(x, t) }"
    weights = {"o": np.array([0]), "k": ONE, "u": np.array([3]), "v": np.array([-1])}
    assert run(parse(body, **weights), SettleShapes())[0].graph.node[0].op_type == "Shape"
    own = parse(body.replace("Shape(z)", "Shape(x)"), **weights)
    assert ops(run(own, SettleShapes(), CleanUp())[0]) == {"Reshape": 1}


def test_an_input_that_is_computed_with_stays() -> None:
    model = parse("(double[N,6] x, int64[1] k) => (double[A,B] y) { s = Shape(x) g = Gather(s, i) d = Div(g, k) y = Slice(x, z, d, i) }",
                  i=ONE, z=np.array([0]))  # fmt: skip
    result, _, _ = run(model, SettleShapes())
    assert ops(result) == {"Div": 1, "Slice": 1}


@pytest.mark.parametrize(
    ("op", "numbers"),
    [("Div", (-7, 2)), ("Div", (7, -2)), ("Div", (7, 0)), ("Mod", (-7, 2)), ("Mod", (7, 0)), ("Mul", (2**31 - 1, 2))],
)
def test_numbers_that_runtimes_may_disagree_on_are_left(op: str, numbers: tuple[int, int]) -> None:
    body = f"s = Shape(x) g = Gather(s, i) a = Mul(g, z) b = Add(a, p) c = {op}(b, q) d = Gather(s, j) y = Add(c, d)"
    weights = {
        "i": ONE,
        "j": np.array([0]),
        "z": np.array([0]),
        "p": np.array([numbers[0]]),
        "q": np.array([numbers[1]]),
    }
    result, _, _ = run(parse(f"(double[N,6] x) => (int64[A] y) {{ {body} }}", **weights), SettleShapes())
    assert ops(result)[op] == 1


def test_what_others_see_stays() -> None:
    model = parse("(double[N,6] x) => (int64[A] g, double[B,C] y) { s = Shape(x) g = Gather(s, i) y = Neg(x) }", i=ONE)
    assert run(model, SettleShapes())[0] is model


def test_shapes_settle_one_another() -> None:
    """What a shape settles may be the shape of the next, as in a stack of CSP blocks."""
    block = "s{0} = Shape(h{0}) g{0} = Gather(s{0}, i) d{0} = Div(g{0}, k) h{1} = Slice(h{0}, z, d{0}, i)"
    body = " ".join(block.format(n, n + 1) for n in range(4))
    model = parse(
        f"(double[N,32,H] x) => (double[A,B,C] y) {{ h0 = Neg(x) {body} y = Neg(h4) }}", i=ONE, k=TWO, z=np.array([0])
    )
    result = pwopt.optimize(model, cost="analytic", verify=False).model
    assert set(ops(result)) <= {"Neg", "Slice"}
    same(model, result, 0.0, x=normal(2, 32, 3))


def test_a_computed_size_beside_a_copied_one_is_explained() -> None:
    body = (
        "(float[N,K,4] x, float[A,M] z) => (float[B,C,D] y) { s = Shape(z) m = Slice(s, one, two)"
        " t = Concat<axis=0>(zero, m, four) y = Reshape(x, t) }"
    )
    weights = {"zero": np.array([0]), "one": np.array([1]), "two": np.array([2]), "four": np.array([4])}
    result, outcome, _ = run(parse(body, **weights), SettleShapes())
    assert ops(result)["Concat"] == 1
    assert any("if another axis is empty" in reason for reason in reasons(outcome))
