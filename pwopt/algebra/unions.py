"""Disjoint sets."""

from __future__ import annotations


class Unions:
    """Sets of integers that are joined until what belongs together is one set (Tarjan, 1975)."""

    def __init__(self) -> None:
        self._parent: dict[int, int] = {}

    def root(self, key: int) -> int:
        """The same number for all members of a set."""
        parent = self._parent
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    def join(self, a: int, b: int) -> None:
        """Make the sets of `a` and `b` one, with the root of `b`."""
        self._parent[self.root(a)] = self.root(b)
