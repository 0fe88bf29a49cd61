"""The house is as CONTRIBUTING.md draws it, its walls stand where pyproject.toml says, and its first rewrite works."""

from __future__ import annotations

import ast
import importlib
import itertools
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
#: The most lines of a function, and of a module.
FUNCTION, MODULE = 60, 450


def sources() -> list[Path]:
    """Every module of the package, wherever it stands in the clone."""
    inside = (p for p in (ROOT / "pwopt").glob("[a-z]*/*.py") if p.parent.name != "passes")
    return sorted({*(ROOT / "pwopt").glob("*.py"), *inside, *(ROOT / "passes").glob("*.py")})


def room(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return (parts[0] if parts[0] == "passes" else parts[1]).removesuffix(".py")


def imported() -> dict[str, set[str]]:
    """Room → rooms that it imports."""
    found: dict[str, set[str]] = {}
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            absolute = isinstance(node, ast.ImportFrom) and node.module and node.level == 0
            parts = node.module.split(".") if absolute else []
            if len(parts) > 1 and parts[0] == "pwopt" and parts[1] != room(path) and room(path) != "__init__":
                found.setdefault(room(path), set()).add(parts[1])
    return found


def drawn() -> dict[str, set[str]]:
    """Room → rooms that an arrow leads to."""
    diagram = re.search(r"```mermaid\n(.*?)```", CONTRIBUTING, re.S)
    assert diagram is not None
    arrows: dict[str, set[str]] = {}
    for a, b in re.findall(r"^\s*(\w+)(?:\[.*?\])? --> (\w+)", diagram[1], re.M):
        arrows.setdefault(a, set()).add(b)
    return arrows


def reachable(start: str, arrows: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    left = [start]
    while left:
        for b in arrows.get(left.pop(), set()) - seen:
            seen.add(b)
            left.append(b)
    return seen


def layers() -> list[set[str]]:
    """Rooms in the import contract, the highest first."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r'type = "layers".*?layers = \[(.*?)\]', text, re.S)
    assert listed is not None
    return [set(re.split(r" [|:] ", line)) for line in re.findall(r'"(.*?)"', listed[1])]


def test_the_picture_is_the_code() -> None:
    arrows, imports = drawn(), imported()
    rooms = set(arrows) | {b for bs in arrows.values() for b in bs}
    assert rooms == {r for r in map(room, sources()) if not r.startswith("__")}
    for a, bs in imports.items():
        if not a.startswith("__"):
            assert bs <= reachable(a, arrows), f"{a} imports what no arrow leads to"
    for a, bs in arrows.items():
        assert bs <= imports[a], f"{a} does not import what an arrow says"
        shortcuts = {b for b in bs if any(b in reachable(c, arrows) for c in bs - {b})}
        assert not shortcuts, f"{a} has arrows that others imply"


def test_the_picture_is_the_contract() -> None:
    floors = layers()
    height = {name: -i for i, floor in enumerate(floors) for name in floor}
    assert set(height) - {"__main__"} == set(drawn()) | {b for bs in drawn().values() for b in bs}
    for a, bs in drawn().items():
        assert all(height[a] > height[b] for b in bs)


def test_packages_are_few() -> None:
    entries = [p for p in (ROOT / "pwopt").iterdir() if p.name != "__pycache__"]
    assert len([p for p in entries if p.is_dir()]) <= 12
    assert len([p for p in entries if p.is_file()]) <= 6


@pytest.mark.parametrize("path", sources(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_functions_and_modules_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MODULE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno is not None:
            assert node.end_lineno - node.lineno < FUNCTION, node.name


def test_a_class_name_means_one_thing() -> None:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sources()]
    names = Counter(node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    assert [name for name, count in names.items() if count > 1] == []


def test_the_first_rewrite_works(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n# (\S+)\n(.*?)```", CONTRIBUTING, re.S)
    files = {Path(name).name: code for name, code in blocks}
    assert set(files) == {"drop_sign.py", "test_drop_sign.py"}
    for name, code in files.items():
        (tmp_path / name).write_text(code, encoding="utf-8")
    conftest = """
        import importlib.util, sys
        spec = importlib.util.spec_from_file_location("pwopt.passes.drop_sign", {path!r})
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    """
    lines = [line.strip() for line in conftest.format(path=str(tmp_path / "drop_sign.py")).splitlines()]
    (tmp_path / "conftest.py").write_text("\n".join(lines), encoding="utf-8")
    options = ["-q", "-p", "no:cacheprovider", "-o", f"pythonpath={ROOT / 'tests'}", "--rootdir", str(tmp_path)]
    command = [sys.executable, "-m", "pytest", *options, str(tmp_path / "test_drop_sign.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "11 passed" in done.stdout


def test_every_pass_is_listed_tested_and_told() -> None:
    from pwopt import passes
    from pwopt.rewriting import Pass

    page = (ROOT / "docs" / "passes.md").read_text(encoding="utf-8")
    for path in (ROOT / "passes").glob("[a-z]*.py"):
        module = importlib.import_module(f"pwopt.passes.{path.stem}")
        found = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Pass)]
        own = [c for c in found if c.__module__ == module.__name__ and hasattr(c, "name")]
        assert own, path
        assert set(own) <= set(passes.PASSES), f"passes/__init__.py leaves one of {own} out"
        assert (ROOT / "tests" / "passes" / f"test_{path.stem}.py").exists(), f"tests/passes lacks {path.stem}"
        for c in own:
            assert f"`{c.name}`" in page, f"docs/passes.md does not tell of {c.name}"


@pytest.mark.parametrize(
    "page", sorted(p for p in ROOT.glob("**/*.md") if ".venv" not in p.parts), ids=lambda p: p.name
)
def test_what_pages_name_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:pwopt|passes|tests|benchmarks|models|docs)/[\w./-]*|[a-z]+/[a-z_]+\.py)`", text)
    named += re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    for name in named:
        places = (ROOT / name, page.parent / name, ROOT / "pwopt" / name)
        missing = not any(p.exists() for p in places) and name not in (
            "passes/drop_sign.py",
            "tests/passes/test_drop_sign.py",
        )
        assert not missing, f"{page.name} names {name}"


def test_the_public_face_is_as_type_checkers_see_it() -> None:
    import pwopt

    tree = ast.parse(Path(pwopt.__file__).read_text(encoding="utf-8"))
    typed = [n for n in tree.body if isinstance(n, ast.If)]
    names = itertools.chain.from_iterable(
        (a.name for a in n.names) for block in typed for n in block.body if isinstance(n, ast.ImportFrom)
    )
    assert sorted(names) == sorted(pwopt.__all__)
    for name in pwopt.__all__:
        assert getattr(pwopt, name) is not None


@pytest.mark.parametrize("code", ["import pwopt", "from pwopt.cli import app"])
def test_nothing_heavy_is_imported_at_once(code: str) -> None:
    heavy = ("numpy", "onnx", "onnxruntime", "onnx_graphsurgeon", "matplotlib", "jinja2")
    check = f"import sys; {code}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["worker", "cold_start"])
def test_processes_that_run_models_start_without_onnx(module: str) -> None:
    check = f"import sys, pwopt.running.{module}; print('numpy' in sys.modules, 'onnx' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True False"
