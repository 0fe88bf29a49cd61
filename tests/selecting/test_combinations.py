from __future__ import annotations

from dataclasses import replace

import numpy as np
from helpers import build, normal

import pwopt
from pwopt.passes import PadChannels, UnrollFrames
from pwopt.rewriting.records import Rewrite, Site, Skip
from pwopt.running.timing import Evidence
from pwopt.selecting.autotuning import Decision
from pwopt.selecting.candidate_base import run_passes
from pwopt.selecting.combinations import combine
from pwopt.selecting.groups import Group, group_rewrites
from pwopt.selecting.rewrite_selection import Candidates, Selection, find_candidates
from pwopt.selecting.tuning_records import NoTuningRecords


def rewrite(name: str, signature: str, site: str, tensors: str, enabled_by: tuple[str, ...] = ()) -> Rewrite:
    became = tuple((t, f"{t}_new") for t in tensors)
    return Rewrite("", became=became, signature=signature, site=Site(name, site), enabled_by=enabled_by)


FRAMES, RANK = rewrite("unroll", "2 convolutions: x", "a", "ab"), rewrite("rank", "lines", "l", "lm")
PAD, FAR = rewrite("pad", "more channels: 5", "a", "a", ("unroll",)), rewrite("pad", "more: 7", "q", "q", ("unroll",))


def test_rewrites_join_the_groups_that_change_the_same_operators() -> None:
    groups = group_rewrites([FRAMES, RANK])
    joint, useless = combine([PAD, FAR], groups)
    sites = (Site("unroll", "a"), Site("pad", "a"))
    assert joint == [
        Group("unroll + pad", "2 convolutions: x; more channels: 5", sites, 0, frozenset("ab")),
    ]
    assert [(s.site, s.reason) for s in useless] == [
        (Site("pad", "q"), "more: 7: it can pay only together with unroll, and none of them applies here")
    ]


def test_every_group_that_enables_a_rewrite_is_combined_with_it() -> None:
    both = replace(PAD, enabled_by=("unroll", "rank"), became=(("b", ""), ("l", "")))
    joint, useless = combine([both], group_rewrites([RANK, FRAMES]))
    assert [g.pass_name for g in joint] == ["rank + pad", "unroll + pad"]
    assert not useless
    larger = [replace(g, macs=9) if g.pass_name == "unroll" else g for g in group_rewrites([RANK, FRAMES])]
    assert [g.pass_name for g in combine([both], larger)[0]] == ["unroll + pad", "rank + pad"]


def test_other_groups_do_not_enable_a_rewrite() -> None:
    joint, useless = combine([PAD], group_rewrites([replace(FRAMES, site=Site("other", "a"))]))
    assert not joint
    assert len(useless) == 1
    assert combine([], group_rewrites([FRAMES])) == ([], [])


def test_a_site_that_pays_in_a_combination_is_not_reported_as_dropped() -> None:
    groups = group_rewrites([FRAMES])
    joint, _ = combine([PAD], groups)
    slower, faster = Evidence.from_logs(np.full(8, -0.1)), Evidence.from_logs(np.full(8, 0.7))
    decisions = [Decision(groups[0], slower), Decision(joint[0], faster)]
    selection = Selection.from_decisions(Candidates((*groups, *joint), (), {}), decisions, NoTuningRecords())
    assert selection.allowed == {Site("unroll", "a"), Site("pad", "a")}
    assert not selection.dropped
    selection = Selection.from_decisions(Candidates((*groups, *joint), (), {}), decisions[:1], NoTuningRecords())
    assert selection.allowed == frozenset()
    assert {s.site for s in selection.dropped} == {Site("unroll", "a"), Site("pad", "a")}


def test_padded_videos_become_padded_frames() -> None:
    """Where both passes may act at the sites that each one found alone."""
    body = "(float[1,4,3,6,6] x) => (float[N] y) { a = Conv(x, w) b = Conv<pads=[1,1,1,1,1,1], group=18>(a, d) y = Conv(b, v) }"
    weights = {"w": normal(18, 4, 1, 1, 1), "d": normal(18, 1, 3, 3, 3), "v": normal(4, 18, 1, 1, 1)}
    model = build(body, {k: v.astype(np.float32) for k, v in weights.items()})
    found = []
    for kind in (PadChannels, UnrollFrames):
        p = kind()
        p.scope = "exact"
        found += run_passes(pwopt.load(model), [p], (), {}).rewrites
    joint, _ = combine([r for r in found if r.enabled_by], group_rewrites(r for r in found if not r.enabled_by))
    passes = [PadChannels(), UnrollFrames()]
    for p in passes:
        p.scope = "exact"
    done = run_passes(pwopt.load(model), passes, (), {}, frozenset(joint[0].sites))
    shapes = {t.name: tuple(t.dims) for t in done.proto.graph.initializer}
    assert {shapes[n.input[1]][:2] for n in done.proto.graph.node if n.op_type == "Conv"} == {(20, 4), (20, 1), (4, 20)}


def test_combinations_are_raced_before_their_parts() -> None:
    found = find_candidates(_Found([FRAMES, PAD]), NoTuningRecords())  # type: ignore[arg-type]
    assert [g.pass_name for g in found.order()] == ["unroll + pad", "unroll"]
    assert not found.refused
    lonely = find_candidates(_Found([RANK, PAD]), NoTuningRecords())  # type: ignore[arg-type]
    assert [g.pass_name for g in lonely.order()] == ["rank"]
    assert [s.site for s in lonely.refused] == [PAD.site]


class _Found:
    """A compilation in which these rewrites can be made."""

    provider_kind = "cpu"

    def __init__(self, rewrites: list[Rewrite]) -> None:
        self.rewrites = rewrites

    def find_opportunities(self) -> tuple[list[Rewrite], list[Skip]]:
        return self.rewrites, []
