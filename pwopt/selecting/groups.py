"""Groups of measured rewrites that look alike: one decision holds for all rewrites of a group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pwopt.rewriting.records import Rewrite, Site
from pwopt.rewriting.wording import drop_name, join_clauses


@dataclass(frozen=True)
class Group:
    """Measured rewrites with the same signature.

    Attributes
    ----------
    pass_name, signature : str
    sites : tuple of Site
    macs : int
        Multiply-adds of the operators that they replace.
    tensors : frozenset of str
        The outputs of those operators; empty if the rewrites do not list all of them.
    """

    pass_name: str
    signature: str
    sites: tuple[Site, ...]
    macs: int
    tensors: frozenset[str] = frozenset()

    @property
    def details(self) -> str:
        """The signature without the name of the pass."""
        return drop_name(self.pass_name, self.signature)

    @property
    def title(self) -> str:
        """The pass and the signature, for users."""
        return join_clauses(self.pass_name, self.details)


def group_rewrites(rewrites: Iterable[Rewrite]) -> list[Group]:
    """Group measured rewrites by pass and by the part of the signature before the colon, as in "gates: 72 at 28×28".

    The pass that saves most multiply-adds comes first, because time may run out before the last one. Among passes that
    save the same number, later passes come first: if two passes can act on one place, the earlier one does, and it must
    be raced on top of the other. Passes that save nothing keep their order. Within a pass, the largest group comes
    first.
    """
    found: dict[tuple[str, str], list[Rewrite]] = {}
    for r in rewrites:
        found.setdefault((r.pass_name, r.signature.partition(": ")[0]), []).append(r)
    listed = [
        Group(
            name,
            _join_signatures(rs),
            tuple(r.site for r in rs),
            sum(r.macs_before for r in rs),
            _list_tensors(rs),
        )
        for (name, _), rs in found.items()
    ]
    saved = Counter[str]()
    for (name, _), rs in found.items():
        saved[name] += max(0, sum(r.macs_before - r.macs_after for r in rs))
    names = list(dict.fromkeys(g.pass_name for g in listed))
    order = sorted(names, key=lambda name: (-saved[name], names.index(name) * (-1 if saved[name] else 1)))
    return sorted(listed, key=lambda g: (order.index(g.pass_name), -g.macs))


def _list_tensors(rewrites: Sequence[Rewrite]) -> frozenset[str]:
    """List the outputs of all removed operators; empty if a rewrite lists fewer outputs than operators."""
    listed = [{old for old, _ in r.became} for r in rewrites]
    if any(len(r.removed) > len(old) or not old for r, old in zip(rewrites, listed, strict=True)):
        return frozenset()
    return frozenset().union(*listed)


def _join_signatures(rewrites: Sequence[Rewrite]) -> str:
    """Join signatures into that of a group: the common part, then each distinct detail with its count."""
    kind, _, details = rewrites[0].signature.partition(": ")
    counted = Counter(r.signature.partition(": ")[2] for r in rewrites)
    listed = ", ".join(f"{n} × {detail}" if n > 1 else detail for detail, n in sorted(counted.items()))
    return f"{kind}: {listed}" if details else kind
