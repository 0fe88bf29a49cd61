"""Choose sizes for the open axes of a model's inputs: run the model at candidate sizes, the likeliest first."""

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
from pwopt.graph.shapes import format_shape
from pwopt.inputs.candidate_sizes import CandidateSizes, SizeSearch
from pwopt.inputs.input_specs import InputSpec, check_shapes
from pwopt.inputs.samples import draw_feeds
from pwopt.inputs.size_guesses import Trust
from pwopt.running.progress import Progress, ignore_progress
from pwopt.running.providers import DEFAULT, Provider
from pwopt.running.session import Session
from pwopt.running.stopwatch import Stopwatch
from pwopt.running.time_limit import TooSlowError, time_run

LOG = logging.getLogger(__name__)

Sizes = dict[str, tuple[int, ...]]

#: Limits in seconds of work (`pwopt.running.stopwatch.Stopwatch`): for one trial run, and for all trial runs together.
RUN_SECONDS, SECONDS = 4.0, 8.0
#: Lengths that rest on their position only grow by this factor until a run takes this many seconds.
TELLING, GROWN = 0.005, 4
#: The largest length that growing reaches.
MAX_GROWN_LENGTH = 16_384
#: The second round of sizes may have this many times the elements of the first.
GROWTH = 4


@dataclass(frozen=True)
class ChosenSizes:
    """Sizes of every input.

    Attributes
    ----------
    sizes : mapping of input name to sizes
    why : tuple of str
        For each open axis that the user did not give: its size and the reason; and which sizes were reduced.
    bytes : int
        The estimated peak of activations; 0 if it was not estimated.
    seconds : float or None
        The time of a run without graph optimisation; None if there was no run.
    """

    sizes: Sizes
    why: tuple[str, ...] = ()
    bytes: int = 0
    seconds: float | None = None


class SizeTrials:
    """Trial runs of a model, within a time limit.

    Parameters
    ----------
    specs : sequence of InputSpec
    session : Session
    seconds : float
        The limit for all runs together; time between them does not count.
    progress : callable
        Called with the sizes of each run and the fraction of the time that is used.
    """

    def __init__(self, specs: Sequence[InputSpec], session: Session, seconds: float, progress: Progress) -> None:
        self.specs, self.session, self.limit, self.progress = specs, session, seconds, progress
        self.left = seconds

    def seconds(self, sizes: Sizes, most: float = RUN_SECONDS) -> float:
        """Run the model, and measure the seconds.

        Raises
        ------
        ModelError
            If the run fails or takes too long.
        """
        self.progress(f"trying {_format_sizes(sizes)}", 1 - max(0.0, self.left) / self.limit)
        feeds = draw_feeds(self.specs, sizes)
        watch = Stopwatch(time.process_time if self.session.on_cpu else None)
        try:
            return time_run(self.session, feeds, max(0.1, min(most, self.left)))
        finally:
            self.left -= watch.elapsed()


def choose_sizes(
    specs: Sequence[InputSpec],
    model: onnx.ModelProto,
    path: str | os.PathLike[str] | None = None,
    provider: Provider = DEFAULT,
    shapes: Mapping[str, Sequence[int]] | None = None,
    progress: Progress = ignore_progress,
) -> ChosenSizes:
    """Choose sizes for every input: the given ones, and otherwise the first likely ones at which the model runs.

    Parameters
    ----------
    model : onnx.ModelProto
        Its metadata, axes and constants suggest sizes.
    path : path, optional
        Its file. Without it nothing is run: the result is the likeliest sizes that shape inference accepts.
    progress : callable, optional
        Called with each trial.

    Raises
    ------
    UsageError
        If the rank of an input is unknown, or the model runs at none of the sizes.
    ModelError, ProviderError
        If the model does not load.
    """
    check_shapes(specs, shapes or {})
    search = SizeSearch(specs, model, shapes)
    if path is None:
        chosen = _to_chosen(search.likeliest())
    else:
        chosen = _find_running(search, SizeTrials(specs, Session(path, provider, optimise=False), SECONDS, progress))
    return _log(chosen)


