"""Passes from elsewhere are treated like pwopt's own: classes, files beside a model, and a package that is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from helpers import normal, ops, parse, plant, planted_race, reasons, run_command

import pwopt
from pwopt.errors import UsageError
from pwopt.passes import PASSES, CleanUp, FoldChains
from pwopt.rewriting import Pass, Rewrite, Rewriter
from pwopt.selecting import plugins, tuning_cache
from pwopt.selecting.pass_list import resolve_passes

PACKAGE = Path(__file__).parent.parent / "plugin_package"
DropSign = plugins.import_pass(f"{PACKAGE / 'pwopt_signs.py'}:DropSign")
Square = plugins.import_pass(f"{PACKAGE / 'pwopt_signs.py'}:Square")


def signs() -> onnx.ModelProto:
    return parse(
        "(float[1,8,16,16] x) => (float[N] y) { c = Conv(x, w) a = Relu(c) n = Neg(a) b = Abs(n) y = Pow(b, two) }",
        w=normal(8, 8, 1, 1, dtype=np.float32), two=np.float32(2),
    )  # fmt: skip


def analytic(**options: object) -> pwopt.Result:
    return pwopt.optimize(signs(), cost="analytic", **options)  # type: ignore[arg-type]


def test_names_classes_and_instances_in_order() -> None:
    chosen = resolve_passes(["fold-chains", DropSign, CleanUp()])
    assert [p.name for p in chosen] == ["fold-chains", "drop-sign", "clean-up"]
    assert [p.requested for p in chosen] == [True, False, False]
    assert [p.name for p in resolve_passes([*PASSES, DropSign])][-2:] == [PASSES[-1].name, "drop-sign"]
    assert [p.name for p in resolve_passes(["drop-sign"], [DropSign])] == ["drop-sign"]
    given = FoldChains()
    assert resolve_passes([given])[0] is not given  # a run leaves no traces in what was handed over


def test_a_class_is_run_certified_and_denied_like_ones_own() -> None:
    pytest.importorskip("onnxruntime")
    result = analytic(passes=[*pwopt.PASSES, DropSign])
    assert ops(result.model) == {"Conv": 1, "Relu": 1, "Abs": 1, "Pow": 1}
    (rewrite,) = result.report.rewrites
    assert rewrite.certificate is not None
    assert (rewrite.pass_name, str(rewrite.site), rewrite.certificate.status) == ("drop-sign", "drop-sign:b", "tested")
    assert result.report.passes["drop-sign"] == "|−x| = |x|"
    denied = analytic(passes=[*pwopt.PASSES, DropSign], deny="drop-sign:b")
    assert ops(denied.model) == ops(signs())
    assert "denied by the user" in [s.reason for s in denied.report.skips]


def test_a_measured_class_is_raced_and_a_name_is_believed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setenv(tuning_cache.FOLDER_VARIABLE, str(tmp_path))
    kept = iter([planted_race(np.full(50, 2.0), np.full(50, 1.0))] * 2)
    plant(monkeypatch, lambda *_, **__: next(kept))
    result = pwopt.optimize(signs(), passes=[CleanUp, Square], threads=1)
    assert ops(result.model)["Mul"] == 1
    assert next(kept, None) is None
    (decision,) = tuning_cache.read_decisions()
    assert decision.pass_name == f"square {plugins.fingerprint(Square())}"
    assert decision.signature == "squares"
    assert ops(analytic(passes=[CleanUp, Square]).model)["Mul"] == 0
    assert ops(analytic(passes=["square"], plugins=[Square]).model)["Mul"] == 1


def test_a_changed_pass_is_raced_anew() -> None:
    class Kept(Square):  # type: ignore[misc, valid-type]
        """Another class in another file."""

    tuned = Square()
    tuned.strength = 3  # type: ignore[attr-defined]
    marks = {plugins.fingerprint(p) for p in (Square(), Kept(), tuned)}
    assert len(marks) == 3
    assert plugins.fingerprint(CleanUp()) == ""


def test_a_file_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(PACKAGE / "pwopt_signs.py", tmp_path / "mine.py")
    onnx.save(signs(), tmp_path / "m.onnx")
    monkeypatch.chdir("/")
    result = pwopt.optimize(tmp_path / "m.onnx", cost="analytic", verify=False, plugins=["mine:DropSign"])
    assert ops(result.model)["Neg"] == 0
    assert (
        plugins.describe_origin(resolve_passes(["drop-sign"], ["mine:DropSign"], tmp_path / "m.onnx")[0]) == "mine.py"
    )


class Wrong(Pass):
    """Nothing."""

    name = "wrong"

    def match_and_rewrite(self, node: gs.Node, rw: Rewriter) -> Rewrite | None:
        raise KeyError("w")


class Outdated(Wrong):
    contract = 1


class Shouting(Wrong):
    name = "Wrong!"


class Sometimes(Wrong):
    policy = "sometimes"


class Whenever(Wrong):
    phase = "whenever"


class Empty(Pass):
    name = "empty"


class Impostor(Wrong):
    name = "fold-chains"


class Chatty(Wrong):
    def match_and_rewrite(self, node: gs.Node, rw: Rewriter) -> Rewrite | None:
        return "done"  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"passes": [Wrong]}, r"the pass 'wrong' \(.*Wrong\) failed at 'wrong:c' with KeyError: 'w'; correct it"),
        ({"passes": [Chatty]}, "returned str, not a Rewrite"),
        ({"passes": [Outdated]}, "written for contract 1, and this pwopt keeps contract 2"),
        ({"passes": [Shouting]}, "is called 'Wrong!'"),
        ({"passes": [Sometimes]}, "policy 'sometimes', which is none of: always, if cheaper, measured"),
        ({"passes": [Whenever]}, "phase 'whenever', which is none of: any, early, late"),
        ({"passes": [Empty]}, "does not write match_and_rewrite"),
        ({"passes": [*PASSES, Impostor]}, "two passes are called 'fold-chains'"),
        ({"plugins": [Impostor]}, "two passes are called 'fold-chains'"),
        ({"passes": [dict]}, "dict is not a subclass of"),
        ({"passes": ["drop-sign"]}, "there is no pass 'drop-sign'"),
        ({"plugins": ["mine"]}, "not of the form module:Class"),
        ({"plugins": ["none.py:Mine"]}, "has no file"),
        ({"plugins": ["no_such_module:Mine"]}, "cannot be imported"),
        ({"plugins": ["json:Mine"]}, "has no class 'Mine'"),
        ({"plugins": ["json:JSONDecoder"]}, "not a subclass"),
    ],
)
def test_what_breaks_the_contract_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        analytic(verify=False, **options)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the package of passes is installed."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(PACKAGE, folder / "source")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(folder / "site"), str(folder / "source")], check=True)
    return folder / "site"


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Let this process find the package, too."""
    monkeypatch.syspath_prepend(site)
    monkeypatch.setitem(sys.modules, "pwopt_signs", None)
    del sys.modules["pwopt_signs"]  # the monkeypatch forgets what is imported from there
    plugins.find_installed.cache_clear()
    yield site
    plugins.find_installed.cache_clear()


