"""Packaging: constraints.txt fits pyproject.toml, and every kind of installation imports `pwopt.passes`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import nox
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = nox.project.load_toml(ROOT / "pyproject.toml")["project"]
#: Every requirement but the wheels that overwrite the CPU's, and pwopt's own extras.
REQUIRED = sorted(
    {
        text
        for extra, listed in {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}.items()
        for text in listed
        if extra != "gpu" and Requirement(text).name != "pwopt"
    }
)


@pytest.fixture(scope="module")
def pinned() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if not line.startswith("#")]
    return {canonicalize_name(r.name): r for r in found}


@pytest.mark.parametrize("text", REQUIRED)
def test_each_requirement_has_a_version_that_it_allows(text: str, pinned: dict[str, Requirement]) -> None:
    required = Requirement(text)
    (exact,) = pinned[canonicalize_name(required.name)].specifier
    assert exact.operator == "=="
    assert required.specifier.contains(exact.version)


def test_constraints_name_no_place_of_one_machine(pinned: dict[str, Requirement]) -> None:
    assert len(pinned) > 50
    assert all(r.url is None for r in pinned.values())
    assert "pwopt" not in pinned


def build(kind: str, source: Path, target: Path) -> Path:
    """Build a `sdist`, `wheel` or `editable` wheel of the folder `source`, and return its path."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({os.fspath(target)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=source)
    assert done.returncode == 0, done.stderr
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the build reads, so that the clone under test stays clean."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder)
    for name in ("pwopt", "passes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_a_wheel_of_the_source_distribution_holds_the_passes(clone: Path, tmp_path: Path) -> None:
    with tarfile.open(build("sdist", clone, tmp_path)) as opened:
        for member in opened.getmembers():
            opened.extract(member, tmp_path)
    (source,) = (p for p in tmp_path.iterdir() if p.is_dir())
    with zipfile.ZipFile(build("wheel", source, tmp_path)) as opened:
        names = {i.filename: i.file_size for i in opened.infolist()}
    for path in (ROOT / "passes").glob("*.py"):
        assert names[f"pwopt/passes/{path.name}"] == path.stat().st_size
    assert {"pwopt/py.typed", "pwopt/selecting/priors.json", "pwopt/reporting/templates/report.html.j2"} <= set(names)
    assert {n.split("/")[0].split("-")[0] for n in names} == {"pwopt"}


def test_an_editable_install_is_a_path_to_the_clone(clone: Path, tmp_path: Path) -> None:
    """An import hook would be hidden by any folder named `pwopt`, and type checkers could not follow it."""
    with zipfile.ZipFile(build("editable", clone, tmp_path)) as opened:
        (path,) = (n for n in opened.namelist() if n.endswith(".pth"))
        assert opened.read(path).decode().strip() == os.fspath(clone)
        assert not [n for n in opened.namelist() if n.endswith(".py")]


@pytest.mark.parametrize("place", ["root", "elsewhere"])
def test_a_clone_imports_its_own_passes(clone: Path, tmp_path: Path, place: str) -> None:
    code = "import pwopt.passes.winograd as w, pwopt; print(w.__file__, pwopt.passes.Winograd is w.Winograd)"
    environment = {**os.environ, "PYTHONPATH": "" if place == "root" else os.fspath(clone)}
    command = [sys.executable, "-c", code]
    folder = clone if place == "root" else tmp_path
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder, env=environment)
    assert done.stdout.split() == [os.fspath(clone / "passes" / "winograd.py"), "True"]


def test_no_source_file_is_a_link() -> None:
    found = [
        p for name in ("pwopt", "passes", "tests", "benchmarks", "models", "docs") for p in (ROOT / name).rglob("*")
    ]
    assert len(found) > 300
    assert not [p for p in found if p.is_symlink()]
