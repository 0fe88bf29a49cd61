"""What Linux has and other systems have not: each way around it is taken, here, by hiding what Linux has."""

from __future__ import annotations

import ast
import contextlib
import errno
import os
import pickle
import platform
import queue
import shutil
import subprocess
import sys
import time
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import MODELS, normal, parse

import pwopt
from pwopt import cli
from pwopt.errors import UsageError
from pwopt.evidence.laws import parse_law
from pwopt.graph import limits, storage
from pwopt.inputs.input_specs import parse_shape
from pwopt.optimizing import batch, cluster, other_conditions
from pwopt.optimizing.request import Request
from pwopt.running import child_process, cold_start, installation, turn, worker
from pwopt.running.child_process import describe_exit
from pwopt.running.providers import DEFAULT
from pwopt.running.session import Session
from pwopt.selecting import plugins

ROOT = Path(__file__).parent.parent.parent
#: Modules that Windows does not have.
POSIX = ("fcntl", "grp", "pwd", "resource", "termios")
NOWHERE = Path("/nowhere/at/all")


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")


def test_nothing_posix_is_imported_at_once() -> None:
    for path in [*(ROOT / "pwopt").rglob("*.py"), *(ROOT / "passes").glob("*.py")]:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            named = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            named += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not set(named) & set(POSIX), path


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_a_whole_run_elsewhere(system: str, tmp_path: Path) -> None:
    """Without /proc, /sys, fork, affinity, and the modules and signals that only POSIX has."""
    pytest.importorskip("onnxruntime")
    arguments = ["optimize", str(MODELS / "linear_sequence.onnx"), "-o", str(tmp_path / "y.onnx"), "--no-cache"]
    arguments += ["--shape", "x=1x64x16x16", "--budget", "1"]
    code = f"""
import os, pathlib, signal, sys
import multiprocessing, subprocess, sysconfig, tempfile  # what asks for the system when it is imported
import onnx_graphsurgeon, onnxruntime, platformdirs, rich.console, threadpoolctl, typer
threadpoolctl.ThreadpoolController._load_libraries = lambda controller: None  # it calls the system's own library
sysconfig.get_config_vars()
for name in ("sched_getaffinity", "sched_setaffinity"):
    delattr(os, name)
if {system!r} == "win32":
    for name in ("fork", "forkpty", "statvfs", "getuid", "geteuid", "killpg"):
        delattr(os, name)
    for name in {POSIX!r}:
        sys.modules[name] = None
    for name in ("SIGALRM", "SIGPIPE", "SIGHUP", "SIGUSR1"):  # SIGKILL is what the subprocess module of POSIX needs
        delattr(signal, name)
exists = pathlib.Path.exists
pathlib.Path.exists = lambda path, **k: not str(path).startswith(("/proc", "/sys")) and exists(path, **k)
sys.platform = {system!r}
from pwopt.cli import main
main({arguments!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    onnx.checker.check_model(tmp_path / "y.onnx")  # the original, if the clock said so


@pytest.mark.parametrize("hidden", ["platform", "proc"])
def test_inference_runs_here_where_no_copy_can(hidden: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fork", None)
    if hidden == "platform":
        monkeypatch.setattr(sys, "platform", "darwin")
    else:
        monkeypatch.setattr(limits, "MEMORY_PAGES", NOWHERE)
    assert limits.run_isolated(lambda: b"answer", 1 << 20) == b"answer"
    assert limits.run_isolated(lambda: bytes(1 // 0), 1 << 20) is None  # as from a copy that failed


class Busy:
    """`os.replace` while another program has the file open, for some tries."""

    def __init__(self, tries: float) -> None:
        self.tries, self.calls, self.replace = tries, 0, os.replace

    def __call__(self, old: str, new: Path) -> None:
        self.calls += 1
        if self.calls <= self.tries:
            raise PermissionError(errno.EACCES, "Access is denied", os.fspath(old), 5, os.fspath(new))
        self.replace(old, new)


@pytest.fixture
def tiny() -> onnx.ModelProto:
    return parse("(float[1,2] x) => (float[1,2] y) { y = Relu(x) }")


def test_a_file_that_is_open_is_waited_for(
    windows: None, tiny: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    busy = Busy(2)
    monkeypatch.setattr(os, "replace", busy)
    monkeypatch.setattr(storage, "WAITS", (0.0,) * 5)
    pwopt.save(tiny, tmp_path / "m.onnx")
    assert busy.calls == 3
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_a_file_that_stays_open_stays_as_it_is(
    windows: None, tiny: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "m.onnx").write_bytes(b"old")
    busy = Busy(np.inf)
    monkeypatch.setattr(os, "replace", busy)
    monkeypatch.setattr(storage, "WAITS", (0.0,) * 5)
    with pytest.raises(UsageError, match=r"cannot be written: another program has it open; close that, and try again"):
        pwopt.save(tiny, tmp_path / "m.onnx")
    assert busy.calls == 6
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert (tmp_path / "m.onnx").read_bytes() == b"old"


def test_elsewhere_nobody_waits(tiny: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    busy = Busy(1)
    monkeypatch.setattr(os, "replace", busy)
    with pytest.raises(UsageError, match="Access is denied"):
        pwopt.save(tiny, tmp_path / "m.onnx")
    assert busy.calls == 1


@pytest.mark.parametrize(
    ("place", "own"),
    [("m.onnx.data", True), ("m.onnx.a\\..\\..\\precious", False), ("m.onnx.a/b", False), ("m.onnx.C:x", False)],
)
def test_only_files_beside_a_model_are_its_own(place: str, own: bool, tmp_path: Path) -> None:
    model = parse("(float[1,2] x) => (float[1,2] y) { y = MatMul(x, w) }", w=normal(2, 2, dtype=np.float32))
    (weight,) = model.graph.initializer
    onnx.external_data_helper.set_external_data(weight, place)
    weight.ClearField("raw_data")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    assert storage.find_data_files(tmp_path / "m.onnx") == ({place} if own else set())


def test_drive_letters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # where these are ordinary names
    shutil.copy(ROOT / "tests" / "plugin_package" / "pwopt_signs.py", "C:\\mine\\signs.py")
    assert plugins.import_pass("C:\\mine\\signs.py:DropSign").name == "drop-sign"
    with pytest.raises(UsageError, match="is not of the form module:Class"):
        plugins.import_pass("C:\\mine\\signs.py")
    with open("C:\\A.npy", "wb") as stream:
        np.save(stream, np.eye(2))
    law = parse_law("conservation:matrix=C:\\A.npy:output=y:0")
    assert law.settings["matrix"].shape == (2, 2)
    assert law.output == "y:0"
    assert parse_shape("C:\\in:0=1x3") == ("C:\\in:0", (1, 3))
    with pytest.raises(UsageError, match="is not an invariant"):
        parse_law("C:\\A.npy")


def test_what_becomes_of_a_worker() -> None:
    assert describe_exit(-9) == "SIGKILL"
    assert describe_exit(-999) == "exit code -999"
    assert describe_exit(3) == "exit code 3"
    assert describe_exit(0xC0000005) == "exit code 0xc0000005"  # an access violation, as Windows counts


def test_a_worker_whose_pipe_is_invalid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Windows says EINVAL where others say EPIPE."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(child_process, "_send", refuse)
    asked = worker.Worker(tmp_path / "m.onnx", DEFAULT, 1, {})
    process = object.__new__(child_process.Child)
    gone: queue.Queue[Any] = queue.Queue()
    gone.put(None)
    pipe = SimpleNamespace(close=lambda: None)
    ended: Any = SimpleNamespace(pid=0, stdin=pipe, stdout=None, wait=lambda *_: 0xC0000005, kill=lambda: None)
    process._process, process._answers, process._stack = ended, gone, contextlib.ExitStack()
    monkeypatch.setattr(asked, "_child", process)
    assert asked.fault(tmp_path / "c.onnx") == "it crashes onnxruntime (exit code 0xc0000005)"
    assert asked._child is None


def test_memory_is_bounded_only_where_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "MEMORY_STATUS", NOWHERE)
    monkeypatch.setitem(sys.modules, "resource", None)
    worker._bound_memory()


def test_the_peak_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    here = cold_start._read_peak()
    monkeypatch.setattr(cold_start, "STATUS", NOWHERE)
    assert cold_start._read_peak() >= 0.9 * here > 1e6
    in_kib = cold_start._read_peak()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cold_start._read_peak() == pytest.approx(in_kib / 1024, rel=0.1)  # which counts bytes
    monkeypatch.setitem(sys.modules, "resource", None)
    assert cold_start._read_peak() == 0.0


def test_the_processor_of_a_mac(mac: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "CPUINFO", NOWHERE)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="Apple M2\n"))
    assert installation.cpu_name() == "Apple M2"

    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError("sysctl")

    monkeypatch.setattr(subprocess, "run", missing)
    monkeypatch.setattr(platform, "processor", lambda: "arm")
    assert installation.cpu_name() == "arm"
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert installation.cpu_name() == "arm64"


def test_the_clock_of_windows(windows: None) -> None:
    """A thread's own time comes in steps of 16 ms there."""
    pytest.importorskip("onnxruntime")
    assert Session(MODELS / "linear_sequence.onnx").clock is time.perf_counter


