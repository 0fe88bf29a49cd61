"""A wrong pass is found behind a threshold, a random operator and a mask, even without certificates."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from helpers import normal, parse

import pwopt
from pwopt.evidence.certify import skip_certificate
from pwopt.optimizing import preparation
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
