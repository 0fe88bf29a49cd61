"""A transformer block as exporters write it: unmerged LoRA on query and value, separate projections, a scaled query."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from helpers import normal, ops, parse, same

import pwopt

pytest.importorskip("onnxruntime")

WIDTH, HEADS, TOKENS, RANK = 24, 3, 7, 2
HEAD = WIDTH // HEADS


def projection(name: str, *, lora: bool) -> str:
    body = f"{name}m = MatMul(x, {name}w) {name}l = Add({name}m, {name}b) "
    if not lora:
        return body + f"{name} = Identity({name}l) "
    return (
        body
        + f"{name}d = MatMul(x, {name}A) {name}u = MatMul({name}d, {name}B) {name}s = Mul({name}u, alpha) {name} = Add({name}l, {name}s) "
    )


def block(scale: str) -> onnx.ModelProto:
    heads = "".join(
        f"{n}r = Reshape({n}{'x' if n == 'q' and scale == 'before' else ''}, split) {n}h = Transpose<perm={perm}>({n}r) "
        for n, perm in (("q", "[0,2,1,3]"), ("k", "[0,2,3,1]"), ("v", "[0,2,1,3]"))
    )
    before = "qx = Mul(q, root) " if scale == "before" else ""
    after = "scaled = Mul(qh, root) " if scale == "after" else "scaled = Identity(qh) "
    body = (
        f"(double[2,{TOKENS},{WIDTH}] x) => (double[N] y) {{"
        + projection("q", lora=True)
        + projection("k", lora=False)
        + projection("v", lora=True)
        + before
        + heads
        + after
        + "scores = MatMul(scaled, kh) weights = Softmax<axis=-1>(scores) mixed = MatMul(weights, vh)"
        + " t = Transpose<perm=[0,2,1,3]>(mixed) r = Reshape(t, join) o = MatMul(r, ow) y = Add(o, x) }"
    )
    numbers: dict[str, np.ndarray] = {
        "ow": normal(WIDTH, WIDTH),
        "alpha": np.float64(0.5),
        "root": np.float64(HEAD**-0.5),
    }
    for i, n in enumerate("qkv"):
        numbers |= {f"{n}w": normal(WIDTH, WIDTH, seed=i), f"{n}b": normal(WIDTH, seed=10 + i)}
        if n != "k":
            numbers |= {f"{n}A": normal(WIDTH, RANK, seed=20 + i), f"{n}B": normal(RANK, WIDTH, seed=30 + i)}
    numbers |= {"split": np.array([0, 0, HEADS, HEAD]), "join": np.array([0, 0, WIDTH])}
    return parse(body, **numbers)


@pytest.mark.parametrize("scale", ["before", "after"])
def test_adapters_merge_scales_fold_and_projections_join(scale: str) -> None:
    model = block(scale)
    result = pwopt.optimize(model, cost="analytic")
    assert ops(model)["MatMul"] == 10
    # query, key and value as one; scores; mixing; output
    assert ops(result.model)["MatMul"] == 4
    assert ops(result.model)["Mul"] == 0
    assert ops(result.model)["Split"] == 1
    assert result.report.equivalence is not None
    assert result.report.equivalence.passed
    same(model, result.model, x=normal(2, TOKENS, WIDTH))
    done = {r.pass_name for r in result.report.rewrites}
    assert {"sum-branches", "merge-siblings", "fold-affine"} <= done
