"""Parallel branch merging: linear branches that meet in a sum become one map."""

from __future__ import annotations

import functools
import operator
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pwopt.algebra.geometry import Geometry, Refusal, RefusedError, add_geometry, attempt
from pwopt.algebra.linear import LinearMap
from pwopt.graph.ir import Node, Tensor
from pwopt.graph.reasons import Reason
from pwopt.graph.shapes import ShapeChange, set_channels
from pwopt.maps import emit, idioms
from pwopt.maps.cost import price
from pwopt.maps.paths import Path, trace
from pwopt.rewriting.driver import Pass, Rewriter, describe
from pwopt.rewriting.records import Rewrite, Skip
from pwopt.rewriting.wording import format_increase

#: The largest number of terms that are considered at once.
MAX_TERMS = 32
#: How many operators above an obstacle are searched for a common origin, to explain a refusal.
MAX_BEYOND = 16


@dataclass(frozen=True, eq=False)
class Term:
    """One summand: the path of maps that computes it, and its sign."""

    path: Path
    sign: float


@dataclass(frozen=True)
class Branch:
    """Terms of one sum, their geometry as one map, and their cost per output position, separately and together."""

    terms: tuple[Term, ...]
    geometry: Geometry
    separate: float

    @property
    def together(self) -> float:
        return self.separate if len(self.terms) == 1 else price(self.geometry, 1)


class SumBranches(Pass):
    """W₁x + W₂x + … = (W₁ + W₂ + …)x with kernels aligned at their centres; x + Wx = (I + W)x

    * A branch is any path of linear maps from the common input: convolutions, normalisations, scales, pooling,
      paddings, or the input itself.
    * Nothing else reads the tensors on these paths, and no weight is shared.
    * Those branches are merged that take no more multiply-adds together. The number of operators decreases.

    Re-parameterised networks train with branches, and many are exported without their authors' fusing step: Ding et
    al., "RepVGG" and "Diverse Branch Block" (2021); Vasu et al., "MobileOne" (2023). Low-rank adapters are branches as
    well: Hu et al., "LoRA" (2021).
    """

    name = "sum-branches"
    operators = frozenset({"Add", "Sub", "Sum"})
    policy = "if cheaper"

    def start(self, rw: Rewriter) -> None:
        self._fused = idioms.fused_by_runtime(rw)

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        if not _is_sum(rw, node) or _is_sum(rw, rw.sole_reader(node.outputs[0])):
            return None
        inner: list[Node] = []
        summands = list(_find_summands(rw, node, inner))
        counts = Counter(t for t, _ in summands)
        terms = [  # a tensor that is summed twice is read twice, so its branch cannot be merged
            Term(trace(rw, t, self._fused) if counts[t] == 1 else Path(t, t, (), None, ""), sign)
            for t, sign in summands
        ]
        origins: dict[tuple[Tensor, int | None], list[Term]] = {}
        axis_of = {t.path.source: t.path.axis for t in terms if t.path.axis is not None}
        for term in terms:
            axis = term.path.axis if term.path.axis is not None else axis_of.get(term.path.source)
            origins.setdefault((term.path.source, axis), []).append(term)
        reason = ""
        for (_, axis), shared in origins.items():
            if len(shared) < 2 or axis is None:
                continue
            done = self._join(rw, [*inner, node], terms, shared, axis)
            if isinstance(done, Rewrite):
                return done
            reason = reason or done.reason
        reason = reason or _find_obstacle(rw, terms)
        return Skip(reason) if reason else None

    def _join(
        self, rw: Rewriter, sums: list[Node], terms: list[Term], shared: list[Term], axis: int
    ) -> Rewrite | Refusal:
        maps = {t: attempt(t.path.compose, rw) for t in shared}
        refused = [m for m in maps.values() if isinstance(m, Refusal)]
        exact = {k: m for k, m in maps.items() if isinstance(m, LinearMap)}
        wide = max((m.geometry.out_channels for m in exact.values()), default=1)
        exact = {k: m.broadcast(wide) for k, m in exact.items()}
        branches = [Branch((t,), exact[t].geometry, t.path.price(rw)) for t in shared if t in exact]
        joined, reason = _find_cheapest(branches)
        if joined is None:
            return Refusal(refused[0].reason if refused and len(branches) < 2 else reason)
        signed = (exact[t] if t.sign > 0 else -exact[t] for t in joined.terms)
        return rw.attempt(self._write, rw, sums, terms, joined, functools.reduce(operator.add, signed), axis)

    def _write(
        self, rw: Rewriter, sums: list[Node], terms: list[Term], joined: Branch, total: LinearMap, axis: int
    ) -> Rewrite:
        root, source = sums[-1], joined.terms[0].path.source
        readings = [r for t in joined.terms for r in t.path.readings if r.kind in emit.WRITERS]
        if not readings:
            raise RefusedError("no branch has weights")
        like = max(readings, key=lambda r: (r.kind.startswith("conv"), r.weighted, r.geometry.weights))
        inside = set(joined.terms)
        rest = [t for t in terms if t not in inside]
        output = root.outputs[0]
        alike = next((t.path.output for t in joined.terms if t.path.readings), source)
        wide = total.geometry.out_channels
        partial = output if not rest else rw.new_variable(f"{output.name}_branches", alike, set_channels(axis, wide))
        written = emit.write(rw, total, like, source, partial, axis)
        new = [*written.nodes, *_add_terms(rw, root, partial, rest)]
        old = [*(n for t in joined.terms for n in t.path.nodes), *sums]
        if len(new) >= len(old):
            raise RefusedError("merging the branches would not save an operator")
        names = ", ".join(describe(r.node) for t in joined.terms for r in t.path.readings[-1:]) or "identity"
        plain = " and the input itself" if any(not t.path.readings for t in joined.terms) else ""
        reason = Reason("{} branches of {!r} become one map: {}{}", len(joined.terms), source.name, names, plain)
        return rw.replace(old, new, reason, written.residual)


