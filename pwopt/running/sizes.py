"""Sizes for the open axes of a model's inputs: guessed, ruled out by inference, and tried by running."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnx

from pwopt.errors import ModelError, UsageError
from pwopt.graph.shapes import written
from pwopt.running.candidates import Candidate, Search
from pwopt.running.guesses import Trust
from pwopt.running.inputs import InputSpec, check_shapes
from pwopt.running.progress import Progress, silent
from pwopt.running.runtime import Session
from pwopt.running.samples import make_feeds
from pwopt.running.trying import TooSlowError, seconds_of

Sizes = dict[str, tuple[int, ...]]

#: Seconds for one run while sizes are looked for, and for all of them.
RUN_SECONDS, SECONDS = 4.0, 8.0
#: A run that takes this long says something; lengths that rest on nothing are grown until then, by this factor.
TELLING, GROWN = 0.005, 4
#: The longest that they become.
LONGEST = 16_384
#: Sizes that are tried besides may have this many times the elements of the first ones.
GROWTH = 4


@dataclass(frozen=True)
class Chosen:
    """Sizes of every input.

    Attributes
    ----------
    sizes : mapping of input name to sizes
    why : tuple of str
        For each open axis that nobody gave, what it was given and why; and what was made smaller.
    bytes : int
        The most that a run's activations take at once, as an estimate; 0 if it was not asked for.
    seconds : float or None
        What a run took without graph optimisation; None if there was none.
    """

    sizes: Sizes
    why: tuple[str, ...] = ()
    bytes: int = 0
    seconds: float | None = None


@dataclass
class Clock:
    """How much is left of the time for trying."""

    limit: float = SECONDS
    start: float = field(default_factory=time.perf_counter)

    @property
    def left(self) -> float:
        return self.limit - (time.perf_counter() - self.start)

    @property
    def share(self) -> float:
        return min(1.0, max(0.0, 1.0 - self.left / self.limit))


def likely_sizes(
    specs: Sequence[InputSpec],
    model: onnx.ModelProto,
    path: str | os.PathLike[str] | None = None,
    provider: str = "cpu",
    shapes: Mapping[str, Sequence[int]] | None = None,
    progress: Progress = silent,
) -> Chosen:
    """Sizes for every input: the given ones, and the first likely ones on which the model runs.

    Parameters
    ----------
    model : onnx.ModelProto
        What its metadata, axes and constants say.
    path : path, optional
        Its file. Nothing is run without it: then the likeliest sizes are taken that inference has nothing against.
    progress : callable, optional
        Told what is tried.

    Raises
    ------
    UsageError
        If an input declares no shape and the graph gives none; if the model runs on none of the sizes.
    ModelError, ProviderError
        If it does not load.
    """
    check_shapes(specs, shapes or {})
    search = Search(specs, model, shapes)
    if path is None:
        return _as_chosen(search.likeliest())
    return _tried(search, specs, Session(path, provider, optimise=False), progress)


def _tried(search: Search, specs: Sequence[InputSpec], session: Session, progress: Progress) -> Chosen:
    """The first candidate that runs, grown until a run says something."""
    clock = Clock()
    failure: ModelError | None = None
    for candidate in itertools.takewhile(lambda _: clock.left > 0, search.candidates()):
        current: Candidate | None = candidate
        while current is not None:
            progress(f"trying {_named(current.sizes)}", clock.share)
            try:
                spent = seconds_of(session, make_feeds(specs, current.sizes), max(0.1, min(RUN_SECONDS, clock.left)))
            except TooSlowError as error:
                if search.settled:
                    return _as_chosen(current)
                failure, current = failure or error, search.smaller(current) if clock.left > 0 else None
            except ModelError as error:
                failure, current = failure or error, None
            else:
                return _grown(search, specs, session, current, spent, clock, progress)
    if search.settled:
        raise UsageError(f"the model does not run at its sizes: {failure}; give others, or --input FILE.npz")
    names = " ".join(f"--shape {name}=…" for name in search.open_inputs)
    raise UsageError(f"no likely size runs ({failure}); give {names} or --input FILE.npz")


def _grown(
    search: Search, specs: Sequence[InputSpec], session: Session, found: Candidate, spent: float, clock: Clock,
    progress: Progress,
) -> Chosen:  # fmt: skip
    """A candidate that runs, with lengths that rest on nothing but their place grown until a run says something."""
    growing = any(g.trust == Trust.PLACE for g in found.guesses)
    while growing and spent < TELLING and clock.left > 0:
        larger = search.larger(found, GROWN, LONGEST)
        if larger is None:
            break
        progress(f"trying {_named(larger.sizes)}", clock.share)
        try:
            took = seconds_of(session, make_feeds(specs, larger.sizes), max(0.1, min(RUN_SECONDS / 4, clock.left)))
        except ModelError:
            break
        found, spent = larger, took
    return replace(_as_chosen(found), seconds=spent)


def _as_chosen(candidate: Candidate) -> Chosen:
    return Chosen(candidate.sizes, candidate.why, candidate.bytes)


def _other(
    search: Search, specs: Sequence[InputSpec], session: Session, first: Chosen, progress: Progress
) -> Chosen | None:
    """Sizes on which the model runs as well as on the first, with as many open axes changed as possible.

    None if every size is fixed, or no other likely ones of up to `GROWTH` times the elements run.
    """
    clock = Clock(SECONDS / 2)
    for candidate in search.others(first.sizes, GROWTH * _elements(first.sizes)):
        if clock.left <= 0:
            break
        progress(f"trying {_named(candidate.sizes)}", clock.share)
        try:
            spent = seconds_of(session, make_feeds(specs, candidate.sizes), max(0.1, min(RUN_SECONDS, clock.left)))
        except ModelError:
            continue
        return replace(_as_chosen(candidate), seconds=spent)
    return None


def rounds(
    specs: Sequence[InputSpec],
    model: onnx.ModelProto,
    path: str | os.PathLike[str],
    provider: str = "cpu",
    given: Sequence[Mapping[str, Sequence[int]]] = (),
    progress: Progress = silent,
) -> list[Chosen]:
    """Sizes to compare two models on: the given ones, or the likeliest and other ones.

    Raises
    ------
    UsageError
        If sizes do not fit the inputs, or the model does not run on them.
    """
    for shapes in given:
        check_shapes(specs, shapes)
    if any(given):
        return [likely_sizes(specs, model, path, provider, shapes, progress) for shapes in given]
    search, session = Search(specs, model), Session(path, provider, optimise=False)
    first = _tried(search, specs, session, progress)
    second = _other(search, specs, session, first, progress)
    return [first] if second is None else [first, second]


def _elements(sizes: Mapping[str, Sequence[int]]) -> int:
    return sum(math.prod(shape) for shape in sizes.values())


def _named(sizes: Mapping[str, Sequence[int]]) -> str:
    return " ".join(f"{name} {written(shape)}" for name, shape in sizes.items())


def told(chosen: Chosen) -> Iterator[str]:
    """For a report: why these sizes."""
    if chosen.why:
        yield f"Sizes that nobody gave: {'; '.join(chosen.why)}. --shape chooses others."


def narrowed(specs: Sequence[InputSpec], other: Sequence[InputSpec]) -> list[InputSpec]:
    """Inputs with the sizes that either of two models fixes, for comparing a model with its fixed variant."""
    fixed = {s.name: s.shape for s in other}

    def narrow(spec: InputSpec) -> InputSpec:
        theirs = fixed.get(spec.name)
        if spec.shape is None or theirs is None or len(theirs) != len(spec.shape):
            return spec
        return replace(
            spec,
            shape=tuple(
                b if isinstance(b, int) and not isinstance(a, int) else a
                for a, b in zip(spec.shape, theirs, strict=True)
            ),
        )

    return [narrow(spec) for spec in specs]
