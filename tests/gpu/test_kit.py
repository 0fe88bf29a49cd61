"""The kit for a sitting at a graphics card, tried where there is none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RUN = Path(__file__).parent / "run.py"
CHECKS = ("doctor", "strictness", "verification", "against_cpu", "clock", "failures", "passes", "graphs")


def sitting(out: Path, *arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit code, and what each check found."""
    pytest.importorskip("onnxruntime")
    command = [sys.executable, str(RUN), "--out", str(out), "--provider", "cpu", "--quick", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (out / "results.json").exists(), done.stderr
    found = json.loads((out / "results.json").read_text(encoding="utf-8"))["checks"]
    table = (out / "results.md").read_text(encoding="utf-8")
    assert all(f"| {c['check']} | {c['status']} |" in table for c in found)
    return done.returncode, {c["check"]: c for c in found}


def only(*names: str) -> list[str]:
    return [word for name in names for word in ("--only", name)]


def test_checks_pass_on_the_cpu(tmp_path: Path) -> None:
    code, found = sitting(tmp_path, *only("doctor", "strictness", "against_cpu", "clock", "failures"))
    assert {name: c["status"] for name, c in found.items()} == dict.fromkeys(found, "passed")
    assert code == 0
    assert found["doctor"]["found"]["device"] is None
    assert found["against_cpu"]["found"] == {"mobileone": 0.0, "generator": 0.0}
    assert found["failures"]["found"]["not_in_the_wheel"].startswith(
        "exit 4: pwopt: TensorrtExecutionProvider is not in"
    )


def test_every_failure_is_told_and_the_rest_runs_on(tmp_path: Path) -> None:
    names = ("doctor", "strictness", "graphs")
    planted = [word for name in names if name != "strictness" for word in ("--plant", name)]
    code, found = sitting(tmp_path, *only(*names), *planted)
    assert code == 1
    assert list(found) == list(names)
    for name, c in found.items():
        assert (c["status"], c["reason"]) == (
            ("passed", "") if name == "strictness" else ("failed", "this failure was planted")
        )


def test_a_missing_wheel_skips_its_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    text = 'raise ModuleNotFoundError("No module named \'hypothesis\'", name="hypothesis")'
    (hidden / "hypothesis.py").write_text(text, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(hidden))
    code, found = sitting(tmp_path, *only("passes"))
    assert (code, found["passes"]["status"]) == (0, "not run")
    assert found["passes"]["reason"] == "hypothesis is not installed; add its wheel to --wheels"


def test_a_plug_in_provider_that_is_missing_fails(tmp_path: Path) -> None:
    code, found = sitting(tmp_path, *only("doctor"), "--provider", "Toy,library=/nowhere/libtoy.so")
    assert (code, found["doctor"]["status"]) == (1, "failed")
    assert "the provider library '/nowhere/libtoy.so' does not exist" in found["doctor"]["reason"]


def test_what_does_not_exist_or_has_no_time_is_told(tmp_path: Path) -> None:
    code, found = sitting(tmp_path, *only("nonsense"))
    assert (code, found["nonsense"]["status"]) == (1, "failed")
    assert "there is no check 'nonsense'; there are doctor," in found["nonsense"]["reason"]
    code, found = sitting(tmp_path, "--minutes", "0.01", *only(*CHECKS))
    assert code == 0
    assert [(name, c["status"]) for name, c in found.items()] == [(name, "not run") for name in CHECKS]


def test_a_wheel_in_pieces_is_joined(tmp_path: Path) -> None:
    sys.path.insert(0, str(RUN.parent))
    try:
        from run import join_pieces
    finally:
        sys.path.remove(str(RUN.parent))
    for name, content in (("a.whl.ab", b"2"), ("a.whl.aa", b"1"), ("a.whl.ac", b"3"), ("b.whl", b"whole")):
        (tmp_path / name).write_bytes(content)
    into = tmp_path / "into"
    into.mkdir()
    found = join_pieces(tmp_path, into)
    assert {p.name: p.read_bytes() for p in found} == {"a.whl": b"123", "b.whl": b"whole"}
