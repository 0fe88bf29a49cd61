"""Measure `pwopt.invariants` on two models, selected by name and with settings as text."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pwopt.errors import UsageError
from pwopt.evidence.equivalence import LawCheck
from pwopt.graph.shapes import format_shape
from pwopt.inputs.samples import Sample, load_array_file
from pwopt.invariants import INVARIANTS, function_of
from pwopt.running.providers import Provider
from pwopt.running.session import Session


@dataclass(frozen=True)
class Law:
    """An invariant to measure.

    Attributes
    ----------
    name : str
        A key of `pwopt.invariants.INVARIANTS`.
    settings : mapping
        Keyword arguments of its function.
    input, output : str or None
        Names of an input and an output; the first ones by default.
    text : str
        The text it was parsed from.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    input: str | None = None
    output: str | None = None
    text: str = ""


def parse_law(text: str) -> Law:
    """Parse ``NAME:KEY=VALUE:KEY=VALUE``.

    Values are integers, several joined by commas, or for ``matrix`` the path of an .npy; ``input`` and ``output`` are
    names.

    Examples
    --------
    >>> parse_law("translation:shift=2:stride=2").settings
    {'shift': 2, 'stride': 2}
    """
    name, _, rest = text.partition(":")
    pairs = re.split(r":(?=\w+=)", rest) if rest else []  # a colon may also be a drive's, or in a tensor's name
    if name not in INVARIANTS:
        raise UsageError(f"{name!r} is not an invariant; choose from {', '.join(INVARIANTS)}")
    parameters = inspect.signature(INVARIANTS[name].residual).parameters
    known = [*list(parameters)[2:], "input", "output"]
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, sep, value = pair.partition("=")
        if not sep or key not in known:
            raise UsageError(f"{pair!r} is not a setting of {name}; choose from {', '.join(known)}, as KEY=VALUE")
        settings[key] = _parse_value(key, value)
    missing = [key for key in known if key == "matrix" and key not in settings]
    if missing:
        raise UsageError(f"{name} needs a matrix; give {name}:matrix=FILE.npy")
    return Law(name, settings, settings.pop("input", None), settings.pop("output", None), text)


def _read_matrix(path: Path) -> Any:
    found = load_array_file(path)
    if not isinstance(found, np.ndarray):
        raise UsageError(f"{str(path)!r} holds several arrays; save one with numpy.save")
    return found


def _parse_value(key: str, text: str) -> Any:
    if key in ("input", "output"):
        return text
    try:
        if key == "matrix":
            return _read_matrix(Path(text))
        numbers = tuple(map(int, text.split(",")))
    except (OSError, ValueError) as error:
        raise UsageError(f"the setting {key}={text} cannot be read: {error}") from error
    return numbers if len(numbers) > 1 else numbers[0]


def measure(
    laws: Sequence[Law], original: Path, candidate: Path, sample: Sample, provider: Provider, threads: int
) -> tuple[LawCheck, ...]:
    """Measure the residual of each invariant on both models, with one sample.

    Raises
    ------
    UsageError
        If an invariant does not fit the models' shapes.
    """
    if not laws:
        return ()
    sessions = [Session(path, provider, threads) for path in (original, candidate)]
    return tuple(
        LawCheck(
            law.text or law.name, INVARIANTS[law.name].formula, *(_measure_residual(law, s, sample) for s in sessions)
        )
        for law in laws
    )


def _measure_residual(law: Law, session: Session, sample: Sample) -> float:
    name = law.input or session.inputs[0]
    if name not in sample.feeds:
        raise UsageError(f"there is no input {name!r}; the model has {', '.join(map(repr, sample.feeds))}")
    others = {k: v for k, v in sample.feeds.items() if k != name}
    function = function_of(session, name, law.output, others)
    try:
        return float(INVARIANTS[law.name].residual(function, sample.feeds[name], **law.settings))
    except IndexError as error:
        result = law.output or session.outputs[0]
        given, size = (format_shape(v.shape) for v in (sample.feeds[name], function(sample.feeds[name])))
        raise UsageError(
            f"{law.text} needs an axis that input {name!r}, {given}, or output {result!r},"
            f" {size}, has not; choose others with input=NAME or output=NAME"
        ) from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"{law.text} does not fit the model: {error}; see {law.name} in pwopt.invariants") from error
