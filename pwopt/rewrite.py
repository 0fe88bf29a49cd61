"""Passes, their records, and the worklist driver that runs them."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import onnx_graphsurgeon as gs

from pwopt.certify import Certificate
from pwopt.cost import macs
from pwopt.graph import View
from pwopt.regions import Journal, Operator, Region

#: Judges what a rewrite did to its region of the graph.
Certifier = Callable[[Region, View], Certificate]

#: A pipeline repeats until nothing changes; real models need two or three rounds.
MAX_ROUNDS = 8


@dataclass(frozen=True)
class Rewrite:
    """What a pass did at one place.

    Attributes
    ----------
    reason : str
        One sentence for the user.
    removed, added : tuple of str
        Operators that went and came, as "Op name".
    macs_before, macs_after : int
        Multiply-adds of those; 0 where sizes are not known.
    residual : float
        Largest relative rounding of folded weights, max |rounded − exact| / max |exact|.
    became : tuple of (str, str)
        Outputs of the removed operators, each with the tensor that their replacement produces ("" if none).
    signature : str
        Of a measured rewrite: those that have it in common, up to a colon, are measured, kept or dropped together.
    pass_name, site : str
        Filled in by the driver. The site is stable across runs: pass name and output tensor.
    before, after : tuple of Operator
        The region that changed, filled in by the driver if it certifies.
    certificate : Certificate or None
    """

    reason: str
    removed: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    macs_before: int = 0
    macs_after: int = 0
    residual: float = 0.0
    became: tuple[tuple[str, str], ...] = ()
    signature: str = ""
    pass_name: str = ""
    site: str = ""
    before: tuple[Operator, ...] = ()
    after: tuple[Operator, ...] = ()
    certificate: Certificate | None = None

    @classmethod
    def of(cls, reason: str, records: Sequence[Rewrite], renamed: Mapping[str, str] | None = None) -> Rewrite:
        """Several replacements as one rewrite; `renamed` tells what their results are called since."""
        names = renamed or {}
        return cls(
            reason,
            tuple(name for r in records for name in r.removed),
            tuple(name for r in records for name in r.added),
            sum(r.macs_before for r in records),
            sum(r.macs_after for r in records),
            max((r.residual for r in records), default=0.0),
            tuple((old, names.get(new, new)) for r in records for old, new in r.became),
        )

    def signed(self, signature: str) -> Rewrite:
        return replace(self, signature=signature)


@dataclass(frozen=True)
class Skip:
    """Why a pass left a place alone that it is about: a sentence a user can act on."""

    reason: str
    pass_name: str = ""
    site: str = ""

    @property
    def tensor(self) -> str:
        """The output tensor of the place."""
        return self.site.partition(":")[2]


class Pass:
    """One rewrite: a fact about graphs, in one class.

    Subclasses set `name` and write `match_and_rewrite`. A pass sees one node at a time and returns None
    ("not mine"), a `Skip` ("mine, but refused, because") or a `Rewrite` ("done").
    """

    name: ClassVar[str]
    #: When the rewrite is kept: "always", "if cheaper" or "measured".
    policy: ClassVar[str] = "always"
    #: How many operators above a rewrite hold facts that it rests on, beside its own region.
    context: ClassVar[int] = 0
    #: Whether a measured rewrite is made wherever it is exact, because it was measured or asked for.
    eager: bool = False
    #: Whether it runs before the measured passes only, since it would undo what they do.
    early: ClassVar[bool] = False

    def start(self, rw: Rewriter) -> None:
        """Look at the whole graph once before the first node."""

    def match_and_rewrite(self, node: gs.Node, rw: Rewriter) -> Rewrite | Skip | None:
        raise NotImplementedError

    def run(
        self,
        graph: gs.Graph,
        *,
        denied: Iterable[str] = (),
        sizes: Mapping[str, Sequence[int]] | None = None,
        reserved: Iterable[str] = (),
        certifier: Certifier | None = None,
    ) -> Outcome:
        """Apply this pass to a graph until nothing more applies.

        Parameters
        ----------
        graph : gs.Graph
            Edited in place. `pwopt.load` gives one with inferred shapes.
        denied : iterable of str
            Sites that must not be rewritten.
        sizes : mapping, optional
            Representative tensor sizes, for costs where shapes are dynamic.
        reserved : iterable of str, optional
            Names that new tensors must not take.
        certifier : callable, optional
            Gives each rewrite its certificate: `pwopt.certify.certify`.

        Returns
        -------
        Outcome

        Examples
        --------
        >>> import pwopt
        >>> from pwopt.passes import FoldChains
        >>> model = pwopt.load("models/linear_sequence.onnx")
        >>> outcome = FoldChains().run(model.graph)
        >>> [node.op for node in model.graph.nodes]
        ['Conv']
        """
        rw = Rewriter(graph, denied, sizes, reserved, certifier)
        outcome = rw.apply(self)
        rw.close()
        return outcome


@dataclass(frozen=True)
class Outcome:
    """Everything a run did and declined to do."""

    rewrites: tuple[Rewrite, ...] = ()
    skips: tuple[Skip, ...] = ()


class Rewriter(View):
    """A `View` with the records of the pass that runs, and the queue of nodes it has yet to look at.

    Only neighbours of a change are looked at again, so a run is near-linear in the number of nodes.
    """

    def __init__(
        self,
        graph: gs.Graph,
        denied: Iterable[str] = (),
        sizes: Mapping[str, Sequence[int]] | None = None,
        reserved: Iterable[str] = (),
        certifier: Certifier | None = None,
    ) -> None:
        super().__init__(graph, sizes, reserved)
        self._certifier = certifier
        self._denied = frozenset(denied)
        self._owner = ""
        self._queue: deque[gs.Node] = deque()
        self._queued: set[int] = set()

    def site(self, node: gs.Node) -> str:
        """Stable identifier of a place: the pass that runs and the tensor that the node produces, by its first name."""
        named = next(filter(None, (t.name for t in node.outputs)), node.name)
        return f"{self._owner}:{self.origin(named)}"

    def denied(self, node: gs.Node) -> bool:
        return bool(self._denied) and self.site(node) in self._denied

    def apply(self, p: Pass, allowed: Collection[str] | None = None) -> Outcome:
        """Run one pass until nothing more applies; at the `allowed` sites only, if any are given."""
        self._owner = p.name
        rewrites: list[Rewrite] = []
        skips: dict[str, Skip] = {}
        p.start(self)
        nodes = self.nodes()
        self._queue.extend(nodes)
        self._queued.update(map(id, nodes))
        while self._queue:
            node = self._queue.popleft()
            self._queued.discard(id(node))
            if node not in self:
                continue
            site = self.site(node)
            if allowed is not None and site not in allowed:
                continue
            if self._certifier is not None:
                self.journal = Journal()
            result = Skip("denied by the user") if self.denied(node) else p.match_and_rewrite(node, self)
            if isinstance(result, Rewrite):
                rewrites.append(self._certified(replace(result, pass_name=p.name, site=site), p.context))
                skips.pop(site, None)
            elif isinstance(result, Skip):
                skips[site] = replace(result, pass_name=p.name, site=site)
        return Outcome(tuple(rewrites), tuple(skips.values()))

    def _certified(self, rewrite: Rewrite, context: int) -> Rewrite:
        if self._certifier is None or self.journal is None:
            return rewrite
        region = Region.of(self, self.journal, context)
        before, after = region.drawings(self)
        return replace(rewrite, before=before, after=after, certificate=self._certifier(region, self))

    def _enqueue(self, node: gs.Node | None) -> None:
        if node is not None and node in self and id(node) not in self._queued:
            self._queued.add(id(node))
            self._queue.append(node)

    def enqueue_around(self, node: gs.Node) -> None:
        """Look again at a node and its neighbours."""
        self._enqueue(node)
        for tensor in node.inputs:
            self._enqueue(self.producer(tensor))
        for tensor in node.outputs:
            for reader in self.readers(tensor):
                self._enqueue(reader)

    def replace(self, old: Sequence[gs.Node], new: Sequence[gs.Node], reason: str, residual: float = 0.0) -> Rewrite:
        """Put `new` where the last of `old` stood; the record counts operators and multiply-adds."""
        before = [macs(self, n) for n in old]
        removed = tuple(describe(n) for n in old)
        kept = list(new)
        result = kept[-1].outputs[0].name if kept else ""
        became = tuple((t.name, result) for n in old for t in n.outputs if t.name)
        for node in kept:
            self.add(node, at=old[-1])
        neighbours = [self.producer(t) for n in old for t in n.inputs]
        for node in old:
            self.remove(node)
        after = [macs(self, n) for n in kept]
        exact = None not in before and None not in after
        for neighbour in neighbours:
            self._enqueue(neighbour)
        for node in kept:
            self.enqueue_around(node)
        return Rewrite(
            reason,
            removed,
            tuple(describe(n) for n in kept),
            sum(m or 0 for m in before) if exact else 0,
            sum(m or 0 for m in after) if exact else 0,
            residual,
            became,
        )


def describe(node: gs.Node) -> str:
    return f"{node.op} {node.name}".strip()


@dataclass(frozen=True)
class Pipeline:
    """Passes in turn, until every one has nothing left to do; measured ones once, when the others have finished.

    A pure function of the graph, the denied sites and the allowed ones: the same inputs give the same graph, byte
    for byte.
    """

    passes: Sequence[Pass]

    def run(
        self,
        graph: gs.Graph,
        *,
        denied: Iterable[str] = (),
        allowed: Collection[str] | None = None,
        sizes: Mapping[str, Sequence[int]] | None = None,
        reserved: Iterable[str] = (),
        certifier: Certifier | None = None,
    ) -> Outcome:
        """Edit `graph` in place; parameters as for `Pass.run`. Refusals are those of each pass's last run.

        `allowed` lists the sites where measured passes may act; None for all. Refusals are of tensors that the graph
        had to begin with: nobody asked for what becomes of those that a rewrite made.
        """
        named = {t.name or n.name for n in graph.nodes for t in n.outputs}
        rw = Rewriter(graph, denied, sizes, reserved, certifier)
        rewrites: list[Rewrite] = []
        skips: dict[str, tuple[Skip, ...]] = {}
        settled = [p for p in self.passes if p.policy != "measured"]
        _repeat(rw, settled, rewrites, skips)
        finished = len(rewrites)
        for p in self.passes:
            if p.policy == "measured":
                outcome = rw.apply(p, allowed)
                rewrites.extend(outcome.rewrites)
                skips[p.name] = outcome.skips
        if len(rewrites) > finished:
            _repeat(rw, [p for p in settled if not p.early], rewrites, skips)
        rw.close()
        listed = itertools.chain.from_iterable(skips.values())
        return Outcome(tuple(rewrites), tuple(s for s in listed if s.tensor in named))


def _repeat(rw: Rewriter, passes: Sequence[Pass], rewrites: list[Rewrite], skips: dict[str, tuple[Skip, ...]]) -> None:
    idle = 0
    for p in itertools.islice(itertools.cycle(passes), MAX_ROUNDS * len(passes)):
        outcome = rw.apply(p)
        rewrites.extend(outcome.rewrites)
        skips[p.name] = outcome.skips
        idle = 0 if outcome.rewrites else idle + 1
        if idle == len(passes):
            break
