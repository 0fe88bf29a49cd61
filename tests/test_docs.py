"""Examples in docstrings, in README.md and in docs run as written; pages say what the command line has."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import runpy
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


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_examples_of_pages(page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)
    assert blocks
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, page, "exec"), {})


def test_readme_has_two_commands() -> None:
    """`.ci/run` takes them from there."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if line.startswith("python3 -m venv")]) == 2


def test_the_picture_is_what_its_script_draws() -> None:
    drawn = runpy.run_path(str(ROOT / "docs" / "picture.py"))
    assert drawn["PICTURE"].read_text(encoding="utf-8") == drawn["picture"]()
    assert f"]({drawn['PICTURE'].relative_to(ROOT).as_posix()})" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_option_is_in_the_documentation() -> None:
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    commands = typer.main.get_command(app).commands.values()  # type: ignore[attr-defined]
    options = {name for command in commands for p in command.params for name in p.opts if name.startswith("--")}
    assert len(options) > 30
    assert {o for o in options if o not in page} == set()


def test_help_lists_what_there_is() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    verify = {p.name: p for p in commands["verify"].params}
    assert verify["kinds"].default == ",".join(DEFAULT_KINDS)
    assert verify["kinds"].help.endswith(f": {', '.join(KINDS)}.")
    assert f": {', '.join(INVARIANTS)};" in verify["invariants"].help
