"""Examples in docstrings and in the README run as written."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import typer

import pwopt
from pwopt.cli import app
from pwopt.invariants import INVARIANTS
from pwopt.running.samples import DEFAULT_KINDS, KINDS

ROOT = Path(__file__).parent.parent
#: Modules whose examples run a model.
RUNNING = ("pwopt.running.bench", "pwopt.evidence.verify")
MODULES = [m.name for m in pkgutil.walk_packages(pwopt.__path__, "pwopt.") if not m.name.endswith("__main__")]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in RUNNING:
        pytest.importorskip("onnxruntime")
    monkeypatch.chdir(ROOT)
    failures, _ = doctest.testmod(importlib.import_module(name))
    assert failures == 0


def test_readme_examples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_every_option_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    commands = typer.main.get_command(app).commands.values()  # type: ignore[attr-defined]
    options = {name for command in commands for p in command.params for name in p.opts if name.startswith("--")}
    assert len(options) > 30
    assert {o for o in options if o not in readme} == set()


def test_help_lists_what_there_is() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    verify = {p.name: p for p in commands["verify"].params}
    assert verify["kinds"].default == ",".join(DEFAULT_KINDS)
    assert verify["kinds"].help.endswith(f": {', '.join(KINDS)}.")
    assert f": {', '.join(INVARIANTS)};" in verify["invariants"].help
