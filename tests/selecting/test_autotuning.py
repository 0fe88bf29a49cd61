from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import normal, ops, parse, plant, planted_race

import pwopt
from pwopt.rewriting.records import Rewrite, Site
from pwopt.running.timing import Evidence, Race
from pwopt.selecting.autotuning import Decision, Estimate, race_groups
from pwopt.selecting.groups import Group, group_rewrites

pytest.importorskip("onnxruntime")


def rewrite(signature: str, site: str, macs: int) -> Rewrite:
    return Rewrite("", macs_before=macs, signature=signature, site=Site("merge-siblings", site))


def test_rewrites_that_look_alike_form_a_group_and_the_largest_comes_first() -> None:
    found = group_rewrites([rewrite("small", "s1", 1), rewrite("large", "l1", 5), rewrite("large", "l2", 5)])
    assert found == [
        Group("merge-siblings", "large", (Site("merge-siblings", "l1"), Site("merge-siblings", "l2")), 10),
        Group("merge-siblings", "small", (Site("merge-siblings", "s1"),), 1),
    ]


def test_a_group_knows_the_operators_it_replaces_if_all_its_rewrites_do() -> None:
    both = Rewrite("", ("Conv", "Add"), became=(("c", "y"), ("y", "y")), signature="s", site=Site("p", "y"))
    other = Rewrite("", ("Conv",), became=(("z", "z"),), signature="s", site=Site("p", "z"))
    (group,) = group_rewrites([both, other])
    assert group.tensors == {"c", "y", "z"}
    for unknown in ({"became": ()}, {"removed": ("Conv", "Slice")}):
        (group,) = group_rewrites([both, replace(other, **unknown)])
        assert group.tensors == frozenset()


class Fake:
    """Races between models whose names are the sites they hold; a model takes what a function of its name says."""

    def __init__(self, cost: Callable[[str], float], noise: float = 0.01, rounds: int = 40) -> None:
        self.cost, self.noise, self.rounds, self.rng = cost, noise, rounds, np.random.default_rng(0)
        self.seen: list[tuple[str, str]] = []
        self.built: list[frozenset[Site]] = []
        self.known: dict[Group, Decision] = {}
        self.estimated_groups: list[tuple[list[str], list[str]]] = []
        self.estimates: dict[Group, Estimate] = {}
        self.bounds: dict[Group, float] = {}
        self.provable = 1.0
        self.checked: list[str] = []

    @classmethod
    def adding(cls, times: dict[str, float]) -> Fake:
        """Each site takes or saves some time."""
        return cls(lambda name: 1.0 + sum(times[s] for s in name.split("+") if s))

    def build(self, sites: frozenset[Site]) -> Path:
        self.built.append(sites)
        return Path("+".join(sorted(s.tensor for s in sites)) or "+")

    def fault(self, model: Path) -> str:
        self.checked.append(model.name)
        return ""

    def race(self, a: Path, b: Path, _seconds: float, _known: Evidence, _promise: float) -> Race | str:
        self.seen.append((a.name, b.name))
        return planted_race(*(self.cost(p.name) * (1 + self.noise * self.rng.random(self.rounds)) for p in (a, b)))

    def least_provable(self, _seconds: float) -> float:
        return self.provable

    def recall(self, group: Group) -> Decision | None:
        return self.known.get(group)

    def bound(self, kept: Sequence[Group], groups: Sequence[Group]) -> Mapping[Group, float]:
        return {g: self.bounds[g] for g in groups if g in self.bounds}

    def estimate(self, kept: Sequence[Group], groups: Sequence[Group]) -> Mapping[Group, Estimate]:
        self.estimated_groups.append(([g.pass_name for g in kept], [g.sites[0].tensor for g in groups]))
        return {g: self.estimates[g] for g in groups if g in self.estimates}


def listed(names: str) -> list[Group]:
    return [Group("p", s.upper(), (Site("p", s),), 1) for s in names]


def evidence(speedup: float, spread: float, rounds: int = 40) -> Evidence:
    """So many rounds whose ratios lie around a speed-up."""
    return Evidence.from_race(planted_race(speedup * np.exp(spread * np.linspace(-1, 1, rounds)), np.ones(rounds)))


