"""How far two outputs rank classes alike."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pwopt.algebra import Values


def compare_rankings(reference: Values, value: Values, piece: int) -> tuple[float | None, float | None]:
    """Return `top1` and `top5` of a `metrics.Agreement`.

    Parameters
    ----------
    reference, value : array
        Of the same shape and floating-point type.
    piece : int
        About how many elements to process at once.
    """
    axis = 1 if reference.ndim >= 4 else reference.ndim - 1
    if axis < 0 or reference.shape[axis] < 2:
        return None, None
    classes, firsts, overlap, positions = reference.shape[axis], 0, 0.0, 0
    for x, y in _rows(np.moveaxis(reference, axis, -1), np.moveaxis(value, axis, -1), piece=piece):
        whole = np.all(np.isfinite(x) & np.isfinite(y), axis=1)
        if not whole.all():
            x, y = x[whole], y[whole]
        every = np.arange(len(x))
        if len(x):
            firsts += int(np.sum(x[every, np.argmax(y, axis=1)] == np.max(x, axis=1)))
        positions += len(x)
        if classes > 5:
            fifth = np.partition(x, classes - 5, axis=1)[:, classes - 5]
            other = np.argpartition(y, classes - 5, axis=1)[:, classes - 5 :]
            # an entry counts if the reference ranks it as high, so that ties are no errors
            overlap += float(np.sum(x[every[:, None], other] >= fifth[:, None])) / 5
    if not positions:
        return None, None
    return firsts / positions, overlap / positions if classes > 5 else None


def _rows(*arrays: Values, piece: int) -> Iterator[tuple[Values, ...]]:
    """Yield pieces of arrays as matrices of their last axis, for any memory layout."""
    first = arrays[0]
    axis = int(np.argmax(first.shape[:-1])) if first.ndim > 1 else 0
    if first.ndim == 1:
        yield tuple(a[None] for a in arrays)
        return
    count = min(first.shape[axis], -(-first.size // piece))
    for pieces in zip(*(np.array_split(a, count, axis) for a in arrays), strict=True):
        yield tuple(p.reshape(-1, first.shape[-1]) for p in pieces)
