"""Compare two models on the same inputs, and find where they begin to differ."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

from pwopt.errors import UsageError
from pwopt.evidence.comparison import Recording, compare, list_runs
from pwopt.evidence.equivalence import Equivalence
from pwopt.evidence.laws import Law, measure
from pwopt.evidence.localise import localise
from pwopt.evidence.precision import find_coarsest_types
from pwopt.graph.files import Source, as_file, load
from pwopt.inputs.feeds import Feeds
from pwopt.inputs.input_specs import InputSpec, input_specs
from pwopt.inputs.samples import DEFAULT_KINDS, Range, Sample, check_kinds, draw_samples, read_samples
from pwopt.rewriting.records import Rewrite
from pwopt.running import memory
from pwopt.running.progress import Progress, ignore_progress
from pwopt.running.providers import DEFAULT, Provider, as_provider
from pwopt.running.session import Session, check_settings, find_fallbacks
from pwopt.running.size_trials import choose_rounds, narrow_specs

#: Sizes by input name, for one round or for several.
Shapes = Mapping[str, Sequence[int]] | Sequence[Mapping[str, Sequence[int]]]


def as_rounds(shapes: Shapes | None) -> list[Mapping[str, Sequence[int]]]:
    """Return the given sizes as a list of rounds."""
    if shapes is None:
        return []
    return [shapes] if isinstance(shapes, (Mapping, str)) else list(shapes)


def samples_for(
    specs: Sequence[InputSpec],
    model: onnx.ModelProto,
    path: str | os.PathLike[str],
    provider: Provider = DEFAULT,
    shapes: Shapes | None = None,
    inputs: Any = None,
    kinds: Sequence[str] = DEFAULT_KINDS,
    ranges: Mapping[str, Range] | None = None,
    progress: Progress = ignore_progress,
) -> list[Sample]:
    """Read the given inputs, or draw random ones for every round of sizes; parameters as for `verify`."""
    check_kinds(kinds, specs, ranges or {})
    given = as_rounds(shapes)
    if inputs is not None and len(given) > 1:
        raise UsageError("given inputs have their own sizes; rounds of --shape are for random ones")
    if inputs is None:
        chosen = choose_rounds(specs, model, path, provider, given, progress)
        return draw_samples(specs, [c.sizes for c in chosen], kinds, ranges)
    return read_samples(inputs, specs, given[0] if given else None)


def verify(
    original: Source, candidate: Source, *, provider: str | Provider = "cpu", threads: int = 1,
    shapes: Shapes | None = None, inputs: str | os.PathLike[str] | Feeds | Sequence[Any] | None = None,
    samples: Sequence[str] = DEFAULT_KINDS, ranges: Mapping[str, Range] | None = None,
    rtol: float | None = None, atol: float | None = None, locate: bool = True, rewrites: Sequence[Rewrite] = (),
    invariants: Sequence[Law] = (), progress: Progress = ignore_progress,
) -> Equivalence:  # fmt: skip
    """Compare two models on the same inputs.

    Parameters
    ----------
    original, candidate : path, bytes, onnx.ModelProto, torch.onnx.ONNXProgram, onnx_ir.Model or Model
        Both have the same inputs and outputs.
    provider, threads
        Where to run both, without fallback to another provider.
    shapes : mapping of input name to sizes, or a sequence of those, optional
        For dynamic dimensions; several are rounds. Without any, two likely ones are tried.
    inputs : path, dict of arrays, or a sequence of those, optional
        Instead of random inputs; files and folders as for `pwopt.inputs.samples.read_samples`.
    samples : sequence of str
        Distributions of random inputs, of `pwopt.inputs.samples.SAMPLE_KINDS`.
    ranges : mapping of input name to (low, high), optional
        Smallest and largest value of a random input.
    rtol, atol : float, optional
        Tolerances; by default those of `pwopt.evidence.metrics.TOLERANCES`.
    locate : bool
        Look for the first tensor that differs if the models are not equivalent.
    rewrites : sequence of Rewrite, optional
        The rewrites that created the candidate, to name the one at fault.
    invariants : sequence of Law
        Invariants to measure on both models, with the first sample; they do not affect the verdict.
    progress : callable, optional
        Called with (stage, fraction done).

    Raises
    ------
    UsageError, ModelError, ProviderError
        See `pwopt.errors`; a model that is not equivalent is a result, not an error.

    Examples
    --------
    >>> import pwopt
    >>> path = "models/linear_sequence.onnx"
    >>> pwopt.verify(path, path, shapes=[{"x": (1, 64, 8, 8)}, {"x": (2, 64, 5, 7)}]).passed
    True
    """
    check_settings(threads, rtol, atol)
    placed = as_provider(provider)
    first = load(original).proto
    specs = narrow_specs(input_specs(first), input_specs(load(candidate).proto))
    with as_file(original) as a, as_file(candidate) as b:
        progress("choosing inputs", 0.0)
        drawn = samples_for(specs, first, a, placed, shapes, inputs, samples, ranges, progress)
        progress("running both models", 0.0)
        result = compare_in_sessions(a, b, drawn, placed, threads, rtol, atol)
        if locate and result.verdict == "not equivalent":
            progress("looking for the first difference", 0.0)
            result = _locate(a, b, result, drawn, placed, threads, rewrites)
        progress("looking where operators ran", 0.0)
        return _attribute(result, {"original": a, "candidate": b}, drawn[0], placed, threads, invariants)


def _locate(
    a: Path, b: Path, failed: Equivalence, samples: Sequence[Sample], provider: Provider, threads: int,
    rewrites: Sequence[Rewrite],
) -> Equivalence:  # fmt: skip
    """Add the first difference. The rewrites are those of a record, which may be of another model."""
    difference = localise(a, b, failed, samples, provider, threads, rewrites)
    return replace(failed, difference=None if difference is None else replace(difference, assumed=True))


def _attribute(
    result: Equivalence,
    models: Mapping[str, Path],
    sample: Sample,
    provider: Provider,
    threads: int,
    laws: Sequence[Law],
) -> Equivalence:
    """Add invariants and operators that ran on other providers to a comparison."""
    original, candidate = models.values()
    found = measure(laws, original, candidate, sample, provider, threads)
    return replace(result, laws=found, elsewhere=find_placements(models, provider, threads, sample))


def compare_in_sessions(
    original: Path,
    candidate: Path,
    samples: Sequence[Sample],
    provider: Provider,
    threads: int,
    rtol: float | None = None,
    atol: float | None = None,
    *,
    together: bool = False,
) -> Equivalence:
    """Compare the outputs of two models on samples.

    Large models are loaded one after the other. If `together` says that two sessions may be open side by side, and they
    need one core each, two run at a time.
    """
    once = [sample.feeds for sample in samples]
    coarsest = functools.cache(lambda: find_coarsest_types(load(original).proto))
    original_session = functools.partial(Session, original, provider, threads)
    candidate_session = functools.partial(Session, candidate, provider, threads)
    if together and threads == 1 and provider.kind == "cpu":
        with ThreadPoolExecutor(1) as pool:
            others = pool.submit(
                lambda: (Recording(original_session(optimise=False), once), Recording(candidate_session(), once))
            )
            recording = Recording(original_session(), list_runs(samples))
        result = compare(recording, *others.result(), samples, rtol, atol, coarsest=coarsest)
    else:
        repeated = _release(original_session(), list_runs(samples))
        plain = _release(original_session(optimise=False), once)
        found = _release(candidate_session(), once)
        result = compare(repeated, plain, found, samples, rtol, atol, coarsest=coarsest)
    memory.release_freed()
    return result


def _release(session: Session, series: Iterable[Feeds]) -> Session | Recording:
    """Run a session and keep its answers in its place, if this process holds much memory."""
    if memory.count_resident() < memory.MIN_RESIDENT:
        return session
    memory.release_freed()
    recording = Recording(session, series)
    del session
    memory.release_freed()
    return recording


def find_placements(
    models: Mapping[str, Path], provider: Provider, threads: int, sample: Sample
) -> dict[str, dict[str, tuple[str, ...]]]:
    """Map each model to other providers and the operators that ran there; models without any are left out."""
    found = {name: find_fallbacks(path, provider, threads, sample.feeds) for name, path in models.items()}
    return {name: places for name, places in found.items() if places}
