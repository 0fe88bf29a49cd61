"""Refusals that are raised: the driver reports them, and makes sure that the graph was not edited before."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from helpers import build, ops, reasons, run

import pwopt
from pwopt.algebra.geometry import Refusal, RefusedError
from pwopt.errors import UsageError
from pwopt.graph.files import from_proto
from pwopt.maps import emit, forms
from pwopt.passes import FoldAffine
from pwopt.rewriting import Pass, Rewrite, Rewriter, Skip

MODEL = build(
    "(float[2,3,4] x) => (float[2,3,4] y) { a = Mul(x, s) b = Mul(a, s) y = Relu(b) }",
    {"s": np.array([1, 2, 3], np.float32).reshape(3, 1)},
)
#: What a pass may edit before it is refused.
EDITS: dict[str, Callable[[Rewriter, gs.Node], object]] = {
    "attribute": lambda rw, node: rw.set_attributes(node, alpha=1.0),
    "input": lambda rw, node: rw.set_input(node, 0, rw.producer(node.inputs[0]).inputs[0]),  # type: ignore[union-attr]
    "removal": lambda rw, node: rw.remove(rw.producer(node.inputs[0])),  # type: ignore[arg-type]
    "name": lambda rw, node: rw.rename(node.inputs[0], "_new"),
    "shape": lambda rw, node: rw.reshape(node.inputs[0], lambda shape: shape),
}


class Scales(Pass):
    """(x·s)·s = x·1e200²: of scales that no float32 holds."""

    name: ClassVar[str] = "scales"
    edit: str = ""

    def match_and_rewrite(self, node: gs.Node, rw: Rewriter) -> Rewrite | Skip | None:
        reading = forms.linear(rw, node)
        if reading is None or rw.producer(reading.source) is None:
            return None
        if self.edit:
            EDITS[self.edit](rw, node)
        linear = reading.load()
        huge = type(linear).diagonal(np.full(3, 1e200))
        written = emit.write(rw, huge @ linear, reading, reading.source, reading.output, reading.axis)
        return rw.replace(reading.nodes, written.nodes, "never")


def test_a_raised_refusal_is_reported_with_its_reason() -> None:
    result, outcome, _ = run(MODEL, Scales())
    assert reasons(outcome) == ["the folded weights overflow float32"]
    assert str(outcome.skips[0].site) == "scales:b"
    assert not outcome.rewrites
    assert ops(result) == ops(MODEL)


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("builtin", [False, True])
def test_a_refusal_after_an_edit_is_an_error(edit: str, builtin: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    p = Scales()
    p.edit = edit
    message = "the graph was edited before a rewrite was refused because the folded weights overflow float32"
    if builtin:
        monkeypatch.setattr(Scales, "builtin", True)
        with pytest.raises(RuntimeError, match=message):
            p.run(from_proto(MODEL).graph)
    else:
        with pytest.raises(UsageError, match=f"the pass 'scales' .* failed at 'scales:b' with RuntimeError: {message}"):
            p.run(from_proto(MODEL).graph)


def test_a_built_in_pass_that_edits_first_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted into what fold-affine writes with: an edit, then a refusal. It would have tried the other side next."""

    def write(view: Rewriter, *_: object, **__: object) -> emit.Written:
        view.set_attributes(view.nodes()[0], planted=1)
        raise RefusedError("planted")

    monkeypatch.setattr(emit, "write", write)
    with pytest.raises(RuntimeError, match="the graph was edited before a rewrite was refused because planted"):
        FoldAffine().run(from_proto(MODEL).graph)


def test_a_pass_may_try_another_way() -> None:
    """`Rewriter.attempt` gives the reason as a value, as planners get it."""
    rw = Rewriter(from_proto(MODEL).graph)

    def refuse() -> int:
        raise RefusedError("no")

    assert rw.attempt(refuse) == Refusal("no")
    assert rw.attempt(lambda: 3) == 3


def test_passes_of_others_that_ask_for_a_refusal_still_run() -> None:
    """Before refusals were raised, a pass compared the answer."""

    class Old(Pass):
        """x = x"""

        name: ClassVar[str] = "old"
        contract: ClassVar[int] = pwopt.rewriting.CONTRACT

        def match_and_rewrite(self, node: gs.Node, rw: Rewriter) -> Rewrite | Skip | None:
            reading = forms.linear(rw, node)
            if reading is None:
                return None
            linear = reading.load()
            return Skip("refused") if isinstance(linear, Refusal) else Skip(f"{linear.geometry.out_channels} channels")

    _, outcome, _ = run(MODEL, Old())
    assert reasons(outcome) == ["3 channels", "3 channels"]