def _find_running(search: SizeSearch, trials: SizeTrials) -> ChosenSizes:
    """Find the first candidate that runs, and grow it until a run takes a measurable time."""
    failure: ModelError | None = None
    for candidate in itertools.takewhile(lambda _: trials.left > 0, search.generate()):
        current: CandidateSizes | None = candidate
        while current is not None:
            try:
                spent = trials.seconds(current.sizes)
            except TooSlowError as error:
                LOG.info("sizes %s: %s", _describe(current.sizes), error)
                if search.is_fixed:
                    return _to_chosen(current)
                failure, current = failure or error, search.reduce(current) if trials.left > 0 else None
            except ModelError as error:
                LOG.info("sizes %s: %s", _describe(current.sizes), error)
                failure, current = failure or error, None
            else:
                LOG.info("sizes %s: the model runs", _describe(current.sizes))
                return _grow(search, trials, current, spent)
    if search.is_fixed:
        raise UsageError(f"the model does not run at its sizes: {failure}; give others, or --input FILE.npz")
    names = " ".join(f"--shape {name}=…" for name in search.open_inputs)
    raise UsageError(f"no likely size runs ({failure}); give {names} or --input FILE.npz")


def _describe(sizes: Sizes) -> str:
    return ", ".join(f"{name} {format_shape(shape)}" for name, shape in sizes.items()) or "of no input"


def _grow(search: SizeSearch, trials: SizeTrials, found: CandidateSizes, spent: float) -> ChosenSizes:
    """Grow the lengths of a candidate that rest on their position only, until a run takes a measurable time."""
    growing = any(g.trust == Trust.PLACE for g in found.guesses)
    while growing and spent < TELLING and trials.left > 0:
        larger = search.grow(found, GROWN, MAX_GROWN_LENGTH)
        if larger is None:
            break
        try:
            spent = trials.seconds(larger.sizes, RUN_SECONDS / 4)
        except ModelError:
            break
        found = larger
    return replace(_to_chosen(found), seconds=spent)


def _to_chosen(candidate: CandidateSizes) -> ChosenSizes:
    return ChosenSizes(candidate.sizes, candidate.why, candidate.bytes)


def _find_other(search: SizeSearch, trials: SizeTrials, first: ChosenSizes) -> ChosenSizes | None:
    """Find other sizes at which the model runs, with as many open axes changed as possible.

    None if every size is fixed, or the model runs at no other likely sizes of up to `GROWTH` times the elements.
    """
    for candidate in search.generate_others(first.sizes, GROWTH * _elements(first.sizes)):
        if trials.left <= 0:
            break
        try:
            spent = trials.seconds(candidate.sizes)
        except ModelError:
            continue
        return replace(_to_chosen(candidate), seconds=spent)
    return None


def choose_rounds(
    specs: Sequence[InputSpec],
    model: onnx.ModelProto,
    path: str | os.PathLike[str],
    provider: Provider = DEFAULT,
    given: Sequence[Mapping[str, Sequence[int]]] = (),
    progress: Progress = ignore_progress,
) -> list[ChosenSizes]:
    """Choose the sizes at which two models are compared: the given ones, or two different likely ones.

    Raises
    ------
    UsageError
        If sizes do not fit the inputs, or the model does not run at them.
    """
    for shapes in given:
        check_shapes(specs, shapes)
    if any(given):
        return [choose_sizes(specs, model, path, provider, shapes, progress) for shapes in given]
    search, session = SizeSearch(specs, model), Session(path, provider, optimise=False)
    first = _log(_find_running(search, SizeTrials(specs, session, SECONDS, progress)))
    second = _find_other(search, SizeTrials(specs, session, SECONDS / 2, progress), first)
    return [first] if second is None else [first, second]


def _elements(sizes: Mapping[str, Sequence[int]]) -> int:
    return sum(math.prod(shape) for shape in sizes.values())


def _format_sizes(sizes: Mapping[str, Sequence[int]]) -> str:
    return " ".join(f"{name} {format_shape(shape)}" for name, shape in sizes.items())


def _log(chosen: ChosenSizes) -> ChosenSizes:
    for line in explain_sizes(chosen):
        LOG.info("%s", line)
    return chosen


def explain_sizes(chosen: ChosenSizes) -> Iterator[str]:
    """Explain in a report how sizes were chosen."""
    if chosen.why:
        yield f"Sizes that nobody gave: {'; '.join(chosen.why)}. --shape chooses others."


def narrow_specs(specs: Sequence[InputSpec], other: Sequence[InputSpec]) -> list[InputSpec]:
    """Fix each size that either of two models fixes, to compare a model with its static variant."""
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
