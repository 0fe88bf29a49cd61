"""Passes, and the worklist driver that runs them."""

from __future__ import annotations

import copy
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal, ParamSpec, TypeVar, get_args

from pwopt.algebra import Values
from pwopt.algebra.geometry import Refusal, RefusedError
from pwopt.errors import UsageError, summarize
from pwopt.graph.changes import Change
from pwopt.graph.ir import Graph, Node, Tensor, adopt_node
from pwopt.graph.journal import Journal
from pwopt.graph.provenance import inherit
from pwopt.graph.view import View
from pwopt.maps.cost import macs
from pwopt.rewriting.contract import MAX_REWRITES_PER_NODE, GraphRecord
from pwopt.rewriting.records import Certificate, Outcome, Rewrite, Site, Skip

if TYPE_CHECKING:
    from typing_extensions import Self

P = ParamSpec("P")
T = TypeVar("T")

#: A change at a node with more inputs does not offer their producers again, or n changes would offer n² nodes.
MAX_NEIGHBOURS = 64

#: Certifies what a rewrite changed.
Certifier = Callable[[Change, View], Certificate]
#: The version of the contract between pwopt and a pass. It increases whenever a pass that met it may no longer do so.
CONTRACT = 2
#: When a rewrite is kept.
Policy = Literal["always", "if cheaper", "measured"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
#: When a pass runs: "any": until nothing changes, before the measured passes and again after them; "early": only before
#: them, since it would undo what they do; "late": once, after all others, since it would stand in their way. A measured
#: pass runs once, between the two.
Phase = Literal["any", "early", "late"]
PHASES: tuple[Phase, ...] = get_args(Phase)
#: Where a pass acts: where it expects a gain; wherever the rewrite is exact, because measurements decide afterwards; or
#: wherever it is exact, because the user asked for the pass by name.
Scope = Literal["profitable", "exact", "requested"]


class Pass:
    """One rewrite, in one class.

    A subclass sets `name` and implements `match_and_rewrite`. The first paragraph of its docstring is the identity that
    reports show.

    Attributes
    ----------
    name : str
        Small letters, digits and hyphens. Sites and options use it.
    policy : {"always", "if cheaper", "measured"}
        When a rewrite is kept.
    phase : {"any", "early", "late"}
        When the pass runs; see `Phase`.
    pays_on : frozenset of {"cpu", "gpu", "other"}
        The kinds of execution provider on which the pass may pay. "cpu" is onnxruntime's own provider, which uses a
        blocked layout. On other kinds the pass runs only if the user asks for it by name.
    context : int
        How many operators above its region a certificate may include, because the rewrite relies on facts from there.
    operators : frozenset of str, or None
        The types of the operators at which the pass can match. It is not offered any others. None: all types.
    contract : int
        The version of the contract that the pass was written for. Packages declare it.
    scope : {"profitable", "exact", "requested"}
        Where this instance acts; see `Scope`. The driver sets it.
    """

    name: ClassVar[str]
    policy: ClassVar[Policy] = "always"
    phase: ClassVar[Phase] = "any"
    pays_on: ClassVar[frozenset[str]] = frozenset({"cpu", "gpu", "other"})
    context: ClassVar[int] = 0
    operators: ClassVar[frozenset[str] | None] = None
    contract: ClassVar[int] = CONTRACT
    scope: Scope = "profitable"

    @classmethod
    def identity(cls) -> str:
        """What the pass rewrites, in one formula or sentence."""
        return " ".join((cls.__doc__ or "").partition("\n\n")[0].split())

    @property
    def builtin(self) -> bool:
        """Whether the pass is one of pwopt's."""
        return type(self).__module__.startswith("pwopt.")

    @property
    def eager(self) -> bool:
        """Whether the pass acts wherever its rewrite is exact."""
        return self.scope != "profitable"

    @property
    def requested(self) -> bool:
        """Whether the user asked for the pass by name, so that no measurement decides on its rewrites."""
        return self.scope == "requested"

    @property
    def needs_measuring(self) -> bool:
        """Whether measurements decide on the rewrites of this pass."""
        return self.policy == "measured" and not self.requested

    def start(self, rw: Rewriter) -> None:
        """Look at the whole graph once before the first node."""

    def select_nodes(self, nodes: Sequence[Node]) -> Sequence[Node]:
        """Select the nodes to offer first, in the same order, after `start`: those at which the pass can match."""
        wanted = self.operators
        return nodes if wanted is None else [node for node in nodes if node.op in wanted]

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        raise NotImplementedError

    def branch(self) -> Self:
        """Copy the pass, with its dicts, sets and lists, to continue with a copy of the graph."""
        twin = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, (dict, set, list)):
                setattr(twin, name, value.copy())
        return twin

    def run(
        self,
        graph: Graph,
        *,
        denied: Iterable[Site] = (),
        sizes: Mapping[str, Sequence[int]] | None = None,
        reserved: Iterable[str] = (),
        certifier: Certifier | None = None,
    ) -> Outcome:
        """Apply this pass to a graph until nothing more applies.

        Parameters
        ----------
        graph : Graph
            Edited in place. `pwopt.load` gives one with inferred shapes.
        denied : iterable of Site
            Sites that must not be rewritten.
        sizes : mapping, optional
            Representative tensor sizes, for costs where shapes are dynamic.
        reserved : iterable of str, optional
            Names that new tensors must not take.
        certifier : callable, optional
            Gives each rewrite its certificate: `pwopt.evidence.certify.certify`.

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


class Rewriter(View):
    """A `View` that runs passes, with a queue of the nodes to offer next.

    Only the neighbours of a change are offered again, so a run takes nearly linear time in the number of nodes.
    """

    def __init__(
        self,
        graph: Graph,
        denied: Iterable[Site] = (),
        sizes: Mapping[str, Sequence[int]] | None = None,
        reserved: Iterable[str] = (),
        certifier: Certifier | None = None,
    ) -> None:
        super().__init__(graph, sizes, reserved)
        self._certifier = certifier
        self._denied = frozenset(denied)
        self._owner = ""
        self._queue: deque[Node] = deque()
        self._queued: set[Node] = set()
        self._wanted: frozenset[str] | None = None

    def branch(self, graph: Graph, denied: Iterable[Site] = (), certifier: Certifier | None = None) -> Self:
        """Continue with a copy of the graph, with its own denied sites and its own certifier."""
        twin = super().branch(graph)
        twin._denied, twin._certifier = frozenset(denied), certifier
        twin._queue, twin._queued = deque(), set()
        return twin

    def site(self, node: Node) -> Site:
        """The site of a node: the running pass, and the original name of the tensor that the node computes."""
        return self._make_site(_name_of(node))

    def _make_site(self, name: str) -> Site:
        return Site(self._owner, self.original_name(name))

    def is_denied(self, node: Node) -> bool:
        return bool(self._denied) and self.site(node) in self._denied

    def apply(self, p: Pass, allowed: Collection[Site] | None = None) -> Outcome:
        """Run one pass until nothing more applies.

        Parameters
        ----------
        p : Pass
        allowed : collection of Site, optional
            The sites where it may act. Default: everywhere.

        Raises
        ------
        UsageError
            If a third-party pass raises, does not end, or changes the graph outside its rewrites.
        """
        self._owner = p.name
        rewrites: list[Rewrite] = []
        skips: dict[Site, Skip] = {}
        record = None if p.builtin else GraphRecord(self)
        self._start(p)
        nodes = self.nodes()
        self._wanted = None if self._denied else p.operators  # a denied site is reported whatever its operator
        offered = nodes if self._denied else p.select_nodes(nodes)
        self._queue.extend(offered)
        self._queued.update(offered)
        counts: Counter[Site] = Counter()
        journalled = self._certifier is not None or record is not None
        self.journal = Journal() if journalled else None
        while self._queue:
            node = self._queue.popleft()
            self._queued.discard(node)
            if node not in self._nodes:
                continue
            name, stored = _name_of(node), self.stored
            if allowed is not None and self._make_site(name) not in allowed:
                continue
            if self.journal is not None and (self.journal.states or self.journal.changed):
                self.journal = Journal()
            result: Rewrite | Skip | Refusal | None
            if self._denied and self.is_denied(node):
                result = Skip("denied by the user")
            elif record is None:
                result = self.attempt(p.match_and_rewrite, node, self)
            else:
                result = self._offer(p, node, record)
            if result is None:
                continue
            site = self._make_site(name)
            if not isinstance(result, Rewrite):
                skips[site] = Skip(result.reason, site)
                continue
            rewrites.append(self._record(result, site, self.stored - stored, p.context))
            skips.pop(site, None)
            counts[site] += 1
            limit = MAX_REWRITES_PER_NODE * (1 + len(nodes))
            if counts[site] > MAX_REWRITES_PER_NODE + len(nodes) or len(rewrites) > limit:  # one may absorb all others
                raise _breach(p, f"does not end: it rewrites {str(site)!r} again and again; leave it out")
        if record is not None:
            self._check_unchanged(p, record.find_change())
        return Outcome(tuple(rewrites), tuple(skips.values()))

    @staticmethod
    def _check_unchanged(p: Pass, changed: str) -> None:
        if changed:
            raise _breach(p, f"changed {changed} directly; it must make every change through its Rewriter")

    def _start(self, p: Pass) -> None:
        """Let a pass look at the graph; a third-party pass must not raise or edit."""
        if p.builtin:
            p.start(self)
            return
        edits = self.edits
        try:
            p.start(self)
        except Exception as error:
            raise _breach(p, f"failed in start with {summarize(error)}; correct it or leave it out") from error
        if self.edits != edits:
            raise _breach(p, "edited the graph in start; only match_and_rewrite may do that")

    def _offer(self, p: Pass, node: Node, record: GraphRecord) -> Rewrite | Skip | Refusal | None:
        """Offer a node to a third-party pass, which must return a Rewrite exactly if it edits the graph.

        Raises
        ------
        UsageError
            If the pass raises, or breaks its contract.
        """
        site, edits = str(self.site(node)), self.edits
        try:
            result = self.attempt(p.match_and_rewrite, node, self)
        except Exception as error:
            raise _breach(p, f"failed at {site!r} with {summarize(error)}; correct it or leave it out") from error
        if result is not None and not isinstance(result, (Rewrite, Skip, Refusal)):
            raise _breach(p, f"returned {type(result).__name__}, not a Rewrite, a Skip or None; correct it")
        if isinstance(result, Rewrite):
            assert self.journal is not None
            if self.edits == edits and not record.find_change():
                return Skip("an error of the pass: it returned a Rewrite, but changed nothing")
            self._check_unchanged(p, record.accept(self, self.journal))
        elif self.edits != edits:
            raise _breach(p, f"edited the graph at {site!r} without returning a Rewrite")
        return result

    def attempt(self, rewrite: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | Refusal:
        """Run a rewrite; return its result, or why it raised `RefusedError`.

        Every refusal must come before the first edit, so that the graph is as it was.

        Raises
        ------
        RuntimeError
            If the graph was edited before the refusal.
        """
        edits = self.edits
        try:
            return rewrite(*args, **kwargs)
        except RefusedError as error:
            if self.edits != edits:
                raise RuntimeError(f"the graph was edited before a rewrite was refused because {error}") from error
            return Refusal(error.reason)

    def _record(self, rewrite: Rewrite, site: Site, growth: int, context: int) -> Rewrite:
        """Add what the driver knows of a rewrite, and its certificate if there is a certifier."""
        if self._certifier is None or self.journal is None:
            return replace(rewrite, site=site, growth=growth)
        region = Change.of(self, self.journal, context)
        before, after = region.draw(self)
        certificate = self._certifier(region, self)
        return replace(rewrite, site=site, growth=growth, before=before, after=after, certificate=certificate)

    def enqueue(self, node: Node | None) -> None:
        """Offer a node again."""
        if node is None or node not in self or node in self._queued:
            return
        if self._wanted is None or node.op in self._wanted:
            self._queued.add(node)
            self._queue.append(node)

    def enqueue_around(self, node: Node) -> None:
        """Offer a node and its neighbours again; of a node with very many inputs, only those after it."""
        self.enqueue(node)
        if len(node.inputs) <= MAX_NEIGHBOURS:
            for tensor in node.inputs:
                self.enqueue(self.producer(tensor))
        for tensor in node.outputs:
            for reader in self.readers(tensor):
                self.enqueue(reader)

    def drop(self, node: Node, source: Tensor, reason: str) -> Rewrite | None:
        """Remove a node whose first output equals `source`; None if both tensors must be kept."""
        removed = (describe(node),)
        around = [self.producer(source), *self.readers(node.outputs[0])]
        if not self.bypass(node, source):
            return None
        for neighbour in around:
            if neighbour is not None:
                self.enqueue_around(neighbour)
        return Rewrite(reason, removed)

    def replace(self, old: Sequence[Node], new: Sequence[Node], reason: str, residual: float = 0.0) -> Rewrite:
        """Replace nodes by others, at the position of the last of `old`."""
        before = [macs(self, n) for n in old]
        removed = tuple(describe(n) for n in old)
        kept = [adopt_node(node) for node in new]
        result = kept[-1].outputs[0].name if kept else ""
        made = {t.name for node in kept for t in node.outputs}
        became = tuple((t.name, t.name if t.name in made else result) for n in old for t in n.outputs if t.name)
        inherit(kept, old)
        for node in kept:
            self.add(node, at=old[-1])
        neighbours = [self.producer(t) for n in old for t in n.inputs]
        for node in old:
            self.remove(node)
        after = [macs(self, n) for n in kept]
        exact = None not in before and None not in after
        for neighbour in neighbours:
            self.enqueue(neighbour)
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

    def bypass_all(self, nodes: Sequence[Node], source: Tensor, reason: str) -> Rewrite:
        """Remove a sequence of nodes whose last output equals `source`. One of the two tensors need not be kept."""
        removed, last = tuple(describe(n) for n in nodes), nodes[-1]
        became = tuple((t.name, source.name) for n in nodes for t in n.outputs if t.name)
        around = [self.producer(source), *self.readers(last.outputs[0])]
        self.set_input(last, 0, source)
        self.bypass(last, source)
        for node in reversed(nodes):
            self.remove(node)
        for neighbour in around:
            if neighbour is not None:
                self.enqueue_around(neighbour)
        return Rewrite(reason, removed, became=became)

    def replace_by_constants(self, node: Node, values: Sequence[Values], reason: str) -> Rewrite:
        """Replace a node by constants with the values of its outputs, none of which must be kept."""
        removed = (describe(node),)
        for tensor, value in zip(list(node.outputs), values, strict=True):
            readers = self.readers(tensor)
            self.release_names([tensor.name])
            self.reroute(tensor, self.new_constant(tensor.name, value))
            for reader in readers:
                self.enqueue_around(reader)
        self.remove(node)
        return Rewrite(reason, removed)


def _name_of(node: Node) -> str:
    """The name of the first output of a node that has one, else the name of the node."""
    for tensor in node.outputs:
        if tensor.name:
            return tensor.name
    return node.name


def _breach(p: Pass, what: str) -> UsageError:
    """The error for a pass that breaks its contract; `what` follows its name."""
    return UsageError(f"the pass {p.name!r} ({type(p).__module__}.{type(p).__qualname__}) {what}")


def describe(node: Node) -> str:
    return f"{node.op} {node.name}".strip()
