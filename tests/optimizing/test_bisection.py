"""Candidates that do not load, crash, run forever, take all memory or deviate are dropped, and the rest is written."""

from __future__ import annotations

import re
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from helpers import MODELS, normal, ops, parse

import pwopt
from pwopt.evidence.certify import skip_certificate
from pwopt.graph.files import from_proto
from pwopt.optimizing import attempt, bisection, preparation
from pwopt.rewriting import Pass, Rewrite, Rewriter
from pwopt.rewriting.records import Site
from pwopt.running import worker
from pwopt.running.providers import DEFAULT
from pwopt.running.timing import Race, Rules
from pwopt.running.worker import UnusableError, Worker
from pwopt.selecting import pass_list
from pwopt.selecting.compilation import Compilation
from pwopt.selecting.pass_list import resolve_passes
from pwopt.selecting.rewrite_selection import RacingEvaluator

pytestmark = pytest.mark.worker_processes
F = np.float32
CHAIN = parse(
    "(float[1,8,16,16] x) => (float[N] y) { a = Conv(x, w) b = Conv(a, v) r = Relu(b) c = Conv(r, u) y = Abs(c) }",
    w=normal(8, 8, 1, 1, dtype=F), v=normal(8, 8, 1, 1, seed=1, dtype=F), u=normal(8, 8, 1, 1, seed=2, dtype=F),
)  # fmt: skip
#: An operator that does something terrible in front of every Abs: its result is added to x as zero.
HARM = {
    "does not load": ("NoSuchOperator", {}),
    "takes all memory": ("ConstantOfShape", {}),
    "runs forever": ("Loop", {}),
    "crashes": ("Erf", {}),
}


class Harmful(Pass):
    """Puts something in front of every Abs that no session survives."""

    name = "harmful"
    kind: ClassVar[str] = ""

    def match_and_rewrite(self, node: gs.Node, rw: Rewriter) -> Rewrite | None:
        if rw.op(node) != "Abs" or rw.op(rw.producer(node.inputs[0])) == "Add":
            return None
        x = node.inputs[0]
        made, total = rw.new_variable("harm", x), rw.new_variable("total", x)
        nodes = [*self.harm(rw, x, made), gs.Node("Add", "", {}, [x, made], [total])]
        new = [*nodes, gs.Node("Abs", node.name, {}, [total], list(node.outputs))]
        return rw.replace([node], new, "harm").with_signature("harm")

    def harm(self, rw: Rewriter, x: gs.Tensor, made: gs.Tensor) -> list[gs.Node]:
        if self.kind == "takes all memory":
            size = rw.new_constant("size", np.array([1 << 33], np.int64))
            large = gs.Variable(rw.unique_name("large"))
            return [
                gs.Node("ConstantOfShape", "", {}, [size], [large]),
                gs.Node("ReduceSum", "", {"keepdims": 0}, [large], [made]),
            ]
        if self.kind == "runs forever":
            yes = rw.new_constant("yes", np.array(True))
            i, go, v = gs.Variable("i", np.int64, []), gs.Variable("go", bool, []), gs.Variable("v", F, x.shape)
            on, w = gs.Variable("on", bool, []), gs.Variable("w", F, x.shape)
            body = gs.Graph(
                [gs.Node("Identity", "", {}, [go], [on]), gs.Node("Abs", "", {}, [v], [w])], [i, go, v], [on, w]
            )
            return [gs.Node("Loop", "", {"body": body}, [gs.Variable.empty(), yes, x], [made])]
        return [gs.Node("Erf" if self.kind == "crashes" else "NoSuchOperator", "aborts", {}, [x], [made])]


@pytest.fixture
def aborting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every session abort that has an operator called so, as a fault in native code would."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(
        textwrap.dedent(
            """
            import os
            import onnxruntime
            real = onnxruntime.InferenceSession
            def session(path, *arguments, **options):
                if b"aborts" in open(path, "rb").read():
                    os.abort()
                return real(path, *arguments, **options)
            onnxruntime.InferenceSession = session
            """
        )
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))


