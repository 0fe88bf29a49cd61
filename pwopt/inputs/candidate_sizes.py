"""Sizes that nothing in a graph contradicts, and that fit into memory: found by inference, before anything runs."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx

from pwopt.errors import UsageError
from pwopt.graph.shapes import Dim, contradiction, infer, skeleton
from pwopt.inputs import shape_constraints
from pwopt.inputs.footprint import Footprint, footprint
from pwopt.inputs.shape_constraints import Demand, Types
from pwopt.inputs.size_guesses import LINE, LINE_WIDTH, Group, Guess, Question, Trust, ask
from pwopt.inputs.specs import InputSpec

#: Bytes of activations that sizes which nobody gave may take, and multiply-adds of those that rest on names and places.
MEMORY, WORK = 1 << 30, 5 * 10**9
#: Nodes that inference may visit to rule sizes out, some seconds' work; a number, so that choices do not hang on load.
VISITS = 20_000
#: Combinations that are looked at, and those that are tried if all are ruled out.
COMBINATIONS, UNCHECKED = 200, 8
#: Solutions that are preferred where a graph allows several, and the largest that is looked for.
PREFERRED, LARGEST = (224, 256, 320, 384, 512, 640, 128, 192, 112, 96, 64, 48, 32, 16_000), 1 << 16
#: Demands that are solved for sizes, at most.
SOLVED = 3
#: Axes that are made smaller or longer: whatever has no fixed number by its nature.
ELASTIC = frozenset({"image", "length", "tokens", "samples", "frames", "depth", "number"})
#: Elastic ones stay at least this large.
SMALLEST = 8


@dataclass(frozen=True)
class Candidate:
    """Sizes of all inputs, and the guesses that they rest on, one for each group.

    Attributes
    ----------
    sizes : dict
    guesses : tuple of Guess
    why : tuple of str
    bytes : int
        Of activations, estimated.
    """

    sizes: dict[str, tuple[int, ...]]
    guesses: tuple[Guess, ...]
    why: tuple[str, ...]
    bytes: int


class Search:
    """What the open axes of a model's inputs may be.

    Parameters
    ----------
    specs : sequence of InputSpec
    model : onnx.ModelProto
    given : mapping of input name to sizes, optional

    Attributes
    ----------
    settled : bool
        Whether nothing is open.
    open_inputs : list of str

    Raises
    ------
    UsageError
        If an input declares no shape and the graph gives none.
    """

    def __init__(
        self, specs: Sequence[InputSpec], model: onnx.ModelProto, given: Mapping[str, Sequence[int]] | None = None
    ) -> None:
        for spec in specs:
            if spec.shape is None and spec.name not in (given or {}):
                raise UsageError(f"input {spec.name!r} declares no shape; give --shape {spec.name}=…")
        self.question: Question = ask(specs, model, given)
        self.facts = [fact for spec in specs for fact in spec.facts if spec.name not in (given or {})]
        self.open_inputs = [n for n, s in self.question.shapes.items() if any(isinstance(d, str) for d in s)]
        self.settled = not self.open_inputs
        self.visits = VISITS
        if not self.settled:
            self.model = skeleton(model)
            self.demands = shape_constraints.demands(model)
            self.strict = not contradiction(self.model, self.question.shapes)
            self.groups = self._advised()

    def likeliest(self) -> Candidate:
        return next(self.candidates())

    def candidates(self) -> Iterator[Candidate]:
        """Sizes to try, the likeliest first: those that inference has nothing against, or if there are none, some."""
        if self.settled:
            yield Candidate(self.question.sizes({}), (), tuple(self.facts), 0)
            return
        wrong: list[tuple[Guess, ...]] = []
        seen: set[tuple[tuple[str, tuple[int, ...]], ...]] = set()
        for guesses in itertools.islice(self._combinations(), COMBINATIONS):
            if not seen and wrong and self.visits <= 0:
                break
            if self._objection(self.sizes(guesses)):
                wrong.append(guesses)
                continue
            found = self._fitted(guesses)
            key = tuple(found.sizes.items())
            if key not in seen:
                seen.add(key)
                yield found
        if not seen:
            yield from map(self._fitted, wrong[:UNCHECKED] or [next(self._combinations())])

    def smaller(self, candidate: Candidate) -> Candidate | None:
        """The next smaller sizes, for a run that took too long; None if there are none."""
        guesses = self._reduced(candidate.guesses, Trust.METADATA)
        return None if guesses is None else self._candidate(guesses, ("made smaller, since a run took too long",))

    def larger(self, candidate: Candidate, factor: int, longest: int) -> Candidate | None:
        """The same with lengths that rest on nothing but their place that many times longer; None where that fails."""
        guesses = tuple(
            Guess((min(longest, factor * g.sizes[0]),), _grown(g.why), g.trust)
            if g.trust == Trust.PLACE and group.role == "length" and 0 < g.sizes[0] < longest
            else g
            for group, g in zip(self.groups, candidate.guesses, strict=True)
        )
        sizes = self.sizes(guesses)
        if sizes == candidate.sizes or self._objection(sizes):
            return None
        cost = self._footprint(sizes)
        return None if cost.bytes > MEMORY or cost.macs > WORK else self._candidate(guesses)

    def others(self, first: Mapping[str, Sequence[int]], elements: int) -> Iterator[Candidate]:
        """Other sizes, those first in which the most axes differ, with at most that many elements."""
        if self.settled:
            return
        self.visits = VISITS
        values = {
            d: size
            for n, s in self.question.shapes.items()
            for d, size in zip(s, first[n], strict=True)
            if isinstance(d, str)
        }
        choices = [_alternatives(g, tuple(values[a] for a in g.axes)) for g in self.groups]
        combinations = list(itertools.islice(itertools.product(*choices), 10 * COMBINATIONS))
        before = [values[a] for g in self.groups for a in g.axes]

        def changes(pick: tuple[tuple[int, ...], ...]) -> int:
            return sum(a != b for a, b in zip(itertools.chain(*pick), before, strict=True))

        for pick in sorted(combinations, key=changes, reverse=True):
            guesses = tuple(Guess(sizes, "to differ", Trust.SPARE) for sizes in pick)
            sizes = self.sizes(guesses)
            if not changes(pick) or sum(map(_product, sizes.values())) > elements:
                continue
            if self.visits <= 0:
                return
            if not self._objection(sizes) and self._footprint(sizes).bytes <= MEMORY:
                yield self._candidate(guesses)

    def sizes(self, guesses: Sequence[Guess]) -> dict[str, tuple[int, ...]]:
        pairs = zip(self.groups, guesses, strict=True)
        return self.question.sizes(
            {a: d for group, guess in pairs for a, d in zip(group.axes, guess.sizes, strict=True)}
        )

    def _combinations(self) -> Iterator[tuple[Guess, ...]]:
        """One guess for each group, by how far down its list they are together."""
        counts = [len(g.guesses) for g in self.groups]
        for total in range(sum(counts) - len(counts) + 1):
            for picks in _summing(counts, total):
                yield tuple(g.guesses[i] for g, i in zip(self.groups, picks, strict=True))

    def _types(self, sizes: Mapping[str, Sequence[Dim]]) -> Types:
        return infer(self.model, sizes)

    def _footprint(self, sizes: Mapping[str, Sequence[int]]) -> Footprint:
        return footprint(self.model, self._types(sizes))

    def _objection(self, sizes: Mapping[str, Sequence[int]]) -> str:
        """What speaks against sizes, as far as inference sees, else ""; nothing any more once it has seen enough."""
        if self.visits <= 0:
            return ""
        self.visits -= 2 * len(self.model.graph.node)
        types = self._types(sizes)
        broken = next((d.by for d in self.demands if d.broken(types)), "")
        return broken or (contradiction(self.model, sizes) if self.strict else "")

    def _fitted(self, guesses: tuple[Guess, ...]) -> Candidate:
        """Guesses, made smaller until activations fit into memory, and until what rests on little is little work."""
        notes: tuple[str, ...] = ()
        cost = begin = self._footprint(self.sizes(guesses))
        while cost.bytes > MEMORY or cost.macs > WORK:
            least = Trust.METADATA if cost.bytes > MEMORY else Trust.NAME
            reduced = self._reduced(guesses, Trust.NAME) or self._reduced(guesses, least)
            if reduced is None:
                break
            guesses = reduced
            cost = self._footprint(self.sizes(guesses))
            if begin.bytes > MEMORY:
                much = (
                    f"activations would take {begin.bytes / 2**30:,.1f} GiB, and {MEMORY / 2**30:.0f} GiB is the most"
                )
            else:
                much = f"a run would take {begin.macs / 1e9:,.0f} G multiply-adds, and {WORK / 1e9:.0f} G is the most"
            notes = (f"made smaller, since {much} for sizes that nobody gave",)
        return self._candidate(guesses, notes, cost.bytes)

    def _reduced(self, guesses: Sequence[Guess], least: Trust) -> tuple[Guess, ...] | None:
        """Elastic axes of that little trust made smaller by one step; None if there are none left."""
        made = tuple(
            replace(guess, sizes=tuple(_lower(d, group) for d in guess.sizes))
            if group.role in ELASTIC and guess.trust >= least
            else guess
            for group, guess in zip(self.groups, guesses, strict=True)
        )
        return None if made == tuple(guesses) else made

    def _candidate(self, guesses: tuple[Guess, ...], notes: Sequence[str] = (), size: int | None = None) -> Candidate:
        sizes = self.sizes(guesses)
        told = [
            f"{' and '.join(f'{a} is {d}' for a, d in zip(group.axes, guess.sizes, strict=True))}, {guess.why}"
            for group, guess in zip(self.groups, guesses, strict=True)
        ]
        taken = self._footprint(sizes).bytes if size is None else size
        return Candidate(sizes, guesses, (*self.facts, *told, *notes), taken)

    def _advised(self) -> tuple[Group, ...]:
        """The groups with what the graph itself names: sizes that tables demand, directly or further down."""
        groups = {a: g for g in self.question.groups for a in g.axes}
        types = self._types(self.question.shapes)
        for demand in self.demands:
            where = demand.found(types)
            if isinstance(where, str) and where in groups and groups[where].role != "batch":
                groups.update(_put(groups[where], {where: demand.size}, demand.by))
        self.groups = _once(groups.values())
        base = {a: d for g in self.groups for a, d in zip(g.axes, g.guesses[0].sizes, strict=True)}
        types = self._types(self.question.sizes(base))
        for demand in [d for d in self.demands if d.broken(types)][:SOLVED]:
            found = self._solved(demand, base)
            if found:
                groups.update(_put(groups[next(iter(found))], found, demand.by))
                base.update(found)
        return _once(groups.values())

    def _solved(self, demand: Demand, base: dict[str, int]) -> dict[str, int]:
        """Sizes of one group's axes for which a demand is met, the others as they are; empty if none were found."""
        part = shape_constraints.submodel(self.model, demand.tensor)

        def count(values: Mapping[str, int]) -> Dim:
            if self.visits <= 0:
                return None
            self.visits -= 1 + len(part.graph.node)
            return demand.found(infer(part, self.question.sizes({**base, **values})))

        now = count({})
        for group in sorted(self.groups, key=lambda g: g.role == "batch"):
            moved = [a for a in group.axes if count({a: 4 * base[a] + 4}) != now]
            if moved and group.role in (*ELASTIC, "batch", "channel"):
                counted = functools.partial(_at_equal_sizes, count, moved)
                found = shape_constraints.solve(counted, demand.size, PREFERRED, LARGEST)
                return {} if found is None else dict.fromkeys(moved, found)
        return {}


