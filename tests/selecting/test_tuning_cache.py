from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import normal, parse, plant, planted_race

import pwopt
from pwopt.cli import main
from pwopt.running.timing import TO_THE_END, Race, Rules
from pwopt.selecting import tuning_cache
from pwopt.selecting.tuning_cache import TuningRecord

#: Forty rounds at 1.25×, hardly apart.
ENTRY = TuningRecord(
    "merge-siblings", "conv 6→(4, 4)", "here", 40.0, 40 * math.log(1.25), 40 * math.log(1.25) ** 2 + 0.01,
    "", "net.onnx", "2026-01-31T10:00:00+00:00",
)  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(tuning_cache.FOLDER_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_decision_is_found_again_where_it_was_made() -> None:
    tuning_cache.store(ENTRY)
    assert tuning_cache.look_up("merge-siblings", "conv 6→(4, 4)", "here") == ENTRY
    assert tuning_cache.look_up("merge-siblings", "conv 6→(4, 4)", "elsewhere") is None
    assert tuning_cache.look_up("merge-siblings", "conv 6→(4, 5)", "here") is None
    assert list(tuning_cache.read_decisions()) == [ENTRY]
    assert tuning_cache.clear() == 1
    assert list(tuning_cache.read_decisions()) == []


def test_a_doubtful_decision_is_its_model_s_own() -> None:
    """Whether a rewrite pays depends on what surrounds it, unless the clock leaves no doubt."""
    doubtful = replace(ENTRY, total=0.4, squares=1.0, model="one")
    tuning_cache.store(doubtful)
    asked = ("merge-siblings", "conv 6→(4, 4)", "here")
    assert tuning_cache.look_up(*asked, "one") == doubtful
    assert tuning_cache.look_up(*asked, "another") is None
    tuning_cache.store(replace(ENTRY, model="another"))
    assert tuning_cache.look_up(*asked, "one") == doubtful
    assert tuning_cache.look_up(*asked, "a third") == ENTRY
    assert len(list(tuning_cache.read_decisions())) == 2
    assert tuning_cache.clear() == 2  # as many as are shown, though a clear one is kept twice


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]",
        '{"speedup": 1}',
        '{"pass_name": "x", "signature": "", "place": "", "pairs": "many", "total": 1.0, "squares": 1.0}',
        '{"pass_name": "x", "signature": "", "place": "", "speedup": 1.2, "low": 1.1, "high": 1.3}',  # an older pwopt's
    ],
)
def test_a_damaged_file_is_no_decision(folder: Path, damage: str) -> None:
    tuning_cache.store(ENTRY)
    (path,) = folder.glob("*.json")
    path.write_text(damage)
    assert tuning_cache.look_up("merge-siblings", "conv 6→(4, 4)", "here") is None
    assert list(tuning_cache.read_decisions()) == []
    tuning_cache.store(ENTRY)
    assert tuning_cache.look_up("merge-siblings", "conv 6→(4, 4)", "here") == ENTRY


def test_a_folder_that_cannot_be_written_does_no_harm(folder: Path) -> None:
    folder.write_text("a file in its place", encoding="utf-8")
    tuning_cache.store(ENTRY)
    assert list(tuning_cache.read_decisions()) == []


def test_two_processes_write_at_once(folder: Path) -> None:
    code = (
        "from pwopt.selecting.tuning_cache import TuningRecord, store\n"
        "for i in range(200): store(TuningRecord('p', f's{i % 20}', 'here', 1.0 + i, 1.0, 2.0, 'm'))"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [w.wait() for w in writers] == [0, 0]
    assert {e.signature for e in tuning_cache.read_decisions()} == {f"s{i}" for i in range(20)}
    assert len(list(folder.iterdir())) == 20


def siblings() -> onnx.ModelProto:
    body = "(float[1,6,5,7] x) => (float[N] a, float[N] b, float[N] c) { a = Conv(x, u) b = Conv(x, v) c = Conv(x, w) }"
    return parse(body, **{k: normal(4, 6, 1, 1, seed=i).astype(np.float32) for i, k in enumerate("uvw")})


def test_a_second_run_decides_alike_without_racing(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    races: list[object] = []

    def counted(_arena: object, *_args: object, rules: Rules = TO_THE_END, **_options: object) -> Race:
        races.append(rules.worth or None)
        return planted_race(np.full(40, 2.0), np.full(40, 1.0))  # whatever is tried is faster

    plant(monkeypatch, counted)
    first = pwopt.optimize(siblings(), measuring=pwopt.Measuring(race_seconds=0.01, budget=600.0), threads=1)
    tuned = sum(r is not None for r in races)
    assert tuned > 0
    assert len(list(tuning_cache.read_decisions())) > 0
    second = pwopt.optimize(siblings(), measuring=pwopt.Measuring(race_seconds=0.01, budget=600.0), threads=1)
    assert sum(r is not None for r in races) == tuned

    def kinds(result: pwopt.Result) -> set[str]:
        return {r.site for r in result.report.rewrites if r.signature}

    assert kinds(first) == kinds(second) != set()
    pwopt.optimize(siblings(), measuring=pwopt.Measuring(race_seconds=0.01, budget=600.0), cache=False, threads=1)
    assert sum(r is not None for r in races) == 2 * tuned


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    tuning_cache.store(ENTRY)
    for arguments, expected in (
        (["cache", "--details"], "conv 6→(4, 4)"),
        (["cache", "--details"], "kept"),
        (["cache"], "merge-siblings 1 2026-01-31"),
        (["cache", "--details"], "1.250×"),
        (["cache", "--details"], "net.onnx"),
        (["cache", "--details"], "2026-01-31"),
        (["cache", "show", "--json"], '"pass_name": "merge-siblings"'),
        (["cache"], "1 decision in"),
        (["cache", "clear"], "1 decision forgotten"),
        (["cache", "show"], "0 decisions"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code in (0, None)
        assert expected in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit) as caught:
        main(["cache", "eat"])
    assert caught.value.code == 2