def test_the_clock_elsewhere(mac: None) -> None:
    pytest.importorskip("onnxruntime")
    assert Session(MODELS / "linear_sequence.onnx").clock is time.thread_time


def test_threads_where_nothing_tells_of_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(Path, "exists", lambda _: False)  # /sys
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert other_conditions.usual_threads() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert other_conditions.usual_threads() == 1


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Whether stdout was let go; the test's own stays."""
    seen: list[object] = []
    monkeypatch.setattr(os, "dup2", lambda *a: seen.append(a))
    return seen


def failing(error: BaseException) -> Any:
    def app(*_: object, **__: object) -> None:
        raise error

    return app


def test_a_closed_pipe_on_windows(windows: None, left: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "app", failing(OSError(errno.EINVAL, "Invalid argument")))
    with pytest.raises(SystemExit) as stop:
        cli.main(["passes"])
    assert stop.value.code == 141


def test_an_invalid_argument_elsewhere_is_a_defect(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(cli, "app", failing(OSError(errno.EINVAL, "Invalid argument")))
    with pytest.raises(SystemExit) as stop:
        cli.main(["passes"])
    assert stop.value.code == 5
    assert "internal error" in capsys.readouterr().err


def test_commands_are_quoted_as_the_system_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(cli, "app", lambda _, obj: seen.append(obj))
    cli.main(["verify", "a b.onnx"])
    monkeypatch.setattr(sys, "platform", "win32")
    cli.main(["verify", "a b.onnx"])
    assert seen == ["pwopt verify 'a b.onnx'", 'pwopt verify "a b.onnx"']


def test_a_terminal_with_few_characters() -> None:
    """As cmd.exe, and pipes of Windows, have: what they cannot show is a question mark, and no failure."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-m", "pwopt", "passes"], capture_output=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"fold-chains" in done.stdout
    assert b"?" in done.stdout


def test_names_that_differ_in_capitals(monkeypatch: pytest.MonkeyPatch, tiny: onnx.ModelProto, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    for folder, name in (("a", "Net.onnx"), ("b", "net.onnx")):
        (tmp_path / folder).mkdir()
        pwopt.save(tiny, tmp_path / folder / name)
    models = [tmp_path / "a" / "Net.onnx", tmp_path / "b" / "net.onnx"]
    assert len(batch.find_jobs(models, tmp_path / "out", Request())) == 2
    for system in ("darwin", "win32"):
        monkeypatch.setattr(sys, "platform", system)
        with pytest.raises(UsageError, match="would be one file on this system; rename one model"):
            batch.find_jobs(models, tmp_path / "out", Request())


@pytest.mark.parametrize("pure", [PureWindowsPath("C:\\models\\m.onnx"), PurePosixPath("/models/m.onnx")])
def test_a_worker_reads_the_paths_of_another_system(
    pure: PureWindowsPath | PurePosixPath, tiny: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(turn, "_turn", turn._turn)  # what a delivery shares ends with this test
    parcel = cluster.JobRequest(pure, pure.with_name("out.onnx"), {"m.onnx": tiny.SerializeToString()}, ())
    delivery = cluster.run_remote_job(pickle.loads(pickle.dumps(parcel)), Request(cost="analytic", verify=False))
    assert (delivery.done.row.status, delivery.done.row.model) == ("done", os.fspath(pure))
    assert set(delivery.files) == {"out.onnx"}
