from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from helpers import MODELS, normal, parse

import pwopt
from pwopt.cli import main
from pwopt.errors import UsageError
from pwopt.running import huge_pages
from pwopt.running.bench import LAYOUT, sum_by_operator
from pwopt.running.cold_start import measure_cold_starts
from pwopt.running.providers import DEFAULT
from pwopt.running.session import Session, _parse_events

pytest.importorskip("onnxruntime")


def saved(path: Path, body: str) -> Path:
    onnx.save(parse(body, w=normal(4, 3, 1, 1).astype(np.float32)), path)
    return path


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    head = "(float[N,3,H,W] x) => (float[M] y) "
    slow = " ".join(f"s{i} = Transpose<perm=[0,1,3,2]>({f's{i - 1}' if i else 'c'})" for i in range(4))
    return [
        saved(tmp_path / "a.onnx", head + f"{{ c = Conv(x, w) {slow} r = Exp(s3) y = Transpose<perm=[0,1,3,2]>(r) }}"),
        saved(tmp_path / "b.onnx", head + "{ c = Conv(x, w) r = Exp(c) y = Transpose<perm=[0,1,3,2]>(r) }"),
    ]


def test_each_model_starts_in_a_process_of_its_own(pair: list[Path], tmp_path: Path) -> None:
    feeds = {"x": np.zeros((1, 3, 256, 256), np.float32)}
    found = measure_cold_starts(pair, DEFAULT, 1, feeds)
    assert [sorted(each) for each in found] == [["first", "memory", "session"]] * 2
    assert all(each["session"] > 0 and each["first"] > 0 and each["memory"] > 1e6 for each in found)
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"no model")
    with pytest.raises(UsageError, match=r"bad\.onnx' does not run in a process of its own"):
        measure_cold_starts([pair[0], bad], DEFAULT, 1, feeds)


@pytest.mark.huge_pages
def test_models_side_by_side(pair: list[Path]) -> None:
    rows = pwopt.benchmark(pair, shapes={"x": (1, 3, 32, 32)}, seconds=0.1)
    assert [r.model for r in rows] == [str(p) for p in pair]
    assert rows[0].ratio == 1.0
    assert rows[1].ratio > 0
    for row in rows:
        assert row.shapes == {"x": (1, 3, 32, 32)}
        assert 0 < row.minimum_ms <= row.median_ms
        assert row.interval[0] <= row.ratio <= row.interval[1]
        assert row.session_ms > 0
        assert row.first_run_ms > 0
        assert row.memory_mb >= 0
        assert {"Conv", "Transpose"} <= set(row.operators)
        assert list(row.operators.values()) == sorted(row.operators.values(), reverse=True)
        assert row.layout_share == pytest.approx(
            sum(ms for op, ms in row.operators.items() if op in LAYOUT) / sum(row.operators.values())
        )
        assert row.elsewhere == 0
        assert (row.huge_pages_mb is None) is not bool(huge_pages.system_mode())
        assert row.start[1] <= row.start[0] <= row.start[2]
    assert rows[0].start == (1.0, 1.0, 1.0) != rows[1].start


def test_a_sweep_over_batches(pair: list[Path]) -> None:
    rows = pwopt.benchmark(pair[1:], shapes={"x": (1, 3, 8, 8)}, batch=[1, 4], seconds=0.05)
    assert [r.shapes["x"] for r in rows] == [(1, 3, 8, 8), (4, 3, 8, 8)]


def test_what_cannot_be_compared(pair: list[Path], tmp_path: Path) -> None:
    other = saved(tmp_path / "c.onnx", "(float[N,3,H,W] image) => (float[M] y) { y = Conv(image, w) }")
    with pytest.raises(pwopt.UsageError, match="does not take the same inputs"):
        pwopt.benchmark([pair[0], other])
    fixed = saved(tmp_path / "d.onnx", "(float[1,3,8,8] x) => (float[M] y) { y = Conv(x, w) }")
    with pytest.raises(pwopt.UsageError, match="does not fit input 'x'"):
        pwopt.benchmark([pair[0], fixed], shapes={"x": (1, 3, 16, 16)}, seconds=0.01)
    with pytest.raises(pwopt.UsageError, match="batch cannot be 4"):
        pwopt.benchmark([fixed], batch=[4])
    with pytest.raises(pwopt.UsageError, match="1 or more"):
        pwopt.benchmark([pair[0]], batch=[0])
    with pytest.raises(pwopt.UsageError, match="no model"):
        pwopt.benchmark([])


