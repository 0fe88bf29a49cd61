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
from pwopt.selecting.autotuning import Estimate
from pwopt.selecting.groups import Group
from pwopt.selecting.profile_estimate import Run, bound_speedups, estimate

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
    return estimate(before, after, ((), REWRITES), [A, B], (runs(OLD, spread, pace), runs(new, spread, pace, seed=1)))


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


def plain_models() -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """The same without activations between the convolutions."""
    weights = {k: normal(4, 4, 1, 1, seed=i, dtype=F) for i, k in enumerate("uvw")}
    before = "(float[1,4,6,6] x) => (float[N] y) { a = Conv(x, u) b = Conv(a, v) y = Conv(b, w) }"
    after = "(float[1,4,6,6] x) => (float[N] y) { p = Mul(x, k) a = Abs(p) q = Mul(a, k) b = Abs(q) y = Conv(b, w) }"
    return parse(before, **weights), parse(after, k=np.array(2, F), w=weights["w"])


def test_a_group_is_credited_with_what_its_neighbours_gain() -> None:
    """The third convolution reads what the second group wrote, so its gain may be that group's, not the first's."""
    old, new = runs({0: 4.0, 1: 3.0, 2: 3.0}), runs({0: 2.0, 1: 2.5, 2: 1.5, 3: 1.5, 4: 1.0})
    found = estimate(*plain_models(), ((), REWRITES), [A, B], (old, new))
    assert found[A].own.speedup == pytest.approx(10 / 10.5)
    assert found[A].best == found[A].own
    assert found[B].best.interval(0.9)[1] > 1.2
    assert found[B].best.speedup > found[B].own.speedup


def test_what_unrelated_operators_gain_is_credited_to_nobody() -> None:
    before, after = models()
    times = {0: 2.0, 1: 3.0, 2: 0.0, 3: 1.0, 4: 2.0, 5: 0.0, 6: 1.0}
    found = estimate(before, after, ((), REWRITES[:1]), [A], (runs(OLD), runs(times)))
    assert found[A].own.speedup == pytest.approx(10 / 11)
    assert found[A].best == found[A].own


def test_credit_passes_through_neighbours_whose_kernels_changed() -> None:
    """The second convolution took the blocked layout, for which onnxruntime names it; so the third may gain too."""
    before, _ = plain_models()
    old, new = runs({0: 4.0, 1: 3.0, 2: 3.0}), runs({0: 3.9, 1: 3.0, 2: 1.0})
    unchanged = estimate(before, before, ((), REWRITES[:1]), [A], (old, new))
    assert unchanged[A].best == unchanged[A].own
    blocked = [[each._replace(name="b_nchwc") if each.name == "@1@" else each for each in run] for run in new]
    found = estimate(before, before, ((), REWRITES[:1]), [A], (old, blocked))
    assert found[A].own.speedup == pytest.approx(10 / 9.9)
    assert found[A].best.interval(0.9)[1] > 1.2


def test_operators_bound_what_a_group_can_gain() -> None:
    """Of 10 ms, 4 are the first convolution's and 3 its neighbour's; a product bounds the way to the third."""
    before, _ = models()
    first = Group("p", "first", (Site("p", "a"),), 1, frozenset({"a"}))
    assert bound_speedups(before, [first], runs(OLD)) == pytest.approx({first: 10 / 3})
    assert bound_speedups(before, [first], runs({**OLD, 0: 1.0, 2: 1.0, 4: 998.0})) == pytest.approx(
        {first: 1000 / 998}
    )


def test_a_bound_includes_changes_of_layout_and_what_lies_behind_light_operators() -> None:
    light = parse("(float[1,4,6,6] x) => (float[N] y) { a = Conv(x, u) b = Abs(a) c = Erf(b) y = Conv(c, u) }",
                  u=normal(4, 4, 1, 1, dtype=F))  # fmt: skip
    group = Group("p", "Abs", (Site("p", "b"),), 1, frozenset({"b"}))
    times = {0: 3.0, "ReorderOutput": 1.0, 1: 1.0, 2: 1.0, 3: 4.0}
    assert bound_speedups(light, [group], runs({**times, 3: 0.0, 0: 0.0})) == pytest.approx({group: 1e9})
    far = Group("p", "Conv", (Site("p", "a"),), 1, frozenset({"a"}))
    assert bound_speedups(light, [far], runs(times)) == pytest.approx({far: 1e9})
    chain = parse("(float[1,4,6,6] x) => (float[N] y) { a = Conv(x, u) b = Conv(a, u) c = Conv(b, u) y = Abs(c) }",
                  u=normal(4, 4, 1, 1, dtype=F))  # fmt: skip
    last = Group("p", "Abs", (Site("p", "y"),), 1, frozenset({"y"}))
    assert bound_speedups(chain, [last], runs({0: 5.0, 1: 3.0, "ReorderOutput": 0.5, 2: 1.0, 3: 0.5})) == pytest.approx(
        {last: 10 / 8}
    )