def _add_terms(rw: Rewriter, root: Node, first: Tensor, rest: Sequence[Term]) -> list[Node]:
    """The operators that add the other terms to `first`, with the output of `root`: one Sum, or Adds and Subs."""
    output = root.outputs[0]
    if root.op == "Sum" and len(rest) > 1 and rw.opset >= 8 and all(t.sign > 0 for t in rest):
        return [Node("Sum", root.name, {}, [first, *(t.path.output for t in rest)], [output])]
    new: list[Node] = []
    for i, term in enumerate(rest):
        last, same = i == len(rest) - 1, rw.shape(first) == rw.shape(term.path.output)
        change: ShapeChange = (lambda shape: shape) if same else (lambda _shape: None)
        after = output if last else rw.new_variable(f"{output.name}_sum", first, change)
        name = root.name if last else rw.node_name(root.name, "_sum")
        new.append(Node("Add" if term.sign > 0 else "Sub", name, {}, [first, term.path.output], [after]))
        first = after
    return new


def _is_sum(rw: Rewriter, node: Node | None) -> bool:
    """Whether a node sums several computed tensors."""
    if not rw.is_a(node, "Add", "Sub", "Sum") or rw.opset < 7:  # older sums broadcast by an attribute
        return False
    return sum(rw.constant(t) is None for t in node.inputs) >= 2


def _find_summands(rw: Rewriter, root: Node, inner: list[Node]) -> Iterator[tuple[Tensor, float]]:
    """The tensors that `root` sums, with signs, also through inner sums without other uses, which join `inner`."""
    pending = _read_operands(root, 1.0)[::-1]
    while pending:
        tensor, sign, once = pending.pop()
        maker = rw.producer(tensor) if once else None
        if maker is None or not _is_sum(rw, maker) or rw.other_uses(tensor) or len(pending) + len(inner) >= MAX_TERMS:
            yield tensor, sign
            continue
        inner.insert(0, maker)
        pending += _read_operands(maker, sign)[::-1]


def _read_operands(node: Node, sign: float) -> list[tuple[Tensor, float, bool]]:
    """The operands of a sum, their signs, and whether each occurs once."""
    counts = Counter(node.inputs)
    minus = node.op == "Sub"
    return [(t, -sign if minus and i == 1 else sign, counts[t] == 1) for i, t in enumerate(node.inputs)]