def test_groups_are_raced_on_top_of_those_kept() -> None:
    fake = Fake.adding({"a": -0.2, "b": 0.1, "c": -0.1, "d": 0.0})
    decisions = race_groups(listed("abcd"), fake, 60.0)
    assert [d.kept for d in decisions] == [True, False, True, False]
    first, rest = fake.seen[:4], fake.seen[4:]
    assert first == [("+", "a"), ("a", "a+b"), ("a", "a+c"), ("a+c", "a+c+d")]
    assert rest == [("c", "a+c")]  # b was clearly slower, d came last: neither is raced again
    assert [s.tensor for d in decisions for s in d.skips()] == ["b", "d"]
    assert "measured" in decisions[1].skips()[0].reason


def test_a_model_is_raced_once_against_the_same_model() -> None:
    """Where a combination of rewrites is that of another group."""
    twins = [*listed("a"), Group("q", "twin", (Site("q", "a"),), 1)]
    for gain, kept in ((-0.2, [True, False]), (0.2, [False, False])):
        fake = Fake.adding({"a": gain})
        fake.build = lambda sites: Path("+".join(sorted({s.tensor for s in sites})) or "+")  # type: ignore[method-assign]
        decisions = race_groups(twins, fake, 60.0)
        assert [d.kept for d in decisions] == kept
        assert fake.seen == [("+", "a")]
    assert decisions[1].explain() == "dropped q: twin: it makes the same model as another rewrite that was raced"


def test_larger_estimates_are_raced_first_though_the_machine_was_busy() -> None:
    fake = Fake.adding({"a": 0.1, "b": 0.1, "c": 0.1, "d": 0.1})
    for group, speedup in zip(listed("abc"), (0.9, 1.3, 1.1), strict=True):
        fake.estimates[group] = Estimate(evidence(speedup, 0.5), evidence(2.0, 0.5), sure=False)
    race_groups(listed("abcd"), fake, 60.0)
    assert fake.seen == [("+", "b"), ("+", "c"), ("+", "d"), ("+", "a")]


def test_a_race_learns_what_profiles_allow() -> None:
    fake, promises = Fake.adding(dict.fromkeys("abc", 0.0)), dict[str, float]()

    def race(_a: Path, b: Path, _seconds: float, _known: Evidence, promise: float) -> Race:
        promises.setdefault(b.name, promise)
        return planted_race(1 + 0.1 * np.linspace(-1, 1, 6), np.ones(6))

    fake.race = race  # type: ignore[method-assign]
    a, b, _ = listed("abc")
    fake.estimates = {
        a: Estimate(evidence(0.99, 0.01), evidence(1.03, 0.01)),
        b: Estimate(evidence(1.2, 0.5), evidence(1.2, 0.5), sure=False),
    }
    race_groups(listed("abc"), fake, 60.0)
    assert promises["a"] == pytest.approx(1.03, abs=0.01)
    assert promises["b"] == promises["c"] == math.inf  # the machine was busy; c was not profiled


def test_what_a_race_could_not_prove_is_not_raced() -> None:
    """Unless it promises much: then there may be more time than a first race takes."""
    fake = Fake.adding({"a": -0.015, "b": -0.03, "c": 0.0})
    a, b, _ = groups = listed("abc")
    fake.estimates = {
        a: Estimate(evidence(0.999, 0.05), evidence(1.03, 0.05)),
        b: Estimate(evidence(1.022, 0.3), evidence(1.022, 0.3)),
    }
    fake.provable = 1.1
    found = dict(zip(groups, race_groups(groups, fake, 60.0), strict=True))
    assert ("+", "a") not in fake.seen
    assert ("+", "b") in fake.seen
    assert ("+", "c") in fake.seen or ("b", "b+c") in fake.seen  # not profiled
    reason = found[a].skips()[0].reason
    assert reason.startswith("A: not raced, since it gains at most 1.0")
    assert reason.endswith("× by profiles, and a race of 6 s can only prove more than 1.100×")


def test_what_pays_only_with_others_is_raced_again() -> None:
    """b makes a worth it, of which nothing was clear before."""
    fake = Fake(lambda name: {"+": 1.0, "a": 0.99, "b": 0.9, "a+b": 0.8}[name], noise=0.2, rounds=200)
    decisions = race_groups(listed("ab"), fake, 60.0)
    assert [d.kept for d in decisions] == [True, True]
    assert ("b", "a+b") in fake.seen