def test_an_installed_package(installed: Path, tmp_path: Path) -> None:
    """Its passes run without being asked for, are listed, shown, denied and reported, and break with one sentence."""
    onnx.save(signs(), tmp_path / "m.onnx")
    path = os.pathsep.join(filter(None, (str(installed), os.environ.get("PYTHONPATH"))))
    report = tmp_path / "r.json"
    command = [sys.executable, "-m", "pwopt", "optimize", "m.onnx", "--cost", "analytic", "--report", str(report)]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path, check=True)
    assert ops(onnx.load(tmp_path / "m.pwopt.onnx")) == {"Conv": 1, "Relu": 1, "Abs": 1, "Pow": 1}
    content = json.loads(report.read_text())
    assert [r["pass"] for r in content["rewrites"]] == ["drop-sign"]
    assert content["passes"]["square"] == "x² = x·x"
    assert {s["pass"] for s in content["skips"]} >= {"square"}
    assert "drop-sign" in run_command("passes").stdout
    arguments = ("optimize", "m.onnx", "--cost", "analytic", "--deny", "drop-sign:b", "--details")
    assert "drop-sign:b: denied by the user" in run_command(*arguments, cwd=tmp_path).stdout
    (info,) = installed.glob("*.dist-info/entry_points.txt")
    info.write_text(info.read_text().replace("pwopt_signs:Square", "pwopt_signs:Cube"))
    plugins.find_installed.cache_clear()
    done = run_command("optimize", "m.onnx", "--cost", "analytic", cwd=tmp_path)
    assert done.returncode == 2
    assert "the pass 'pwopt_signs:Cube' of pwopt-signs 1.2 cannot be imported" in " ".join(done.stderr.split())


def test_refusals_name_the_pass() -> None:
    model = parse("(float[1,3] x) => (float[1,3] y, float[1,3] n) { n = Neg(x) y = Abs(n) }")
    outcome = DropSign().run(pwopt.load(model).graph)
    assert reasons(outcome) == ["'n' is a graph output, so the sign is computed anyway"]
