"""Run the suite on every Python, and on the oldest and newest libraries: `pip install nox`, then `nox`.

`nox -s oldest` tests the lower bounds of pyproject.toml: it installs each requirement ``name>=version`` as
``name==version``. `nox -s "newest-3.12"` uses one Python. Pythons that are not installed are skipped. Arguments after
``--`` go to pytest: `nox -s oldest -- -x tests/maps/test_forms.py`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import nox

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
#: The lower bounds are tested on the oldest Python.
OLDEST = PYTHONS[0]

nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = False
nox.options.sessions = ["newest", "oldest", "without_runtime"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


def lower_bounds() -> list[str]:
    """Return all dependencies and the onnxruntime of the `cpu` extra, each at its lower bound."""
    project = nox.project.load_toml(Path(__file__).parent / "pyproject.toml")["project"]
    required = [*project["dependencies"], *project["optional-dependencies"]["cpu"]]
    return [r.replace(">=", "==") for r in required]


@nox.session(python=PYTHONS)
def newest(session: nox.Session) -> None:
    """Test on every Python, with its newest libraries."""
    session.install("--upgrade", "-e", ".[cpu,report,test]")
    session.run("pytest", *session.posargs, env=ENVIRONMENT)


@nox.session(python=OLDEST)
def oldest(session: nox.Session) -> None:
    """Test the lower bounds of pyproject.toml."""
    session.install("-e", ".[cpu,test]", *lower_bounds())
    session.run("pytest", *session.posargs, env=ENVIRONMENT)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation site in ./site; every warning is an error."""
    session.install("-e", ".[cpu,docs,fleet]")
    quiet = {"NO_MKDOCS_2_WARNING": "1"}  # a notice of mkdocs-material on its own future
    session.run("mkdocs", "build", "--strict", "-d", *(session.posargs or ["site"]), env=quiet)


@nox.session
def client(session: nox.Session) -> None:
    """Test docs/rapidocr.md with RapidOCR's wheel, which is too large for the suite."""
    session.install("-e", ".[cpu,test]", "rapidocr-onnxruntime>=1.4")
    session.run("pytest", "tests/whole/test_client.py", *session.posargs, env=ENVIRONMENT)


@nox.session
def plugins(session: nox.Session) -> None:
    """Test plug-in providers with OpenVINO's wheel, which needs one of Intel's processors."""
    session.install("-e", ".[cpu,test]", "onnxruntime>=1.23", "onnxruntime-ep-openvino>=1.8")
    session.run("pwopt", "doctor")
    session.run("pytest", "-rs", "tests/running/test_provider_libraries.py", *session.posargs, env=ENVIRONMENT)


@nox.session
def package(session: nox.Session) -> None:
    """Build the wheel and the source distribution, and check their contents and descriptions."""
    session.install("build", "twine", "check-wheel-contents")
    folder = Path(session.create_tmp()) / "dist"
    shutil.rmtree(folder, ignore_errors=True)
    session.run("python", "-m", "build", "-o", str(folder), ".")
    session.run("twine", "check", "--strict", *map(str, folder.iterdir()))
    session.run("check-wheel-contents", *map(str, folder.glob("*.whl")))


@nox.session
def constraints(session: nox.Session) -> None:
    """Write the newest versions of all packages to constraints.txt, and keep its comments."""
    file = Path(__file__).parent / "constraints.txt"
    said = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    session.install("-e", ".[cpu,docs,fleet,report,test]")
    found = session.run("pip", "freeze", "--all", "--exclude", "pip", "--exclude", "pwopt", silent=True)
    file.write_text("\n".join([*said, str(found).strip(), ""]), encoding="utf-8", newline="\n")


@nox.session(python=OLDEST)
def without_runtime(session: nox.Session) -> None:
    """Test without onnxruntime: tests that need it are skipped, those of the algebra are not."""
    session.install("-e", ".[test]")
    session.run("pytest", *session.posargs, env=ENVIRONMENT)