def test_what_no_longer_pays_is_dropped_in_the_end() -> None:
    """b does all that a does, and more."""
    fake = Fake(lambda name: {"+": 1.0, "a": 0.9, "b": 0.7, "a+b": 0.71}[name], noise=0.001)
    assert [d.kept for d in race_groups(listed("ab"), fake, 60.0)] == [False, True]


def test_each_model_is_built_once() -> None:
    fake = Fake.adding({"a": -0.2, "b": 0.1, "c": -0.1})
    race_groups(listed("abc"), fake, 60.0)
    assert len(fake.built) == len(set(fake.built))


def test_remembered_groups_are_not_raced_if_they_are_clear() -> None:
    fake = Fake.adding({"a": -0.2, "b": -0.1})
    a, b = listed("ab")
    fake.known[a] = Decision(a, evidence(1.2, 0.01), remembered=True)
    assert [d.kept for d in race_groups([a, b], fake, 60.0)] == [True, True]
    assert fake.seen == [("a", "a+b")]


def test_a_doubtful_race_goes_on_where_it_ended() -> None:
    """Sums are kept, not verdicts: every run narrows the interval, until it decides."""
    (group,) = listed("a")
    fake = Fake(lambda name: 1.0 if name == "+" else 0.98, noise=0.15, rounds=15)
    widths, decision = [], Decision(group)
    for _ in range(20):
        (decision,) = race_groups([group], fake, 60.0)
        widths.append(decision.interval[1] - decision.interval[0])
        if decision.clear:
            break
        assert "in doubt" in decision.reason()
        fake.known[group] = Decision(group, decision.evidence, remembered=True)
    assert decision.kept
    assert len(widths) > 2
    assert all(a > b for a, b in itertools.pairwise(widths))
    assert decision.evidence.pairs > 15 * (len(widths) - 0.5)


@pytest.mark.parametrize(
    ("speedup", "spread", "rounds", "clear", "kept"),
    [
        (1.05, 0.02, 40, True, True),
        (0.95, 0.02, 40, True, False),
        (1.058, 0.4, 40, False, False),
        (1.0, 0.005, 40, True, False),  # hardly anything to gain
        (1.0, 0.005, 4, False, False),  # too few pairs to say so
        (1.02, 0.0001, 3, True, True),  # few rounds of a slow model say as much as many of a fast one
    ],
)
def test_when_races_have_decided(speedup: float, spread: float, rounds: int, clear: bool, kept: bool) -> None:
    decision = Decision(listed("a")[0], evidence(speedup, spread, rounds))
    assert (decision.clear, decision.kept) == (clear, kept)


def test_a_model_that_fails_in_a_race_is_dropped() -> None:
    fake = Fake.adding({"a": -0.5})
    fake.race = lambda *_: "it crashes onnxruntime (SIGSEGV)"  # type: ignore[method-assign]
    (decision,) = race_groups(listed("a"), fake, 60.0)
    assert not decision.kept
    assert "SIGSEGV" in decision.reason()


def glance(own: float, best: float | None = None, spread: float = 0.0005) -> Estimate:
    return Estimate(evidence(own, spread, 10), evidence(best or own, spread, 10))


def test_what_profiles_rule_out_is_not_raced_and_what_pays_is_raced_at_once() -> None:
    """a and c pay, b costs, of d nothing is known, and e might pay by what others gain."""
    fake = Fake.adding({"a": -0.1, "b": 0.1, "c": -0.05, "d": -0.02, "e": 0.02})
    groups = listed("abcde")
    fake.estimates = dict(zip(groups, (glance(1.11), glance(0.9), glance(1.05)), strict=False))
    fake.estimates[groups[4]] = glance(0.98, 1.03)
    decisions = race_groups(groups, fake, 60.0)
    assert fake.estimated_groups == [([], ["a", "b", "c", "d", "e"])]
    assert fake.seen[0] == ("+", "a+c")
    assert all("b" not in name.split("+") for race in fake.seen for name in race)
    assert [d.kept for d in decisions] == [True, False, True, True, False]
    assert [d.estimated for d in decisions] == [True, True, True, False, False]
    assert "by profiles of its operators" in decisions[1].reason()
    assert "in a race of all that pay so" in decisions[0].reason()
    assert decisions[0].speedup == pytest.approx(1.11)


def test_profiles_alone_keep_nothing() -> None:
    """They promise what the whole model does not hold: each is then raced by itself."""
    fake = Fake.adding({"a": 0.1, "b": -0.01})
    groups = listed("ab")
    fake.estimates = {g: glance(1.1) for g in groups}
    decisions = race_groups(groups, fake, 60.0)
    assert fake.seen[:3] == [("+", "a+b"), ("+", "a"), ("+", "b")]
    assert [d.kept for d in decisions] == [False, True]
    assert not any(d.estimated for d in decisions)


