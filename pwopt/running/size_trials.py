"""Sizes for the open axes of a model's inputs: guessed, ruled out by inference, and tried by running."""

from __future__ import annotations

import itertools
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx

from pwopt.errors import ModelError, UsageError
from pwopt.graph.shapes import written
from pwopt.inputs.candidate_sizes import CandidateSizes, SizeSearch
from pwopt.inputs.samples import make_feeds
from pwopt.inputs.size_guesses import Trust
from pwopt.inputs.specs import InputSpec, check_shapes
from pwopt.running.progress import Progress, ignore_progress
from pwopt.running.providers import DEFAULT, Provider
from pwopt.running.session import Session
from pwopt.running.timed_run import TooSlowError, seconds_of

LOG = logging.getLogger(__name__)

Sizes = dict[str, tuple[int, ...]]

#: Seconds for one run while sizes are looked for, and for all of them together.
RUN_SECONDS, SECONDS = 4.0, 8.0
#: A run that takes this long says something; lengths that rest on nothing are grown until then, by this factor.
TELLING, GROWN = 0.005, 4
#: The longest that they become.
LONGEST = 16_384
#: Sizes that are tried besides may have this many times the elements of the first ones.
GROWTH = 4


@dataclass(frozen=True)
class ChosenSizes:
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


class SizeTrials:
    """Runs of a model at sizes, in a time of their own.

    Parameters
    ----------
    specs : sequence of InputSpec
    session : Session
    seconds : float
        For all runs together; other work does not count.
    progress : callable
        Told what is tried.
    """

    def __init__(self, specs: Sequence[InputSpec], session: Session, seconds: float, progress: Progress) -> None:
        self.specs, self.session, self.limit, self.progress = specs, session, seconds, progress
        self.left = seconds

    def seconds(self, sizes: Sizes, most: float = RUN_SECONDS) -> float:
        """How long a run takes.

        Raises
        ------
        ModelError
            If it fails, or takes too long.
        """
        self.progress(f"trying {_named(sizes)}", 1 - max(0.0, self.left) / self.limit)
        feeds = make_feeds(self.specs, sizes)
        start = time.perf_counter()
        try:
            return seconds_of(self.session, feeds, max(0.1, min(most, self.left)))
        finally:
            self.left -= time.perf_counter() - start


def likely_sizes(
    specs: Sequence[InputSpec],
    model: onnx.ModelProto,
    path: str | os.PathLike[str] | None = None,
    provider: Provider = DEFAULT,
    shapes: Mapping[str, Sequence[int]] | None = None,
    progress: Progress = ignore_progress,
) -> ChosenSizes:
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
    search = SizeSearch(specs, model, shapes)
    if path is None:
        chosen = _as_chosen(search.likeliest())
    else:
        chosen = _tried(search, SizeTrials(specs, Session(path, provider, optimise=False), SECONDS, progress))
    return _logged(chosen)


def _tried(search: SizeSearch, trials: SizeTrials) -> ChosenSizes:
    """The first candidate that runs, grown until a run says something."""
    failure: ModelError | None = None
    for candidate in itertools.takewhile(lambda _: trials.left > 0, search.generate()):
        current: CandidateSizes | None = candidate
        while current is not None:
            try:
                spent = trials.seconds(current.sizes)
            except TooSlowError as error:
                LOG.info("sizes %s: %s", _said(current.sizes), error)
                if search.is_fixed:
                    return _as_chosen(current)
                failure, current = failure or error, search.reduce(current) if trials.left > 0 else None
            except ModelError as error:
                LOG.info("sizes %s: %s", _said(current.sizes), error)
                failure, current = failure or error, None
            else:
                LOG.info("sizes %s: the model runs", _said(current.sizes))
                return _grown(search, trials, current, spent)
    if search.is_fixed:
        raise UsageError(f"the model does not run at its sizes: {failure}; give others, or --input FILE.npz")
    names = " ".join(f"--shape {name}=…" for name in search.open_inputs)
    raise UsageError(f"no likely size runs ({failure}); give {names} or --input FILE.npz")


def _said(sizes: Sizes) -> str:
    return ", ".join(f"{name} {written(shape)}" for name, shape in sizes.items()) or "of no input"


def _grown(search: SizeSearch, trials: SizeTrials, found: CandidateSizes, spent: float) -> ChosenSizes:
    """A candidate that runs, with lengths that rest on nothing but their place grown until a run says something."""
    growing = any(g.trust == Trust.PLACE for g in found.guesses)
    while growing and spent < TELLING and trials.left > 0:
        larger = search.grow(found, GROWN, LONGEST)
        if larger is None:
            break
        try:
            spent = trials.seconds(larger.sizes, RUN_SECONDS / 4)
        except ModelError:
            break
        found = larger
    return replace(_as_chosen(found), seconds=spent)


def _as_chosen(candidate: CandidateSizes) -> ChosenSizes:
    return ChosenSizes(candidate.sizes, candidate.why, candidate.bytes)


def _other(search: SizeSearch, trials: SizeTrials, first: ChosenSizes) -> ChosenSizes | None:
    """Sizes on which the model runs as well as on the first, with as many open axes changed as possible.

    None if every size is fixed, or no other likely ones of up to `GROWTH` times the elements run.
    """
    for candidate in search.generate_others(first.sizes, GROWTH * _elements(first.sizes)):
        if trials.left <= 0:
            break
        try:
            spent = trials.seconds(candidate.sizes)
        except ModelError:
            continue
        return replace(_as_chosen(candidate), seconds=spent)
    return None


def rounds(
    specs: Sequence[InputSpec],
    model: onnx.ModelProto,
    path: str | os.PathLike[str],
    provider: Provider = DEFAULT,
    given: Sequence[Mapping[str, Sequence[int]]] = (),
    progress: Progress = ignore_progress,
) -> list[ChosenSizes]:
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
    search, session = SizeSearch(specs, model), Session(path, provider, optimise=False)
    first = _logged(_tried(search, SizeTrials(specs, session, SECONDS, progress)))
    second = _other(search, SizeTrials(specs, session, SECONDS / 2, progress), first)
    return [first] if second is None else [first, second]


def _elements(sizes: Mapping[str, Sequence[int]]) -> int:
    return sum(math.prod(shape) for shape in sizes.values())


def _named(sizes: Mapping[str, Sequence[int]]) -> str:
    return " ".join(f"{name} {written(shape)}" for name, shape in sizes.items())


def _logged(chosen: ChosenSizes) -> ChosenSizes:
    for line in told(chosen):
        LOG.info("%s", line)
    return chosen


def told(chosen: ChosenSizes) -> Iterator[str]:
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
