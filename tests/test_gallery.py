"""End to end: every system of the gallery is built, rewritten, verified, and does what it declares."""

from __future__ import annotations

import re
from dataclasses import replace

import onnx
import pytest
from models import page
from models.gallery import SYSTEMS, Row, check, serialised
from models.system import FOLDER, Kept, Law, Refusal, System

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    return {system.name: check(system) for system in SYSTEMS}


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda s: s.name)
def test_a_system(system: System, rows: dict[str, Row]) -> None:
    """Reproduced byte for byte, equivalent, rewritten as expected and no further, properties before and after."""
    row = rows[system.name]
    assert row.faults == ()
    assert row.report.equivalence is not None
    assert row.report.equivalence.passed
    assert row.report.after.macs <= row.report.before.macs
    assert row.report.after.nodes < row.report.before.nodes or row.report.after.macs < row.report.before.macs
    assert row.rewrites
    assert row.figures
    assert row.report.before.unknown == row.report.after.unknown == 0


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda s: s.name)
def test_a_file(system: System) -> None:
    assert len(system.path.read_bytes()) <= 300_000
    onnx.checker.check_model(onnx.load(system.path), full_check=True)
    assert serialised(system) == serialised(system)


def test_there_are_sixteen_and_nothing_else() -> None:
    assert len({s.name for s in SYSTEMS}) == 16
    assert {p.stem for p in FOLDER.glob("*.onnx")} == {s.name for s in SYSTEMS}


def test_what_is_not_as_declared_is_a_fault() -> None:
    """Each kind of declaration, made wrong on purpose."""
    system = next(s for s in SYSTEMS if s.name == "physics")
    wrong = replace(
        system,
        rewrites=("fold-chains",),
        refusals=(Refusal("/constraint/Conv", ""), Refusal("/network/2/Relu", "", "no pass says this")),
        properties=(Law("a law is broken", lambda _: 1.0, 1e-3), Kept("a quantity moves", lambda s: id(s), 0.0)),
    )
    faults = " ".join(check(wrong).faults)
    assert "the passes that acted were ['fold-affine', 'fold-chains']" in faults
    assert "no refusal says 'no pass says this'" in faults
    assert "a law is broken" in faults
    assert "a quantity moves" in faults


def test_a_changed_file_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    system = next(s for s in SYSTEMS if s.name == "hyperspectral")

    def build() -> onnx.ModelProto:
        model = system.build()
        model.doc_string = "changed"
        return model

    build.__module__ = system.build.__module__
    assert check(replace(system, build=build)).faults == ("hyperspectral.onnx is not what its builder makes",)


def test_the_page_is_up_to_date(rows: dict[str, Row]) -> None:
    """But for figures that were measured, and the machine."""
    kept = (FOLDER / "README.md").read_text(encoding="utf-8")
    for row in rows.values():
        for paragraph in row.system.text.split("\n\n")[1:]:
            said = paragraph.replace("Rewritten:", "**Rewritten.**").replace("Left alone:", "**Left alone.**")
            assert said in kept, row.system.name
        for claim in row.figures:
            assert claim.claim in kept
        before, after = row.report.before.macs, row.report.after.macs
        assert f"multiply-adds {before:,} → {after:,}" in kept
    anchors = re.findall(r"\]\(#([^)]*)\)", kept)
    assert anchors == [page.anchor(row) for row in rows.values()]
    assert len(re.findall(r"^## ", kept, re.M)) == len(SYSTEMS)
