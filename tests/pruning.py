"""What the tests of drop-dead share: models with dead channels, and checks of what becomes of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from helpers import normal, parse, reasons, run, same

from pwopt.passes import DropDead

F = np.float32
X = normal(2, 4, 6, 6)
SIDE = "(double[2,4,6,6] x) => (double[N] y) "
TWO = "(double[2,4,6,6] x) => (double[N] y, double[N] z) "


def dead(values: np.ndarray, rows: Sequence[int] = (), columns: Sequence[int] = (), scale: float = 0.0) -> np.ndarray:
    """`values` with some rows (filters) and columns (input channels) scaled, to zero unless told."""
    result: np.ndarray = values.copy()
    result[np.array(rows, int)] *= scale
    result[:, np.array(columns, int)] *= scale
    return result


def holding(value: float, channels: int = 7, at: Sequence[int] = (1, 4)) -> np.ndarray:
    """A bias with one value where the filters are zero."""
    bias = normal(channels, seed=3)
    bias[np.array(at, int)] = value
    return bias


#: Filters 1 and 4 of seven are zero; so are rows 1 and 4 of the seven-channel maps that continue elsewhere.
W, V = dead(normal(7, 4, 1, 1), rows=(1, 4)), normal(5, 7, 1, 1, seed=9)
CONSTANTS = {
    "w": W, "b": holding(0.7), "v": V, "w2": dead(normal(7, 4, 1, 1, seed=1), rows=(1, 3)), "b2": holding(-0.2, at=(1, 3)),
    "mat": normal(7, 5, seed=9), "flat": normal(5, 7, seed=9), "bias5": normal(5, seed=8), "bias7": normal(7, seed=4),
    "stencil": normal(7, 1, 3, 3, seed=2), "slope": np.abs(normal(7, 1, 1, seed=5)) + 0.1, "half": np.float64(0.5),
    "low": np.float64(0), "high": np.float64(6), "map": normal(6, 6, seed=6),
    "gamma": normal(7, seed=5), "beta": normal(7, seed=6), "mean": normal(7, seed=7), "var": np.abs(normal(7, seed=8)) + 0.1,
    "up": np.array([1, 1, 2, 2], F), "size": np.array([2, 7, 12, 12]), "ring": np.array([0, 0, 1, 0, 0, 0, 0, 2]),
    "space": np.array([2, 3]), "one": np.array([1]), "five": np.array([5]), "three": np.array([3]),
}  # fmt: skip


def build(body: str, opset: int = 17, /, **weights: np.ndarray) -> onnx.ModelProto:
    """`parse` with those of CONSTANTS that occur in the nodes."""
    words = set(re.findall(r"\w+", body[body.index("{") :]))
    return parse(body, opset, 8, **{k: v for k, v in {**CONSTANTS, **weights}.items() if k in words})


def pruned(
    body: str, shapes: Mapping[str, tuple[int, ...]], opset: int = 17, /, **weights: np.ndarray
) -> tuple[onnx.ModelProto, str]:
    """Same answers (for `x`) with weights of these shapes; the result and all reasons."""
    x = weights.pop("x", X)
    model = build(body, opset, **weights)
    result, outcome, _ = run(model, DropDead())
    found = {t.name: tuple(t.dims) for t in result.graph.initializer}
    assert {k: found.get(k) for k in shapes} == shapes, reasons(outcome)
    same(model, result, x=x)
    return result, " | ".join(r.reason for r in outcome.rewrites)


def untouched(body: str, opset: int = 17, /, **weights: np.ndarray) -> str:
    model = build(body, opset, **weights)
    result, outcome, _ = run(model, DropDead())
    assert result is model, outcome.rewrites
    return " ".join(reasons(outcome))


def subnormal() -> np.ndarray:
    """Ordinary float32 weights (7, 4, 1, 1), three of them below the smallest normal number; no row or column is zero."""
    values = normal(7, 4, 1, 1, dtype=F)
    values[[0, 3, 5], [1, 2, 1]] = np.array([1e-40, -1e-39, 3e-45], F)[:, None, None]
    return values
