"""Products of two matrices take in additions and transpositions."""

import numpy as np
import pytest
from helpers import build, normal, open_session, ops, parse, reasons, run, same

from pwopt.passes import WriteGemm

A, B = normal(3, 4), normal(4, 5, seed=1)


@pytest.mark.parametrize("call", ["Add(p, c)", "Add(c, p)", "Sum(p, c)"])
@pytest.mark.parametrize("shape", [(), (5,), (1,), (3, 1), (1, 5), (3, 5)])
def test_an_addition_after_a_product(call: str, shape: tuple[int, ...]) -> None:
    model = parse(
        f"(double[3,4] a, double[4,5] b) => (double[M,N] y) {{ p = MatMul(a, b) y = {call} }}", c=normal(*shape)
    )
    result, outcome, _ = run(model, WriteGemm())
    assert ops(result) == {"Gemm": 1}
    assert outcome.rewrites[0].certificate.status != "failed"
    same(model, result, a=A, b=B)


def test_sizes_that_have_one_name_are_equal() -> None:
    body = "(double[M,4] a, double[4,5] b) => (double[A,B] y) { p = MatMul(a, b) q = MatMul(a, w) r = Abs(q) y = Add(r, p) }"
    model = parse(body, w=normal(4, 5, seed=2))
    result, _, _ = run(model, WriteGemm())
    assert ops(result) == {"MatMul": 1, "Abs": 1, "Gemm": 1}
    same(model, result, a=A, b=B)


def test_declared_names_are_checked_when_the_model_runs() -> None:
    body = "(double[M,K] a, double[K,N] b, double[M,N] c) => (double[A,B] y) { p = MatMul(a, b) y = Add(c, p) }"
    model = parse(body)
    result, _, _ = run(model, WriteGemm())
    assert ops(result) == {"Gemm": 1}
    same(model, result, a=A, b=B, c=normal(3, 5, seed=2))
    same(model, result, a=A, b=B, c=normal(1, 5, seed=2))
    session = open_session(result)
    with pytest.raises(Exception, match="Gemm"):
        session.run(None, {"a": A[:1], "b": B, "c": normal(3, 5)})


def test_an_addend_that_may_enlarge_the_product_stays() -> None:
    body = "(double[M,K] a, double[K,N] b, double[J,N] c) => (double[A,B] y) { p = MatMul(a, b) y = Add(c, p) }"
    model = parse(body)
    result, outcome, _ = run(model, WriteGemm())
    assert result is model
    assert "may enlarge the product" in reasons(outcome)[0]


@pytest.mark.parametrize(
    ("ends", "body"),
    [
        ("double[3,4] a, double[4,5] b, double[2,3,5] c", "p = MatMul(a, b) y = Add(p, c)"),  # enlarges the product
        ("double[1,4] a, double[4,5] b, double[3,5] c", "p = MatMul(a, b) y = Add(p, c)"),
        ("double[3,4] a, double[4,5] b, double[J,5] c", "p = MatMul(a, b) y = Add(p, c)"),  # may be 1 or not
        ("double[2,3,4] a, double[4,5] b, double[5] c", "p = MatMul(a, b) y = Add(p, c)"),
        ("double[4] a, double[4,5] b, double[5] c", "p = MatMul(a, b) y = Add(p, c)"),
        ("int64[3,4] a, int64[4,5] b, int64[5] c", "p = MatMul(a, b) y = Add(p, c)"),
        ("float16[3,4] a, float16[4,5] b, float16[5] c", "p = MatMul(a, b) y = Add(p, c)"),
        ("double[3,4] a, double[4,5] b, double[5] c", "p = MatMul(a, b) q = Add(p, c) y = Mul(p, q)"),  # read twice
        ("double[3,4] a, double[4,5] b, double[5] c", "p = MatMul(a, b) y = Add(p, p)"),
        ("double[3,4] a, double[4,5] b, double[5] c", "p = Gemm(a, b, c) y = Add(p, c)"),
        ("double[3,4] a, double[4,5] b, double[5] c", "p = MatMul(a, b) y = Sub(p, c)"),
        ("double[4,4] a, double[4,4] b, double[4] c", "p = Gemm(a, b, c) y = Transpose(p)"),  # c would be transposed
        ("double[2,4,4] a, double[2,4,4] b, double[4] c", "p = MatMul(a, b) y = Transpose<perm=[0,2,1]>(p)"),
        ("double[4,4] a, double[4,4] b, double[4] c", "p = MatMul(a, b) q = Transpose(p) y = Mul(p, q)"),
        ("double[2,4,4] a, double[4,4] b, double[4] c", "t = Transpose(b) y = MatMul(a, t)"),
        ("double[4,4] a, double[4,4] b, double[4] c", "t = Transpose<perm=[0,1]>(b) y = MatMul(a, t)"),
        ("double[4,4] a, double[4,4] b, double[4] c", "t = Transpose(b) p = MatMul(a, t) y = Mul(p, t)"),
    ],
)
def test_what_stays(ends: str, body: str) -> None:
    kind = ends.split("[")[0]
    model = build(f"({ends}) => ({kind}[Z,Q] y) {{ {body} }}", {})
    assert run(model, WriteGemm())[0] is model