def _at_equal_sizes(count: Callable[[Mapping[str, int]], Dim], axes: Sequence[str], size: int) -> Dim:
    return count(dict.fromkeys(axes, size))


def _put(group: Group, found: Mapping[str, int], by: str) -> dict[str, Group]:
    """A group with sizes that the graph demands for some of its axes, by each of its axes."""
    first = dict(zip(group.axes, group.guesses[0].sizes, strict=True))
    if group.role == "image" and len(found) == 1 and len(group.axes) == 2:
        ((axis, size),) = found.items()
        first = dict.fromkeys(first, size)
        if axis == group.axes[0] and size <= LINE:
            first[group.axes[1]] = LINE_WIDTH  # a line of text
    sizes = tuple({**first, **found}[a] for a in group.axes)
    trust = Trust.GRAPH if group.guesses[0].trust > Trust.DECLARED else Trust.DECLARED
    return dict.fromkeys(group.axes, group.put(Guess(sizes, f"by {by}", trust)))


def _once(groups: Iterable[Group]) -> tuple[Group, ...]:
    return tuple({g.axes: g for g in groups}.values())


def _summing(counts: Sequence[int], total: int) -> Iterator[tuple[int, ...]]:
    """Every choice of an index below each count, with that sum; earlier ones small first."""
    if not counts:
        if total == 0:
            yield ()
        return
    for i in range(min(counts[0], total + 1)):
        for rest in _summing(counts[1:], total - i):
            yield (i, *rest)