def test_on_a_busy_machine_profiles_rule_out_and_promise_nothing() -> None:
    fake = Fake.adding({"a": -0.1, "b": 0.1, "c": -0.1})
    groups = listed("abc")
    fake.estimates = {g: glance(s)._replace(sure=False) for g, s in zip(groups, (1.1, 0.9, 1.1), strict=True)}
    decisions = race_groups(groups, fake, 60.0)
    assert fake.seen[0] == ("+", "a")
    assert [d.estimated for d in decisions] == [False, True, False]
    assert [d.kept for d in decisions] == [True, False, True]


def test_hardly_anything_is_no_reason_to_race() -> None:
    fake = Fake.adding({"a": 0.0, "b": 0.0})
    groups = listed("ab")
    fake.estimates = {groups[0]: glance(1.001), groups[1]: glance(1.004, 1.007)}
    assert [d.kept for d in race_groups(groups, fake, 60.0)] == [False, False]
    assert not fake.seen


def test_what_was_profiled_is_not_checked_before_a_race() -> None:
    """It ran under the profiler. Of b nothing is known, so it might crash or never end."""
    fake = Fake.adding({"a": -0.1, "b": -0.1})
    a, b = listed("ab")
    fake.estimates = {a: glance(1.1)}
    race_groups([a, b], fake, 60.0)
    assert fake.seen[:2] == [("+", "a"), ("a", "a+b")]
    assert fake.checked == ["a+b"]


@pytest.mark.parametrize(("gain", "races"), [(0.04, 2), (0.01, 1)])
def test_a_promising_group_in_doubt_is_raced_on(gain: float, races: int) -> None:
    """With all evidence so far, and for as long as there is time."""
    fake = Fake.adding({"a": -gain})
    lengths, known = [], []

    def race(_a: Path, _b: Path, seconds: float, seen: Evidence, _promise: float) -> Race:
        lengths.append(seconds)
        known.append(seen.pairs)
        spread, count = (0.1, 6) if len(lengths) == 1 else (0.01, 40)
        return planted_race(np.exp(spread * np.linspace(-1, 1, count)) / (1 - gain), np.ones(count))

    fake.race = race  # type: ignore[method-assign]
    (decision,) = race_groups(listed("a"), fake, 60.0)
    assert decision.kept == (races == 2)
    assert len(lengths) == races
    assert known == [0, 6][:races]
    assert lengths[0] == 6.0  # a tenth of the time
    assert all(seconds > 50 for seconds in lengths[1:])


def test_evidence_on_top_of_a_group_that_was_dropped_since_does_not_count() -> None:
    fake, known = Fake.adding({}), dict[tuple[str, str], float]()
    clear = {("+", "b"): 1.2, ("b", "b+c"): 1.2, ("c", "b+c"): 0.9, ("c", "a+c"): 1.04}

    def race(a: Path, b: Path, _seconds: float, seen: Evidence, _promise: float) -> Race:
        known[a.name, b.name] = seen.pairs
        speedup = clear.get((a.name, b.name))
        spread = np.linspace(-1, 1, 6)
        ratios = 1.04 * np.exp(0.1 * spread) if speedup is None else speedup * np.exp(0.001 * spread)
        return planted_race(ratios, np.ones(6))

    fake.race = race  # type: ignore[method-assign]
    decisions = race_groups(listed("abc"), fake, 60.0)
    assert [d.kept for d in decisions] == [True, False, True]
    assert list(known)[-2:] == [("c", "b+c"), ("c", "a+c")]
    assert known["c", "a+c"] == 0


def test_what_takes_too_little_time_is_neither_profiled_nor_raced() -> None:
    """Were all operators of b free, the model would be 0.9 % faster."""
    fake = Fake.adding({"a": -0.1, "b": -0.009})
    a, b = listed("ab")
    fake.bounds = {a: 1.2, b: 1.009}
    decisions = race_groups([a, b], fake, 60.0)
    assert [d.kept for d in decisions] == [True, False]
    assert fake.estimated_groups == [([], ["a"])]
    assert fake.seen == [("+", "a")]
    assert decisions[1].reason() == (
        "B: not tried, since its operators take so little time that it gains at most 1.009×"
    )
    assert not decisions[1].raced


