"""What every system of the gallery declares, and how a declaration is checked."""

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
from pwopt.running.runtime import Session

FOLDER = Path(__file__).parent
#: Passes that need no clock.
UNMEASURED = tuple(p.name for p in PASSES if p.policy != "measured")
#: Numbers that are printed one by one.
MAX_PRINTED = 3


@dataclass(frozen=True)
class Figure:
    """A property before and after, as numbers to print, and whether it holds."""

    claim: str
    before: str
    after: str
    holds: bool


@dataclass(frozen=True)
class Law:
    """A property whose residual stays below a limit, before and after (see `pwopt.invariants`)."""

    claim: str
    residual: Callable[[Session], float]
    limit: float

    def compare(self, before: Session, after: Session) -> Figure:
        a, b = self.residual(before), self.residual(after)
        return Figure(self.claim, _off(a), _off(b), max(a, b) <= self.limit)


@dataclass(frozen=True)
class Kept:
    """A quantity that is the same before and after, to within a limit relative to its largest value."""

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
        Its name.
    why : str
        For readers.
    said : str
        A part of the reason that pwopt reports; "" where no pass is concerned with the place at all.
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
        Makes the model; its module's docstring is the system's paragraph in the gallery.
    shapes : mapping
        Input sizes for figures.
    rewrites : sequence of str
        Passes that must change it, and no others.
    properties : sequence of Law or Kept
        What holds before and after.
    refusals : sequence of Refusal
    measured : sequence of str
        Passes that only a clock can judge, and that this system is about: applied here without one.
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
        """The builder's docstring: a title, a blank line, paragraphs."""
        return inspect.cleandoc(sys.modules[self.build.__module__].__doc__ or "")

    @property
    def title(self) -> str:
        return self.text.partition("\n")[0].rstrip(".")

    @property
    def passes(self) -> list[str]:
        """What runs without a clock: the passes that need none, and those that the system is about."""
        return [*UNMEASURED, *self.measured]

    def optimise(self) -> pwopt.Result:
        """Rewritten, the same way on every machine, and verified with onnxruntime."""
        return pwopt.optimize(self.path, cost="analytic", shapes=self.shapes, passes=self.passes)


def _off(residual: float) -> str:
    return "exact" if residual == 0 else f"{residual:.1e}"


def outputs(session: Session, **feeds: np.ndarray) -> dict[str, np.ndarray]:
    """A run's outputs by name."""
    return dict(zip(session.outputs, map(np.asarray, session.run(feeds)), strict=True))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Seeded float32 noise."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def object_in(*shape: int, size: int, start: int, seed: int = 0) -> np.ndarray:
    """Noise in a cube of `size` positions along every spatial axis, from `start` on, with zeros around it."""
    x = np.zeros(shape, np.float32)
    inside = (slice(None), slice(None), *(slice(start, start + size),) * (len(shape) - 2))
    x[inside] = normal(*x[inside].shape, seed=seed)
    return x
