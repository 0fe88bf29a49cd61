"""Time by layer: which operators belong together, and that no time is lost or counted twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import normal, parse, plant, planted_race

import pwopt
from pwopt.maps.cost import Cost
from pwopt.optimizing.layer_times import compare_layers
from pwopt.reporting import notes
from pwopt.reporting.report import LAYOUT_CHANGES, Latency, Layer, RejectedCandidate, Report
from pwopt.rewriting import Rewrite
from pwopt.rewriting.records import Site, Skip
from pwopt.running.session import NodeTime
from pwopt.selecting.profile_alignment import find_kernels, save_marked, sum_by_node

BODY = """(float[1,4,6,6] x) => (float[N] y) {
    a = Conv(x, w) b = BatchNormalization(a, s, t, t, v) r = Relu(b) c = Conv(r, u) q = Mul(c, k) y = Add(q, r)
}"""
WEIGHTS = {
    "w": normal(4, 4, 1, 1), "u": normal(4, 4, 1, 1, seed=1), "k": np.array(2.0), "s": np.ones(4), "t": np.zeros(4),
    "v": np.ones(4),
}  # fmt: skip


def model() -> onnx.ModelProto:
    return parse(BODY, **{name: value.astype(np.float32) for name, value in WEIGHTS.items()})


def test_names_in_a_profile_tell_nodes() -> None:
    profile = [
        NodeTime("Conv", "b_nchwc", 1e-3), NodeTime("Mul", "@4@", 2e-3), NodeTime("Gelu", "@4@/Fusion/", 1e-3),
        NodeTime("ReorderInput", "ReorderInput", 5e-4),
    ]  # fmt: skip
    assert sum_by_node(model(), profile) == ({1: 1.0, 4: 3.0}, 0.5)


def test_what_is_fused_belongs_to_what_it_ran_in() -> None:
    # The convolution folded into its normalisation, the activation into what it ends, though another reads it as well.
    assert find_kernels(model(), {1: 1.0, 3: 1.0, 5: 1.0}) == [1, 1, 1, 3, 5, 5]
    assert find_kernels(model(), dict.fromkeys(range(6), 1.0)) == list(range(6))
    assert find_kernels(model(), {}) == [2, 2, 2, 5, 5, 5]  # nothing is known: up to what begins a kernel


def test_what_became_of_an_operator_stands_beside_it() -> None:
    before = model()
    after = parse("(float[1,4,6,6] x) => (float[N] y) { b = Conv(x, w) r = Relu(b) g = Conv(r, u) n = Neg(g) y = Add(n, r) }",
                  w=WEIGHTS["w"].astype(np.float32), u=WEIGHTS["u"].astype(np.float32))  # fmt: skip
    rewrites = [Rewrite("", became=(("a", "b"), ("b", "b"))), Rewrite("", became=(("c", "z"), ("q", "n"), ("z", "n")))]
    every = [[NodeTime(n.op_type, f"@{i}@", 1e-3) for i, n in enumerate(m.graph.node)] for m in (before, after)]
    every[0].append(NodeTime("ReorderInput", "ReorderInput", 1e-3))
    found = compare_layers(before, after, rewrites, (every[0], every[1]))
    assert [(x.before, x.after, round(x.before_ms), round(x.after_ms)) for x in found] == [
        (("Conv a", "BatchNormalization b"), ("Conv b",), 2, 1),
        ((LAYOUT_CHANGES,), (), 1, 0),
        (("Relu r",), ("Relu r",), 1, 1),
        (("Conv c", "Mul q"), ("Conv g", "Neg n"), 2, 2),
        (("Add y",), ("Add y",), 1, 1),
    ]


def test_marked_copies_share_external_data(tmp_path: Path) -> None:
    given, folder = tmp_path / "given", tmp_path / "folder"
    given.mkdir()
    folder.mkdir()
    onnx.save(model(), given / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    source = pwopt.load(given / "m.onnx")
    copy = save_marked(source.proto, folder / "marked.onnx", source)
    assert save_marked(source.proto, folder / "other.onnx", source) != copy
    assert len(list(folder.glob("*.shared"))) == 1  # both refer to one copy
    written = onnx.load(copy)
    assert [n.name for n in written.graph.node][:2] == ["@0@", "@1@"]
    assert list(written.graph.initializer) == list(onnx.load(given / "m.onnx").graph.initializer)


def test_every_operator_is_in_one_layer_and_no_time_is_lost() -> None:
    pytest.importorskip("onnxruntime")
    report = pwopt.optimize(model(), passes=["fold-affine"], measuring=pwopt.Measuring(race_seconds=0.1)).report
    assert report.layers is not None
    assert report.operators is not None
    listed = [o for x in report.layers for o in x.before if o != LAYOUT_CHANGES]
    assert sorted(listed) == sorted(f"{n.op_type} {n.output[0]}" for n in model().graph.node)
    for side, key in (("before", "before_ms"), ("after", "after_ms")):
        total = sum(getattr(x, key) for x in report.layers)
        assert total == pytest.approx(sum(report.operators[side].values()))
    assert report.to_dict()["layers"][0].keys() == Layer((), (), 0.0, 0.0).__dict__.keys()


def test_layers_are_profiled_for_a_report_only() -> None:
    pytest.importorskip("onnxruntime")
    measuring = pwopt.Measuring(race_seconds=0.1, layers=False)
    report = pwopt.optimize(model(), passes=["fold-affine"], measuring=measuring).report
    assert report.latency is not None
    assert (report.layers, report.operators) == (None, None)


TIMES = {"Conv": 6.0, "Gemm": 2.0, "Resize": 2.0}
SLOW = Latency(10.0, 10.0, 0.9, (0.85, 0.95), 10.0, 10.0, 9)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ["80% of the time goes into 2 convolutions, at 50 G multiply-adds/s; nothing in front of or behind them could be folded."]),
        (
            {"skips": (Skip("it is an output", Site("a", "b")),)},
            ["80% of the time goes into 2 convolutions, at 50 G multiply-adds/s; 1 place could not be rewritten, each for a reason given."],
        ),
        ({"before": Cost(6, 9, 4 * 10**8, 1)}, ["80% of the time goes into 2 convolutions; nothing in front of or behind them could be folded."]),
        ({"operators": {"before": {"Resize": 7.0, "Conv": 3.0}, "after": {}}}, ["The time goes into Resize (70%), Conv (30%); nothing in front of or behind them could be folded."]),
        ({"operators": {"before": {"Relu": 7.0}, "after": {}}}, ["The time goes into Relu (100%); nothing in front of or behind it could be folded."]),
        (
            {"operators": None, "candidate": RejectedCandidate(Cost(1, 1, 1, 0), SLOW, operators={"before": TIMES, "after": {}})},
            ["80% of the time goes into 2 convolutions, at 50 G multiply-adds/s."],
        ),
        ({"rewrites": (Rewrite(""),), "latency": SLOW}, ["80% of the time goes into 2 convolutions, at 50 G multiply-adds/s."]),
        ({"rewrites": (Rewrite(""),), "latency": replace(SLOW, interval=(1.5, 1.6))}, []),
        ({"operators": None}, []),
    ],
)  # fmt: skip
def test_a_model_that_gains_nothing_says_what_it_spends_its_time_on(changes: dict[str, Any], said: list[str]) -> None:
    report = Report(
        "m", None, "cpu", {}, {}, before=Cost(6, 9, 4 * 10**8, 0), operators={"before": TIMES, "after": TIMES}
    )
    assert list(notes.explain_time(replace(report, **changes), model())) == said


def test_the_time_of_a_model_without_rewrites_is_measured() -> None:
    pytest.importorskip("onnxruntime")
    plain = parse("(float[1,4,6,6] x) => (float[N] y) { y = Conv(x, w) }", w=WEIGHTS["w"].astype(np.float32))
    report = pwopt.optimize(plain, cache=False).report
    assert not report.rewrites
    assert report.latency is None
    assert report.operators is not None
    assert "Conv" in report.operators["before"]
    assert "goes into" in " ".join(report.notes)
    assert pwopt.optimize(plain, cost="analytic").report.operators is None


def test_an_original_that_is_returned_is_profiled_without_a_report_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    slow = planted_race(*(np.full(20, s) for s in (1.0, 2.0, 1.0)))
    plant(monkeypatch, lambda *_, **__: slow)
    measuring = pwopt.Measuring(budget=0.0, layers=False)
    report = pwopt.optimize(model(), cache=False, threads=1, measuring=measuring).report
    assert report.candidate is not None
    assert report.candidate.operators is None
    assert "ime goes into " in report.notes[-1]