def _lower(size: int, group: Group) -> int:
    """The next smaller size: three quarters of an image, in steps that networks like, or half of a length."""
    if size <= SMALLEST:
        return size
    if group.role != "image":
        return max(SMALLEST, size // 2)
    step = max(group.step, 32 if size > 64 else 16 if size > 16 else 8)
    return max(min(size, max(group.step, SMALLEST)), min(size * 3 // 4, size - 1) // step * step)


def _alternatives(group: Group, sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Other sizes for a group, and last the same."""
    if group.role == "image":
        low = tuple(_lower(d, group) for d in sizes)
        wide = tuple(d + max(32, group.step) if i else _lower(d, group) for i, d in enumerate(sizes))
        mixed = [tuple(low[j] if i == j else d for j, d in enumerate(sizes)) for i in range(len(sizes))]
        found = [wide, low, *(g.sizes for g in group.guesses), *mixed]
        found += [(sizes[0], g.sizes[1]) for g in group.guesses if len(sizes) == 2]
    elif group.role == "batch":
        found = [(2,) if sizes != (2,) else (1,)]
    elif group.role in ELASTIC:
        found = [(max(1, sizes[0] // 2),), (2 * sizes[0],)]
    else:
        found = [g.sizes for g in group.guesses if group.role == "past"]
    return list(dict.fromkeys([*(s for s in found if s != sizes), sizes]))


def _grown(why: str) -> str:
    added = ", grown until a run takes some milliseconds"
    return why if why.endswith(added) else why + added


def _product(shape: Sequence[int]) -> int:
    count = 1
    for d in shape:
        count *= d
    return count
