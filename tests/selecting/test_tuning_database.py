"""Decisions recorded on one machine and used on another."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import normal, ops, parse, plant, planted_race

import pwopt
from pwopt.cli import main
from pwopt.errors import UsageError
from pwopt.running.timing import Race
from pwopt.selecting.tuning_database import TuningDatabase

pytest.importorskip("onnxruntime")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A map whose result is split, and a gate: one kind of rewrite for each of two measured passes."""
    body = "(float[1,6,5,7] x, float[1,4,1,1] g) => (float[N] p, float[N] q) { a = Conv(x, w) p, r = Split<axis=1>(a, n) q = Mul(r, g) }"
    weights = {"w": normal(8, 6, 1, 1).astype(np.float32), "n": np.array([4, 4])}
    onnx.save(parse(body, **weights), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


@pytest.fixture
def recorded(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A profile of a machine on which splitting the map pays, and nothing else does."""

    def race(_arena: object, models: list[Path], *_: object, **__: object) -> Race:
        found = [ops(onnx.load(m)) for m in models]
        return planted_race(*(np.full(40, 1.0 + f["Split"] + f["Resize"]) for f in found))

    plant(monkeypatch, race)
    pwopt.profile([model]).save(tmp_path / "target.json")
    monkeypatch.undo()
    return tmp_path / "target.json"


def test_a_profile_decides_without_a_race(model: Path, recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> Race:
        raise AssertionError("a race on this machine")

    plant(monkeypatch, never)
    result = pwopt.optimize(model, measuring=pwopt.Measuring(target_profile=recorded))
    assert ops(result.model) == {"Conv": 2, "Mul": 1}
    assert result.report.equivalence is not None
    assert result.report.latency is None
    assert "Nothing was timed: --target-profile decides from a record." in result.report.notes
    dropped = {s.pass_name: s.reason for s in result.report.skips}
    assert "measured 0.500×" in dropped["keep-layout"]
    assert "in the profile" in dropped["keep-layout"]
    assert result.model == pwopt.optimize(model, measuring=pwopt.Measuring(target_profile=recorded)).model


def test_what_it_does_not_know_is_left_out(model: Path, recorded: Path) -> None:
    content = json.loads(recorded.read_text(encoding="utf-8"))
    content["decisions"] = []
    recorded.write_text(json.dumps(content), encoding="utf-8")
    result = pwopt.optimize(model, measuring=pwopt.Measuring(target_profile=recorded))
    assert ops(result.model) == {"Conv": 1, "Split": 1, "Mul": 1}
    assert any("the target's profile does not know it" in s.reason for s in result.report.skips)


def test_a_profile_comes_back_as_it_was(recorded: Path, tmp_path: Path) -> None:
    profile = TuningDatabase.load(recorded)
    profile.save(tmp_path / "again.json")
    assert TuningDatabase.load(tmp_path / "again.json") == profile
    assert {e.pass_name for e in profile.entries} == {"split-siblings", "keep-layout", "to-matmul"}
    assert profile.environment["threads"] == 1


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"schema": 99}', '{"schema": 1, "environment": {}, "decisions": [{}]}']
)
def test_other_files_are_refused(model: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(UsageError, match=r"profile|layout"):
        pwopt.optimize(model, measuring=pwopt.Measuring(target_profile=tmp_path / "p.json"))


def test_from_the_command_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, out = tmp_path / "t.json", tmp_path / "o.onnx"
    for arguments in (
        ["profile", str(model), "-o", str(target), "--budget", "0.5"],
        ["optimize", str(model), "-o", str(out), "--target-profile", str(target)],
    ):
        with pytest.raises(SystemExit) as code:
            main(arguments)
        assert code.value.code == 0, capsys.readouterr()
    assert out.exists()
    assert re.search(
        r"\d kinds? of rewrites on .*: \d faster, \d not faster, \d in doubt; wrote", capsys.readouterr().out
    )
    with pytest.raises(SystemExit) as code:
        main(["profile", str(model), "-o", str(model)])
    assert code.value.code == 2
