"""Combine measured rewrites that can pay only together with others (`Rewrite.enabled_by`) with those others.

For example, onnxruntime's CPU provider gains from more channels only where convolutions are 2-D. A convolution over
time becomes 2-D by another rewrite, which may not pay alone either, so only a race of both shows the gain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pwopt.graph.reasons import Reason
from pwopt.rewriting.records import Rewrite, Site, Skip
from pwopt.selecting.groups import Group, group_rewrites


def combine(rewrites: Sequence[Rewrite], groups: Sequence[Group]) -> tuple[list[Group], list[Skip]]:
    """Combine rewrites with the groups that enable them.

    Parameters
    ----------
    rewrites : sequence of Rewrite
        Rewrites that can pay only together with others.
    groups : sequence of Group
        The groups that can pay alone.

    Returns
    -------
    list of Group
        Each one is a group that enables some of the rewrites, together with all of those that change one of the same
        operators. Its pass name lists the passes: "unroll-frames + pad-channels". Combinations with most multiply-adds
        come first.
    list of Skip
        The rewrites that no group enables.
    """
    combined, enabled = list[Group](), set[Site]()
    for group in groups:
        mine = [
            r for r in rewrites if group.pass_name in r.enabled_by and not group.tensors.isdisjoint(_find_tensors(r))
        ]
        if mine:
            combined.append(_join([group, *group_rewrites(mine)]))
            enabled.update(r.site for r in mine)
    combined.sort(key=lambda g: -g.macs)  # the sort is stable
    return combined, [Skip(_explain(r), r.site) for r in rewrites if r.site not in enabled]


def _find_tensors(rewrite: Rewrite) -> list[str]:
    return [old for old, _ in rewrite.became]


def _join(groups: Sequence[Group]) -> Group:
    parts = [g.tensors for g in groups]
    return replace(
        groups[0],
        pass_name=" + ".join(dict.fromkeys(g.pass_name for g in groups)),
        signature="; ".join(g.signature for g in groups),
        sites=tuple(site for g in groups for site in g.sites),
        tensors=frozenset[str]().union(*parts) if all(parts) else frozenset(),
    )


def _explain(rewrite: Rewrite) -> str:
    passes = " or ".join(rewrite.enabled_by)
    return Reason("{}: it can pay only together with {}, and none of them applies here", rewrite.signature, passes)
