"""The lowering table: what every row declares, and what docs/passes.md shows of it."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, get_args

import pytest
from helpers import ops, parse, reasons, run

from pwopt.graph.ir import Node
from pwopt.passes import LOWERING, NAMING
from pwopt.rewriting.driver import Rewriter
from pwopt.rewriting.lowering import Exactness, Form, Lowering

PAGE = (Path(__file__).parents[2] / "docs" / "passes.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("row", [*NAMING, *LOWERING], ids=lambda row: row.name)
def test_the_page_shows_the_row(row: type[Lowering]) -> None:
    assert row.exactness in get_args(Exactness)
    raced = " \\*" if row.policy == "measured" else ""
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{row.name}`{raced} |")]
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[4] == row.exactness
    assert cells[5] == ("all" if len(row.pays_on) == 3 else ", ".join(sorted(row.pays_on)))
    assert cells[7] == row.figure


def test_rows_for_the_cpu_provider_serve_no_other() -> None:
    assert all(row.pays_on == {"cpu"} for row in LOWERING)


class Renamed(Lowering):
    """Relu(x) = Abs(x): wrong, but short"""

    name = "renamed"
    operators = frozenset({"Relu"})
    since, until = 14, 17
    exactness = "rounding"
    figure = "none"
    pays: ClassVar[bool] = True

    def lower(self, node: Node, rw: Rewriter) -> Form:
        new = Node("Abs", node.name, {}, list(node.inputs), list(node.outputs))
        return Form((node,), (new,), "Abs is shorter", pays=self.pays)


@pytest.mark.parametrize(("opset", "applies"), [(13, False), (14, True), (17, True), (18, False)])
def test_the_opset_selects_rows(opset: int, applies: bool) -> None:
    model = parse("(float[4] x) => (float[4] y) { y = Relu(x) }", opset)
    assert ops(run(model, Renamed(), certifier=None)[0]) == {"Abs" if applies else "Relu": 1}


def test_a_form_that_may_not_pay_waits_for_a_race() -> None:
    model = parse("(float[4] x) => (float[4] y) { y = Relu(x) }")
    row = Renamed()
    row.pays = False  # type: ignore[misc]
    result, outcome, _ = run(model, row, certifier=None)
    assert result is model
    assert reasons(outcome) == ["Abs is shorter; only measuring can tell whether that is faster"]
    row.scope = "exact"
    assert ops(run(model, row, certifier=None)[0]) == {"Abs": 1}
