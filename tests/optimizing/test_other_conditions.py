"""Several sizes and numbers of threads: the first is optimised for, under none of the others is the result slower."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import normal, ops, parse, plant, planted_race

import pwopt
from pwopt.errors import UsageError
from pwopt.inputs.samples import Sample, SampleLabel
from pwopt.optimizing import other_conditions
from pwopt.optimizing.request import Request
from pwopt.reporting.document import render_document
from pwopt.running import huge_pages
from pwopt.running.noninferiority import Spread
from pwopt.running.progress import ignore_progress
from pwopt.running.providers import DEFAULT
from pwopt.running.timing import Race
from pwopt.selecting.environment import Environment

F = np.float32
#: Its chain is folded where that is cheaper, its factor of one always goes.
CHAIN = parse(
    "(float[N,8,H,W] x) => (float[N,8,H,W] y) { a = Conv(x, w) r = Relu(a) b = Conv(r, v) c = Conv(b, u) m = Mul(c, one) y = Abs(m) }",
    w=normal(8, 8, 1, 1, dtype=F), v=normal(8, 8, 1, 1, seed=1, dtype=F), u=normal(8, 8, 1, 1, seed=2, dtype=F),
    one=np.ones((), F),
)  # fmt: skip
SMALL, LARGE = {"x": (1, 8, 16, 16)}, {"x": (1, 8, 64, 64)}
#: Convolutions and products of a model → how long it takes, of a session and its feeds.
Speed = Callable[[dict[str, int], int, int], float]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Speed], None]:
    """Let races say what a function of (operators, threads, width of the input) says."""
    pytest.importorskip("onnxruntime")

    def install(speed: Speed) -> None:
        def race(arena: Environment, models: list[Path], *_: Any, **__: Any) -> Race:
            width = arena.samples[0].feeds["x"].shape[-1]
            return planted_race(*(np.full(20, speed(ops(onnx.load(m)), arena.threads, width)) for m in models))

        plant(monkeypatch, race)
        monkeypatch.setattr(other_conditions, "usual_threads", lambda: 4)

    return install


def folded(counted: dict[str, int]) -> bool:
    return counted["Conv"] == 2


def faster_but(where: Callable[[int, int], bool]) -> Speed:
    """Folding pays, but where a condition says it does not; without the product everything is faster."""

    def speed(counted: dict[str, int], threads: int, width: int) -> float:
        time = 8.0 + counted["Mul"]
        return time * (1.5 if where(threads, width) else 0.5) if folded(counted) else time

    return speed


@pytest.mark.parametrize(
    ("where", "label"),
    [
        (lambda threads, width: width > 32, "1 thread, x 1×8×64×64"),
        (lambda threads, width: threads > 1, "4 threads, x 1×8×16×16"),
    ],
)
def test_what_is_slower_elsewhere_is_not_done(
    where: Callable[[int, int], bool], label: str, clock: Callable[[Speed], None]
) -> None:
    clock(faster_but(where))
    done = pwopt.optimize(
        CHAIN, shapes=[SMALL, LARGE], threads=(1, 4), measuring=pwopt.Measuring(budget=0.0, race_seconds=0.1)
    )
    assert ops(done.model) == {"Conv": 3, "Relu": 1, "Abs": 1}
    assert {r.pass_name for r in done.report.rewrites} == {"clean-up"}
    (left,) = (s for s in done.report.skips if s.pass_name == "fold-chains" and s.reason.startswith("left out"))
    assert left.reason.startswith(f"left out (slower with {label}: 0.")
    assert f"Left out: fold-chains at 1 place, slower with {label}" in " ".join(done.report.notes)
    assert len(done.report.conditions) == 3
    assert not any(c.slower for c in done.report.conditions)
    assert done.report.latency.speedup > 1
    assert [c.latency.speedup > 1 for c in done.report.conditions] == [True] * 3


def test_one_kind_at_fault_under_several_conditions_is_left_out_once(clock: Callable[[Speed], None]) -> None:
    """What else was rewritten stays, since the result without that kind is slower nowhere."""

    def speed(counted: dict[str, int], threads: int, width: int) -> float:
        time = 8.0 if not counted["Mul"] else 7.95  # hardly slower without the product
        return time * (0.5 if (threads, width) == (1, 16) else 1.5) if folded(counted) else time

    clock(speed)
    done = pwopt.optimize(
        CHAIN, shapes=[SMALL, LARGE], threads=(1, 4), measuring=pwopt.Measuring(budget=0.0, race_seconds=0.1)
    )
    assert {r.pass_name for r in done.report.rewrites} == {"clean-up"}
    assert len([s for s in done.report.skips if s.reason.startswith("left out")]) == 1


def test_what_is_faster_everywhere_stays(clock: Callable[[Speed], None]) -> None:
    clock(faster_but(lambda threads, width: False))
    done = pwopt.optimize(CHAIN, shapes=[SMALL, LARGE], measuring=pwopt.Measuring(budget=0.0, race_seconds=0.1))
    assert ops(done.model) == {"Conv": 2, "Relu": 1, "Abs": 1}
    assert [(c.threads, c.shapes["x"][-1]) for c in done.report.conditions] == [(4, 16), (1, 64)]
    content = done.report.to_dict()["conditions"]
    assert [c["threads"] for c in content] == [4, 1]
    assert content[0]["latency"]["speedup"] == pytest.approx(9 / 4)


def test_the_original_is_returned_if_nothing_alone_is_at_fault(clock: Callable[[Speed], None]) -> None:
    def speed(counted: dict[str, int], threads: int, width: int) -> float:
        changed = folded(counted) or not counted["Mul"]
        return (2.0 if threads > 1 else 0.5) if changed else 1.0

    clock(speed)
    done = pwopt.optimize(CHAIN, shapes=SMALL, threads=(1, 4), measuring=pwopt.Measuring(budget=0.0, race_seconds=0.1))
    assert ops(done.model) == ops(CHAIN)
    assert done.report.notes[-2].startswith(
        "The rewritten model was measured slower with 4 threads, x 1×8×16×16 (0.500×"
    )


def test_what_was_asked_for_is_kept_though_slower_elsewhere(clock: Callable[[Speed], None]) -> None:
    clock(faster_but(lambda threads, width: threads > 1))
    done = pwopt.optimize(
        CHAIN, shapes=SMALL, threads=(1, 4), passes=["fold-chains"], measuring=pwopt.Measuring(race_seconds=0.1)
    )
    assert ops(done.model)["Conv"] == 2
    assert "Measured slower with 4 threads, x 1×8×16×16" in done.report.notes[-1]
    assert done.report.notes[-1].endswith("and kept since --passes was asked for.")


def test_what_a_request_names() -> None:
    assert Request().rounds == [] == Request(shapes={}).rounds
    assert Request(shapes=SMALL).rounds == [SMALL]
    assert Request(shapes=[SMALL, LARGE]).rounds == [SMALL, LARGE]
    assert (Request().thread_counts, Request().first_threads) == ((), 1)
    assert (Request(threads=3).thread_counts, Request(threads=3).first_threads) == ((3,), 3)
    assert (Request(threads=(2, 1)).thread_counts, Request(threads=(2, 1)).first_threads) == ((2, 1), 2)
    assert other_conditions.usual_threads() >= 1


def test_rounds_are_for_random_inputs() -> None:
    pytest.importorskip("onnxruntime")
    inputs = {"x": normal(1, 8, 4, 4, dtype=F)}
    with pytest.raises(UsageError, match="given inputs have their own sizes"):
        pwopt.optimize(CHAIN, inputs=inputs, shapes=[SMALL, LARGE])
    with pytest.raises(UsageError, match="0 threads cannot run anything"):
        pwopt.optimize(CHAIN, threads=(1, 0))


#: Seconds of the original and of the folded model, with pages of 4 KiB and with huge pages → operators of the result.
PAGES = {
    "loses without huge pages": ((10.0, 15.0), (9.0, 6.0), {"Conv": 3, "Relu": 1, "Abs": 1}),
    "pays with both": ((10.0, 8.0), (9.0, 6.0), {"Conv": 2, "Relu": 1, "Abs": 1}),
}


@pytest.mark.parametrize("case", PAGES)
def test_page_sizes_are_a_condition(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What pays with huge pages only, and loses with pages of 4 KiB, is left out; both figures are reported."""
    pytest.importorskip("onnxruntime")
    small, huge, expected = PAGES[case]

    def race(environment: Environment, models: list[Path], *_: Any, **__: Any) -> Race:
        times = small if environment.small_pages else huge
        counted = [ops(onnx.load(m)) for m in models]
        return planted_race(*(np.full(20, times[folded(c)] + 0.1 * c["Mul"]) for c in counted))

    plant(monkeypatch, race)
    monkeypatch.setattr(huge_pages, "system_mode", lambda: "madvise")
    monkeypatch.setattr(Environment, "huge_pages_mb", property(lambda _: 64.0))
    done = pwopt.optimize(
        CHAIN, shapes=SMALL, threads=1, measuring=pwopt.Measuring(budget=0.0, race_seconds=0.1), cache=False
    )
    assert ops(done.model) == expected
    report = done.report
    assert report.environment["huge_pages_mb"] == 64.0
    (condition,) = report.conditions
    assert condition.small_pages
    assert condition.label == "1 thread, x 1×8×16×16, pages of 4 KiB"
    assert report.huge_pages is not None
    assert report.huge_pages[0] == pytest.approx(10.1 / 9.1)
    if case == "loses without huge pages":
        assert "slower with 1 thread, x 1×8×16×16, pages of 4 KiB" in " ".join(report.notes)
        assert condition.latency.speedup == pytest.approx(10.1 / 10.0)
    else:
        assert report.latency is not None
        assert (report.latency.speedup, condition.latency.speedup) == pytest.approx((9.1 / 6.0, 10.1 / 8.0))
    text = render_document(report, "markdown")
    assert "latency, median, huge pages" in text
    assert "latency, 1 thread, x 1×8×16×16, pages of 4 KiB" in text
    assert "Huge pages instead of pages of 4 KiB: 1.11× as fast" in text


