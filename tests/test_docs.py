"""Examples in docstrings, in README.md and in docs run as written; pages say what the command line has."""

from __future__ import annotations

import doctest
import importlib
import itertools
import json
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import onnx
import pytest
import typer
from helpers import normal, parse, run_command
from markdown_it import MarkdownIt
from markdown_it.token import Token

import pwopt
from pwopt.cli import app
from pwopt.inputs.samples import DEFAULT_KINDS, SAMPLE_KINDS
from pwopt.invariants import INVARIANTS
from pwopt.optimizing.request import EFFORTS

ROOT = Path(__file__).parent.parent
#: What people read, on GitHub and as a site.
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "models" / "README.md"]
#: Links that lead elsewhere. Nothing here asks the network: look at a new one in a browser, then list it.
ELSEWHERE = {
    "https://distributed.dask.org",
    "https://distributed.dask.org/en/stable/tls.html",
    "https://github.com/RapidAI/RapidOCR",
    "https://keepachangelog.com/en/1.1.0/",
    "https://pypi.org/project/onnx-graphsurgeon/",
    "https://semver.org",
}
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


def place_models(folder: Path) -> None:
    """Link the repository's models into a folder; the one that is slow at its likely sizes gets small fixed sizes."""
    folder.mkdir()
    for path in (ROOT / "models").glob("*.onnx"):
        (folder / path.name).symlink_to(path)
    model = onnx.load(folder / "linear_sequence.onnx")
    (folder / "linear_sequence.onnx").unlink()
    for value in (*model.graph.input, *model.graph.output):
        for axis, size in ((0, 1), (2, 32), (3, 32)):
            value.type.tensor_type.shape.dim[axis].dim_value = size
    onnx.save(model, folder / "linear_sequence.onnx")


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_examples_of_pages(page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)
    assert blocks
    place_models(tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(EFFORTS, "normal", 0.5)
    for block in blocks:
        exec(compile(block, page, "exec"), {})


def test_models_can_be_compared_without_pwopt(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "verification.md").read_text(encoding="utf-8"), re.S)
    (block,) = (b for b in blocks if "InferenceSession" in b)
    monkeypatch.chdir(tmp_path)
    model = onnx.load(ROOT / "models" / "network_in_network.onnx")
    onnx.save(model, "model.onnx")
    pwopt.optimize(model, "fast.onnx", cost="analytic")
    exec(compile(block, "docs/verification.md", "exec"), {})
    deviations = json.loads(capsys.readouterr().out)
    assert len(deviations) == len(model.graph.output)
    assert max(deviations) < 1e-5


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Run commands of a page in a folder with the repository's models, measuring for a moment only.

    Lines that call pwopt run in this process, and all others in bash.
    """
    monkeypatch.setitem(EFFORTS, "quick", 0.3)
    monkeypatch.setitem(EFFORTS, "normal", 0.3)
    place_models(tmp_path / "models")

    def run(commands: str) -> str:
        commands = re.sub(r"--(budget|seconds) \d+", r"--\1 0.3", commands).replace("\\\n", "").replace(" && ", "\n")
        printed = ""
        for part in re.findall(r"^pwopt .*$|(?:^(?!pwopt ).+\n?)+", commands, re.M):
            if part.startswith("pwopt "):
                done = run_command(*shlex.split(part)[1:], cwd=tmp_path)
            else:
                done = subprocess.run(["bash", "-ec", part], cwd=tmp_path, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{part}\n{done.stdout}\n{done.stderr}"
            printed += done.stdout
        return printed

    return run


@pytest.mark.skipif(sys.platform == "win32", reason="the commands are for a POSIX shell")
def test_recipes_work(shell: Callable[[str], str]) -> None:
    pytest.importorskip("onnxruntime")
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8"), re.S)
    assert len(blocks) > 5
    for block in blocks:
        shell(block)


@pytest.mark.huge_pages
@pytest.mark.skipif(sys.platform == "win32", reason="the commands are for a POSIX shell")
def test_readme_shows_what_the_first_command_prints(shell: Callable[[str], str]) -> None:
    """All words of the shown rows are printed. Numbers, line breaks and the rows in brackets depend on the machine."""
    pytest.importorskip("onnxruntime")
    found = re.search(
        r"<!-- output: (.*?) -->\n```text\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S
    )
    assert found is not None
    command, shown = found.groups()

    def words(text: str) -> Counter[str]:
        return Counter(re.sub(r"\[.*?\]|[-\d.,+%×e─]+|unclear|over|under", " ", text).split())

    assert len(words(shown)) > 15
    assert words(shown) <= words(shell(command))


@pytest.mark.skipif(sys.platform == "win32", reason="the commands are for a POSIX shell")
def test_quickstart_prints_what_it_shows(
    shell: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is the one that torch exports there, with names of our own."""
    pytest.importorskip("onnxruntime")
    body = """(float[1,3,224,224] x) => (float[1,16,224,224] y) {
        a = Conv(x, w, b) n = BatchNormalization(a, s, t, m, v) c = Conv(n, u, d) y = Relu(c) }"""
    b, s, t, m, d = (normal(count, seed=i, dtype=np.float32) for i, count in enumerate((32, 32, 32, 32, 16)))
    w, u = normal(32, 3, 1, 1, dtype=np.float32), normal(16, 32, 1, 1, dtype=np.float32)
    onnx.save(parse(body, w=w, u=u, b=b, s=s, t=t, m=m, d=d, v=np.abs(t) + 1), tmp_path / "model.onnx")
    page = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    shown = [block.partition("\n") for block in re.findall(r"```console\n\$ (.*?)```", page, re.S)]
    compared = [(command, output) for command, _, output in shown if output and not output.startswith("$")]
    assert len(compared) == 2
    for command, output in compared:
        printed, expected = (" ".join(re.sub(r"\de-\d\d", "…", text).split()) for text in (shell(command), output))
        assert printed == expected
    (samples,) = (b for b in re.findall(r"```python\n(.*?)```", page, re.S) if "np.savez" in b)
    monkeypatch.chdir(tmp_path)
    exec(compile(samples, "docs/quickstart.md", "exec"), {})
    (optimize,) = (command for command, _, _ in shown if "--report report.html" in command)
    (check,) = (command for command, _, _ in shown if command.startswith("pwopt verify"))
    shell(f"{optimize} && {check}")
    monkeypatch.setitem(EFFORTS, "normal", 0.5)
    (call,) = (b for b in re.findall(r"```python\n(.*?)```", page, re.S) if "result  # in Jupyter" in b)
    exec(compile(call, "docs/quickstart.md", "exec"), {})


