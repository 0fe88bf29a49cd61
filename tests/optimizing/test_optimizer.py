"""The main job from Python: optimise, verify, measure, refuse."""

from __future__ import annotations

import io
import itertools
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from helpers import MODELS, evaluate, normal, ops, parse, plant, planted_race, weight
from rich.console import Console
from threadpoolctl import threadpool_info, threadpool_limits

import pwopt
from pwopt.errors import NotEquivalentError, ProviderError, UsageError
from pwopt.evidence.certify import skip_certificate
from pwopt.graph.files import load
from pwopt.maps.cost import Cost
from pwopt.optimizing import attempt, preparation
from pwopt.optimizing.budget import Budget
from pwopt.reporting import notes
from pwopt.reporting.document import render_document
from pwopt.reporting.report import Latency, Report
from pwopt.reporting.terminal import render, render_benchmark
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.records import Rewrite, Site
from pwopt.running import installation
from pwopt.running.bench import Row
from pwopt.running.timing import Race, SessionPair
from pwopt.selecting import candidate_base, pass_list
from pwopt.selecting.environment import Environment

F = np.float32


class Planted(Pass):
    """A wrong rewrite: every weight of a Conv grows by a thousandth."""

    name = "planted"
    __module__ = "pwopt.passes.planted"

    def match_and_rewrite(self, node: gs.Node, rw: Rewriter) -> Rewrite | None:
        if rw.op(node) != "Conv" or "planted" in node.inputs[1].name:
            return None
        values = rw.raw(node.inputs[1])
        assert values is not None
        wrong = rw.new_constant("planted", (values * 1.001).astype(values.dtype))
        new = gs.Node("Conv", node.name, node.attrs, [node.inputs[0], wrong, *node.inputs[2:]], list(node.outputs))
        return rw.replace([node], [new], "planted")


def test_a_wrong_rewrite_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by its certificate: by the answers of the whole model, and what they are traced back to."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(pass_list, "PASSES", (*pass_list.PASSES, Planted))
    monkeypatch.setattr(preparation, "certify", skip_certificate)
    path = MODELS / "network_in_network.onnx"
    report = pwopt.optimize(path, tmp_path / "out.onnx", cost="analytic").report
    assert report.equivalence.passed
    assert "planted" not in {r.pass_name for r in report.rewrites}
    assert "fold-chains" in {r.pass_name for r in report.rewrites}
    left = [s for s in report.skips if s.pass_name == "planted"]
    assert left
    assert all(s.reason.startswith("left out (output ") for s in left)
    assert any(note.startswith("Left out: planted at ") and "please report it" in note for note in report.notes)


def test_a_wrong_result_of_unknown_cause_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(pass_list, "PASSES", (Planted,))
    monkeypatch.setattr(preparation, "certify", skip_certificate)
    monkeypatch.setattr(attempt, "localise", lambda *_: None)
    monkeypatch.setattr(attempt, "leave_out_faulty", lambda compilation, *_: compilation)
    with pytest.raises(NotEquivalentError, match="nothing was written") as caught:
        pwopt.optimize(MODELS / "network_in_network.onnx", tmp_path / "out.onnx", cost="analytic")
    assert not caught.value.report.equivalence.passed
    assert list(tmp_path.iterdir()) == []


def test_bisection_finds_wrong_rewrites_that_no_tensor_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refusing the whole model is the last resort."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(pass_list, "PASSES", (Planted,))
    monkeypatch.setattr(preparation, "certify", skip_certificate)
    monkeypatch.setattr(attempt, "localise", lambda *_: None)
    report = pwopt.optimize(MODELS / "network_in_network.onnx", cost="analytic").report
    assert report.rewrites == ()
    assert {s.pass_name for s in report.skips} == {"planted"}
    assert any("deviates by" in note for note in report.notes)


