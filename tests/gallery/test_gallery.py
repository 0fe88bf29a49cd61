"""End to end: every system of the gallery is built, rewritten, verified, and does what it declares."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from models import page
from models.__main__ import app
from models.gallery import SYSTEMS, Row, check, serialised
from models.system import FOLDER, Kept, Law, Refusal, System
from pwopt.errors import ProviderError
from pwopt.graph.files import as_file
from pwopt.running.session import Session

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


def test_there_are_eighteen_and_nothing_else() -> None:
    assert len({s.name for s in SYSTEMS}) == 18
    written = set(FOLDER.glob("*.pwopt.onnx"))  # by the README's first command
    assert {p.stem for p in set(FOLDER.glob("*.onnx")) - written} == {s.name for s in SYSTEMS}


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


@pytest.mark.parametrize(
    ("name", "weight", "number"),
    [
        ("graph_network", "self_loops", 0),
        ("hyperspectral", "projection.weight", 0),
        ("hyperspectral", "projection.weight", 1),
        ("distillation_projector", "projector.weight", 0),
        ("distillation_projector", "hint/regressor.weight", 1),
        ("fcn", "classifier.weight", 0),
        ("resnet_projection", "rotation.weight", 0),
        ("rgbd_fusion", "scores.depth.conv.weight", 0),
        ("style_transfer", "colour/turn.weight", 0),
        ("style_transfer", "palette.weight", 1),
        ("beamformer", "gains", 0),
        ("physics", "freezing.weight", 0),
        ("physics", "constraint.weight", 1),
        ("text_detector", "probability.up2.weight", 0),
    ],
)
def test_a_property_notices_a_wrong_weight(name: str, weight: str, number: int) -> None:
    """Were a fold wrong by a few per cent, the property would not hold."""
    system = next(s for s in SYSTEMS if s.name == name)
    model = system.build()
    tensor = next(t for t in model.graph.initializer if t.name == weight)
    value = numpy_helper.to_array(tensor)
    noise = np.random.default_rng(0).normal(0, 0.1 * value.std(), value.shape).astype(np.float32)
    tensor.CopyFrom(numpy_helper.from_array(value + noise, weight))
    with as_file(model) as changed:
        sessions = Session(system.path), Session(changed)
    assert system.properties[number].compare(sessions[0], sessions[0]).holds
    assert not system.properties[number].compare(*sessions).holds


@pytest.mark.parametrize(
    ("name", "tensor", "op", "inputs"),
    [
        ("network_in_network", "/block2.norm/BatchNormalization_output_0", "Add", (1, 64, 16, 16)),
        ("inception", "InceptionV1/input/Transpose:0", "Add", (1, 96, 28, 28)),
        ("fpn", "/layer2/Relu_output_0", "Add", (1, 32, 32, 32)),
        ("attention", "/norm/LayerNormalization_output_0", "Add", (1, 49, 96)),
        ("protein_distance_map", "/symmetrise/Mul_output_0", "Add", (1, 32, 48, 48)),
        ("squeeze_excitation", "p2o.Conv.0.0", "Add", (1, 120, 20, 20)),
        ("beamformer", "beams", "Add", (1, 4, 1024)),
        ("decoder", "/decoder2/Relu_output_0", "Add", (1, 16, 64, 64)),
        ("linear_sequence", "h2", "Relu", ()),
    ],
)
def test_a_property_notices_a_wrong_structure(name: str, tensor: str, op: str, inputs: tuple[int, ...]) -> None:
    """What depends on the position, or is not linear, breaks the law that the system stands for."""
    system = next(s for s in SYSTEMS if s.name == name)
    model = system.build()
    position = next(i for i, n in enumerate(model.graph.node) if tensor in n.output)
    maker = model.graph.node[position]
    maker.output[list(maker.output).index(tensor)] = "before"
    names = ["before"]
    if inputs:
        values = np.random.default_rng(0).normal(size=inputs).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, "position"))
        names.append("position")
    model.graph.node.insert(position + 1, onnx.helper.make_node(op, names, [tensor]))
    with as_file(model) as changed:
        sessions = Session(system.path), Session(changed)
    assert not system.properties[-1].compare(*sessions).holds


def test_a_changed_file_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    system = next(s for s in SYSTEMS if s.name == "hyperspectral")

    def build() -> onnx.ModelProto:
        model = system.build()
        model.doc_string = "changed"
        return model

    build.__module__ = system.build.__module__
    assert check(replace(system, build=build)).faults == ("hyperspectral.onnx is not what its builder writes",)


def test_the_page_is_up_to_date(rows: dict[str, Row]) -> None:
    """Except for measured figures and the machine."""
    kept = (FOLDER / "README.md").read_text(encoding="utf-8")
    for row in rows.values():
        for claim in row.figures:
            assert claim.claim in kept
        claims = tuple(f"* {claim.claim}: " for claim in row.figures)
        for line in page.markdown([row]).partition("\n## ")[2].splitlines():
            assert line in kept or line.startswith(claims), row.system.name
    anchors = re.findall(r"\]\(#([^)]*)\)", kept)
    assert anchors == [page.anchor(row) for row in rows.values()]
    assert len(re.findall(r"^## ", kept, re.M)) == len(SYSTEMS)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        app(["physics", "graph_network", "--seconds", "0"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.count("holds") == 2
    assert "inception" not in text
    with pytest.raises(SystemExit) as stop:
        app(["phlogiston"])
    assert stop.value.code == 2


def test_the_page_is_written_only_after_a_raced_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    system = next(s for s in SYSTEMS if s.name == "physics")
    monkeypatch.setattr("models.__main__.SYSTEMS", (system,))
    monkeypatch.setattr("models.__main__.__file__", str(tmp_path / "__main__.py"))
    monkeypatch.setattr("models.__main__.check", lambda s, _: check(s))
    for arguments, written in ((["--seconds", "0"], False), (["--no-readme"], False), ([], True)):
        with pytest.raises(SystemExit) as stop:
            app(arguments)
        assert stop.value.code == 0
        assert (tmp_path / "README.md").exists() == written
        assert ("wrote" in capsys.readouterr().out) == written
    (tmp_path / "README.md").unlink()
    with pytest.raises(SystemExit):
        app(["--seconds", "0", "--readme"])
    assert (tmp_path / "README.md").exists()
    monkeypatch.setattr("models.__main__.SYSTEMS", SYSTEMS)
    with pytest.raises(SystemExit) as stop:
        app(["physics", "--readme"])
    assert stop.value.code == 2


@pytest.mark.parametrize("columns", ["80", "120", "160"])
def test_nothing_is_cut_in_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit):
        app(["rgbd_fusion", "--seconds", "0"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= int(columns)
    words = text.split()
    for word in ("fold-affine", "join-concat", "multiply-adds", "3.4e-07", "29,952", "early"):
        assert word in words


def test_a_fault_is_told_and_counts(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    system = next(s for s in SYSTEMS if s.name == "physics")
    monkeypatch.setattr("models.__main__.SYSTEMS", (replace(system, rewrites=()),))
    with pytest.raises(SystemExit) as stop:
        app(["--seconds", "0", "--no-readme"])
    assert stop.value.code == 1
    assert "physics: the passes that acted" in capsys.readouterr().out


def test_without_onnxruntime_nothing_is_claimed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise ProviderError("onnxruntime cannot be imported; pip install 'pwopt[cpu]'")

    monkeypatch.setattr("pwopt.running.installation.import_onnxruntime", missing)
    with pytest.raises(SystemExit) as stop:
        app(["physics"])
    assert stop.value.code == 4
    assert "pwopt[cpu]" in capsys.readouterr().out


def test_a_raced_row() -> None:
    """Whatever the clock says, what was kept is told, and the page names the machine."""
    row = check(next(s for s in SYSTEMS if s.name == "linear_sequence"), seconds=0.2)
    assert row.faults == ()
    assert row.raced is not None
    assert "×" in page.speed(row) or page.speed(row) == "1, original kept"
    text = page.markdown([row])
    assert "speed-up" in text
    assert row.raced.environment["cpu"] in text.replace("\n", " ")
