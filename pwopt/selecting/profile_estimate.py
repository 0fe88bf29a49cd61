"""Profile-guided estimates: the gain of each group of rewrites, from profiled runs without any group and with all.

The time of one operator is a small part of a run, and so is its noise. So profiles separate gains that races cannot.
But only the whole model shows the cost of a change of layout. Therefore each group is also credited with the gain that
belongs to no group, and a group is kept only if a race confirms it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx

from pwopt.algebra import Array
from pwopt.rewriting.records import Rewrite
from pwopt.running.session import NodeTime
from pwopt.running.timing import Evidence
from pwopt.selecting.autotuning import Estimate, Group
from pwopt.selecting.profile_alignment import align, assign_to_nodes

#: Two sessions of one model differ by this share of a run, because their memory is placed differently.
SESSIONS = 0.015
#: The pace of a run is estimated if the operators of no group take at least this share of it.
CONTROL = 0.2

#: The times of all operators in one profiled run, in the order of execution.
Run = Iterable[NodeTime]


def estimate(
    before: onnx.ModelProto,
    after: onnx.ModelProto,
    rewrites: Sequence[Rewrite],
    groups: Sequence[Group],
    runs: tuple[Sequence[Run], Sequence[Run]],
) -> dict[Group, Estimate]:
    """Estimate the gain of each group from profiled runs of two models, the second of which has all groups.

    A change of layout counts for the group of the operator after it, or else before it. Any group may have caused the
    gain of operators that belong to no group.

    Parameters
    ----------
    before, after : onnx.ModelProto
        The profiled models.
    rewrites : sequence of Rewrite
        The rewrites that created the second model.
    groups : sequence of Group
    runs : (sequence, sequence)
        Runs of both models, which alternated.

    Returns
    -------
    dict
        Group → estimate. A group is missing if not all of its rewrites were made, or if it shares operators with
        another group.
    """
    seen = [[assign_to_nodes(proto, run) for run in each] for proto, each in zip((before, after), runs, strict=True)]
    owners = _find_owners(groups, rewrites)
    timed = [{i: 1.0 for run in each for i, _ in run if i is not None} for each in seen]
    of: tuple[dict[int, Group], dict[int, Group]] = ({}, {})
    made = {r.site for r in rewrites}
    vague = {g for g in groups if not made.issuperset(g.sites)}
    for a, b in align(before, after, rewrites, (timed[0], timed[1])):
        mine = {g for i in a for name in before.graph.node[i].output for g in owners.get(name, ())}
        vague |= mine if len(mine) > 1 else set()
        if len(mine) == 1:
            (group,) = mine
            of[0].update(dict.fromkeys(a, group))
            of[1].update(dict.fromkeys(b, group))
    spent = [[_sum_by_group(run, of[k]) for run in each] for k, each in enumerate(seen)]
    totals = np.array([[sum(times.values()) for times in each] for each in spent])
    scales = _estimate_pace(spent, totals)
    whole = float(np.median(totals[0] / scales[0]))
    gains: dict[Group, Array] = {g: _times(spent[0], g) / scales[0] - _times(spent[1], g) / scales[1] for g in groups}
    credit = _estimate_credit(spent, whole)
    found = {g: (_speedup(whole, gain), _speedup(whole, gain + credit)) for g, gain in gains.items() if g not in vague}
    if len(found) == 1 and len(groups) == 1:  # it caused every change
        (group, (own, best)), total = next(iter(found.items())), Evidence.from_logs(np.log(totals[0] / totals[1]))
        return {group: Estimate(own, max(best, total, key=lambda e: e.speedup))}
    return {g: Estimate(*evidence) for g, evidence in found.items()}


def _speedup(whole: float, gain: Array) -> Evidence:
    return Evidence.from_logs(np.log(whole / np.maximum(whole - gain, 1e-9)))


def _times(runs: Sequence[Mapping[Group | None, float]], group: Group | None) -> Array:
    return np.array([times.get(group, 0.0) for times in runs])


def _estimate_credit(spent: Sequence[Sequence[Mapping[Group | None, float]]], whole: float) -> float:
    """Estimate the milliseconds that operators of no group surely gained, because layouts changed around them."""
    apart = _times(spent[0], None) - _times(spent[1], None)
    middle = float(np.median(apart))
    error = 1.2533 * 1.4826 * float(np.median(np.abs(apart - middle))) / math.sqrt(len(apart))  # of a median
    return max(0.0, middle - max(2 * error, SESSIONS * whole))


def _estimate_pace(spent: Sequence[Sequence[Mapping[Group | None, float]]], totals: Array) -> Array:
    """Estimate how slow the machine was in each run, from the operators of no group.

    Runs are compared with other runs of the same model, because these operators may have another layout in the other
    model.
    """
    same = np.array([_times(runs, None) for runs in spent])
    if np.min(same) < CONTROL * np.min(totals):
        return np.ones_like(same)
    return np.asarray(same / np.median(same, axis=1, keepdims=True))


def _find_owners(groups: Sequence[Group], rewrites: Sequence[Rewrite]) -> dict[str, set[Group]]:
    """Map each tensor of the first model to the groups that rewrote it."""
    of = {site: g for g in groups for site in g.sites}
    owners: defaultdict[str, set[Group]] = defaultdict(set)
    for r in rewrites:
        if r.site in of:
            for name in (*(old for old, _ in r.became), r.site.tensor):
                owners[name].add(of[r.site])
    return dict(owners)


def _sum_by_group(run: Sequence[tuple[int | None, float]], of: dict[int, Group]) -> dict[Group | None, float]:
    """Sum the milliseconds of a run by group; None is no group. A change of layout counts for a neighbour's group."""
    owner = [None if i is None else of.get(i) for i, _ in run]
    total: defaultdict[Group | None, float] = defaultdict(float)
    for k, (i, spent) in enumerate(run):
        group = owner[k]
        if i is None:
            before = next((owner[m] for m in range(k - 1, -1, -1) if run[m][0] is not None), None)
            after = next((owner[m] for m in range(k + 1, len(run)) if run[m][0] is not None), None)
            group = after or before
        total[group] += spent
    return dict(total)