def test_a_wrong_rewrite_is_dropped_by_its_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(pass_list, "PASSES", (Planted,))
    path = MODELS / "network_in_network.onnx"
    report = pwopt.optimize(path, tmp_path / "out.onnx", cost="analytic").report
    assert report.rewrites == ()
    assert "refused by its certificate" in report.skips[-1].reason
    assert "please report" in " ".join(report.notes)
    monkeypatch.setattr(Planted, "__module__", "elsewhere")
    assert "the fault of planted." in " ".join(pwopt.optimize(path, cost="analytic").report.notes)
    assert onnx.load(tmp_path / "out.onnx") == onnx.load(path)


def test_a_slower_result_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    slow = planted_race(np.full(50, 1.0), np.full(50, 2.0))
    plant(monkeypatch, lambda *_, **__: slow)
    result = pwopt.optimize(MODELS / "linear_sequence.onnx", tmp_path / "out.onnx", shapes={"x": (1, 64, 4, 4)})
    assert "measured slower (0.500× [0.500, 0.500]): the original is returned" in result.report.notes[-2]
    assert result.report.rewrites == ()
    assert "measured slower in the whole model" in result.report.skips[-1].reason
    assert result.report.after == result.report.before
    assert (tmp_path / "out.onnx").read_bytes() == onnx.load(MODELS / "linear_sequence.onnx").SerializeToString(
        deterministic=True
    )


CHAIN = parse(
    "(float[1,8,64,64] x) => (float[N] y) { a = Conv(x, w) r = Relu(a) b = Conv(r, v) c = Conv(b, u) m = Mul(c, one) y = Abs(m) }",
    w=normal(8, 8, 1, 1).astype(F), v=normal(8, 8, 1, 1, seed=1).astype(F), u=normal(8, 8, 1, 1, seed=2).astype(F),
    one=np.ones((), F),
)  # fmt: skip


FOLDED = {"Conv": 2, "Relu": 1, "Abs": 1}
ASKED = "threads were asked for, but this process may use"