class _Pool:
    """Branches of one sum, in order, by their kinds: equal geometries of equal cost are joined alike.

    So a sum of n branches of k kinds takes n·k² steps, and k² calls of `add_geometry`.
    """

    def __init__(self, branches: Sequence[Branch]) -> None:
        self._branches: dict[int, Branch] = {}
        self._kinds: dict[tuple[Geometry, float], deque[int]] = {}
        self._geometries: dict[tuple[Geometry, Geometry], Geometry | Refusal] = {}
        self._count = 0
        for branch in branches:
            self.add(branch)

    def add(self, branch: Branch) -> None:
        """Add a branch as the last one."""
        self._branches[self._count] = branch
        self._kinds.setdefault((branch.geometry, branch.together), deque()).append(self._count)
        self._count += 1

    def __len__(self) -> int:
        return len(self._branches)

    def __iter__(self) -> Iterator[Branch]:
        return iter(self._branches.values())

    def _add_geometry(self, first: Geometry, second: Geometry) -> Geometry | Refusal:
        pair = (first, second)
        if pair not in self._geometries:
            self._geometries[pair] = add_geometry(pair)
        return self._geometries[pair]

    def join(self) -> str:
        """Join the first of the pairs that save most; the reason why not if none saves, which is that of the last."""
        best: tuple[float, int, int] | None = None
        for (a, cost_a), (b, cost_b), first, second in self._pairs():
            geometry = self._add_geometry(a, b)
            if isinstance(geometry, Refusal):
                continue
            saved = cost_a + cost_b - price(geometry, 1)
            if saved >= 0 and (best is None or (-saved, second, first) < (-best[0], best[2], best[1])):
                best = (saved, first, second)
        if best is None:
            return self._explain()
        one, other = self._take(best[1]), self._take(best[2])
        joined = self._add_geometry(one.geometry, other.geometry)
        assert isinstance(joined, Geometry)
        self.add(Branch((*one.terms, *other.terms), joined, one.separate + other.separate))
        return ""

    def _pairs(self) -> Iterator[tuple[tuple[Geometry, float], tuple[Geometry, float], int, int]]:
        """Two kinds, and the places of the first branches of these kinds."""
        kinds = [(kind, places) for kind, places in self._kinds.items() if places]
        for i, (a, places_a) in enumerate(kinds):
            if len(places_a) > 1:
                yield a, a, places_a[0], places_a[1]
            for b, places_b in kinds[:i]:
                first, second = sorted([(places_a[0], a), (places_b[0], b)], key=lambda kind: kind[0])
                yield first[1], second[1], first[0], second[0]

    def _take(self, place: int) -> Branch:
        """Remove a branch, one of the first two of its kind."""
        branch = self._branches.pop(place)
        self._kinds[branch.geometry, branch.together].remove(place)
        return branch

    def _explain(self) -> str:
        """Why the last two branches are not joined."""
        first, second = list(self._branches.values())[-2:]
        geometry = self._add_geometry(first.geometry, second.geometry)
        if isinstance(geometry, Refusal):
            return Reason("the branches cannot be merged: {}", geometry.reason)
        return (
            f"merging the branches would cost {format_increase(first.together + second.together, price(geometry, 1))}"
        )


def _find_cheapest(branches: Sequence[Branch]) -> tuple[Branch | None, str]:
    """The best set of branches to merge, or why there is none.

    Merges the pair that saves most until no pair saves anything. A pair that costs as much as before is merged, too,
    because that saves an operator.
    """
    if len(branches) < 2:
        return None, "the branches are not linear maps with constant numbers"
    pool, reason = _Pool(branches), ""
    while len(pool) > 1 and not reason:
        reason = pool.join()
    joined = [b for b in pool if len(b.terms) > 1]
    return (joined[0], "") if joined else (None, reason)


def _find_obstacle(rw: Rewriter, terms: list[Term]) -> str:
    """Why branches with a common origin were not merged; "" if there are none."""
    reached: dict[Tensor, list[tuple[Tensor, Term]]] = {}
    for term in terms:
        tensors, tensor = {term.path.source: term.path.source}, term.path.source
        for _ in range(MAX_BEYOND):
            node = rw.producer(tensor)
            computed = [t for t in node.inputs if t.name and rw.constant(t) is None] if node is not None else []
            if not computed:
                break
            tensor = computed[0]
            tensors.setdefault(tensor, tensor)
        for key, value in tensors.items():
            reached.setdefault(key, []).append((value, term))
    for meeting in reached.values():
        blocked = [t for tensor, t in meeting if t.path.source is not tensor and t.path.obstacle]
        if len(meeting) > 1 and blocked:
            return Reason("the branches of {!r} are not all linear: {}", meeting[0][0].name, blocked[0].path.obstacle)
    return ""