def list_commands() -> list[tuple[str, list[str]]]:
    """Every call of pwopt in a page, without prompts and comments."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for block in re.findall(r"```(?:bash|console|yaml)\n(.*?)```", text, re.S):
            for call in re.findall(r"(?:^|[$:&(] +|\| *)(pwopt [^\n&|;>)]+)", block, re.M):
                found.append((page.name, shlex.split(call, comments=True)[1:]))
        for call in re.findall(r"`(pwopt -*\w[^`]*)`", re.sub(r"```.*?```", "", text, flags=re.S)):
            found.append((page.name, shlex.split(call)[1:]))
    return found


def test_every_command_that_a_page_shows_exists() -> None:
    """Also those that need a GPU, a cluster or a user's own files: their options parse."""
    group = typer.main.get_command(app)
    listed = list_commands()
    assert len(listed) > 60
    assert {name for name, _ in listed} >= {"README.md", "quickstart.md", "recipes.md", "fleet.md", "own-rewrites.md"}
    for page, (name, *rest) in listed:
        if name.startswith("-"):
            assert any(name in p.opts for p in group.params), f"{page}: pwopt {name}"
            continue
        command = group.commands[name]  # type: ignore[attr-defined]
        if rest:  # else it only names the command
            command.make_context(name, rest)


