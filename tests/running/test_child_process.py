"""Child processes: where they import from, and how signals end this process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from helpers import MODELS, parse

from pwopt.running.child_process import ROOT, child_command, module_path
from pwopt.running.signals import received_signal, signals_interrupt

#: The command line as its script starts it: without the current folder on the module path.
SCRIPT = "from pwopt.cli import main\nmain()\n"


def say(*words: str) -> None:
    """In a child: print its arguments and its module path."""
    print(*words, sys.path[0], sep="|")


def test_a_child_has_the_module_path_of_this_process_without_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", os.curdir, str(tmp_path), *sys.path])
    paths = module_path()
    assert str(tmp_path) not in paths
    assert "" not in paths
    assert ROOT in paths
    for name in ("numpy", "pickle", "runpy", "os", "encodings"):
        (tmp_path / f"{name}.py").write_text("open('executed', 'w')\n")
    done = subprocess.run(child_command(say, "a b", "c"), capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"a b|c|{paths[0]}")
    assert not (tmp_path / "executed").exists()


def test_the_current_folder_stays_where_pwopt_lies_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert ROOT in module_path()


@pytest.mark.parametrize(
    "command",
    [
        ["optimize", "-q", "model.onnx", "-o", "out.onnx", "--cost", "analytic", "--no-cache"],
        ["bench", "-q", "model.onnx", "--seconds", "0.01"],
        ["doctor", "--provider", "cpu"],
        [
            *[
                "optimize",
                "-q",
                "model.onnx",
                "two.onnx",
                "-d",
                "out",
                "--cost",
                "analytic",
                "--no-verify",
                "--workers",
                "2",
            ]
        ],
    ],
    ids=lambda c: " ".join(c[:2]) if "-d" not in c else "workers",
)
def test_code_beside_a_model_is_not_executed(command: list[str], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    folder = tmp_path / "models"
    folder.mkdir()
    for name in ("model", "two"):
        onnx.save(parse("(float[1,4] x) => (float[1,4] y) { y = Relu(x) }"), folder / f"{name}.onnx")
    for name in ("numpy", "onnxruntime", "pickle", "multiprocessing", "runpy", "queue"):
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nraise ImportError\n")
    (tmp_path / "pwopt_script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "pwopt_script.py"), *command], cwd=folder, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "executed").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)])
def test_signals_end_the_process_as_an_interrupt_does(number: int) -> None:
    code = (
        "import os\nfrom pwopt.running.signals import received_signal, signals_interrupt\n"
        "with signals_interrupt():\n    try:\n"
        f"        os.kill(os.getpid(), {int(number)})\n        import time; time.sleep(60)\n"
        f"    except KeyboardInterrupt:\n        os.kill(os.getpid(), {int(number)})\n"
        "        print(received_signal())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == number


def test_handlers_that_a_program_has_set_stay() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with signals_interrupt():
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received_signal() is None


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
@pytest.mark.parametrize(
    ("redirect", "code"),
    [
        (">&-", 0),
        ("2>&-", 0),
        ("<&- >&- 2>&-", 0),
        ("2>/dev/full", 0),
        ("--json >/dev/full", 2),
        ("--verbose >/dev/full", 2),
    ],
)
def test_output_streams_may_be_closed_or_full(redirect: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = f"{sys.executable} script.py optimize {MODELS / 'linear_sequence.onnx'} -o out.onnx --cost analytic"
    done = subprocess.run(["bash", "-c", f"{command} --no-verify {redirect}"], cwd=tmp_path, capture_output=True)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "out.onnx").exists()
