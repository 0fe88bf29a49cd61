"""The declaration of a gallery system, and how it is checked."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import ArrayLike

import pwopt
from pwopt.passes import PASSES
from pwopt.running.session import Session

FOLDER = Path(__file__).parent
#: Passes that need no timing.
UNMEASURED = tuple(p.name for p in PASSES if p.policy != "measured" and p.pays_on)
#: More numbers than this are not printed one by one.
MAX_PRINTED = 3


@dataclass(frozen=True)
class Figure:
    """A property before and after, as text, and whether it holds."""

    claim: str
    before: str
    after: str
    holds: bool


@dataclass(frozen=True)
class Law:
    """A property whose residual must stay below a limit before and after (see `pwopt.invariants`)."""

    claim: str
    residual: Callable[[Session], float]
    limit: float

    def compare(self, before: Session, after: Session) -> Figure:
        a, b = self.residual(before), self.residual(after)
        return Figure(self.claim, _off(a), _off(b), max(a, b) <= self.limit)


@dataclass(frozen=True)
class Kept:
    """A quantity that must not change, up to a limit relative to its largest value."""

    claim: str
    value: Callable[[Session], ArrayLike]
    limit: float

    def compare(self, before: Session, after: Session) -> Figure:
        a, b = (np.asarray(self.value(s), np.float64) for s in (before, after))
        off = float(np.max(np.abs(a - b))) / float(np.max(np.abs(a)))
        if a.size <= MAX_PRINTED:
            first, second = (", ".join(f"{x:.5g}" for x in v.reshape(-1)) for v in (a, b))
        else:
            first, second = f"{a.size:,} values", "the same" if off == 0 else f"off by {off:.1e}"
        return Figure(self.claim, first, second, off <= self.limit)


@dataclass(frozen=True)
class Refusal:
    """An operator that must stay.

    Attributes
    ----------
    node : str
        The operator's name.
    why : str
        The reason, for readers.
    said : str
        A part of the reason that pwopt reports; "" if no pass reports about the operator.
    """

    node: str
    why: str
    said: str = ""


@dataclass(frozen=True)
class System:
    """One use of the pointwise convolution.

    Attributes
    ----------
    build : callable
        Builds the model; its module's docstring is the system's chapter in the gallery.
    shapes : mapping
        Input sizes for all figures.
    rewrites : sequence of str
        The passes that must act, and no others.
    properties : sequence of Law or Kept
        What holds before and after.
    refusals : sequence of Refusal
    measured : sequence of str
        Measured passes that this system demonstrates; they are applied here without timing.
    """

    build: Callable[[], onnx.ModelProto]
    shapes: Mapping[str, Sequence[int]]
    rewrites: Sequence[str]
    properties: Sequence[Law | Kept]
    refusals: Sequence[Refusal] = ()
    measured: Sequence[str] = ()

    @property
    def name(self) -> str:
        return self.build.__module__.rpartition(".")[2]

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.name}.onnx"

    @property
    def text(self) -> str:
        """The docstring of the builder's module: a title, a blank line, paragraphs."""
        return inspect.cleandoc(sys.modules[self.build.__module__].__doc__ or "")

    @property
    def title(self) -> str:
        return self.text.partition("\n")[0].rstrip(".")

    @property
    def passes(self) -> list[str]:
        """The passes to run: those that need no timing, and those that the system demonstrates."""
        return [*UNMEASURED, *self.measured]

    def optimise(self) -> pwopt.Result:
        """Optimise in the same way on every machine, and verify with onnxruntime."""
        return pwopt.optimize(self.path, cost="analytic", shapes=self.shapes, passes=self.passes)


def _off(residual: float) -> str:
    return "exact" if residual == 0 else f"{residual:.1e}"


def outputs(session: Session, **feeds: np.ndarray) -> dict[str, np.ndarray]:
    """Run the model and return its outputs by name."""
    return dict(zip(session.outputs, map(np.asarray, session.run(feeds)), strict=True))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Seeded float32 noise."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def object_in(*shape: int, size: int, start: int, seed: int = 0) -> np.ndarray:
    """Noise in a cube of `size` positions along every spatial axis, beginning at `start`, with zeros around it."""
    x = np.zeros(shape, np.float32)
    inside = (slice(None), slice(None), *(slice(start, start + size),) * (len(shape) - 2))
    x[inside] = normal(*x[inside].shape, seed=seed)
    return x
