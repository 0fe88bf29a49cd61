"""Profile-guided estimates: the gain of each group of rewrites, from profiled runs without any group and with all.

The time of one operator is a small part of a run, and so is its noise. So profiles separate gains that races cannot.
But only the whole model shows the cost of a change of layout. Therefore each group is also credited with the gain of
its neighbours, whose layout may have changed, and a group is kept only if a race confirms it. Noise in unrelated
operators does not count.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx

from pwopt.algebra import Array
from pwopt.graph.operators import WEIGHTED_OPERATORS
from pwopt.rewriting.records import Rewrite
from pwopt.running.session import NodeTime
from pwopt.running.timing import Evidence
from pwopt.selecting.autotuning import Estimate
from pwopt.selecting.groups import Group
from pwopt.selecting.profile_alignment import BLOCKED, align, assign_to_nodes, find_kernels, find_origins

#: Times of operators in two sessions of one model differ by this share, because their memory is placed differently.
SESSIONS = 0.015
#: The pace of a run is estimated if the operators of no group take at least this share of it.
CONTROL = 0.2

#: No estimate of a speed-up exceeds this: slow spells may make the gain of a run as long as the run itself.
LARGEST = 100.0

#: The times of all operators in one profiled run, in the order of execution.
Run = Sequence[NodeTime]


def estimate(
    before: onnx.ModelProto,
    after: onnx.ModelProto,
    rewrites: tuple[Sequence[Rewrite], Sequence[Rewrite]],
    groups: Sequence[Group],
    runs: tuple[Sequence[Run], Sequence[Run]],
) -> dict[Group, Estimate]:
    """Estimate the gain of each group from profiled runs of two models, the second of which has all groups.

    A change of layout counts for the group of the operator after it, or else before it. A group may also have caused
    the gain of its neighbours, and of their neighbours where a neighbour has another kernel in the second model.

    Parameters
    ----------
    before, after : onnx.ModelProto
        The profiled models.
    rewrites : (sequence of Rewrite, sequence of Rewrite)
        The rewrites that created each model.
    groups : sequence of Group
    runs : (sequence, sequence)
        Runs of both models, which alternated.

    Returns
    -------
    dict
        Group → estimate. A group is missing if not all of its rewrites were made, if it shares operators with another
        group, or if none of its operators is found.
    """
    seen = [[assign_to_nodes(proto, run) for run in each] for proto, each in zip((before, after), runs, strict=True)]
    timed = [{i: 1.0 for run in each for i, _ in run if i is not None} for each in seen]
    classes = align(before, after, rewrites, (timed[0], timed[1]))
    of, vague = _attribute_classes(before, classes, groups, rewrites)
    member = [{i: k for k, both in enumerate(classes) for i in both[side]} for side in (0, 1)]
    spent = [[_sum_by_class(run, member[side], of) for run in each] for side, each in enumerate(seen)]
    kernels = [_find_kernels(proto, member[side], runs[side]) for side, proto in enumerate((before, after))]
    links = _link_classes((before, after), member)
    rest = set(range(len(classes))).difference(of)
    changed = {k for k in rest if kernels[0].get(k) != kernels[1].get(k)}
    totals = np.array([[sum(times.values()) for times in each] for each in spent])
    scales = _estimate_pace(np.array([_times(each, rest) for each in spent]), totals)
    whole = float(np.median(totals[0] / scales[0]))
    found = {}
    for g in groups:
        own = {k for k, group in of.items() if group is g}
        near = _find_neighbours(own, links, changed) & rest
        gain = _times(spent[0], own) / scales[0] - _times(spent[1], own) / scales[1]
        credit = _estimate_credit(_times(spent[0], near), _times(spent[1], near))
        found[g] = Estimate(_speedup(whole, gain), _speedup(whole, gain + credit))
    return {g: each for g, each in found.items() if g not in vague}


def bound_speedups(proto: onnx.ModelProto, groups: Sequence[Group], runs: Sequence[Run]) -> dict[Group, float]:
    """Bound the speed-up by each group, from profiled runs of the model without any group.

    A group saves at most the time of the operators that it affects (Amdahl, "Validity of the single processor approach
    to achieving large scale computing capabilities", AFIPS 1967). These are the operators that it removes, and their
    neighbours, because the layout of those may change. A change of layout passes through operators without weights, so
    their neighbours are included. Neighbours with weights that already have the blocked layout gain nothing.

    Parameters
    ----------
    proto : onnx.ModelProto
    groups : sequence of Group
    runs : sequence
        Profiled runs of a marked copy of the model.

    Returns
    -------
    dict
        Group → 1/(1 − s), where s is the share of these operators in the time of a run. A group is missing if the model
        lacks a tensor that the group removes.
    """
    seen = [assign_to_nodes(proto, run) for run in runs]
    kernels = find_kernels(proto, {i: 1.0 for run in seen for i, _ in run if i is not None})
    member, nodes = dict(enumerate(kernels)), proto.graph.node
    makers = {name: member[i] for i, node in enumerate(nodes) for name in node.output if name}
    heavy = {member[i] for i, node in enumerate(nodes) if node.op_type in WEIGHTED_OPERATORS}
    layouts = _find_kernels(proto, member, runs)
    final = {k for k in heavy if k in layouts and all(blocked for _, blocked in layouts[k])}
    links, bounds = _link_classes((proto,), [member]), dict[Group, float]()
    for g in groups:
        if g.tensors and makers.keys() >= g.tensors:
            own = {makers[name] for name in g.tensors}
            affected = own | _find_neighbours(own, links, set(kernels) - heavy) - final
            share = float(np.median([_find_share(run, member, affected) for run in seen]))
            bounds[g] = 1 / max(1 - share, 1e-9)
    return bounds


def _find_share(run: Sequence[tuple[int | None, float]], member: Mapping[int, int], affected: set[int]) -> float:
    """Find the share of some classes in a run, with the changes of layout before and after them."""
    inside = [i is not None and member[i] in affected for i, _ in run]
    spent = 0.0
    for k, (i, time) in enumerate(run):
        if i is None:
            before = next((inside[m] for m in range(k - 1, -1, -1) if run[m][0] is not None), False)
            after = next((inside[m] for m in range(k + 1, len(run)) if run[m][0] is not None), False)
            spent += time if before or after else 0.0
        else:
            spent += time if inside[k] else 0.0
    return spent / max(sum(time for _, time in run), 1e-12)


def _attribute_classes(
    before: onnx.ModelProto,
    classes: Sequence[tuple[list[int], list[int]]],
    groups: Sequence[Group],
    rewrites: tuple[Sequence[Rewrite], Sequence[Rewrite]],
) -> tuple[dict[int, Group], set[Group]]:
    """Map the number of each class to the group that changed it; also return groups that profiles cannot separate."""
    owners, made = _find_owners(groups, rewrites[1]), {r.site for r in rewrites[1]}
    for new, originals in find_origins(rewrites[0]).items():
        owners[new] = owners.get(new, set()).union(*(owners.get(old, ()) for old in originals))
    of, vague = dict[int, Group](), {g for g in groups if not made.issuperset(g.sites)}
    for k, (a, _) in enumerate(classes):
        mine = {g for i in a for name in before.graph.node[i].output for g in owners.get(name, ())}
        if len(mine) == 1:
            (of[k],) = mine
        else:
            vague |= mine
    return of, vague.union(set(groups).difference(of.values()))


def _find_kernels(
    proto: onnx.ModelProto, member: Mapping[int, int], runs: Sequence[Run]
) -> dict[int, set[tuple[str, bool]]]:
    """Map each class to its kernels in the first run: operators, and whether they ran in the blocked layout."""
    found: defaultdict[int, set[tuple[str, bool]]] = defaultdict(set)
    for run in runs[:1]:
        for node, (i, _) in zip(run, assign_to_nodes(proto, run), strict=True):
            if i is not None:
                found[member[i]].add((node.op, node.name.endswith(BLOCKED)))
    return dict(found)


def _link_classes(protos: Sequence[onnx.ModelProto], member: Sequence[Mapping[int, int]]) -> dict[int, set[int]]:
    """Map each class to the classes that it exchanges a tensor with, in any of the models."""
    links: defaultdict[int, set[int]] = defaultdict(set)
    for proto, of in zip(protos, member, strict=True):
        maker = {name: of[i] for i, node in enumerate(proto.graph.node) for name in node.output if name}
        for i, node in enumerate(proto.graph.node):
            for name in node.input:
                if name in maker and maker[name] != of[i]:
                    links[of[i]].add(maker[name])
                    links[maker[name]].add(of[i])
    return dict(links)


def _find_neighbours(own: set[int], links: Mapping[int, set[int]], passable: set[int]) -> set[int]:
    """Find the neighbours of some classes, those of passable neighbours included."""
    found, waiting = set[int](), list(own)
    while waiting:
        for k in links.get(waiting.pop(), set()) - own - found:
            found.add(k)
            waiting += [k] if k in passable else []
    return found


def _speedup(whole: float, gain: Array) -> Evidence:
    return Evidence.from_logs(np.log(whole / np.maximum(whole - gain, whole / LARGEST)))


def _times(runs: Sequence[Mapping[int | None, float]], classes: Collection[int]) -> Array:
    return np.array([sum(times.get(k, 0.0) for k in classes) for times in runs])


def _estimate_credit(before: Array, after: Array) -> float:
    """Estimate the milliseconds that the neighbours of a group surely gained, because layouts changed around them.

    Parameters
    ----------
    before, after : arrays of float64, shape (runs,)
        Milliseconds of the neighbours in each run of both models.
    """
    apart = before - after
    middle = float(np.median(apart))
    error = 1.2533 * 1.4826 * float(np.median(np.abs(apart - middle))) / math.sqrt(len(apart))  # of a median
    return max(0.0, middle - max(2 * error, SESSIONS * float(np.median(before))))


def _estimate_pace(same: Array, totals: Array) -> Array:
    """Estimate how slow the machine was in each run, from the operators of no group.

    Runs are compared with other runs of the same model, because these operators may have another layout in the other
    model.

    Parameters
    ----------
    same, totals : arrays of float64, shape (models, runs)
        Milliseconds of the operators of no group, and of all operators.
    """
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


def _sum_by_class(
    run: Sequence[tuple[int | None, float]], member: Mapping[int, int], of: Mapping[int, Group]
) -> dict[int | None, float]:
    """Sum the milliseconds of a run by class. A change of layout counts for a neighbour, best for one of a group."""
    number = [None if i is None else member[i] for i, _ in run]
    total: defaultdict[int | None, float] = defaultdict(float)
    for k, (i, spent) in enumerate(run):
        mine = number[k]
        if i is None:
            before = next((number[m] for m in range(k - 1, -1, -1) if run[m][0] is not None), None)
            after = next((number[m] for m in range(k + 1, len(run)) if run[m][0] is not None), None)
            mine = next((near for near in (after, before) if near in of), before if after is None else after)
        total[mine] += spent
    return dict(total)
