"""The worker: what is asked again, and what is said where it cannot start."""

from __future__ import annotations

import os
import signal
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import normal, parse

import pwopt
from pwopt.running import child_process
from pwopt.running.child_process import Channel, Child, EndedError, StartError, TimeLimitError
from pwopt.running.progress import ignore_progress
from pwopt.running.providers import DEFAULT
from pwopt.running.timing import TO_THE_END
from pwopt.running.worker import UnusableError, Worker

pytestmark = pytest.mark.worker_processes
FEEDS = {"x": normal(1, 8, dtype="float32")}
posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals that kill")


def echo() -> None:
    """In a child: answer each message by itself, until it is a number, which ends the child."""
    channel = Channel()
    while (message := channel.receive()) is not None:
        print("this goes elsewhere")
        if isinstance(message, int):
            os._exit(message)
        channel.send(message)


def sleep() -> None:
    """In a child: never answer."""
    channel = Channel()
    time.sleep(3600)
    channel.send("late")


def hang() -> None:
    """In a child: close the channel, and never end."""
    Channel()
    time.sleep(3600)


def fail() -> None:
    raise ImportError("no such library")


def test_a_child_answers_messages_until_it_ends() -> None:
    process = Child(echo)
    assert process.ask("a", 60.0) == "a"
    with pytest.raises(EndedError, match="exit code 7") as found:
        process.ask(7, 60.0)
    assert not found.value.killed
    process.close()
    late = Child(sleep)
    with pytest.raises(TimeLimitError, match="did not finish within 0 seconds"):
        late.ask("a", 0.0)
    late.close()


@posix
def test_a_child_that_hangs_at_its_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_process, "END_SECONDS", 0.1)
    process = Child(hang)
    with pytest.raises(EndedError, match="SIGKILL"):
        process.ask("a", 60.0)
    process.close()


def test_a_child_that_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StartError, match=r"ended while it started \(exit code 1: ImportError: no such library\)"):
        Child(fail)
    monkeypatch.setattr(child_process, "child_command", lambda *_: ["/no/such/python"])
    with pytest.raises(StartError, match="no process could be started"):
        Child(echo)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two models, of which one kills its process as the system does when memory runs out."""
    pytest.importorskip("onnxruntime")
    for name in ("good", "deadly"):
        model = parse("(float[1,8] x) => (float[N] y) { y = Relu(x) }")
        model.graph.node[0].name = name
        onnx.save(model, tmp_path / f"{name}.onnx")
    (tmp_path / "path").mkdir()
    code = """
        import os, onnxruntime
        real = onnxruntime.InferenceSession
        def session(path, *arguments, **options):
            if b"deadly" in open(path, "rb").read():
                os.kill(os.getpid(), 9)
            return real(path, *arguments, **options)
        onnxruntime.InferenceSession = session
    """
    (tmp_path / "path" / "sitecustomize.py").write_text(textwrap.dedent(code))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "path"), os.environ.get("PYTHONPATH", "")]))
    return tmp_path


@posix
def test_a_worker_that_is_killed_from_outside_is_asked_again_once(models: Path) -> None:
    asked = Worker(models / "good.onnx", DEFAULT, 1, FEEDS)
    assert asked.ready
    assert asked._child is not None
    asked._child._process.send_signal(signal.SIGKILL)
    assert asked.fault(models / "good.onnx") == ""
    assert asked.fault(models / "deadly.onnx") == "its process was killed twice (SIGKILL)"
    assert asked.fault(models / "good.onnx") == ""
    asked.close()


def test_a_model_that_fails_in_a_race_does_not_end_the_process(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    onnx.save(parse("(float[1,8] x) => (float[N] y) { y = Relu(x) }"), tmp_path / "good.onnx")
    outside = parse("(float[1,8] x) => (float[N] y) { y = Gather<axis=1>(x, i) }", i=np.array([9]))
    onnx.save(outside, tmp_path / "bad.onnx")
    asked = Worker(tmp_path / "good.onnx", DEFAULT, 1, FEEDS)
    assert asked.ready
    with pytest.raises(UnusableError, match="onnxruntime cannot run the model on these inputs"):
        asked.race([tmp_path / "good.onnx", tmp_path / "bad.onnx"], 1, FEEDS, 0.1, TO_THE_END, ignore_progress)
    assert asked._child is not None
    asked.close()


def test_a_report_says_where_no_worker_starts(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_process, "child_command", lambda *_: ["/no/such/python"])
    body = "(float[1,8] x) => (float[1,8] y) { h = Mul(x, a) y = Mul(h, a) }"
    model = parse(body, a=normal(8, dtype="float32"))
    report = pwopt.optimize(model, cost="analytic", cache=False).report
    assert report.rewrites
    assert any("did not run in a process of their own: no process could be started" in n for n in report.notes)