#: Blocks that no test runs, by the page and how they begin, and why not.
NOT_RUN = {
    ("README.md", "pip download"): "downloads a model; the command of pwopt is parsed",
    ("README.md", "python3 -m venv"): "`.ci/run` runs it",
    ("README.md", "$ pwopt"): "a user's own model; parsed",
    ("CONTRIBUTING.md", "git clone"): "`.ci/run` does the same",
    ("CONTRIBUTING.md", "pytest"): "`.ci/run` does the same",
    ("fleet.md", "$ pwopt"): "a user's own models; parsed",
    ("fleet.md", "head$"): "needs several machines; parsed, and tests/optimizing has a cluster in one",
    ("own-rewrites.md", "import pwopt"): "a user's own model and module",
    ("own-rewrites.md", "$ pwopt"): "a user's own model and module; parsed",
    ("quickstart.md", "python3 -m venv"): "`.ci/run` does the same",
    ("quickstart.md", "pip install"): "downloads torch",
    ("quickstart.md", "import torch"): "needs torch; the test makes the same model",
    ("quickstart.md", "serving$"): "two machines; parsed, and recipes.md runs both commands on one",
    ("rapidocr.md", "pip install"): "downloads a package; `nox -s client` does",
    ("running-fast.md", "GLIBC_TUNABLES"): "a user's own program",
}
#: Pages whose blocks of a language run as a whole, with the tests that do so.
RUN = {
    ("README.md", "python"), ("README.md", "text"), ("python.md", "python"), ("recipes.md", "bash"),
    ("quickstart.md", "python"), ("quickstart.md", "console"), ("verification.md", "python"),
    ("quantise.md", "python"),  # tests/whole/test_quantise.py
    ("rapidocr.md", "python"),  # tests/whole/test_client.py
    ("CONTRIBUTING.md", "python"),  # tests/test_house.py
    ("own-rewrites.md", "python"), ("running-fast.md", "python"),
}  # fmt: skip


def test_every_block_runs_or_has_a_reason_not_to() -> None:
    unused = dict(NOT_RUN)
    for page in PAGES:
        for kind, block in re.findall(r"```(bash|console|python)\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            excuses = [key for key in NOT_RUN if key[0] == page.name and block.startswith(key[1])]
            assert excuses or (page.name, kind) in RUN, f"{page.name}: {block}"
            for key in excuses:
                unused.pop(key, None)
    assert not unused


def test_the_settings_of_running_fast_exist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    page = (ROOT / "docs" / "running-fast.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    options = onnxruntime.SessionOptions()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) == 5
    for block in blocks:
        exec(compile(block, "docs/running-fast.md", "exec"), {"options": options})
    onnxruntime.InferenceSession(ROOT / "models" / "fcn.onnx", options, ["CPUExecutionProvider"])
    assert (tmp_path / "offline.onnx").exists()


def test_own_rewrites_work() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own-rewrites.md").read_text(encoding="utf-8"), re.S)
    names: dict[str, Any] = {}
    exec(compile(blocks[0], "own-rewrites.md", "exec"), names)
    model = parse("(float[1,2] x) => (float[1,2] y) { h = Neg(x) y = Abs(h) }")
    result = pwopt.optimize(model, passes=[*pwopt.PASSES, names["DropSign"]], cost="analytic", verify=False)
    assert [n.op_type for n in result.model.graph.node] == ["Abs"]
    assert result.report.rewrites[0].reason == "the sign has no effect on an absolute value"


def inline(page: Path) -> list[tuple[str, Token]]:
    """Each run of text of a page, with the kind of block that it stands in."""
    tokens = MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))
    return [(a.type, b) for a, b in itertools.pairwise(tokens) if b.type == "inline"]


def anchors(page: Path) -> set[str]:
    """Where GitHub, and the site, let links lead within a page."""
    headings = ["".join(c.content for c in t.children or ()) for kind, t in inline(page) if kind == "heading_open"]
    kept = ("".join(c for c in heading.lower() if c.isalnum() or c in " -_") for heading in headings)
    return {text.replace(" ", "-") for text in kept}


