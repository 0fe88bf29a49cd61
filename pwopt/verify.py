"""Equivalence: the same answers, measured against how far the original's own answers can be trusted.

Two figures of the original say that. Its *noise floor*: onnxruntime's disagreement with itself, with and without
graph optimisation. Its *sensitivity*: what rounding its inputs once more does to its outputs, since no
implementation can be held to more digits than its inputs have (Higham, "Accuracy and Stability of Numerical
Algorithms", 2002: a backward stable result is the exact one for slightly different inputs).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from pwopt.errors import ModelError, UsageError
from pwopt.model import Model, as_file, load
from pwopt.runtime import (
    Feeds,
    InputSpec,
    Session,
    as_feeds,
    available,
    candidate_shapes,
    check_settings,
    check_shapes,
    input_specs,
    make_feeds,
)
from pwopt.shapes import known

#: An output passes if its deviation is within this many times the original's noise floor or sensitivity.
FLOOR_FACTOR = 4.0
#: Default relative and absolute tolerance by type: a few hundred roundings.
TOLERANCES = {"float64": (1e-9, 1e-10), "float32": (1e-4, 1e-5), "float16": (1e-2, 1e-3), "bfloat16": (5e-2, 1e-2)}
#: Random inputs every comparison runs on.
SAMPLES = (("normal", 0), ("uniform", 1), ("normal", 2))


@dataclass(frozen=True)
class OutputCheck:
    """How one output of two models agrees, over all samples.

    Attributes
    ----------
    max_abs, max_rel : float
        Largest absolute deviation; largest deviation relative to the original's magnitude at that element.
    mean_abs : float
        Mean absolute deviation, of the worst sample.
    mismatch : float
        Fraction of unequal elements; the verdict for integer, bool and string outputs.
    floor, floor_mismatch : float
        The same figures (max_abs, mismatch) for the original against itself without graph optimisation.
    sensitivity : float
        max_abs of the original against itself with each input moved by one unit in the last place.
    passed : bool
    reason : str
        Which rule decided.
    """

    name: str
    max_abs: float
    max_rel: float
    mean_abs: float
    mismatch: float
    floor: float
    floor_mismatch: float
    sensitivity: float
    passed: bool
    reason: str

    def explain(self) -> str:
        """What to say about it in a sentence."""
        if self.mismatch and not self.max_abs:
            return self.reason
        return f"deviates by {self.max_abs:.3g} (noise floor {self.floor:.3g}): {self.reason}"


@dataclass(frozen=True)
class Equivalence:
    """Verdict over all outputs, and the input shapes it was reached on."""

    passed: bool
    outputs: tuple[OutputCheck, ...]
    samples: int
    shapes: dict[str, tuple[int, ...]]
    rtol: float | None
    atol: float | None

    def worst(self) -> OutputCheck | None:
        return max(
            self.outputs, key=lambda o: (not o.passed, o.max_abs / o.floor if o.floor else o.max_abs), default=None
        )


@dataclass(frozen=True)
class _Deviation:
    max_abs: float = 0.0
    max_rel: float = 0.0
    mean_abs: float = 0.0
    mismatch: float = 0.0
    within: bool = True
    note: str = ""
    size: int = 0
    compared: int = 0

    def worse(self, other: _Deviation) -> _Deviation:
        return _Deviation(
            max(self.max_abs, other.max_abs),
            max(self.max_rel, other.max_rel),
            max(self.mean_abs, other.mean_abs),
            max(self.mismatch, other.mismatch),
            self.within and other.within,
            self.note or other.note,
            self.size + other.size,
            self.compared + other.compared,
        )


def deviation(reference: Any, value: Any, rtol: float | None = None, atol: float | None = None) -> _Deviation:
    """How far `value` is from `reference`, element by element; NaN and infinities must agree."""
    if not isinstance(reference, np.ndarray) or not isinstance(value, np.ndarray):
        same = _plain(reference) == _plain(value)
        return _Deviation(
            mismatch=0.0 if same else 1.0, within=same, note="" if same else "the values differ", compared=1
        )
    a, b = reference, value
    if a.shape != b.shape or a.dtype != b.dtype:
        return _Deviation(
            np.inf, np.inf, np.inf, 1.0, False, f"{a.dtype}{list(a.shape)} became {b.dtype}{list(b.shape)}"
        )
    if a.size == 0:
        return _Deviation()
    if a.dtype.kind not in "fVc":
        mismatch = float(np.mean(a != b))
        gap = float(np.max(np.abs(a.astype(np.float64) - b.astype(np.float64)))) if a.dtype.kind in "iu" else mismatch
        return _Deviation(gap, 0.0, 0.0, mismatch, mismatch == 0, size=a.size, compared=a.size)
    default = TOLERANCES.get(str(a.dtype), TOLERANCES["float32"])
    rtol, atol = default[0] if rtol is None else rtol, default[1] if atol is None else atol
    x, y = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(x)
    if not np.array_equal(np.where(finite, 0, x), np.where(np.isfinite(y), 0, y), equal_nan=True):
        return _Deviation(np.inf, np.inf, np.inf, float(np.mean(x != y)), False, "NaN or infinity at different places")
    x, y = x[finite], y[finite]
    if x.size == 0:
        return _Deviation(size=a.size)
    error = np.abs(x - y)
    relative = error / np.maximum(np.abs(x), np.finfo(np.float32).tiny)
    return _Deviation(
        float(error.max()), float(relative.max()), float(error.mean()), float(np.mean(error != 0)),
        bool(np.all(error <= atol + rtol * np.abs(x))), size=a.size, compared=x.size,
    )  # fmt: skip


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def judge(name: str, candidate: _Deviation, floor: _Deviation, moved: _Deviation, discrete: bool) -> OutputCheck:
    """The rule: within `FLOOR_FACTOR` times noise floor or sensitivity, or within tolerance; discrete by mismatch."""
    if candidate.note:
        passed, reason = False, candidate.note
    elif not candidate.size:
        passed, reason = True, "empty in every sample, so nothing was compared"
    elif not candidate.compared:
        passed, reason = False, "no finite value to compare in any sample; give other inputs with --shape or --input"
    elif discrete:
        own = max(floor.mismatch, moved.mismatch)
        passed = candidate.mismatch <= FLOOR_FACTOR * own
        reason = f"{candidate.mismatch:.2%} of elements differ, {own:.2%} in the original against itself"
    elif candidate.max_abs <= FLOOR_FACTOR * floor.max_abs:
        passed, reason = True, f"within {FLOOR_FACTOR:g}× the noise floor"
    elif candidate.within:
        passed, reason = True, "within the tolerance"
    elif candidate.max_abs <= FLOOR_FACTOR * moved.max_abs:
        passed, reason = True, f"within {FLOOR_FACTOR:g}× the effect of rounding the inputs"
    else:
        passed, reason = False, f"beyond the tolerance and {FLOOR_FACTOR:g}× the noise floor and sensitivity"
    return OutputCheck(
        name, candidate.max_abs, candidate.max_rel, candidate.mean_abs, candidate.mismatch,
        floor.max_abs, floor.mismatch, moved.max_abs, passed, reason,
    )  # fmt: skip


def compare(
    original: Session,
    plain: Session,
    candidate: Session,
    samples: Sequence[Feeds],
    rtol: float | None = None,
    atol: float | None = None,
) -> Equivalence:
    """Run three sessions on the same inputs: the original, the original without graph optimisation, the candidate."""
    for what in ("inputs", "outputs"):
        a, b = getattr(original, what), getattr(candidate, what)
        if sorted(a) != sorted(b):
            raise ModelError(f"the models' {what} differ: {', '.join(a)} against {', '.join(b)}")
    found: dict[str, _Deviation] = {}
    floors: dict[str, _Deviation] = {}
    moves: dict[str, _Deviation] = {}
    discrete: dict[str, bool] = {}
    for feeds in samples:
        reference = _named(original, feeds)
        others = (
            (found, _named(candidate, feeds)),
            (floors, _named(plain, feeds)),
            (moves, _named(original, nudge(feeds))),
        )
        for name, value in reference.items():
            discrete[name] = not (isinstance(value, np.ndarray) and value.dtype.kind in "fVc")
            for worst, values in others:
                worst[name] = deviation(value, values[name], rtol, atol).worse(worst.get(name, _Deviation()))
    checks = tuple(judge(name, found[name], floors[name], moves[name], discrete[name]) for name in original.outputs)
    shapes = {name: value.shape for name, value in samples[0].items()}
    return Equivalence(all(c.passed for c in checks), checks, len(samples), shapes, rtol, atol)


def _named(session: Session, feeds: Feeds) -> dict[str, Any]:
    return dict(zip(session.outputs, session.run(feeds), strict=True))


def nudge(feeds: Feeds) -> Feeds:
    """Floating-point inputs moved by one unit in the last place, up or down at random."""
    rng = np.random.default_rng(0)
    moved = dict(feeds)
    for name, value in feeds.items():
        if value.dtype.kind == "f":
            away = np.where(rng.random(value.shape) < 0.5, -np.inf, np.inf).astype(value.dtype)
            moved[name] = np.nextafter(value, away)
    return moved


def samples_for(specs: Sequence[InputSpec], sizes: Mapping[str, Sequence[int]], feeds: Feeds | None) -> list[Feeds]:
    """The given inputs, or random ones of the given sizes."""
    return [feeds] if feeds is not None else [make_feeds(specs, sizes, kind, seed) for kind, seed in SAMPLES]


def likely_sizes(
    specs: Sequence[InputSpec],
    path: str | os.PathLike[str],
    provider: str = "cpu",
    shapes: Mapping[str, Sequence[int]] | None = None,
    *,
    must_run: bool = True,
) -> dict[str, tuple[int, ...]]:
    """Sizes for every input: the given ones, and the first likely ones on which the model runs.

    Parameters
    ----------
    must_run : bool
        Whether it is an error if it runs on none, or there is no onnxruntime; else the likeliest are taken then.

    Raises
    ------
    UsageError
        If the model runs on none of them.
    """
    likeliest = next(candidate_shapes(specs, shapes))
    settled = all(s.name in (shapes or {}) or known(s.shape) is not None for s in specs)
    if not must_run and (settled or not available()):
        return likeliest
    failure: ModelError | None = None
    try:
        session = Session(path, provider, optimise=False)
    except ModelError:
        if must_run:
            raise
        return likeliest
    for candidate in candidate_shapes(specs, shapes):
        try:
            session.run(make_feeds(specs, candidate))
        except ModelError as error:
            failure = failure or error
            continue
        return candidate
    if not must_run:
        return likeliest
    if settled:
        raise UsageError(f"the model does not run at its sizes: {failure}; give others, or --input FILE.npz")
    names = " ".join(f"--shape {s.name}=…" for s in specs if known(s.shape) is None)
    raise UsageError(f"no likely size runs ({failure}); give {names} or --input FILE.npz")


def verify(
    original: str | os.PathLike[str] | onnx.ModelProto | Model,
    candidate: str | os.PathLike[str] | onnx.ModelProto | Model,
    *,
    provider: str = "cpu",
    threads: int = 1,
    shapes: Mapping[str, Sequence[int]] | None = None,
    inputs: str | os.PathLike[str] | Feeds | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Equivalence:
    """Compare two models on the same inputs.

    Parameters
    ----------
    original, candidate : path, onnx.ModelProto or Model
        Models with the same inputs and outputs, whoever made the second.
    provider, threads
        Where to run both; strict about the provider.
    shapes : mapping of input name to sizes, optional
        For dynamic dimensions.
    inputs : path of an .npz (or .npy, for one input), or dict of arrays, optional
        Instead of random inputs.
    rtol, atol : float, optional
        Tolerances; by default those of `TOLERANCES`.
    progress : callable, optional
        Called with each stage.

    Returns
    -------
    Equivalence

    Raises
    ------
    UsageError, ModelError, ProviderError
        See `pwopt.errors`; a model that is not equivalent is a result, not an error.

    Examples
    --------
    >>> import pwopt
    >>> pwopt.verify("models/linear_sequence.onnx", "models/linear_sequence.onnx").passed
    True
    """
    check_settings(threads, rtol, atol)
    specs = input_specs(load(original).proto)
    check_shapes(specs, shapes or {})
    feeds = None if inputs is None else as_feeds(inputs, specs, shapes)
    with as_file(original) as a, as_file(candidate) as b:
        load(b)
        progress("choosing inputs")
        sizes = {} if feeds is not None else likely_sizes(specs, a, provider, shapes)
        progress("running both models")
        return compare(
            Session(a, provider, threads),
            Session(a, provider, threads, optimise=False),
            Session(b, provider, threads),
            samples_for(specs, sizes, feeds),
            rtol,
            atol,
        )
