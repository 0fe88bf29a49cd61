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
from pwopt.model import load
from pwopt.runtime import Feeds, InputSpec, Session, candidate_shapes, check_shapes, input_specs, load_feeds, make_feeds

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


@dataclass(frozen=True)
class Equivalence:
    """Verdict over all outputs."""

    passed: bool
    outputs: tuple[OutputCheck, ...]
    samples: int
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

    def worse(self, other: _Deviation) -> _Deviation:
        return _Deviation(
            max(self.max_abs, other.max_abs),
            max(self.max_rel, other.max_rel),
            max(self.mean_abs, other.mean_abs),
            max(self.mismatch, other.mismatch),
            self.within and other.within,
            self.note or other.note,
        )


def deviation(reference: Any, value: Any, rtol: float | None = None, atol: float | None = None) -> _Deviation:
    """How far `value` is from `reference`, element by element; NaN and infinities must agree."""
    if not isinstance(reference, np.ndarray) or not isinstance(value, np.ndarray):
        same = _plain(reference) == _plain(value)
        return _Deviation(mismatch=0.0 if same else 1.0, within=same, note="" if same else "the values differ")
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
        return _Deviation(gap, 0.0, 0.0, mismatch, mismatch == 0)
    default = TOLERANCES.get(str(a.dtype), TOLERANCES["float32"])
    rtol, atol = default[0] if rtol is None else rtol, default[1] if atol is None else atol
    x, y = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(x)
    if not np.array_equal(np.where(finite, 0, x), np.where(np.isfinite(y), 0, y), equal_nan=True):
        return _Deviation(np.inf, np.inf, np.inf, float(np.mean(x != y)), False, "NaN or infinity at different places")
    x, y = x[finite], y[finite]
    if x.size == 0:
        return _Deviation()
    error = np.abs(x - y)
    relative = error / np.maximum(np.abs(x), np.finfo(np.float32).tiny)
    return _Deviation(
        float(error.max()), float(relative.max()), float(error.mean()), float(np.mean(error != 0)),
        bool(np.all(error <= atol + rtol * np.abs(x))),
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
    if sorted(original.outputs) != sorted(candidate.outputs):
        raise ModelError(f"the outputs differ: {', '.join(original.outputs)} against {', '.join(candidate.outputs)}")
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
        for name, a in reference.items():
            discrete[name] = not (isinstance(a, np.ndarray) and a.dtype.kind in "fVc")
            for worst, values in others:
                worst[name] = deviation(a, values[name], rtol, atol).worse(worst.get(name, _Deviation()))
    checks = tuple(judge(name, found[name], floors[name], moves[name], discrete[name]) for name in original.outputs)
    return Equivalence(all(c.passed for c in checks), checks, len(samples), rtol, atol)


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


def choose_inputs(
    proto: onnx.ModelProto,
    path: str | os.PathLike[str],
    provider: str,
    shapes: Mapping[str, Sequence[int]] | None,
    inputs: str | os.PathLike[str] | Feeds | None,
) -> tuple[dict[str, tuple[int, ...]], list[Feeds]]:
    """Sample inputs the original accepts, and their shapes.

    Dynamic dimensions without a given size are tried from the likeliest sizes on, until one runs.

    Raises
    ------
    UsageError
        If none does.
    """
    specs = input_specs(proto)
    if inputs is not None:
        feeds = inputs if isinstance(inputs, dict) else load_feeds(inputs, specs)
        return {name: tuple(v.shape) for name, v in feeds.items()}, [feeds]
    check_shapes(specs, shapes or {})
    chosen = first_that_runs(specs, path, provider, shapes)
    return chosen, [make_feeds(specs, chosen, kind, seed) for kind, seed in SAMPLES]


def first_that_runs(
    specs: Sequence[InputSpec], path: str | os.PathLike[str], provider: str, shapes: Mapping[str, Sequence[int]] | None
) -> dict[str, tuple[int, ...]]:
    """The first candidate shapes on which the model runs."""
    session = Session(path, provider)
    failure: ModelError | None = None
    for candidate in candidate_shapes(specs, shapes):
        try:
            session.run(make_feeds(specs, candidate))
        except ModelError as error:
            failure = failure or error
            continue
        return candidate
    names = ", ".join(f"--shape {s.name}=…" for s in specs)
    raise UsageError(f"no default size runs ({failure}); give {names or '--input FILE.npz'}")


def verify(
    original: str | os.PathLike[str],
    candidate: str | os.PathLike[str],
    *,
    provider: str = "cpu",
    threads: int = 1,
    shapes: Mapping[str, Sequence[int]] | None = None,
    inputs: str | os.PathLike[str] | Feeds | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Equivalence:
    """Compare two model files on the same inputs.

    Parameters
    ----------
    original, candidate : path
        Models with the same inputs and outputs, whoever made the second.
    provider, threads
        Where to run both; strict about the provider.
    shapes : mapping of input name to sizes, optional
        For dynamic dimensions.
    inputs : path of an .npz, or dict of arrays, optional
        Instead of random inputs.
    rtol, atol : float, optional
        Tolerances; by default those of `TOLERANCES`.

    Returns
    -------
    Equivalence

    Examples
    --------
    >>> import pwopt
    >>> pwopt.verify("models/linear_sequence.onnx", "models/linear_sequence.onnx").passed
    True
    """
    proto = load(original).proto
    load(candidate)
    progress("choosing inputs")
    _, samples = choose_inputs(proto, original, provider, shapes, inputs)
    progress("running both models")
    return compare(
        Session(original, provider, threads),
        Session(original, provider, threads, optimise=False),
        Session(candidate, provider, threads),
        samples,
        rtol,
        atol,
    )
