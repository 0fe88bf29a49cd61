"""A wrong pass is found behind a threshold, a random operator and a mask, even without certificates."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from helpers import normal, parse, rng

import pwopt
from pwopt.evidence.certify import skip_certificate
from pwopt.optimizing import attempt, preparation
from pwopt.passes import FoldChains
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.records import Rewrite

pytest.importorskip("onnxruntime")


class Grow(Pass):
    """A wrong rewrite: every weight of a Conv grows by 3 %."""

    name = "grow"

    def match_and_rewrite(self, node: gs.Node, rw: Rewriter) -> Rewrite | None:
        if rw.op(node) != "Conv" or "grown" in node.inputs[1].name:
            return None
        values = rw.raw(node.inputs[1])
        assert values is not None
        wrong = rw.new_constant("grown", (values * 1.03).astype(values.dtype))
        return rw.replace([node], [gs.Node("Conv", "", node.attrs, [node.inputs[0], wrong], list(node.outputs))], "")


#: What follows the convolution, and the words of the note.
BEHIND = {
    "threshold": ("g = Greater(a, t) y = Where(g, a, z)", "outside the tolerance"),
    "random": ("n = RandomNormalLike(a) y = Add(a, n)", "cannot be compared"),
    "mask": ("g = Less(x, z) y = Where(g, low, a)", "beyond the tolerance"),
}


@pytest.mark.parametrize("step", BEHIND)
def test_a_wrong_pass_is_found(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "certify", skip_certificate)
    text, words = BEHIND[step]
    constants = {"t": np.float16(0.7), "z": np.float16(0), "low": np.float16(-65504)}
    model = parse(
        f"(float16[1,8,64,64] x) => (float16[N,C,P,Q] y) {{ a = Conv(x, w) {text} }}",
        w=(normal(8, 8, 1, 1) / 3).astype(np.float16), **{k: v for k, v in constants.items() if f" {k}" in text or f"({k}" in text},
    )  # fmt: skip
    report = pwopt.optimize(model, passes=[Grow()], cost="analytic").report
    assert report.rewrites == ()
    assert any(words in note for note in report.notes), report.notes
    assert pwopt.optimize(model, passes=[Grow()], cost="analytic", verify=False).report.rewrites


class GrowOne(Grow):
    """The same, but only for the convolution that computes 'bad'."""

    name = "grow-one"

    def match_and_rewrite(self, node: gs.Node, rw: Rewriter) -> Rewrite | None:
        return super().match_and_rewrite(node, rw) if node.outputs[0].name == "bad" else None


@pytest.mark.parametrize("located", [True, False])
def test_a_deviating_result_loses_only_the_rewrite_at_fault(located: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The body computes in float16 between float32 inputs and outputs. Without a location, bisection finds the fault."""
    monkeypatch.setattr(preparation, "certify", skip_certificate)
    if not located:
        monkeypatch.setattr(attempt, "localise", lambda *_args, **_options: None)
    model = parse(
        "(float[1,8,32,32] x) => (float[N,C,P,Q] y) { h = Cast<to=10>(x) a = Conv(h, v) b = Conv(a, w) r = Relu(b) "
        "bad = Conv(r, u) s = Relu(bad) y = Cast<to=1>(s) }",
        **{n: (rng(i).integers(-2, 3, (8, 8, 1, 1)) / 4).astype(np.float16) for i, n in enumerate("vwu")},  # exact
    )
    report = pwopt.optimize(model, passes=[FoldChains(), GrowOne()], cost="analytic").report
    assert [r.pass_name for r in report.rewrites] == ["fold-chains"]
    assert report.equivalence is not None
    assert report.equivalence.passed
    assert [s.pass_name for s in report.skips if s.tensor == "bad"] == ["grow-one"]
