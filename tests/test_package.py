"""What is installed: constraints.txt fits pyproject.toml, and a wheel holds files where a checkout has a link."""

from __future__ import annotations

import subprocess
import sys
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


def test_a_wheel_holds_the_passes_as_files(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "pwopt").symlink_to(ROOT / "pwopt")
    done = subprocess.run([*command, "."], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        names = {i.filename: i for i in opened.infolist()}
    for path in (ROOT / "passes").glob("*.py"):
        assert names[f"pwopt/passes/{path.name}"].file_size == path.stat().st_size
    assert {"pwopt/py.typed", "pwopt/selecting/priors.json", "pwopt/reporting/templates/report.html.j2"} <= set(names)
    assert not [n for n in names if n.startswith(("tests", "models", "docs"))]
