from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import normal, ops, parse

import pwopt
from pwopt.rewriting.records import Rewrite
from pwopt.running.timing import Race
from pwopt.selecting.tune import Decision, Group, choose, groups

pytest.importorskip("onnxruntime")

RNG = np.random.default_rng(0)


def rewrite(signature: str, site: str, macs: int) -> Rewrite:
    return Rewrite("", macs_before=macs, signature=signature, pass_name="merge-siblings", site=site)


def test_rewrites_that_look_alike_form_a_group_and_the_largest_comes_first() -> None:
    found = groups([rewrite("small", "s1", 1), rewrite("large", "l1", 5), rewrite("large", "l2", 5)])
    assert found == [Group("merge-siblings", "large", ("l1", "l2"), 10), Group("merge-siblings", "small", ("s1",), 1)]


def fake(times: dict[str, float]) -> tuple[list[tuple[str, str]], object]:
    """A race between models whose names are the sites they hold, each of which takes or saves some time."""
    seen: list[tuple[str, str]] = []

    def race(a: Path, b: Path, _seconds: float) -> Race:
        seen.append((a.name, b.name))
        cost = [1.0 + sum(times[s] for s in p.name.split("+") if s) for p in (a, b)]
        return Race(tuple(c * (1 + 0.01 * RNG.random(40)) for c in cost))

    return seen, race


def test_groups_are_raced_on_top_of_those_kept() -> None:
    seen, race = fake({"a": -0.2, "b": 0.1, "c": -0.1, "d": 0.0})
    listed = [Group("p", s.upper(), (s,), 1) for s in "abcd"]
    decisions = choose(listed, lambda sites: Path("+".join(sorted(sites)) or "+"), race, 60.0)  # type: ignore[arg-type]
    assert [d.kept for d in decisions] == [True, False, True, False]
    first, rest = seen[:4], seen[4:]
    assert first == [("+", "a"), ("a", "a+b"), ("a", "a+c"), ("a+c", "a+c+d")]
    assert rest == [("c", "a+c")]  # b was clearly slower, d came last: neither is raced again
    assert [s.site for d in decisions for s in d.skips()] == ["b", "d"]
    assert "measured" in decisions[1].skips()[0].reason


def test_what_pays_only_with_others_is_raced_again() -> None:
    """b makes a worth it."""

    def race(a: Path, b: Path, _seconds: float) -> Race:
        cost = {"+": 1.0, "a": 1.0, "b": 0.9, "a+b": 0.8}
        return Race(tuple(cost[p.name] * (1 + 0.01 * RNG.random(40)) for p in (a, b)))

    listed = [Group("p", s.upper(), (s,), 1) for s in "ab"]
    decisions = choose(listed, lambda sites: Path("+".join(sorted(sites)) or "+"), race, 60.0)
    assert [d.kept for d in decisions] == [True, True]


def test_what_no_longer_pays_is_dropped_in_the_end() -> None:
    """b does all that a does, and more."""

    def race(a: Path, b: Path, _seconds: float) -> Race:
        cost = {"+": 1.0, "a": 0.9, "b": 0.7, "a+b": 0.71}
        return Race(tuple(cost[p.name] * (1 + 0.001 * RNG.random(40)) for p in (a, b)))

    listed = [Group("p", s.upper(), (s,), 1) for s in "ab"]
    decisions = choose(listed, lambda sites: Path("+".join(sorted(sites)) or "+"), race, 60.0)
    assert [d.kept for d in decisions] == [False, True]


def test_each_model_is_built_once() -> None:
    built: list[frozenset[str]] = []

    def build(sites: frozenset[str]) -> Path:
        built.append(sites)
        return Path("+".join(sorted(sites)) or "+")

    _, race = fake({"a": -0.2, "b": 0.1, "c": -0.1})
    choose([Group("p", s.upper(), (s,), 1) for s in "abc"], build, race, 60.0)  # type: ignore[arg-type]
    assert len(built) == len(set(built))


def test_remembered_groups_are_not_raced() -> None:
    seen, race = fake({"a": -0.2, "b": -0.1})
    listed = [Group("p", s.upper(), (s,), 1) for s in "ab"]
    known = Decision(listed[0], 1.2, (1.1, 1.3), remembered=True)
    decisions = choose(
        listed, lambda sites: Path("+".join(sorted(sites)) or "+"), race, 60.0,  # type: ignore[arg-type]
        remembered=lambda g: known if g is listed[0] else None,
    )  # fmt: skip
    assert [d.kept for d in decisions] == [True, True]
    assert seen == [("a", "a+b")]