@pytest.mark.parametrize(
    ("signature", "title"),
    [
        ("lower-residual", "lower-residual"),
        ("lower-residual: 2×3", "lower-residual: 2×3"),
        ("sums", "lower-residual: sums"),
    ],
)
def test_the_name_of_a_pass_is_said_once(signature: str, title: str) -> None:
    group = Group("lower-residual", signature, (Site("lower-residual", "y"),), 1)
    decision = Decision(group, not_raced="not tried")
    assert group.title == title
    assert decision.explain() == f"dropped {title}: not tried"
    assert f"{decision.skips()[0].pass_name}: {decision.reason()}" == f"{title}: not tried"


def enabled(tensors: str) -> tuple[list[Group], Fake]:
    """b pays only on top of a, and profiles without a say that b and c do not pay."""
    groups = [replace(g, tensors=frozenset(tensors)) if g.signature == "A" else g for g in listed("abc")]
    costs = {"+": 1.0, "a": 0.9, "a+b": 0.8, "b": 1.1, "a+c": 0.95, "a+b+c": 0.85}
    fake = Fake(costs.__getitem__)
    profiles = iter([{groups[1]: glance(0.91), groups[2]: glance(0.9)}, {groups[1]: glance(1.12)}])
    real = fake.estimate

    def estimate(kept: Sequence[Group], asked: Sequence[Group]) -> Mapping[Group, Estimate]:
        return {**real(kept, asked), **next(profiles)}

    fake.estimate = estimate  # type: ignore[method-assign]
    return groups, fake


def test_what_another_form_of_its_operators_enables_is_profiled_again() -> None:
    groups, fake = enabled("ab")
    decisions = race_groups(groups, fake, 60.0)
    assert [asked for _, asked in fake.estimated_groups] == [["a", "b", "c"], ["b"]]
    assert [d.kept for d in decisions] == [True, True, False]
    assert ("a", "a+b") in fake.seen


def test_what_seems_to_pay_in_another_form_is_raced_even_if_the_profile_is_in_doubt() -> None:
    groups, fake = enabled("ab")
    unsure = iter([{groups[1]: glance(0.91), groups[2]: glance(0.9)}, {groups[1]: glance(1.1, spread=0.5)}])
    fake.estimate = lambda _kept, _asked: next(unsure)  # type: ignore[method-assign]
    decisions = race_groups(groups, fake, 60.0)
    assert [d.kept for d in decisions] == [True, True, False]


def test_what_pays_in_another_form_is_raced_at_once() -> None:
    groups = [replace(g, tensors=frozenset("abc")) if g.signature == "A" else g for g in listed("abc")]
    costs = {"+": 1.0, "a": 0.9, "b": 1.1, "c": 1.1, "a+b": 0.85, "a+c": 0.86, "b+c": 1.2, "a+b+c": 0.8}
    fake = Fake(costs.__getitem__)
    profiles = iter([dict.fromkeys(groups[1:], glance(0.9)), dict.fromkeys(groups[1:], glance(1.06))])
    fake.estimate = lambda _kept, _asked: next(profiles)  # type: ignore[method-assign]
    decisions = race_groups(groups, fake, 60.0)
    assert [d.kept for d in decisions] == [True, True, True]
    assert fake.seen[:2] == [("+", "a"), ("a", "a+b+c")]
    assert [d.estimated for d in decisions] == [False, True, True]


def test_what_no_kept_group_writes_is_not_profiled_again() -> None:
    groups, fake = enabled("a")
    decisions = race_groups(groups, fake, 60.0)
    assert [asked for _, asked in fake.estimated_groups] == [["a", "b", "c"]]
    assert [d.kept for d in decisions] == [True, False, False]
    assert decisions[1].estimated


def test_a_decision_stays_if_the_second_profile_fails() -> None:
    groups, fake = enabled("ab")
    first = iter([{groups[1]: glance(0.91), groups[2]: glance(0.9)}, {}])
    fake.estimate = lambda _kept, _asked: next(first)  # type: ignore[method-assign]
    decisions = race_groups(groups, fake, 60.0)
    assert [d.kept for d in decisions] == [True, False, False]
    assert decisions[1].estimated