def test_a_neighbour_with_weights_gains_nothing_if_its_layout_is_blocked_already() -> None:
    chain = parse("(float[1,4,6,6] x) => (float[N] y) { a = Conv(x, u) b = Abs(a) c = Relu(b) y = Conv(c, u) }",
                  u=normal(4, 4, 1, 1, dtype=F))  # fmt: skip
    group = Group("p", "Abs", (Site("p", "b"),), 1, frozenset({"b"}))
    times = {"a_nchwc": 5.0, "ReorderOutput": 0.5, 1: 1.0, 2: 0.5, 3: 3.0}
    assert bound_speedups(chain, [group], runs(times)) == pytest.approx({group: 10 / 5})
    last = Group("p", "Conv", (Site("p", "y"),), 1, frozenset({"y"}))
    replaced = {"a_nchwc": 5.0, "ReorderOutput": 0.5, 1: 1.0, 2: 0.5, "y_nchwc": 3.0}  # its own time may be saved
    assert bound_speedups(chain, [last], runs(replaced)) == pytest.approx({last: 10 / 5})


def test_a_group_whose_operators_are_not_in_the_model_has_no_bound() -> None:
    before, _ = models()
    assert bound_speedups(before, [A, Group("p", "other", (), 1, frozenset({"elsewhere"}))], runs(OLD)) == {}


def test_operators_are_found_under_the_names_that_a_kept_rewrite_gave_them() -> None:
    """A kept rewrite renamed a in both models. In the second one, the group had rewritten it before."""
    weights = {k: normal(4, 4, 1, 1, seed=i, dtype=F) for i, k in enumerate("uvw")}
    before = parse("(float[1,4,6,6] x) => (float[N] y) { a_2d = Conv(x, u) y = Conv(a_2d, w) }", **weights)
    after = parse(
        "(float[1,4,6,6] x) => (float[N] y) { b = Conv(x, u) c = Conv(x, v) flat = Concat<axis=1>(b, c) y = Conv(flat, w) }",
        **weights,
    )
    mine = Rewrite("", became=(("a", "a"),), site=Site("p", "a"))
    kept, again = (Rewrite("", became=(("a", new),), site=Site("q", "a")) for new in ("a_2d", "flat"))
    found = estimate(
        before, after, ([kept], [mine, again]), [A], (runs({0: 7.0, 1: 3.0}), runs({0: 1.0, 1: 1.0, 2: 3.0, 3: 3.0}))
    )
    assert found[A].own.speedup == pytest.approx(10 / 8)


def test_nothing_is_said_of_a_group_whose_operators_are_not_found() -> None:
    before, after = models()
    lost = Group("p", "lost", (Site("p", "z"),), 1)
    rewrites = [*REWRITES, Rewrite("", site=Site("p", "z"))]
    assert lost not in estimate(before, after, ((), rewrites), [A, lost], (runs(OLD), runs(OLD)))


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
    assert set(estimate(before, after, ((), REWRITES), [A, partly], both)) == {A}
    same = Group("q", "also first", (Site("q", "a"),), 1)
    rewrites = [*REWRITES, Rewrite("", became=(("a", "a"),), site=Site("q", "a"))]
    assert set(estimate(before, after, ((), rewrites), [A, B, same], both)) == {B}


def test_a_slow_spell_longer_than_a_run_gives_no_absurd_figure() -> None:
    before, after = models()
    new = {0: 1.0, 1: 1.0, 2: 0.0, 3: 1.0, 4: 1.0, 5: 0.0, 6: 3.0}
    slow = [*runs(OLD)[:9], *runs({**OLD, 0: 4000.0})[:1]]
    found = estimate(before, after, ((), REWRITES), [A, B], (slow, runs(new)))
    assert 1 < found[A].own.speedup < 2
    assert found[A].own.interval(0.9)[1] < 10