def test_what_must_stay_visible() -> None:
    model = parse(
        "(double[3,4] a, double[4,5] b, double[5] c) => (double[M,N] y, double[J,L] p) { p = MatMul(a, b) y = Add(p, c) }"
    )
    assert run(model, WriteGemm())[0] is model


@pytest.mark.parametrize(
    "product", ["MatMul(a, b)", "Gemm<alpha=0.5>(a, b)", "Gemm<transA=1>(d, b)", "Gemm<transB=1>(a, e)"]
)
def test_a_transposition_of_the_result(product: str) -> None:
    ends = "double[3,4] a, double[4,5] b, double[4,3] d, double[5,4] e"
    model = build(f"({ends}) => (double[M,N] y) {{ p = {product} y = Transpose(p) }}", {})
    result, _, _ = run(model, WriteGemm())
    assert ops(result) == {"Gemm": 1}
    same(model, result, a=A, b=B, d=normal(4, 3, seed=2), e=normal(5, 4, seed=3))


@pytest.mark.parametrize(
    ("product", "left"),
    [("MatMul(t, u)", 0), ("Gemm<alpha=0.5, beta=2.0>(t, u, c)", 1), ("Gemm<transA=1, transB=1>(t, u)", 0)],
)
def test_transpositions_of_the_operands(product: str, left: int) -> None:
    turned = "transA" in product
    ends = "double[3,4] a, double[4,5] b" if turned else "double[4,3] a, double[5,4] b"
    body = f"t = Transpose(a) u = Transpose(b) p = {product} y = Add(p, c)"
    model = build(f"({ends}) => (double[M,N] y) {{ {body} }}", {"c": normal(5)})
    result, _, _ = run(model, WriteGemm())
    assert ops(result) == {"Gemm": 1, **({"Add": 1} if left else {})}
    same(model, result, a=A if turned else A.T.copy(), b=B if turned else B.T.copy())


@pytest.mark.parametrize(("opset", "left"), [(6, {"MatMul": 1, "Add": 1}), (7, {"Gemm": 1})])
def test_gemm_broadcasts_since_opset_7(opset: int, left: dict[str, int]) -> None:
    body = "(double[3,4] a, double[4,5] b, double[3,5] c) => (double[M,N] y) { p = MatMul(a, b) y = Add(p, c) }"
    assert ops(run(parse(body, opset=opset), WriteGemm())[0]) == left


@pytest.mark.parametrize(("opset", "left"), [(10, {"MatMul": 1, "Transpose": 1}), (11, {"Gemm": 1})])
def test_gemm_adds_nothing_since_opset_11(opset: int, left: dict[str, int]) -> None:
    body = "(double[3,4] a, double[4,5] b) => (double[M,N] y) { p = MatMul(a, b) y = Transpose(p) }"
    assert ops(run(parse(body, opset=opset), WriteGemm())[0]) == left


def test_weights_and_biases_become_a_gemm() -> None:
    body = "(double[3,4] a) => (double[M,N] y) { p = MatMul(a, w) y = Add(p, c) }"
    model = parse(body, w=B, c=np.arange(5.0))
    result, _, _ = run(model, WriteGemm())
    assert ops(result) == {"Gemm": 1}
    same(model, result, a=A)