def test_more_threads_than_cores_are_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pwopt.reporting.notes.list_cores", lambda: {0})
    report = str(tmp_path / "bench.json")
    arguments = ["--shape", "x=1x64x8x8", "--seconds", "0.05", "--threads", "2", "--report", report]
    with pytest.raises(SystemExit) as caught:
        main(["bench", str(MODELS / "linear_sequence.onnx"), *arguments])
    assert caught.value.code in (0, None)
    note = "2 threads were asked for, but this process may use 1 core."
    assert note in " ".join(capsys.readouterr().out.split())
    assert json.loads(Path(report).read_text(encoding="utf-8"))["notes"] == [note]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "bench.json"
    model = str(MODELS / "linear_sequence.onnx")
    with pytest.raises(SystemExit) as caught:
        main(["bench", model, model, "--shape", "x=1x64x8x8", "--seconds", "0.05", "--report", str(report)])
    assert caught.value.code in (0, None)
    assert "linear_sequence.onnx" in capsys.readouterr().out.replace("\n", "")
    content = json.loads(report.read_text())
    assert len(content["rows"]) == 2
    assert content["environment"]["threads"] == 1
    assert content["environment"]["huge_pages_mb"] == content["rows"][0]["huge_pages_mb"]
    assert content["notes"] == []
    with pytest.raises(SystemExit) as caught:
        main(["bench", model, "--batch", "one"])
    assert caught.value.code == 2


def test_a_plot_of_the_latencies(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = MODELS / "linear_sequence.onnx"
    plot = tmp_path / "plot.svg"
    with pytest.raises(SystemExit) as code:
        main(["bench", str(model), str(model), "--shape", "x=1x64x8x8", "--seconds", "0", "--plot", str(plot)])
    assert code.value.code == 0
    text = plot.read_text()
    assert text.count("linear_sequence.onnx") == 2
    assert "x 1×64×8×8" in text
    assert "var(--" not in text
    with pytest.raises(SystemExit) as code:
        main(["bench", str(model), "--plot", str(tmp_path / "plot.png")])
    assert code.value.code == 2


def test_a_profile_with_quotes_in_names() -> None:
    """Older versions of onnxruntime do not escape them: those events are lost, the others are not."""
    lines = ["[", '{"cat": "Node", "name": "a"},', '{"cat": "Node", "name": "b"c"},', '{"cat": "Session"}', "]", ""]
    assert _parse_events("\n".join(lines)) == [{"cat": "Node", "name": "a"}, {"cat": "Session"}]


def profile_of(runs: list[list[tuple[str, str, int]]], folder: Path) -> Path:
    """What onnxruntime's profiler writes: nodes (name, operator, microseconds), and the end of each run."""
    events: list[dict[str, object]] = [{"cat": "Session", "name": "session_initialization", "dur": 1, "args": {}}]
    for run in runs:
        events += [
            {"cat": "Node", "name": f"{name}_kernel_time", "dur": dur, "args": {"op_name": op}} for name, op, dur in run
        ]
        events.append({"cat": "Session", "name": "model_run", "dur": sum(dur for *_, dur in run), "args": {}})
    path = folder / "profile.json"
    path.write_text(json.dumps(events))
    return path


RUN = [("a", "Conv", 100), ("b", "Conv", 60), ("l", "Relu", 5), ("l", "Relu", 5)]
SLOW = [("a", "Conv", 500), ("b", "Conv", 60), ("l", "Relu", 5), ("l", "Relu", 5)]


@pytest.mark.parametrize(
    ("runs", "spent", "conv", "relu"),
    [
        ([RUN] * 3, 180, 160, 10),  # both times that Relu ran in a run count
        ([RUN, SLOW, RUN], 180, 160, 10),  # something else had the processor while a was waiting
        ([SLOW] * 3, 190, 560 / 3, 10 / 3),  # and here in every run: the thread had a third of 570 µs
    ],
)
def test_operators_are_timed_as_the_race_is(
    runs: list[list[tuple[str, str, int]]], spent: float, conv: float, relu: float, tmp_path: Path
) -> None:
    """In the thread's own time: what else the machine does is no operator's."""
    path, now = profile_of(runs, tmp_path), [0.0]
    session = object.__new__(Session)
    session._spent, session.clock = [], lambda: now[0]
    session.session = SimpleNamespace(end_profiling=lambda: str(path))
    session.provider = DEFAULT
    session.session.run = lambda *_: now.__setitem__(0, now[0] + spent * 1e-6) or []
    for _ in runs:
        session.profiled_run({})
    found = sum_by_operator(session.nodes())
    assert list(found) == ["Conv", "Relu"]
    assert found == pytest.approx({"Conv": conv * 1e-3, "Relu": relu * 1e-3})
    assert not path.exists()