def links(page: Path) -> list[str]:
    children = [c for _, t in inline(page) for c in t.children or ()]
    return [str(c.attrGet("href") or c.attrGet("src")) for c in children if c.type in ("link_open", "image")]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if link.startswith(("http:", "https:")):
            assert link in ELSEWHERE, f"{page.name}: {link}"
            continue
        name, _, anchor = unquote(link).partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name}: {link}"
        assert target.is_relative_to(ROOT), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_line_that_begins_with_a_number_is_in_a_list_for_every_renderer(page: Path) -> None:
    """In the middle of a sentence, "exits with\\n0. With" is one paragraph on GitHub, but a list on the site."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    numbers = re.findall(r"^ *(\d+)\. ", text, re.M)
    tokens = MarkdownIt("commonmark").parse(text)
    assert len(numbers) == sum(t.type == "list_item_open" and t.info.isdigit() for t in tokens)


def test_every_link_elsewhere_is_somewhere() -> None:
    assert set(itertools.chain.from_iterable(map(links, PAGES))) >= ELSEWHERE


def test_the_api_reference_names_what_exists() -> None:
    names = re.findall(r"^::: (\S+)", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.M)
    assert len(names) > 10
    for name in names:
        assert pkgutil.resolve_name(name) is not None


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
    assert verify["kinds"].help.endswith(f": {', '.join(SAMPLE_KINDS)}.")
    assert f": {', '.join(INVARIANTS)};" in verify["invariants"].help


def test_the_tables_of_tools_are_the_recorded_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """`benchmarks/peers.py --render` writes them, and says where others are ahead."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    peers = runpy.run_path(str(ROOT / "benchmarks" / "peers.py"))
    tables = runpy.run_path(str(ROOT / "benchmarks" / "peers_tables.py"))
    split_page = runpy.run_path(str(ROOT / "benchmarks" / "pages.py"))["split_page"]
    record = json.loads(peers["RECORD"].read_text(encoding="utf-8"))
    for page, write in peers["TABLES"].items():
        assert split_page(page, "peers")[1] == write(record)
    assert len(record["models"]) == 25
    behind = {
        "pwopt": {"speedup": [1.1, 1.05, 1.2], "returned": "result"},
        "onnxsim": {"speedup": [1.5, 1.4, 1.6]},
        "OnnxSlim": {"error": "no"},
    }
    row = {"model": "m", "ms": 1.0, "tools": behind}
    ((model, tool, times),) = tables["find_ahead"]({**record, "models": [row]})
    assert (model, tool, times) == ("m", "onnxsim", pytest.approx(1.5 / 1.1))
    assert tables["find_best"](row) == {"onnxsim"}
    assert tables["speedup"](row, "OnnxSlim") == 1.0
    slower = {**row, "tools": {"pwopt": {"speedup": [0.97, 0.95, 0.98], "returned": "result"}}}
    back = {**row, "model": "b", "tools": {"pwopt": {"speedup": [1.0, 1.0, 1.0], "returned": "original: nothing"}}}
    said = tables["summarize"]({"models": [row, slower, back]})
    assert "a rewritten model for 2 of 3 models, and the original of b. 1 of them were not clearly faster" in said
    assert said.endswith("by more than 1 %: m.")


@pytest.mark.parametrize("script", ["readers", "offline"])
def test_a_table_is_the_recorded_one(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script's `--render` writes it."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = runpy.run_path(str(ROOT / "benchmarks" / f"{script}.py"))
    split_page = runpy.run_path(str(ROOT / "benchmarks" / "pages.py"))["split_page"]
    record = json.loads(module["RECORD"].read_text(encoding="utf-8"))
    assert split_page(module["PAGE"], script)[1] == module["render"](record)


def test_whatever_reads_an_original_reads_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    readers = runpy.run_path(str(ROOT / "benchmarks" / "readers.py"))
    record = json.loads(readers["RECORD"].read_text(encoding="utf-8"))
    assert len(record["models"]) == 10
    verdicts = {
        (model, name): readers["judge"](name, *cell["found"])
        for model, row in record["models"].items()
        for name, cell in row.items()
    }
    assert {v for v in verdicts.values() if v.startswith("**")} == set(), verdicts


def test_how_a_reader_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    judge = runpy.run_path(str(ROOT / "benchmarks" / "readers.py"))["judge"]
    failed, exact, close, far = {"error": "no"}, {"deviation": 0.0}, {"deviation": 9e-5}, {"deviation": 2e-3}
    assert judge("tract", failed, failed) == "neither"
    assert judge("tract", failed, exact) == "only the result"
    assert judge("tract", exact, failed) == "**only the original**"
    assert judge("tract", exact, close) == "same"
    assert judge("tract", exact, far) == "**0 → 0.002**"
    assert judge("float16", exact, far) == "same"
    assert judge("tract", {"deviation": 1.5e-3}, far) == "same"  # rounding errors are random
