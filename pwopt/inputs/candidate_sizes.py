"""Candidate sizes: combinations of guesses that shape inference does not contradict and that fit into memory."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx

from pwopt.errors import UsageError
from pwopt.graph.shapes import Dim, find_contradiction, infer, make_skeleton
from pwopt.inputs import shape_constraints
from pwopt.inputs.footprint import Footprint, estimate_footprint
from pwopt.inputs.input_specs import InputSpec
from pwopt.inputs.shape_constraints import ShapeConstraint, Types
from pwopt.inputs.size_guesses import MAX_TEXT_HEIGHT, TEXT_WIDTH, AxisGroup, Guess, OpenAxes, Trust, find_open_axes

#: Limits for sizes that the user did not give: bytes of activations; multiply-adds where guesses rest on names only.
MEMORY, WORK = 1 << 30, 5 * 10**9
#: Nodes that shape inference may visit to reject sizes: some seconds. A count, so that results do not depend on load.
VISITS = 20_000
#: Combinations to check, and combinations to try unchecked if all are rejected.
COMBINATIONS, UNCHECKED = 200, 8
#: Preferred sizes where a constraint allows several, and the largest size to look for.
PREFERRED, MAX_SIZE = (224, 256, 320, 384, 512, 640, 128, 192, 112, 96, 64, 48, 32, 16_000), 1 << 16
#: The most shape constraints that are solved for sizes.
SOLVED = 3
#: Roles whose sizes may be reduced or increased.
ELASTIC = frozenset({"image", "length", "tokens", "samples", "frames", "depth", "number"})
#: Elastic axes stay at least this large.
SMALLEST = 8


@dataclass(frozen=True)
class CandidateSizes:
    """Sizes of all inputs, and the guesses behind them, one for each group of axes.

    Attributes
    ----------
    sizes : dict
    guesses : tuple of Guess
    why : tuple of str
    bytes : int
        Estimated peak of activations.
    """

    sizes: dict[str, tuple[int, ...]]
    guesses: tuple[Guess, ...]
    why: tuple[str, ...]
    bytes: int


class SizeSearch:
    """Search for sizes of the open axes of a model's inputs, without running the model.

    Parameters
    ----------
    specs : sequence of InputSpec
    model : onnx.ModelProto
    given : mapping of input name to sizes, optional

    Attributes
    ----------
    is_fixed : bool
        Whether no axis is open.
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
        self.open_axes: OpenAxes = find_open_axes(specs, model, given)
        self.facts = [fact for spec in specs for fact in spec.facts if spec.name not in (given or {})]
        self.open_inputs = [n for n, s in self.open_axes.shapes.items() if any(isinstance(d, str) for d in s)]
        self.is_fixed = not self.open_inputs
        self.visits = VISITS
        if not self.is_fixed:
            self.model = make_skeleton(model)
            self.constraints = shape_constraints.find_shape_constraints(model)
            self.strict = not find_contradiction(self.model, self.open_axes.shapes)
            self.groups = self._add_graph_guesses()

    def likeliest(self) -> CandidateSizes:
        return next(self.generate())

    def generate(self) -> Iterator[CandidateSizes]:
        """Generate sizes that shape inference accepts, the likeliest first; unchecked ones if it accepts none."""
        if self.is_fixed:
            yield CandidateSizes(self.open_axes.sizes({}), (), tuple(self.facts), 0)
            return
        wrong: list[tuple[Guess, ...]] = []
        seen: set[tuple[tuple[str, tuple[int, ...]], ...]] = set()
        for guesses in itertools.islice(self._combine(), COMBINATIONS):
            if not seen and wrong and self.visits <= 0:
                break
            if self._find_contradiction(self.assign(guesses)):
                wrong.append(guesses)
                continue
            found = self._fit_limits(guesses)
            key = tuple(found.sizes.items())
            if key not in seen:
                seen.add(key)
                yield found
        if not seen:
            yield from map(self._fit_limits, wrong[:UNCHECKED] or [next(self._combine())])

    def reduce(self, candidate: CandidateSizes) -> CandidateSizes | None:
        """Reduce sizes by one step, after a run took too long; None if they are minimal."""
        guesses = self._reduce(candidate.guesses, Trust.METADATA)
        return None if guesses is None else self._make_candidate(guesses, ("made smaller, since a run took too long",))

    def grow(self, candidate: CandidateSizes, factor: int, longest: int) -> CandidateSizes | None:
        """Multiply the lengths that rest on their position only; None if the result is invalid or too large."""
        guesses = tuple(
            Guess((min(longest, factor * g.sizes[0]),), _explain_growth(g.why), g.trust)
            if g.trust == Trust.PLACE and group.role == "length" and 0 < g.sizes[0] < longest
            else g
            for group, g in zip(self.groups, candidate.guesses, strict=True)
        )
        sizes = self.assign(guesses)
        if sizes == candidate.sizes or self._find_contradiction(sizes):
            return None
        cost = self._footprint(sizes)
        return None if cost.bytes > MEMORY or cost.macs > WORK else self._make_candidate(guesses)

    def generate_others(self, first: Mapping[str, Sequence[int]], elements: int) -> Iterator[CandidateSizes]:
        """Generate other sizes with at most that many elements, those first in which the most axes differ."""
        if self.is_fixed:
            return
        self.visits = VISITS
        values = {
            d: size
            for n, s in self.open_axes.shapes.items()
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
            sizes = self.assign(guesses)
            if not changes(pick) or sum(map(_product, sizes.values())) > elements:
                continue
            if self.visits <= 0:
                return
            if not self._find_contradiction(sizes) and self._footprint(sizes).bytes <= MEMORY:
                yield self._make_candidate(guesses)

    def assign(self, guesses: Sequence[Guess]) -> dict[str, tuple[int, ...]]:
        pairs = zip(self.groups, guesses, strict=True)
        return self.open_axes.sizes(
            {a: d for group, guess in pairs for a, d in zip(group.axes, guess.sizes, strict=True)}
        )

    def _combine(self) -> Iterator[tuple[Guess, ...]]:
        """Generate combinations of one guess per group, ordered by the sum of their positions in the lists."""
        counts = [len(g.guesses) for g in self.groups]
        for total in range(sum(counts) - len(counts) + 1):
            for picks in _indices_with_sum(counts, total):
                yield tuple(g.guesses[i] for g, i in zip(self.groups, picks, strict=True))

    def _types(self, sizes: Mapping[str, Sequence[Dim]]) -> Types:
        return infer(self.model, sizes)

    def _footprint(self, sizes: Mapping[str, Sequence[int]]) -> Footprint:
        return estimate_footprint(self.model, self._types(sizes))

    def _find_contradiction(self, sizes: Mapping[str, Sequence[int]]) -> str:
        """Say why sizes are invalid by shape inference, else ""; always "" once `visits` are used up."""
        if self.visits <= 0:
            return ""
        self.visits -= 2 * len(self.model.graph.node)
        types = self._types(sizes)
        broken = next((d.source for d in self.constraints if d.is_violated(types)), "")
        return broken or (find_contradiction(self.model, sizes) if self.strict else "")

    def _fit_limits(self, guesses: tuple[Guess, ...]) -> CandidateSizes:
        """Reduce guesses until activations fit into memory and a run has few multiply-adds."""
        notes: tuple[str, ...] = ()
        cost = begin = self._footprint(self.assign(guesses))
        while cost.bytes > MEMORY or cost.macs > WORK:
            least = Trust.METADATA if cost.bytes > MEMORY else Trust.NAME
            reduced = self._reduce(guesses, Trust.NAME) or self._reduce(guesses, least)
            if reduced is None:
                break
            guesses = reduced
            cost = self._footprint(self.assign(guesses))
            if begin.bytes > MEMORY:
                much = (
                    f"activations would take {begin.bytes / 2**30:,.1f} GiB, and {MEMORY / 2**30:.0f} GiB is the most"
                )
            else:
                much = f"a run would take {begin.macs / 1e9:,.0f} G multiply-adds, and {WORK / 1e9:.0f} G is the most"
            notes = (f"made smaller, since {much} for sizes that nobody gave",)
        return self._make_candidate(guesses, notes, cost.bytes)

    def _reduce(self, guesses: Sequence[Guess], least: Trust) -> tuple[Guess, ...] | None:
        """Reduce elastic axes with at most that trust by one step; None if nothing changes."""
        made = tuple(
            replace(guess, sizes=tuple(_next_smaller(d, group) for d in guess.sizes))
            if group.role in ELASTIC and guess.trust >= least
            else guess
            for group, guess in zip(self.groups, guesses, strict=True)
        )
        return None if made == tuple(guesses) else made

    def _make_candidate(
        self, guesses: tuple[Guess, ...], notes: Sequence[str] = (), size: int | None = None
    ) -> CandidateSizes:
        sizes = self.assign(guesses)
        reasons = [
            f"{' and '.join(f'{a} is {d}' for a, d in zip(group.axes, guess.sizes, strict=True))}, {guess.why}"
            for group, guess in zip(self.groups, guesses, strict=True)
        ]
        taken = self._footprint(sizes).bytes if size is None else size
        return CandidateSizes(sizes, guesses, (*self.facts, *reasons, *notes), taken)

    def _add_graph_guesses(self) -> tuple[AxisGroup, ...]:
        """Add guesses from the graph: sizes that shape constraints require, of an input or further down."""
        groups = {a: g for g in self.open_axes.groups for a in g.axes}
        types = self._types(self.open_axes.shapes)
        for constraint in self.constraints:
            where = constraint.current_size(types)
            if isinstance(where, str) and where in groups and groups[where].role != "batch":
                groups.update(_insert_required(groups[where], {where: constraint.size}, constraint.source))
        self.groups = _unique(groups.values())
        base = {a: d for g in self.groups for a, d in zip(g.axes, g.guesses[0].sizes, strict=True)}
        types = self._types(self.open_axes.sizes(base))
        for constraint in [d for d in self.constraints if d.is_violated(types)][:SOLVED]:
            found = self._solve(constraint, base)
            if found:
                groups.update(_insert_required(groups[next(iter(found))], found, constraint.source))
                base.update(found)
        return _unique(groups.values())

    def _solve(self, constraint: ShapeConstraint, base: dict[str, int]) -> dict[str, int]:
        """Find sizes of one group's axes that satisfy a constraint, with the other axes fixed; empty if none do."""
        part = shape_constraints.extract_submodel(self.model, constraint.tensor)

        def count(values: Mapping[str, int]) -> Dim:
            if self.visits <= 0:
                return None
            self.visits -= 1 + len(part.graph.node)
            return constraint.current_size(infer(part, self.open_axes.sizes({**base, **values})))

        now = count({})
        for group in sorted(self.groups, key=lambda g: g.role == "batch"):
            moved = [a for a in group.axes if count({a: 4 * base[a] + 4}) != now]
            if moved and group.role in (*ELASTIC, "batch", "channel"):
                counted = functools.partial(_count_at, count, moved)
                found = shape_constraints.solve_size(counted, constraint.size, PREFERRED, MAX_SIZE)
                return {} if found is None else dict.fromkeys(moved, found)
        return {}


def _count_at(count: Callable[[Mapping[str, int]], Dim], axes: Sequence[str], size: int) -> Dim:
    return count(dict.fromkeys(axes, size))


def _insert_required(group: AxisGroup, found: Mapping[str, int], by: str) -> dict[str, AxisGroup]:
    """Insert sizes that the graph requires for some axes of a group. Returns the group by each of its axes."""
    first = dict(zip(group.axes, group.guesses[0].sizes, strict=True))
    if group.role == "image" and len(found) == 1 and len(group.axes) == 2:
        ((axis, size),) = found.items()
        first = dict.fromkeys(first, size)
        if axis == group.axes[0] and size <= MAX_TEXT_HEIGHT:
            first[group.axes[1]] = TEXT_WIDTH  # a line of text
    sizes = tuple({**first, **found}[a] for a in group.axes)
    trust = Trust.GRAPH if group.guesses[0].trust > Trust.DECLARED else Trust.DECLARED
    return dict.fromkeys(group.axes, group.insert(Guess(sizes, f"by {by}", trust)))


def _unique(groups: Iterable[AxisGroup]) -> tuple[AxisGroup, ...]:
    return tuple({g.axes: g for g in groups}.values())


def _indices_with_sum(counts: Sequence[int], total: int) -> Iterator[tuple[int, ...]]:
    """Generate every choice of an index below each count with that sum, in lexicographic order."""
    if not counts:
        if total == 0:
            yield ()
        return
    for i in range(min(counts[0], total + 1)):
        for rest in _indices_with_sum(counts[1:], total - i):
            yield (i, *rest)


def _next_smaller(size: int, group: AxisGroup) -> int:
    """Compute the next smaller size: three quarters of an image in steps of 8, 16 or 32, or half of a length."""
    if size <= SMALLEST:
        return size
    if group.role != "image":
        return max(SMALLEST, size // 2)
    step = max(group.step, 32 if size > 64 else 16 if size > 16 else 8)
    return max(min(size, max(group.step, SMALLEST)), min(size * 3 // 4, size - 1) // step * step)


def _alternatives(group: AxisGroup, sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """List other sizes for a group, and last the same."""
    if group.role == "image":
        low = tuple(_next_smaller(d, group) for d in sizes)
        wide = tuple(d + max(32, group.step) if i else _next_smaller(d, group) for i, d in enumerate(sizes))
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


def _explain_growth(why: str) -> str:
    added = ", grown until a run takes some milliseconds"
    return why if why.endswith(added) else why + added


def _product(shape: Sequence[int]) -> int:
    count = 1
    for d in shape:
        count *= d
    return count