def test_what_is_known_is_not_estimated() -> None:
    fake = Fake.adding({"a": -0.1, "b": 0.1})
    a, b = listed("ab")
    fake.known[a] = Decision(a, evidence(1.1, 0.01), remembered=True)
    race_groups([a, b], fake, 60.0)
    assert fake.estimated_groups == [(["p"], ["b"])]


def test_without_time_nothing_is_decided() -> None:
    fake = Fake.adding({"a": -0.5})
    assert race_groups(listed("a"), fake, 0.0) == []
    assert not fake.seen


def three(path: Path) -> Path:
    import onnx

    body = "(float[2,6,5,7] x) => (float[N] a, float[N] b, float[N] c) { a = Conv(x, u) b = Conv(x, v) c = Conv(x, w) }"
    weights = {k: normal(4, 6, 1, 1, seed=i).astype(np.float32) for i, k in enumerate("uvw")}
    onnx.save(parse(body, **weights), path)
    return path


@pytest.mark.parametrize("speedup", [2.0, 1.0, 0.5])
def test_every_measured_rewrite_is_kept_or_reported(
    speedup: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    plant(monkeypatch, lambda *_, **__: planted_race(np.full(40, speedup), np.full(40, 1.0)))
    result = pwopt.optimize(three(tmp_path / "m.onnx"), measuring=pwopt.Measuring(budget=600.0), cache=False, threads=1)
    kept = [r for r in result.report.rewrites if r.pass_name == "merge-siblings"]
    dropped = [s for s in result.report.skips if s.pass_name == "merge-siblings"]
    assert (len(kept) >= 1, len(dropped) >= 1) == (speedup > 1, speedup <= 1)
    assert all("measured" in s.reason for s in dropped)


def test_without_a_budget_measured_rewrites_are_left_out(tmp_path: Path) -> None:
    result = pwopt.optimize(three(tmp_path / "m.onnx"), measuring=pwopt.Measuring(race_seconds=0.05, budget=0.0))
    assert ops(result.model) == {"Conv": 3}


def test_analytic_cost_merges_where_operators_disappear(tmp_path: Path) -> None:
    result = pwopt.optimize(three(tmp_path / "m.onnx"), cost="analytic")
    assert ops(result.model) == {"Conv": 1, "Split": 1}
    assert result.report.equivalence is not None
    assert result.report.equivalence.passed


def test_a_measured_pass_that_is_named_acts_wherever_it_is_exact(tmp_path: Path) -> None:
    body = "(float[2,3,5,7] a, float[2,4,5,7] b) => (float[N] y) { t = Concat<axis=1>(a, b) y = Conv(t, w) }"
    model = parse(body, w=normal(5, 7, 1, 1).astype(np.float32))
    result = pwopt.optimize(model, passes=["split-concat"], cost="analytic")
    assert ops(result.model) == {"Conv": 2, "Add": 1}


def test_the_pass_that_saves_most_is_raced_first() -> None:
    """Time may run out; what saves nothing, or costs multiply-adds, waits in its own order."""
    saves = [("a", 9, 9), ("b", 5, 8), ("c", 5, 3), ("d", 4, 2), ("d", 6, 3), ("a", 1, 1)]
    rewrites = [
        Rewrite("", macs_before=before, macs_after=after, signature=str(i), site=Site(name, str(i)))
        for i, (name, before, after) in enumerate(saves)
    ]
    assert [str(g.sites[0]) for g in group_rewrites(rewrites)] == ["d:4", "d:3", "c:2", "a:0", "a:5", "b:1"]


def test_of_two_that_act_on_one_place_the_first_is_raced_against_the_other() -> None:
    """The first takes the place where both are allowed, so the other has to be raced before, and then has no effect."""
    rewrites = [
        Rewrite("", macs_before=9, macs_after=4, signature=name, site=Site(name, "y")) for name in ("first", "second")
    ]
    found = group_rewrites(rewrites)
    assert [g.pass_name for g in found] == ["second", "first"]
    fake = Fake(lambda name: {"+": 1.0, "second": 0.9, "first": 0.8}[name], noise=0.001)
    fake.build = lambda sites: Path("first" if Site("first", "y") in sites else "second" if sites else "+")  # type: ignore[method-assign]
    decisions = race_groups(found, fake, 60.0)
    assert fake.seen == [("+", "second"), ("second", "first")]
    assert [d.kept for d in decisions] == [False, True]
    assert not decisions[0].raced
    assert [s.reason for s in decisions[0].skips()] == ["another rewrite that was kept takes its place"]
