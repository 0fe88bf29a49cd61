"""What profiled runs of two models say of each group of rewrites, before anything is raced."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import pytest
from helpers import normal, parse

from pwopt.rewriting import Rewrite
from pwopt.rewriting.records import Site
from pwopt.running.session import NodeTime
from pwopt.selecting.autotuning import Estimate, Group
from pwopt.selecting.profile_estimate import Run, estimate

F = np.float32
#: Three convolutions in a row, of which the first two are rewritten into a product each.
BEFORE = "(float[1,4,6,6] x) => (float[N] y) { a = Conv(x, u) r = Relu(a) b = Conv(r, v) s = Relu(b) y = Conv(s, w) }"
AFTER = "(float[1,4,6,6] x) => (float[N] y) { p = Mul(x, k) a = Abs(p) r = Relu(a) q = Mul(r, k) b = Abs(q) s = Relu(b) y = Conv(s, w) }"
A, B = Group("p", "first", (Site("p", "a"),), 1), Group("p", "second", (Site("p", "b"),), 1)
REWRITES = [
    Rewrite("", became=(("a", "a"),), site=Site("p", "a")),
    Rewrite("", became=(("b", "b"),), site=Site("p", "b")),
]
#: Milliseconds of the first model's operators, by number; activations take none.
OLD = {0: 4.0, 1: 0.0, 2: 3.0, 3: 0.0, 4: 3.0}


def models() -> tuple[onnx.ModelProto, onnx.ModelProto]:
    weights = {k: normal(4, 4, 1, 1, seed=i, dtype=F) for i, k in enumerate("uvw")}
    return parse(BEFORE, **weights), parse(AFTER, k=np.array(2, F), w=weights["w"])


def runs(times: Mapping[int | str, float], spread: float = 0.0, pace: float = 0.0, seed: int = 0) -> list[Run]:
    """Ten runs, operators of which take so many milliseconds; a number is a node's, a name one that none has."""
    rng, spells = np.random.default_rng(seed), np.random.default_rng(7)  # which hit models side by side alike
    found = []
    for _ in range(10):
        slow = np.exp(abs(spells.normal(0, pace)))
        found.append([
            NodeTime("Op", f"@{i}@" if isinstance(i, int) else i, 1e-3 * ms * slow * np.exp(rng.normal(0, spread)))
            for i, ms in times.items()
        ])  # fmt: skip
    return found


def seen(new: Mapping[int | str, float], spread: float = 0.0, pace: float = 0.0) -> dict[Group, Estimate]:
    before, after = models()
    return estimate(before, after, REWRITES, [A, B], (runs(OLD, spread, pace), runs(new, spread, pace, seed=1)))


def test_each_group_is_told_what_its_own_operators_gain() -> None:
    """The first goes from 4 to 2 of 10 ms, the second from 3 to 5."""
    found = seen({0: 1.0, 1: 1.0, 2: 0.0, 3: 2.0, 4: 3.0, 5: 0.0, 6: 3.0})
    assert found[A].own.speedup == pytest.approx(10 / 8)
    assert found[B].own.speedup == pytest.approx(10 / 12)
    assert found[B].best.speedup == pytest.approx(10 / 12)


def test_a_change_of_layout_belongs_to_what_it_is_for() -> None:
    """Between an operator of no group and one of a group's, it is that group's; the order of runs tells."""
    found = seen({0: 1.0, 1: 1.0, 2: 0.0, 3: 1.0, 4: 1.0, "ReorderInput": 2.0, 5: 0.0, 6: 3.0})
    assert found[A].own.speedup == pytest.approx(10 / 8)
    assert found[B].own.speedup == pytest.approx(10 / 11)


def test_what_others_gain_is_held_in_favour_of_each() -> None:
    """The third convolution became faster, for whatever reason: nobody is dropped for its own loss alone."""
    found = seen({0: 2.0, 1: 2.5, 2: 0.0, 3: 1.5, 4: 1.5, 5: 0.0, 6: 1.0})
    assert found[A].own.speedup == pytest.approx(10 / 10.5)
    assert found[A].best.interval(0.9)[1] > 1.1
    assert found[B].best.speedup > found[B].own.speedup


def test_a_single_group_may_be_behind_all_that_changed() -> None:
    before, after = models()
    times = {0: 2.0, 1: 3.0, 2: 0.0, 3: 1.0, 4: 2.0, 5: 0.0, 6: 1.0}
    found = estimate(before, after, REWRITES[:1], [A], (runs(OLD), runs(times)))
    assert found[A].best.speedup == pytest.approx(10 / 9)
    assert found[A].own.speedup < 1.0


def test_slow_spells_of_whole_runs_cancel() -> None:
    new = {0: 1.9, 1: 1.9, 2: 0.0, 3: 1.5, 4: 1.5, 5: 0.0, 6: 3.0}
    wild, steady = seen(new, spread=0.005, pace=0.3), seen(new, spread=0.005)
    for group, truth in ((A, 10 / 9.8), (B, 1.0)):
        low, high = wild[group].own.interval(0.99)
        assert low <= truth <= high
        assert high - low < 3 * np.subtract(*steady[group].own.interval(0.99)[::-1])


def test_nothing_is_said_of_what_was_not_made_or_is_not_alone() -> None:
    before, after = models()
    both = (runs(OLD), runs({0: 1.0, 1: 1.0, 2: 0.0, 3: 2.0, 4: 3.0, 5: 0.0, 6: 3.0}))
    partly = Group("p", "third", (Site("p", "b"), Site("p", "y")), 1)
    assert set(estimate(before, after, REWRITES, [A, partly], both)) == {A}
    same = Group("q", "also first", (Site("q", "a"),), 1)
    rewrites = [*REWRITES, Rewrite("", became=(("a", "a"),), site=Site("q", "a"))]
    assert set(estimate(before, after, rewrites, [A, B, same], both)) == {B}