def test_without_time_nothing_is_decided() -> None:
    seen, race = fake({"a": -0.5})
    listed = [Group("p", "A", ("a",), 1)]
    assert choose(listed, lambda sites: Path("+"), race, 0.0) == []  # type: ignore[arg-type]
    assert not seen


def three(path: Path) -> Path:
    import onnx

    body = "(float[2,6,5,7] x) => (float[N] a, float[N] b, float[N] c) { a = Conv(x, u) b = Conv(x, v) c = Conv(x, w) }"
    weights = {k: normal(4, 6, 1, 1, seed=i).astype(np.float32) for i, k in enumerate("uvw")}
    onnx.save(parse(body, **weights), path)
    return path


def test_every_measured_rewrite_is_kept_or_told(tmp_path: Path) -> None:
    result = pwopt.optimize(three(tmp_path / "m.onnx"), race_seconds=0.05, budget=5.0)
    kept = [r for r in result.report.rewrites if r.pass_name == "merge-siblings"]
    dropped = [s for s in result.report.skips if s.pass_name == "merge-siblings"]
    assert len(kept) + len(dropped) >= 1
    assert all("measured" in s.reason for s in dropped)


def test_without_a_budget_measured_rewrites_are_left_out(tmp_path: Path) -> None:
    result = pwopt.optimize(three(tmp_path / "m.onnx"), race_seconds=0.05, budget=0.0)
    assert ops(result.model) == {"Conv": 3}


def test_analytic_cost_merges_where_operators_disappear(tmp_path: Path) -> None:
    result = pwopt.optimize(three(tmp_path / "m.onnx"), cost_model="analytic")
    assert ops(result.model) == {"Conv": 1, "Split": 1}
    assert result.report.equivalence is not None
    assert result.report.equivalence.passed


def test_a_measured_pass_that_is_named_acts_wherever_it_is_exact(tmp_path: Path) -> None:
    body = "(float[2,3,5,7] a, float[2,4,5,7] b) => (float[N] y) { t = Concat<axis=1>(a, b) y = Conv(t, w) }"
    model = parse(body, w=normal(5, 7, 1, 1).astype(np.float32))
    result = pwopt.optimize(model, passes=["split-concat"], cost_model="analytic")
    assert ops(result.model) == {"Conv": 2, "Add": 1}


def test_the_pass_that_saves_most_is_raced_first() -> None:
    """Time may run out; what saves nothing, or costs multiply-adds, waits in its own order."""
    saves = [("a", 9, 9), ("b", 5, 8), ("c", 5, 3), ("d", 4, 2), ("d", 6, 3), ("a", 1, 1)]
    rewrites = [
        Rewrite("", macs_before=before, macs_after=after, signature=str(i), pass_name=name, site=f"{name}{i}")
        for i, (name, before, after) in enumerate(saves)
    ]
    assert [g.sites[0] for g in groups(rewrites)] == ["d4", "d3", "c2", "a0", "a5", "b1"]


def test_of_two_that_act_on_one_place_the_first_is_raced_against_the_other() -> None:
    """The first takes the place where both are allowed, so the other has to be raced before, and then has no effect."""
    rewrites = [
        Rewrite("", macs_before=9, macs_after=4, signature=name, pass_name=name, site=f"{name}:y")
        for name in ("first", "second")
    ]
    listed = groups(rewrites)
    assert [g.pass_name for g in listed] == ["second", "first"]
    seen: list[tuple[str, str]] = []

    def build(sites: frozenset[str]) -> Path:
        return Path("first" if "first:y" in sites else "second" if sites else "+")

    def race(a: Path, b: Path, _seconds: float) -> Race:
        seen.append((a.name, b.name))
        cost = {"+": 1.0, "second": 0.9, "first": 0.8}
        return Race(tuple(cost[p.name] * (1 + 0.001 * RNG.random(40)) for p in (a, b)))

    decisions = choose(listed, build, race, 60.0)
    assert seen == [("+", "second"), ("second", "first")]
    assert [d.kept for d in decisions] == [False, True]
    assert not decisions[0].raced
    assert [s.reason for s in decisions[0].skips()] == ["second: another rewrite that was kept takes its place"]
