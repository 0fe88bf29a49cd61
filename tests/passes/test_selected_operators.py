"""Passes match only at the operators that they declare."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import MODELS

import pwopt
from pwopt.graph.ir import Node
from pwopt.maps import forms
from pwopt.passes import PASSES
from pwopt.passes.keep_layout import LAYOUT_RULES, KeepLayout
from pwopt.rewriting import Pass, Rewrite, Rewriter, Skip


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.onnx")), ids=lambda path: path.stem)
def test_no_pass_matches_elsewhere(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offer every node to every pass, in the middle of a run."""
    original, seen = Pass.select_nodes, set[str]()

    def select_nodes(self: Pass, nodes: list[Node]) -> list[Node]:
        chosen = list(original(self, nodes))
        seen.add(self.name)
        return chosen

    def apply(self: Rewriter, p: Pass, *arguments: object) -> object:
        if p.operators is not None:
            p.start(self)
            for node in self.nodes():
                if node.op not in p.operators:
                    assert self.attempt(p.match_and_rewrite, node, self) is None, f"{p.name} matches {node.op}"
        return run(self, p, *arguments)

    run = Rewriter.apply
    monkeypatch.setattr(Rewriter, "apply", apply)
    monkeypatch.setattr(Pass, "select_nodes", select_nodes)
    pwopt.optimize(path, cost="analytic", verify=False, passes=[p.name for p in PASSES])
    assert "focus" in seen


def test_declared_operators() -> None:
    assert KeepLayout.operators == LAYOUT_RULES.keys()
    assert {"Conv", "ConvTranspose", "Gemm", "MatMul"} < forms.WEIGHTED_TYPES


class AtRelu(Pass):
    """relu(x) = relu(x)"""

    name = "at-relu"
    operators = frozenset({"Relu"})

    def __init__(self) -> None:
        self.offered: list[str] = []

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        self.offered.append(node.op)
        return None


def test_only_declared_operators_are_offered() -> None:
    graph = pwopt.load(MODELS / "network_in_network.onnx").graph
    relus = [n.op for n in graph.nodes if n.op == "Relu"]
    p = AtRelu()
    p.run(graph)
    assert p.offered == relus != []


def test_denied_sites_are_reported_at_any_operator() -> None:
    graph = pwopt.load(MODELS / "network_in_network.onnx").graph
    other = next(n for n in graph.nodes if n.op != "Relu")
    site = pwopt.Site("at-relu", other.outputs[0].name)
    outcome = AtRelu().run(graph, denied=[site])
    assert [(s.site, s.reason) for s in outcome.skips] == [(site, "denied by the user")]
