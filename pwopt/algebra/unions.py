"""Disjoint sets."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

Member = TypeVar("Member", bound=Hashable)


class Unions(Generic[Member]):
    """Disjoint sets that are merged step by step (union-find; Tarjan, 1975)."""

    def __init__(self) -> None:
        self._parent: dict[Member, Member] = {}

    def root(self, member: Member) -> Member:
        """The representative of the set that holds `member`: the same one for all its members."""
        parent = self._parent
        while parent.setdefault(member, member) != member:
            parent[member] = member = parent[parent[member]]
        return member

    def join(self, a: Member, b: Member) -> None:
        """Merge the sets of `a` and `b`; the representative of `b` stays."""
        self._parent[self.root(a)] = self.root(b)
