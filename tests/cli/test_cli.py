"""The command line as its users run it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import MODELS, normal, ops, parse
from helpers import run_command as pwopt

from pwopt.passes import PASSES

pytest.importorskip("onnxruntime")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "seq.onnx"
    path.write_bytes((MODELS / "linear_sequence.onnx").read_bytes())
    return path


def test_optimize_writes_beside_the_input(model: Path) -> None:
    report = model.parent / "report.json"
    done = pwopt("optimize", model, "--cost", "analytic", "--shape", "x=1x64x8x8", "--report", report)
    assert done.returncode == 0, done.stderr
    assert ops(onnx.load(model.with_name("seq.pwopt.onnx"))) == {"Conv": 1}
    assert "multiply-adds" in done.stdout
    assert "-96.7%" in done.stdout
    last = done.stdout.splitlines()[-1].split("#")[0].split()
    assert last == ["next:", "pwopt", "verify", str(model), str(model.with_name("seq.pwopt.onnx")), "--input", "FOLDER"]
    assert [line.split(" s ")[1] for line in done.stderr.splitlines()][-2:] == ["verifying", "writing"]
    content = json.loads(report.read_text())
    assert content["model"] == str(model)
    assert content["rewrites"][0]["site"] == "fold-chains:y"
    assert content["shapes"] == {"x": [1, 64, 8, 8]}


@pytest.mark.worker_processes
def test_optimize_measures_by_default(model: Path) -> None:
    done = pwopt("optimize", model, "--shape", "x=1x64x2x2")
    assert done.returncode == 0, done.stderr
    assert "latency" in done.stdout


def test_the_input_is_not_overwritten_unless_forced(model: Path) -> None:
    before = model.read_bytes()
    done = pwopt("optimize", model, "-o", model)
    assert done.returncode == 2
    assert "--force" in done.stderr
    assert model.read_bytes() == before
    done = pwopt("optimize", model, "-o", model, "--force", "--cost", "analytic", "--shape", "x=1x64x2x2")
    assert done.returncode == 0
    assert ops(onnx.load(model)) == {"Conv": 1}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["optimize", "missing.onnx"], 2, "there is no file"),
        (["optimize", "text.onnx"], 3, "not an ONNX model"),
        (["optimize", "empty.onnx"], 3, "not an ONNX model"),
        (["optimize", "."], 3, "folder"),
        (["optimize", "seq.onnx", "--provider", "cuda"], 4, "CUDAExecutionProvider is not in this onnxruntime"),
        (["optimize", "seq.onnx", "--shape", "x=1x3x4x4"], 2, "does not fit"),
        (["optimize", "seq.onnx", "--shape", "nonsense"], 2, "not of the form"),
        (["optimize", "seq.onnx", "--passes", "fold"], 2, "there is no pass 'fold'"),
        (["optimize", "seq.onnx", "--passes", "fold-chain"], 2, "did you mean 'fold-chains'?"),
        (["optimize", "seq.onnx", "--cost", "free"], 2, "not one of: measured, analytic"),
        (["optimize", "seq.onnx", "--input", "text.onnx"], 2, "cannot be read as .npz"),
        (["optimize", "seq.onnx", "-o", "no/such/folder/out.onnx"], 2, "nothing can be written"),
        (["verify", "seq.onnx", "text.onnx"], 3, "not an ONNX model"),
        (["optimize", "bad.onnx"], 3, "onnxruntime does not load the model"),
        (["bench", "seq.onnx", "--report", "r.html"], 2, "bench writes JSON reports only"),
        (["inspect", "seq.onnx", "--report", "r.html"], 2, "--report needs --properties"),
        (["frobnicate"], 2, "No such command"),
        (["optimize"], 2, "Missing argument"),
    ],
)
def test_errors_are_one_sentence_and_a_code(model: Path, arguments: list[str], code: int, words: str) -> None:
    folder = model.parent
    (folder / "text.onnx").write_text("hello")
    (folder / "empty.onnx").write_bytes(b"")
    onnx.save(parse("(float[2,3] x, float[3,4] z) => (float[2,4] y) { y = Add(x, z) }"), folder / "bad.onnx")
    files = sorted(p.name for p in folder.iterdir())
    done = pwopt(*arguments, cwd=folder)
    assert done.returncode == code, done.stderr
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert sorted(p.name for p in folder.iterdir()) == files


def test_debug_shows_the_traceback(model: Path) -> None:
    done = pwopt("optimize", "missing.onnx", "--debug")
    assert "Traceback" in done.stderr


def test_verify_exits_by_its_verdict(model: Path) -> None:
    wrong = model.with_name("wrong.onnx")
    proto = onnx.load(model)
    proto.graph.initializer[0].raw_data = (
        np.frombuffer(proto.graph.initializer[0].raw_data, np.float32) * 1.01
    ).tobytes()
    onnx.save(proto, wrong)
    report = model.parent / "r.json"
    same, other = (
        pwopt("verify", model, model, "--shape", "x=1x64x4x4"),
        pwopt("verify", model, wrong, "--report", report, "--shape", "x=1x64x4x4"),
    )
    assert (same.returncode, other.returncode) == (0, 1)
    assert "not equivalent" in other.stdout
    output = json.loads(report.read_text())["equivalence"]["outputs"][0]
    assert set(output) >= {"name", "max_abs", "max_rel", "floor", "passed"}
    assert output["passed"] is False


def test_inputs_from_a_file(model: Path) -> None:
    np.savez(model.parent / "in.npz", x=normal(2, 64, 3, 5))
    done = pwopt("optimize", model, "--cost", "analytic", "--input", model.parent / "in.npz")
    assert done.returncode == 0, done.stderr
    assert "x 2×64×3×5" in done.stdout


def test_deny_and_details(model: Path) -> None:
    done = pwopt(
        "optimize", model, "--cost", "analytic", "--shape", "x=1x64x2x2", "--deny", "fold-chains:y", "--details"
    )
    assert done.returncode == 0
    assert "denied by the user" in done.stdout
    assert "fold-chains:h3" in done.stdout


def test_deny_a_whole_pass(model: Path) -> None:
    report = model.parent / "r.json"
    denied = ("--deny", "fold-chains", "--deny", "clean-up:y")
    done = pwopt("optimize", model, "--cost", "analytic", "--shape", "x=1x64x2x2", *denied, "--report", report)
    assert done.returncode == 0, done.stderr
    content = json.loads(report.read_text())
    assert "fold-chains" not in content["passes"]
    assert "clean-up" in content["passes"]
    assert "fold-chains" not in {r["pass"] for r in (*content["rewrites"], *content["skips"])}


def test_a_mistyped_pass_fails_before_the_work(model: Path) -> None:
    out = model.parent / "denied.onnx"
    done = pwopt("optimize", model, "-o", out, "--cost", "analytic", "--deny", "fold-chain")
    assert done.returncode == 2
    words = "there is no pass 'fold-chain' to leave out (a place is PASS:TENSOR); did you mean 'fold-chains'?"
    assert words in " ".join(done.stderr.split())
    assert not out.exists()


def test_inspect(model: Path) -> None:
    done = pwopt("inspect", model, "--shape", "x=1x64x2x2")
    assert done.returncode == 0
    assert "4 maps" in done.stdout
    assert "64→128→192→128→32 is cheaper as one map" in done.stdout
    listed = json.loads(pwopt("inspect", model, "--json").stdout)
    assert [m["channels"] for m in listed] == ["64→128", "128→192", "192→128", "128→32"]
    assert {m["chain"] for m in listed} == {1}


def test_passes_and_help() -> None:
    listed = pwopt("passes").stdout
    assert all(p.name in listed for p in PASSES)
    root = pwopt("--help").stdout
    words = " ".join(root.replace("│", " ").split())
    assert "Exit codes: 0 success; 1 not equivalent" in words
    assert "1: not equivalent; 3: not comparable" in words
    assert all(c in root for c in ("optimize", "verify", "inspect", "passes"))
    assert pwopt("--version").stdout.startswith("pwopt ")


def test_hostile_names_are_harmless(tmp_path: Path) -> None:
    body = "(float[1,4,2,2] x) => (float[N] y) { h = Conv(x, w) y = Mul(h, s) }"
    model = parse(body, w=normal(4, 4, 1, 1, dtype=np.float32), s=np.float32(2))
    evil = "\x1b[31mred\x1b[0m\n[bold]\u202e</script>"
    for node in model.graph.node:
        node.output[:] = [evil if o == "y" else o for o in node.output]
    model.graph.output[0].name = evil
    onnx.save(model, tmp_path / "m.onnx")
    report = tmp_path / "r.json"
    done = pwopt("optimize", tmp_path / "m.onnx", "--cost", "analytic", "--details", "--report", report)
    assert done.returncode == 0, done.stderr
    assert "\x1b[31m" not in done.stdout
    assert "\u202e" not in done.stdout
    assert "[bold]" in done.stdout
    assert json.loads(report.read_text())["rewrites"][0]["site"] == f"fold-affine:{evil}"


def test_a_report_never_replaces_a_model(model: Path) -> None:
    before = model.read_bytes()
    for arguments in (
        ["optimize", model, "--report", model],
        ["optimize", model, "-o", model.parent / "o.onnx", "--report", model.parent / "o.onnx"],
        ["verify", model, model, "--report", model],
    ):
        done = pwopt(*arguments)
        assert done.returncode == 2
        assert "would replace a model" in done.stderr
    assert model.read_bytes() == before
    assert [p.name for p in model.parent.iterdir()] == ["seq.onnx"]


def test_an_impossible_report_is_noticed_before_the_work(model: Path) -> None:
    done = pwopt("optimize", model, "--report", model.parent / "no" / "r.json")
    assert done.returncode == 2
    assert "no such folder" in done.stderr
    assert [p.name for p in model.parent.iterdir()] == ["seq.onnx"]


def test_only_regular_files_are_replaced(model: Path) -> None:
    pipe, link, target = (model.parent / n for n in ("pipe", "link.onnx", "target.onnx"))
    os.mkfifo(pipe)
    done = pwopt("optimize", model, "--cost", "analytic", "--shape", "x=1x64x2x2", "-o", pipe)
    assert done.returncode == 2
    assert "not a regular file" in done.stderr
    assert pipe.is_fifo()
    target.write_bytes(b"old")
    link.symlink_to(target)
    assert pwopt("optimize", model, "--cost", "analytic", "--shape", "x=1x64x2x2", "-o", link).returncode == 0
    assert link.is_symlink()
    assert ops(onnx.load(target)) == {"Conv": 1}


def test_verify_tells_everything(model: Path) -> None:
    """Rounds of sizes, distributions, ranges, invariants, figures, the first difference and the rewrite to deny."""
    report, made, wrong = (model.parent / n for n in ("optimize.json", "made.onnx", "wrong.onnx"))
    sizes = ("--shape", "x=1x64x4x4", "--shape", "x=2x64x3x5")
    assert pwopt("optimize", model, "-o", made, "--cost", "analytic", *sizes[:2], "--report", report).returncode == 0
    proto = onnx.load(made)
    tensor = next(t for t in proto.graph.initializer if len(t.dims) == 4)
    tensor.raw_data = (np.frombuffer(tensor.raw_data, np.float32) * np.float32(1.001)).tobytes()
    onnx.save(proto, wrong)
    verdict = model.parent / "verify.json"
    done = pwopt(
        "verify", model, wrong, *sizes, "--samples", "normal,zeros", "--range", "x=0:255", "--invariant",
        "translation:shift=1:margin=1", "--rewrites", report, "--report", verdict,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    text = " ".join(done.stdout.split())
    assert text.startswith("not equivalent compared on cpu: x 1×64×4×4 (normal, zeros); x 2×64×3×5 (normal, zeros) ")
    assert "of 99 % of elements" not in text
    for words in ("largest error / largest value", "f(shifted x) = shifted f(x)", "--deny 'fold-chains:y'"):
        assert words in text
    content = json.loads(verdict.read_text())
    equivalence = content["equivalence"]
    assert equivalence["inputs"] == [
        "normal, x 1×64×4×4",
        "zeros, x 1×64×4×4",
        "normal, x 2×64×3×5",
        "zeros, x 2×64×3×5",
    ]
    assert equivalence["difference"]["tensor"] == "y"
    assert equivalence["difference"]["sites"] == ["fold-chains:y"]
    assert equivalence["laws"][0]["original"] < 1e-5
    (output,) = equivalence["outputs"]
    assert set(output) >= {"ulp", "ulp_p99", "cosine", "snr_db", "top1", "top5", "histogram", "scatter", "noise"}
    assert len(output["scatter"]) <= 500
    assert sum(output["histogram"]["counts"]) + output["histogram"]["zero"] == output["compared"]
    assert len(output["histogram"]["edges"]) == len(output["histogram"]["counts"]) + 1


def test_verify_on_a_folder_of_inputs(model: Path) -> None:
    folder = model.parent / "inputs"
    folder.mkdir()
    for k in range(2):
        np.savez(folder / f"{k}.npz", x=normal(1, 64, 2, 2 + k))
    done = pwopt("verify", model, model, "--input", folder, "--input", folder / "0.npz")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("0.npz") == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["verify", "seq.onnx", "seq.onnx", "--samples", "gaussian"], "there is no distribution 'gaussian'"),
        (["verify", "seq.onnx", "seq.onnx", "--range", "x=255"], "not of the form NAME=0:255"),
        (["verify", "seq.onnx", "seq.onnx", "--invariant", "energy"], "'energy' is not an invariant"),
        (["verify", "seq.onnx", "seq.onnx", "--rewrites", "seq.onnx"], "is not a JSON report of pwopt optimize"),
        (["verify", "seq.onnx", "seq.onnx", "--input", "none"], "there is no file or folder 'none'"),
        (
            ["bench", "seq.onnx", "--shape", "x=1x64x2x2", "--shape", "x=1x64x3x3"],
            "only optimize and verify accept several",
        ),
        (["optimize", "seq.onnx", "--threads", "1,two"], "--threads takes numbers separated by commas"),
        (["optimize", "seq.onnx", "--threads", "1,0"], "0 threads cannot run anything"),
        (
            ["verify", "seq.onnx", "seq.onnx", "--input", "a.npz", "--shape", "x=1x64x2x2", "--shape", "x=1x64x3x3"],
            "have their own sizes",
        ),
    ],
)
def test_what_verify_refuses(model: Path, arguments: list[str], words: str) -> None:
    done = pwopt(*arguments, cwd=model.parent)
    assert done.returncode == 2, done.stderr
    assert words in " ".join(done.stderr.split())


def test_inspect_properties(model: Path) -> None:
    done = pwopt("inspect", model, "--properties", "--shape", "x=1x64x2x2")
    assert done.returncode == 0, done.stderr
    assert "4 pointwise maps" in done.stdout
    listed = json.loads(pwopt("inspect", model, "--properties", "--json", "--shape", "x=1x64x2x2").stdout)
    assert [(m["columns"], m["rows"]) for m in listed] == [(64, 128), (128, 192), (192, 128), (128, 32)]
    assert all(len(m["singular_values"]) == min(m["columns"], m["rows"]) for m in listed)


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_no_figure_is_cut(model: Path, monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    done = pwopt("inspect", model, "--properties", "--shape", "x=1x64x2x2")
    for size in ("64→128", "128→192", "192→128", "128→32"):
        assert re.search(rf"(?<!\S){size}(?![\w.])", done.stdout), done.stdout


def test_debug_keeps_the_exit_code(model: Path) -> None:
    done = pwopt("optimize", model, "--provider", "cuda", "--debug")
    assert done.returncode == 4
    assert "Traceback" in done.stderr


def test_defaults_are_in_the_help() -> None:
    text = " ".join(pwopt("optimize", "--help").stdout.replace("│", " ").split())
    assert "MODEL.pwopt.onnx" in text
    assert "1e-4 for float32" in text


@pytest.mark.parametrize(
    ("site", "hint"),
    [
        ("fold-chain:y", "there is no pass 'fold-chain'; did you mean 'fold-chains:y'?"),
        (
            "fold-chains:h4",
            "no operator makes 'h4'; did you mean 'fold-chains:h3' or 'fold-chains:h2' or 'fold-chains:h1'?",
        ),
        ("fold-chains:x", "no operator makes 'x'; --details lists the sites of a model"),
        ("fold-chain:h9", "there is no pass 'fold-chain'; did you mean 'fold-chains:h"),
    ],
)
def test_a_mistyped_site_fails_before_the_work(model: Path, site: str, hint: str) -> None:
    out = model.parent / "denied.onnx"
    done = pwopt("optimize", model, "-o", out, "--cost", "analytic", "--shape", "x=1x64x2x2", "--deny", site)
    assert done.returncode == 2
    assert f"there is no place {site!r} to leave alone: {hint}" in " ".join(done.stderr.split())
    assert not out.exists()


def test_a_site_that_a_pass_might_have_made_is_said_in_the_end(model: Path) -> None:
    done = pwopt("optimize", model, "--cost", "analytic", "--shape", "x=1x64x2x2", "--deny", "fold-chains:h1_part")
    assert done.returncode == 0
    assert "No place is called 'fold-chains:h1_part'" in done.stdout


def test_an_array_alone_for_a_model_with_one_input(model: Path) -> None:
    np.save(model.parent / "x.npy", normal(1, 64, 2, 2))
    assert pwopt("verify", model, model, "--input", model.parent / "x.npy").returncode == 0
    np.savez(model.parent / "text.npz", x=np.array([[[["a"]]]] * 64).reshape(1, 64, 1, 1))
    done = pwopt("verify", model, model, "--input", model.parent / "text.npz")
    assert done.returncode == 2
    assert "does not hold numbers" in done.stderr


ANALYTIC = ("--cost", "analytic", "--shape", "x=1x64x2x2")


def test_stages_are_lines_where_there_is_no_terminal(model: Path) -> None:
    done = pwopt("optimize", model, *ANALYTIC)
    stages = [line.split(" s ", 1)[1] for line in done.stderr.splitlines()]
    assert stages[0] == "reading"
    assert stages[-1] == "writing"
    assert len(stages) == len(set(stages))


def test_a_page_is_only_suggested_if_it_can_be_written(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--report report.html" in pwopt("optimize", model, *ANALYTIC).stdout
    monkeypatch.setitem(sys.modules, "jinja2", None)
    done = pwopt("optimize", model, *ANALYTIC)
    assert "report.html" not in done.stdout
    assert "next: pwopt verify" in done.stdout


def test_a_name_that_other_tools_refuse_is_mentioned(model: Path) -> None:
    done = pwopt("optimize", model, "-o", model.with_name("fast.bin"), "--cost", "analytic", "--no-verify")
    assert "Some tools refuse 'fast.bin', because its name does not end in .onnx." in done.stdout.splitlines()


def test_a_folder_says_why_a_model_is_not_faster(tmp_path: Path) -> None:
    nothing = parse("(float[N,2] x) => (float[N,2] y) { y = Tanh(x) }")
    (tmp_path / "in").mkdir()
    onnx.save(nothing, tmp_path / "in" / "tanh.onnx")
    done = pwopt("optimize", tmp_path / "in", "-d", tmp_path / "out", "--cost", "analytic")
    row, *why = done.stdout.splitlines()[:-1]
    assert row.endswith("tanh.onnx")
    assert (
        " ".join(" ".join(why).split())
        == json.loads((tmp_path / "out" / "index.json").read_text())["rows"][0]["sentence"]
    )
    assert why


def test_quiet_says_errors_only(model: Path) -> None:
    done = pwopt("optimize", model, *ANALYTIC, "-q")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = pwopt("optimize", "missing.onnx", "-q")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_verbose_says_why(model: Path) -> None:
    body = "(float[N,4,8,8] x) => (float[N,2,8,8] y) { h = Conv(x, v) y = Conv(h, w) }"
    weights = {"v": normal(4, 4, 1, 1, dtype=np.float32), "w": normal(2, 4, 1, 1, dtype=np.float32)}
    onnx.save(parse(body, **weights), model)
    done = pwopt("optimize", model, "-v", "--budget", "0.2", "--no-cache")
    said = " ".join(done.stderr.split())
    assert "the model runs" in said
    assert "likely sizes, since none were given" in said
    assert "the whole model: " in said
    assert "output 'y': " in said


@pytest.mark.parametrize(
    "arguments",
    [
        ["optimize", "seq.onnx", *ANALYTIC],
        ["optimize", "seq.onnx", *ANALYTIC, "--dry-run"],
        ["optimize", "seq.onnx", *ANALYTIC, "-d", "out"],
        ["verify", "seq.onnx", "seq.onnx", "--shape", "x=1x64x2x2"],
        ["inspect", "seq.onnx"],
        ["inspect", "seq.onnx", "--properties"],
        ["passes"],
        ["passes", "winograd"],
        ["bench", "seq.onnx", "--shape", "x=1x64x2x2", "--seconds", "0.1"],
        ["profile", "seq.onnx", "--shape", "x=1x64x2x2", "-o", "p.json", "--budget", "0.1"],
        ["cache"],
        ["cache", "clear"],
    ],
)
def test_json_is_all_that_stdout_says(model: Path, arguments: list[str]) -> None:
    done = pwopt(*arguments, "--json", cwd=model.parent)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) is not None


def test_a_dry_run_changes_nothing(model: Path) -> None:
    before = sorted(p.name for p in model.parent.iterdir())
    done = pwopt("optimize", model, "--dry-run", "--details")
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "done fold-chains:y" in text
    assert "A dry run: nothing was raced, verified or written." in text
    assert "Not verified" not in text
    assert (
        "would be timed, unless earlier runs on this machine have already decided "
        in pwopt("optimize", MODELS / "network_in_network.onnx", "--dry-run").stdout
    )
    assert "latency" not in text
    assert "wrote" not in text
    assert sorted(p.name for p in model.parent.iterdir()) == before


def test_everything_about_one_pass() -> None:
    done = pwopt("passes", "winograd")
    assert "winograd  (measured, on cpu and other providers)" in done.stdout
    assert "Lavin and" in done.stdout
    assert "fold-chains" not in done.stdout
    done = pwopt("passes", "wino")
    assert done.returncode == 2
    assert "there is no pass 'wino'" in done.stderr
    assert [p["name"] for p in json.loads(pwopt("passes", "--json").stdout)] == [p.name for p in PASSES]


@pytest.mark.parametrize("command", ["optimize", "verify", "inspect", "passes", "bench", "profile", "cache", ""])
def test_short_help_shows_no_values_for_flags(command: str) -> None:
    asked = [command] if command else []
    text = pwopt(*asked, "-h").stdout
    assert text == pwopt(*asked, "--help").stdout
    assert "Usage" in text
    assert "<bool>" not in text


def test_completion_is_offered() -> None:
    environment = {**os.environ, "_PWOPT_COMPLETE": "complete_bash", "COMP_WORDS": "pwopt op", "COMP_CWORD": "1"}
    script = Path(sys.executable).with_name("pwopt")
    done = subprocess.run([script], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["optimize"]
    assert "--install-completion" in pwopt("--help").stdout


def test_verdicts_fit_eighty_columns(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = pwopt("verify", model, model, "--shape", "x=1x64x2x2")
    assert re.search(r"^ *y +0 +.* identical *$", done.stdout, re.M)
    done = pwopt("optimize", model, *ANALYTIC)
    assert re.search(r"rewrites +count +saved +rounding +certified +tested +none", done.stdout)
    assert re.search(r"fold-chains +1 +237,568 +\S+ +1 +0 +0 *$", done.stdout, re.M)


def test_a_closed_pipe_is_quiet(model: Path) -> None:
    for arguments in (["passes"], ["inspect", str(model), "--json"]):
        command = [sys.executable, "-m", "pwopt", *arguments]
        done = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert done.stdout is not None
        assert done.stderr is not None
        done.stdout.close()
        said = [line for line in done.stderr if " s " not in line]
        assert (done.wait(), said) == (141, [])
        done.stderr.close()


@pytest.mark.skipif(os.name == "nt", reason="needs SIGINT")
def test_an_interrupt_says_so(model: Path) -> None:
    command = [sys.executable, "-m", "pwopt", "optimize", str(model), "--shape", "x=1x64x64x64", "--no-cache"]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # though what started the tests may not hear it
    done = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    assert done.stderr is not None
    while "rac" not in done.stderr.readline():
        assert done.poll() is None
    done.send_signal(signal.SIGINT)
    out, err = done.communicate()
    assert (done.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "pwopt: interrupted"
    assert sorted(p.name for p in model.parent.iterdir()) == ["seq.onnx"]