@pytest.mark.parametrize(("mode", "held"), [("always", 64.0), ("never", 0.0), ("", None), ("madvise", 0.0)])
def test_one_page_size_is_no_condition(mode: str, held: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs cannot choose, or the process that measures received no huge pages (older glibc)."""
    pytest.importorskip("onnxruntime")
    plant(monkeypatch, lambda _e, models, *_, **__: planted_race(*(np.full(9, 1.0) for _ in models)))
    monkeypatch.setattr(huge_pages, "system_mode", lambda: mode)
    monkeypatch.setattr(Environment, "huge_pages_mb", property(lambda _: held))
    report = pwopt.optimize(CHAIN, shapes=SMALL, threads=1, measuring=pwopt.Measuring(budget=0.0), cache=False).report
    assert (report.conditions, report.huge_pages, report.environment["huge_pages_mb"]) == ((), None, held)


def test_a_condition_is_slower_only_beyond_a_copy_of_the_original(tmp_path: Path) -> None:
    """A copy 1.1 times as fast in the final race means that 0.95 in another says nothing."""
    sample = Sample(SampleLabel("normal"), {"x": normal(1, 8, 4, 4, dtype=F)})

    @dataclasses.dataclass(frozen=True)
    class Planted(Environment):
        def race(self, *_: Any, **__: Any) -> Race:
            return planted_race(np.full(9, 0.95), np.full(9, 1.0))

    environment = Planted(DEFAULT, 1, [sample])
    for noise, slower in ((1.0, True), (1.1, False)):
        races = other_conditions.ConditionRaces(tmp_path, 1.0, ignore_progress, noise)
        found = races.run(tmp_path, environment)
        assert found is not None
        assert found[0].slower is slower


def test_the_gain_of_huge_pages_has_the_spread_of_both_races() -> None:
    missed = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        small, huge = (planted_race(np.exp(rng.normal(mean, 0.02, 8)), np.ones(8)) for mean in (0.1, 0.0))
        ratio, low, high = other_conditions.compare_page_sizes(small, huge)
        assert low < ratio < high
        assert 1.01 < high / low < 1.2
        missed += not low < np.exp(0.1) < high
    assert missed <= 6  # 2 in the mean, at 99 %
    alone = planted_race(np.ones(1), np.ones(1))
    assert other_conditions.compare_page_sizes(alone, huge)[1:] == (0.0, np.inf)


def test_what_seems_slower_is_raced_again_and_only_that_decides(tmp_path: Path) -> None:
    sample = Sample(SampleLabel("normal"), {"x": normal(1, 8, 4, 4, dtype=F)})
    races = [
        ([0.5] * 7, True, 0.5),
        ([0.5, 1.0, 1.0, 1.0], False, 1.0),  # six pairs do not seem slower: no more races
        ([0.5, 0.3, 0.5, 0.8, 1.8, 0.4, 0.8], False, (0.3 * 0.5 * 0.8 * 1.8 * 0.4 * 0.8) ** (1 / 6)),  # too different
        ([1.5], False, 1.5),
    ]

    @dataclasses.dataclass(frozen=True)
    class Planted(Environment):
        times: list[float] = dataclasses.field(default_factory=list)

        def race(self, *_: Any, **__: Any) -> Race:
            return planted_race(np.full(2, self.times.pop(0)), np.full(2, 1.0))

    spread = Spread(0.03, 10)  # two pairs may raise a suspicion, not settle it
    for times, slower, speedup in races:
        environment = Planted(DEFAULT, 1, [sample], times=list(times))
        found = other_conditions.ConditionRaces(tmp_path, 1.0, ignore_progress, spread=spread).run(
            tmp_path, environment
        )
        assert found is not None
        assert not environment.times
        assert found[0].slower is slower
        assert found[0].latency.speedup == pytest.approx(speedup, rel=0.01)