@pytest.mark.parametrize("policy", ["always", "measured"])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("does not load", "onnxruntime does not load the model: "),
        ("takes all memory", "Failed to allocate memory|std::bad_alloc"),
        ("runs forever", "it did not finish within "),
        ("crashes", r"it crashes onnxruntime \(SIGABRT\)"),
    ],
)
def test_what_cannot_be_used_is_left_out(
    kind: str, reason: str, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    pytest.importorskip("onnxruntime")
    if kind == "crashes":
        request.getfixturevalue("aborting")
    monkeypatch.setattr(RacingEvaluator, "estimate", lambda *_: {})  # at a copy whose nodes have other names
    monkeypatch.setattr(Harmful, "kind", kind)
    monkeypatch.setattr(Harmful, "policy", policy)
    others = (p for p in pass_list.PASSES if p.policy != "measured")  # whose races would take the time
    monkeypatch.setattr(pass_list, "PASSES", (*others, Harmful))
    monkeypatch.setattr(preparation, "certify", skip_certificate)
    if kind == "runs forever":  # the others end by themselves, however busy the machine is
        monkeypatch.setattr(worker, "MIN_TIME_LIMIT", 1.5)
        monkeypatch.setattr(worker, "SLOWER", 3.0)
    out = tmp_path / "out.onnx"
    report = pwopt.optimize(
        CHAIN, out, measuring=pwopt.Measuring(race_seconds=0.1, budget=600.0), cache=False, threads=1
    ).report
    (left,) = (s for s in report.skips if s.pass_name == "harmful")
    assert re.search(reason, left.reason)
    assert "the model with it cannot be used, since " in left.reason
    written = ops(onnx.load(out))
    assert "Add" not in written
    assert "harmful" not in {r.pass_name for r in report.rewrites}
    if policy == "always":
        assert any("Left out: harmful at 1 place, " in note and "the fault of harmful" in note for note in report.notes)


def test_a_quantised_model_that_onnxruntime_refuses_when_rewritten(tmp_path: Path) -> None:
    """At opset 21, onnxruntime 1.32 does not load DequantizeLinear in front of a Reshape: a candidate's fault."""
    pytest.importorskip("onnxruntime")
    scale, zero = np.float32(0.05), np.int8(0)
    model = parse(
        "(float[1,32,40,40] x) => (float[N] y) { q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) c = Conv(d, w) y = Relu(c) }",
        21, 10, s=scale, z=zero, w=normal(32, 32, 1, 1, dtype=F),
    )  # fmt: skip
    report = pwopt.optimize(
        model, tmp_path / "out.onnx", measuring=pwopt.Measuring(budget=5.0, race_seconds=0.2), cache=False
    ).report
    assert report.equivalence is None or report.equivalence.passed
    pwopt.running.session.Session(tmp_path / "out.onnx")


def test_the_rewrite_at_fault_is_found_by_halves(tmp_path: Path) -> None:
    model = from_proto(CHAIN)
    work = Compilation(model, model, resolve_passes(), (), {}, tmp_path)
    rewrites = [Rewrite("r", site=Site(f"p{i % 3}", f"t{i}")) for i in range(16)]
    asked: list[int] = []

    def fault(tried: Compilation) -> str:
        made = [r.site for r in rewrites if r.site not in tried.refused]
        asked.append(len(made))
        return "it is broken" if {Site("p2", "t5"), Site("p1", "t13")} & set(made) else ""

    first = bisection.leave_out_faulty(work, rewrites, fault)
    reason = "the model with it cannot be used, since it is broken; a defect of pwopt or onnxruntime"
    assert list(first.refused) == [Site("p2", "t5")]
    assert first.refused[Site("p2", "t5")].reason.startswith(f"left out ({reason}")
    assert first.notes[0].startswith(f"Left out: p2 at 1 place, {reason}")
    assert len(asked) <= 2 + 4
    second = bisection.leave_out_faulty(first, rewrites, fault)
    assert list(second.refused) == [Site("p2", "t5"), Site("p1", "t13")]
    assert bisection.leave_out_faulty(second, rewrites, fault) is second
    again = bisection.add_repeated(first, [rewrites[2]], rewrites)
    assert {r.site for r in again} == {r.site for r in rewrites if r.pass_name == "p2"}
    assert bisection.leave_out_faulty(work, rewrites, lambda _: "always") is work
    assert bisection.leave_out_faulty(work, rewrites, lambda _: "") is work


def test_a_worker_is_replaced_and_knows_when_it_tells_nothing(tmp_path: Path, aborting: None) -> None:
    pytest.importorskip("onnxruntime")
    onnx.save(CHAIN, tmp_path / "good.onnx")
    bad = parse("(float[1,8,16,16] x) => (float[N] y) { y = Erf(x) }")
    bad.graph.node[0].name = "aborts"
    onnx.save(bad, tmp_path / "bad.onnx")
    feeds = {"x": normal(1, 8, 16, 16, dtype=F)}
    tried = Worker(tmp_path / "good.onnx", DEFAULT, 1, feeds)
    found = [tried.fault(tmp_path / f"{name}.onnx") for name in ("good", "bad", "good")]
    tried.close()
    assert found == ["", "it crashes onnxruntime (SIGABRT)", ""]
    useless = Worker(tmp_path / "bad.onnx", DEFAULT, 1, feeds)
    assert useless.fault(tmp_path / "bad.onnx") == ""
    useless.close()


def test_races_run_in_the_worker_and_what_fails_there_is_told(tmp_path: Path, aborting: None) -> None:
    pytest.importorskip("onnxruntime")
    paths = [tmp_path / f"{name}.onnx" for name in ("a", "b", "bad")]
    for path in paths[:2]:
        onnx.save(CHAIN, path)
    bad = parse("(float[1,8,16,16] x) => (float[N] y) { y = Erf(x) }")
    bad.graph.node[0].name = "aborts"
    onnx.save(bad, paths[2])
    feeds, seen = {"x": normal(1, 8, 16, 16, dtype=F)}, list[float]()
    tried = Worker(paths[0], DEFAULT, 1, feeds)
    assert tried.ready
    assert min(tried.took) > 0
    race = tried.race(paths[:2], 1, feeds, 0.3, Rules(), lambda _, done: seen.append(done))
    assert len(race.pairs) >= 3
    assert 0.2 < race.speedup() < 5  # the same model
    assert seen[-1] <= 1.0
    (first, second), own = tried.profiles(paths[:2], 0.1, 3)
    assert 0 < own <= 1.05
    assert len(first) == len(second) >= 3
    assert {n.op for n in first[0]} >= {"Conv"}
    with pytest.raises(UnusableError, match="SIGABRT"):
        tried.race([paths[0], paths[2]], 1, feeds, 0.1, Rules(), lambda _, done: seen.append(done))
    assert tried.fault(paths[1]) == ""  # by a new one
    tried.close()


def test_a_process_starts_in_the_background_and_ends_while_it_starts(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    path = tmp_path / "m.onnx"
    onnx.save(CHAIN, path)
    feeds = {"x": normal(1, 8, 16, 16, dtype=F)}
    early = Worker(path, DEFAULT, 1, feeds)
    with ThreadPoolExecutor(1) as pool:
        early.start_early(pool)
        assert early.ready
        assert early.took[1] > 0
        early.close()
        early.start_early(pool)
        early.close()
        assert early.problem or not early._child
        early.start_early(pool)  # ends after it has started as well
        assert early.problem or early.ready
        early.close()


def test_a_process_that_waits_for_another_to_start_need_not_start(tmp_path: Path) -> None:
    worker, begun = Worker(tmp_path / "m.onnx", DEFAULT, 1, {}), Event()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(begun.wait)
        worker.start_early(pool)
        worker.close()
        begun.set()
    assert not worker.problem
    assert worker._child is None


def test_a_candidate_that_fails_when_it_is_timed_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")

    def race(_worker: Worker, models: list[Path], *_: object, **__: object) -> Race:
        raise UnusableError(f"it crashes onnxruntime (SIGSEGV) with {len(models)} models")

    monkeypatch.setattr(Worker, "race", race)
    monkeypatch.setattr(Worker, "profiles", race)
    report = pwopt.optimize(CHAIN, tmp_path / "out.onnx", threads=1, cache=False).report
    assert report.rewrites == ()
    assert any("fails when it is timed: it crashes onnxruntime (SIGSEGV)" in s.reason for s in report.skips)
    assert any("SIGSEGV" in s.reason for s in report.skips if s.pass_name == "to-matmul")


def test_without_verification_a_result_that_does_not_load_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(Harmful, "kind", "does not load")
    monkeypatch.setattr(pass_list, "PASSES", (Harmful,))
    done = pwopt.optimize(CHAIN, tmp_path / "out.onnx", verify=False)
    said = "Not verified (as asked). The result cannot be used: onnxruntime does not load the model: "
    assert sum(note.startswith(said) for note in done.report.notes) == 1
    assert "Nothing was timed: --no-verify runs no model." in done.report.notes
    fine = pwopt.optimize(MODELS / "linear_sequence.onnx", tmp_path / "fine.onnx", verify=False)
    assert "Not verified (as asked)." in fine.report.notes


def test_the_original_is_returned_when_attempts_run_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never a model that was not verified."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(Harmful, "kind", "does not load")
    monkeypatch.setattr(pass_list, "PASSES", (Harmful,))
    monkeypatch.setattr(preparation, "certify", skip_certificate)
    monkeypatch.setattr(attempt, "MAX_ATTEMPTS", 1)
    done = pwopt.optimize(CHAIN, tmp_path / "out.onnx", threads=1)
    assert ops(done.model) == ops(onnx.load(tmp_path / "out.onnx")) == ops(CHAIN)
    assert done.report.rewrites == ()
    assert done.report.notes[-2] == "The original is returned."
    assert "time goes into" in done.report.notes[-1]