@pytest.mark.parametrize(
    ("speedups", "note", "left"),
    [
        ([2.0], "", FOLDED),
        ([1.03], "Slightly faster (1.030× [1.030, 1.030]). It has 2 operators fewer. Multiply-adds fell by 33.3%", FOLDED),
        ([1.0], "Same speed (1.000× [1.000, 1.000]). It has 2 operators fewer. Multiply-adds fell by 33.3%", FOLDED),
        ([0.992], "Same speed (0.992× [0.992, 0.992])", FOLDED),
        # slower; faster without fold-chains, which is then no slower than the original; and the race of what is left
        ([0.5, 2.0, 1.0, 1.0], "Left out: fold-chains at 1 place, slower with 1 thread", {"Conv": 3, "Relu": 1, "Abs": 1}),
        # slower, and no faster without either kind
        ([0.5, 0.9, 0.9], "measured slower (0.500× [0.500, 0.500]): the original is returned", ops(CHAIN)),
    ],
)  # fmt: skip
def test_what_is_slower_is_taken_back_and_what_is_as_fast_stays(
    speedups: list[float], note: str, left: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    races = iter([planted_race(np.full(50, s), np.full(50, 1.0)) for s in speedups])
    plant(monkeypatch, lambda *_, **__: next(races))
    result = pwopt.optimize(CHAIN, measuring=pwopt.Measuring(budget=0.0), threads=1)
    assert ops(result.model) == left
    assert note in " ".join(result.report.notes)
    assert next(races, None) is None
    sites = {str(r.site) for r in result.report.rewrites}
    assert ("fold-chains:c" in sites, "clean-up:m" in sites) == (left["Conv"] == 2, "Mul" not in left)
    undone = {str(s.site) for s in result.report.skips if "slower" in s.reason}
    assert undone.isdisjoint(sites)
    assert len(undone) + len(sites) == 2
    assert result.report.after.nodes == sum(left.values())


@pytest.mark.parametrize("own", [1.0, 0.3])
def test_an_undecided_race_keeps_what_needs_no_measurement(own: float, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    spread = np.exp(np.array([-0.1, 0.12, 0.01, -0.05]))
    plant(monkeypatch, lambda *_, **__: planted_race(spread, np.ones(4), own=own))
    result = pwopt.optimize(CHAIN, measuring=pwopt.Measuring(budget=0.0), threads=1)
    assert ops(result.model) == FOLDED
    said = " ".join(result.report.notes)
    assert said.count("Whether it is faster is not clear (99 % interval ") == 1
    assert "unclear" not in said
    assert ("the models had the processor for 30% of the time of their race" in said) == (own < 1)


@pytest.mark.parametrize(("cores", "notes"), [(16, []), (8, [f"16 {ASKED} 8 cores."]), (1, [f"16 {ASKED} 1 core."])])
def test_more_threads_than_cores_are_noted(cores: int, notes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    report = pwopt.optimize(CHAIN, cost="analytic", threads=(1, 16)).report
    assert [n for n in report.notes if "threads" in n] == notes
    assert all(n in render_document(report, "html") for n in notes)
    unused = pwopt.optimize(CHAIN, cost="analytic", threads=16, verify=False).report
    assert ASKED not in " ".join(unused.notes)


def test_measured_rewrites_must_be_faster_in_the_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A measured rewrite that won its own race goes if the model is no faster than the original with it."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(Detour, "policy", "measured")
    monkeypatch.setattr(pass_list, "PASSES", (*pass_list.PASSES, Detour))
    whole = iter([1.0, 1.0])

    def race(self: object, models: list[Path], *_: object, **__: object) -> Race:
        final = len(models) == 3
        speedup = next(whole) if final else 2.0
        return planted_race(np.full(20, speedup), *(np.full(20, 1.0) for _ in models[1:]))

    plant(monkeypatch, race)
    started = []
    monkeypatch.setattr(attempt.Pair, "profile", lambda pair, report, *_: started.append(pair.candidate) or report)
    result = pwopt.optimize(CHAIN, threads=1, cache=False)
    assert len(started) == 1  # the first result is not profiled, since it is not returned
    assert ops(result.model) == FOLDED
    (dropped,) = (s for s in result.report.skips if s.pass_name == "detour")
    assert dropped.reason.startswith("measured no faster beyond doubt in the whole model (1.000× [1.000, 1.000])")
    assert "detour the model was measured no faster beyond doubt" in " ".join(result.report.notes)
    assert next(whole, None) is None


@pytest.mark.parametrize("retry", [True, False])
def test_measured_rewrites_must_be_faster_than_a_copy(retry: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the original as fast as the result means that the clock saw nothing, also if the budget is spent."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(Detour, "policy", "measured")
    monkeypatch.setattr(pass_list, "PASSES", (*pass_list.PASSES, Detour))
    monkeypatch.setattr(Budget, "allows_retry", retry)
    finals = []

    def race(self: object, models: list[Path], *_: object, **__: object) -> Race:
        if len(models) < 3:
            return planted_race(np.full(20, 2.0), np.full(20, 1.0))
        finals.append(models)
        return planted_race(np.full(20, 1.2), np.full(20, 1.0), np.full(20, 0.99))

    plant(monkeypatch, race)
    result = pwopt.optimize(CHAIN, threads=1, cache=False)
    assert ops(result.model) == FOLDED
    assert "detour" not in {r.pass_name for r in result.report.rewrites}
    assert "(1.200× [1.200, 1.200]; a copy of the original 1.212×)" in " ".join(result.report.notes)
    assert len(finals) == (3 if retry else 2)  # the first one left it open
    assert (result.report.latency is None) is not retry


@pytest.mark.parametrize("large", [True, False])
def test_memory_is_measured_before_the_race(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is measured while the outputs are compared; of a large model, afterwards."""
    pytest.importorskip("onnxruntime")
    begun, race, compare = list[str](), Environment.race, attempt.Pair.compare
    measure = attempt.Pair.measure_memory

    def record(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def recording(*arguments: Any, **options: Any) -> Any:
            done = function(*arguments, **options)
            begun.append(name)
            return done

        return recording

    monkeypatch.setattr(Environment, "race", record("race", race))
    monkeypatch.setattr(attempt.Pair, "compare", record("compare", compare))
    monkeypatch.setattr(attempt.Pair, "measure_memory", record("memory", measure))
    monkeypatch.setattr(attempt.memory, "LARGE_MODEL", 0 if large else 1 << 60)
    report = pwopt.optimize(
        CHAIN, threads=1, cache=False, measuring=pwopt.Measuring(budget=0.0, race_seconds=0.01)
    ).report
    assert report.latency is not None
    assert report.latency.start is not None
    assert report.latency.start.memory_mb is not None
    assert begun.index("race") == 2
    assert sorted(begun[:2]) == ["compare", "memory"]
    assert not large or begun[0] == "compare"


@pytest.mark.parametrize("error", [UsageError("it does not run there"), FileNotFoundError("no python")])
def test_memory_that_cannot_be_measured_ends_nothing(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")

    def fail(*_: object) -> dict[str, float]:
        raise error

    monkeypatch.setattr(attempt, "measure_cold_starts", fail)
    report = pwopt.optimize(CHAIN, threads=1, cache=False, measuring=pwopt.Measuring(budget=1.0)).report
    assert report.latency is not None
    assert report.latency.start is not None
    assert report.latency.start.memory_mb is None


def test_what_is_shown_of_a_candidate_that_is_not_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    slow = planted_race(np.full(50, 1.0), np.full(50, 2.0))
    plant(monkeypatch, lambda *_, **__: slow)
    report = pwopt.optimize(CHAIN, measuring=pwopt.Measuring(budget=0.0)).report
    assert report.latency is not None
    assert (report.latency.after_ms, report.latency.speedup, report.latency.interval) == (1e3, 1.0, (1.0, 1.0))
    assert report.operators is None
    tried = report.candidate
    assert tried is not None
    assert tried.cost.nodes < report.after.nodes == report.before.nodes
    assert (tried.latency.after_ms, tried.latency.speedup) == (2e3, 0.5)
    assert set(tried.operators or {}) == {"before", "after"}
    console = Console(width=200, record=True, file=io.StringIO())
    render(report, console)
    shown = console.export_text()
    assert "latency (cpu, 1 thread)" in shown
    assert re.search(r"latency \(cpu, 1 thread\) +1000.00 ms +1000.00 ms +1.00× *\n", shown)
    assert re.search(r"latency, candidate \(not returned\) +1000.00 ms +2000.00 ms +0.50×", shown)
    assert re.search(r"multiply-adds, candidate \(not returned\) +786,432 +524,288 +-33.3%", shown)
    assert re.search(r"multiply-adds +786,432 +786,432 +\+0.0%", shown)
    for kind in ("html", "markdown"):
        text = render_document(report, kind)
        assert "1.00×" in text
        assert "as fast, because the original is returned" in text
        assert "0.50× [0.50, 0.50]" in text or kind == "markdown"
        assert "candidate (not returned)" in text or "candidate \\(not returned\\)" in text


def test_ratio_and_medians_that_point_opposite_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs side by side: 10 ms against 11, 20 against 21, 31 against 30; the medians of each say 20 and 21."""
    pytest.importorskip("onnxruntime")
    times = np.tile(np.array([[10, 20, 31, 40, 50, 12, 14], [9, 21, 30, 39, 49, 11, 13]]) * 1e-3, 3)
    race = planted_race(times[0], times[1])
    assert race.median(0) < race.median(1)
    assert race.speedup() > 1
    plant(monkeypatch, lambda *_, **__: race)
    notes = " ".join(pwopt.optimize(CHAIN, passes=["fold-chains"]).report.notes)
    assert f"The medians (20 → 21 ms) and the ratio ({race.speedup():.3f}×) point opposite ways" in notes
    blank = Row("a.onnx", {}, 20.0, 1.0, 1.0, (1.01, 1.05), 1.0, 1.0, 1.0, None, {}, 0.0, 0)
    console = Console(width=200, record=True, file=io.StringIO())
    render_benchmark([blank, replace(blank, model="b.onnx", median_ms=21.0, ratio=1.033)], console)
    assert "b.onnx: The medians (20 → 21 ms) and the ratio (1.033×) point opposite ways" in console.export_text()
    alike = planted_race(times[0], times[0] * 0.9)
    plant(monkeypatch, lambda *_, **__: alike)
    assert "opposite" not in " ".join(pwopt.optimize(CHAIN, passes=["fold-chains"]).report.notes)


def test_a_profile_that_does_not_go_with_the_latency_is_explained() -> None:
    latency = Latency(38.0, 35.0, 38 / 35, (1.05, 1.1), 37.0, 34.0, 50)
    apart = {"before": {"Conv": 61.0, "Relu": 1.0}, "after": {"Conv": 30.0}}
    (note,) = notes.explain_profile(latency, apart)
    assert note.startswith("The operators' times add up to 62 → 30 ms, and runs take 38 → 35 ms. ")
    assert not list(notes.explain_profile(latency, {"before": {"Conv": 36.0}, "after": {"Conv": 33.0, "Relu": 0.5}}))
    assert list(
        notes.explain_profile(latency, {"before": {"Conv": 50.0}, "after": {"Conv": 46.0}})
    )  # the runs take less
    assert not list(notes.explain_profile(latency, None))


def test_multiply_adds_that_become_known_are_no_rise() -> None:
    before, after = Cost(3, 10, 100, 1), Cost(2, 10, 300, 0)
    assert before.change(after) is None
    assert before.change(Cost(2, 10, 50, 1)) == -0.5
    assert Cost(1, 1, 0, 0).change(Cost(1, 1, 0, 0)) is None
    report = Report("m", None, "cpu", {"threads": 1, "onnxruntime": "1", "pwopt": "0"}, {}, before=before, after=after)
    console = Console(width=200, record=True, file=io.StringIO())
    render(report, console)
    assert re.search(r"multiply-adds +100 +300 *\n", console.export_text())
    assert "200.0%" not in render_document(report, "html") + render_document(report, "markdown")
    noted = " ".join(notes.describe_unknown_sizes(report, unseen=False))
    assert "leave out 1 operator whose sizes are not known, whatever the inputs' sizes" in noted
    assert "In the result they leave out 0 operators, so the two counts are not of the same work." in noted


def test_where_other_sizes_may_settle_what_is_unknown() -> None:
    """A product of what NonZero finds is of a size that no --shape tells."""
    model = parse(
        "(float[N,4] x) => (float[A,B] y) { i = NonZero(x) f = Cast<to=1>(i) t = Transpose<perm=[1,0]>(f) y = MatMul(t, w) }",
        w=normal(2, 3).astype(F),
    )
    notes = " ".join(pwopt.optimize(model, cost="analytic").report.notes)
    assert "Multiply-adds leave out 1 operator whose sizes are not known, whatever the inputs' sizes" in notes
    notes = " ".join(pwopt.optimize(model, cost="analytic", verify=False).report.notes)
    assert "--shape may settle them" in notes
    notes = " ".join(pwopt.optimize(model, cost="analytic", verify=False, shapes={"x": (2, 4)}).report.notes)
    assert "--shape" not in notes


def test_what_was_asked_for_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    slow = planted_race(np.full(50, 1.0), np.full(50, 2.0))
    plant(monkeypatch, lambda *_, **__: slow)
    result = pwopt.optimize(CHAIN, passes=["fold-chains"], threads=1)
    assert ops(result.model)["Conv"] == 2
    assert "Measured slower (0.50×), and kept since --passes was asked for." in result.report.notes


class Detour(Pass):
    """A slow rewrite that changes no answer: forty absolute values behind every Relu."""

    name = "detour"

    def match_and_rewrite(self, node: gs.Node, rw: Rewriter) -> Rewrite | None:
        if rw.op(node) != "Relu" or rw.is_a(rw.readers(node.outputs[0])[0], "Abs"):
            return None
        y = node.outputs[0]
        steps = [*(rw.new_variable(f"{y.name}_detour", y) for _ in range(40)), y]
        first = gs.Node("Relu", node.name, {}, list(node.inputs), [steps[0]])
        detour = [gs.Node("Abs", "", {}, [a], [b]) for a, b in itertools.pairwise(steps)]
        return rw.replace([node], [first, *detour], "a detour").with_signature("detour")


@pytest.mark.worker_processes
@pytest.mark.parametrize("policy", ["always", "measured"])
def test_a_slow_rewrite_is_raced_out(policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For real: forty passes over memory are slower than none, whatever the machine."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(Detour, "policy", policy)
    monkeypatch.setattr(pass_list, "PASSES", (*pass_list.PASSES, Detour))
    result = pwopt.optimize(CHAIN, tmp_path / "out.onnx", measuring=pwopt.Measuring(race_seconds=0.5), cache=False)
    assert ops(onnx.load(tmp_path / "out.onnx"))["Abs"] == 1
    (dropped,) = (s for s in result.report.skips if s.pass_name == "detour")
    assert "slower" in dropped.reason or "in the whole model" in dropped.reason
    assert not any(r.pass_name == "detour" for r in result.report.rewrites)


@pytest.mark.huge_pages
def test_measured(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    out = tmp_path / "out.onnx"
    result = pwopt.optimize(
        MODELS / "linear_sequence.onnx", out, shapes={"x": (1, 64, 8, 8)}, measuring=pwopt.Measuring(race_seconds=0.5)
    )
    assert ops(onnx.load(out)) == {"Conv": 1}
    assert onnx.load(out) == result.model
    report = result.report.to_dict()
    assert report["equivalence"]["passed"]
    assert set(report["latency"]) >= {"before_ms", "after_ms", "speedup"}
    assert report["cost"]["before"]["macs"] == 61440 * 64
    assert report["cost"]["after"]["macs"] == 2048 * 64
    (rewrite,) = report["rewrites"]
    assert set(rewrite) >= {"pass", "site", "removed", "added", "macs_before", "macs_after", "residual"}
    assert (rewrite["macs_before"], rewrite["macs_after"]) == (61440 * 64, 2048 * 64)
    assert 0 < rewrite["residual"] < 6e-8
    assert set(report["environment"]) >= {"onnxruntime", "onnx", "cpu", "threads"}


def test_analytic_needs_no_onnxruntime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    result = pwopt.optimize(MODELS / "linear_sequence.onnx", tmp_path / "out.onnx", cost="analytic")
    assert ops(result.model) == {"Conv": 1}
    assert result.report.equivalence is None
    assert "Not verified" in result.report.notes[0]
    assert "Nothing was timed: --cost analytic decides from shapes alone." in result.report.notes
    with pytest.raises(ProviderError, match=r"pip install onnxruntime, or"):
        pwopt.optimize(MODELS / "linear_sequence.onnx")


def test_a_model_in_memory_and_dynamic_shapes_survive() -> None:
    pytest.importorskip("onnxruntime")
    model = onnx.load(MODELS / "hyperspectral.onnx")
    before = model.SerializeToString(deterministic=True)
    result = pwopt.optimize(model, cost="analytic", shapes={"cube": (1, 200, 4, 4)})
    assert model.SerializeToString(deterministic=True) == before
    assert result.model.graph.input == model.graph.input
    assert result.model.graph.output == model.graph.output
    assert result.report.equivalence is not None
    assert result.report.equivalence.passed


def test_static_fixes_the_inputs(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    result = pwopt.optimize(
        MODELS / "linear_sequence.onnx",
        tmp_path / "out.onnx",
        cost="analytic",
        static=True,
        shapes={"x": (2, 64, 3, 5)},
    )
    assert [d.dim_value for d in result.model.graph.input[0].type.tensor_type.shape.dim] == [2, 64, 3, 5]
    assert [d.dim_value for d in result.model.graph.output[0].type.tensor_type.shape.dim] == [2, 32, 3, 5]


def test_opset_conversion_keeps_names_and_documentation(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    body = """(float[N,4,H,W] x) => (float[N] y, float[N] z) {
        h = Conv(x, w) a = Add(h, t) c = Clip(a, l, u) m = Mul(h, c) y = Div(m, u) z = Softmax<axis=1>(y)
    }"""
    model = parse(body, 12, w=normal(4, 4, 1, 1, dtype=F), t=F(3), l=F(0), u=F(6))
    for node in model.graph.node:
        node.name, node.doc_string = f"n_{node.output[0]}", "doc"
        node.metadata_props.add(key="k", value="v")
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    result = pwopt.optimize(path, tmp_path / "out.onnx", cost="analytic", opset=14, shapes={"x": (1, 4, 5, 5)})
    assert result.model.opset_import[0].version == 14
    assert "HardSwish" in ops(result.model)
    conv = result.model.graph.node[0]
    assert (conv.name, conv.doc_string, conv.metadata_props[0].value) == ("n_h", "doc", "v")
    with pytest.raises(UsageError, match="converts upwards only"):
        pwopt.optimize(path, opset=7)


def test_unknown_names_are_usage_errors() -> None:
    for arguments, word in (({"passes": ["fold-everything"]}, "no pass"), ({"cost": "free"}, "not one of")):
        with pytest.raises(UsageError, match=word):
            pwopt.optimize(MODELS / "linear_sequence.onnx", **arguments)  # type: ignore[arg-type]


def test_passes_can_be_chosen() -> None:
    result = pwopt.optimize(MODELS / "network_in_network.onnx", passes=["fold-affine"], cost="analytic", verify=False)
    assert {r.pass_name for r in result.report.rewrites} == {"fold-affine"}


def test_external_data_is_verified_and_written(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    path = tmp_path / "big.onnx"
    onnx.save(
        onnx.load(MODELS / "linear_sequence.onnx"),
        path,
        save_as_external_data=True,
        location="big.bin",
        size_threshold=0,
    )
    result = pwopt.optimize(path, tmp_path / "out.onnx", cost="analytic", shapes={"x": (1, 64, 4, 4)})
    assert result.report.equivalence is not None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["big.bin", "big.onnx", "out.onnx", "out.onnx.data"]
    assert weight(onnx.load(tmp_path / "out.onnx"), "conv4.weight").shape == (32, 64, 1, 1)


def test_sizes_follow_through_shape_arithmetic() -> None:
    """Paddle writes Shape → Cast → Slice → Cast → Concat → Reshape; costs still need the sizes behind it."""
    body = """(float[N,4,H] x) => (float[N] y) {
        s = Shape(x) a = Cast<to=6>(s) n = Slice(a, i, j, k) b = Cast<to=7>(n) r = Concat<axis=0>(b, m) h = Reshape(x, r)
        y = MatMul(h, w)
    }"""
    model = parse(body, i=np.array([0]), j=np.array([1]), k=np.array([0]), m=np.array([-1, 4]), w=normal(4, 8, dtype=F))
    before = candidate_base.run_passes(load(model), [], (), {"x": (2, 4, 6)}).before
    assert before.unknown == 0
    assert before.macs == 2 * 6 * 4 * 8
    assert evaluate(model, x=normal(2, 4, 6, dtype=F))[0].shape == (2, 6, 8)


def test_runtime_environment_names_the_machine() -> None:
    found = installation.describe_machine()
    assert found["cpu"]
    assert found["pwopt"] == pwopt.__version__


def test_the_input_is_not_overwritten_unless_forced(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes((MODELS / "linear_sequence.onnx").read_bytes())
    with pytest.raises(UsageError, match="is the input"):
        pwopt.optimize(path, path, verify=False)
    pwopt.optimize(path, path, verify=False, writing=pwopt.Writing(force=True))
    assert ops(onnx.load(path)) == {"Conv": 1}


def test_one_name_is_a_list_of_one() -> None:
    path = MODELS / "linear_sequence.onnx"
    assert pwopt.optimize(path, verify=False, deny="fold-chains:y").report.rewrites[0].site == Site("fold-chains", "h3")
    assert not pwopt.optimize(path, verify=False, passes="clean-up").report.rewrites


def test_a_gain_in_doubt_is_raced_again_before_it_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """One disturbed pair of three makes the interval of the final race wide."""
    pytest.importorskip("onnxruntime")
    clear, wide = (planted_race(np.array([2.0, 2.0, t] * n), np.ones(3 * n)) for t, n in ((2.0, 9), (0.5, 1)))
    finals: list[float] = []

    def race(_: object, models: list[Path], *given: Any, **__: object) -> Race:
        if len(models) < 3:
            return clear
        finals.append(given[-1].precise)
        found = wide if len(finals) == 1 else clear
        return Race(tuple(SessionPair((*p.times, p.times[0])) for p in found.pairs), 1.0)

    plant(monkeypatch, race)
    body = "(float[1,8,16,16] x) => (float[N] y, float[N] z) { y = Conv(x, w) z = Conv(x, v) }"
    model = parse(body, w=normal(4, 8, 1, 1).astype(F), v=normal(4, 8, 1, 1, seed=1).astype(F))
    report = pwopt.optimize(model, cache=False, threads=1, measuring=pwopt.Measuring(budget=600.0)).report
    assert [r.pass_name for r in report.rewrites] == ["merge-siblings"]
    assert finals == [0.005, 0.005]
    assert report.latency is not None
    assert report.latency.pairs == 30


def test_a_result_whose_race_says_little_is_raced_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if none of its rewrites needs a measurement."""
    pytest.importorskip("onnxruntime")
    finals: list[float] = []

    def race(_: object, models: list[Path], *given: Any, **__: object) -> Race:
        if len(models) == 3:
            finals.append(given[-1].precise)
        found = planted_race(np.array([1.0, 1.0, 0.5 if len(finals) == 1 else 1.0] * 3), np.ones(9))
        return Race(tuple(SessionPair((*p.times, p.times[0])[: len(models)]) for p in found.pairs), 1.0)

    plant(monkeypatch, race)
    report = pwopt.optimize(MODELS / "linear_sequence.onnx", cache=False, threads=1, shapes={"x": (1, 64, 8, 8)}).report
    assert finals == [0.005, 0.1]  # only a narrower interval is wanted
    assert report.latency is not None
    assert report.latency.pairs == 18


def test_numpy_uses_one_thread_while_a_model_is_optimised() -> None:
    """Threads that wait for each other take most of the processor's time of small products."""

    seen: list[int] = []

    def watch(stage: str, done: float) -> None:
        if stage != "reading":
            seen.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")

    with threadpool_limits(limits=2, user_api="blas"):
        pwopt.optimize(MODELS / "linear_sequence.onnx", cost="analytic", verify=False, progress=watch)
        assert set(seen) == {1}
        assert {p["num_threads"] for p in threadpool_info() if p["user_api"] == "blas"} == {2}
