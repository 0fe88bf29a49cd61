"""Maps of low rank: find them, and factor each into two maps."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import numpy as np

from pwopt.algebra import Array
from pwopt.algebra.geometry import RefusedError
from pwopt.algebra.linear import LinearMap
from pwopt.algebra.summaries import is_finite

#: Sketches that must agree: one in ten of a large matrix is nearly singular by chance (Edelman, 1988).
SKETCHES = 3
#: Matrices up to this size may be decomposed right away, which takes less time than a sketch.
SMALL = 256
#: Steps that scale rows and columns; each halves the logarithms of what is left to scale.
EQUILIBRATIONS = 8


def low_rank(matrix: Array, relative_error: float) -> bool:
    """Whether a matrix may be of so low a rank that two factors have fewer weights; almost never False if it is.

    Its rows and columns are summed with random signs in k random sets each (a count sketch: Charikar et al., 2002;
    Clarkson and Woodruff, 2013). If the rank is below k, the k×k result is singular to within `relative_error` times
    the norms of the sketches, and solving it for random right-hand sides blows up, twice over (inverse iteration: Golub
    and Van Loan, 8.2.2). Costs two passes over the matrix and two LU decompositions of a quarter of its size.
    """
    rows, columns = matrix.shape
    k = -(-matrix.size // (rows + columns))
    if k < 1 or not np.any(matrix):
        return False
    if matrix.size <= SMALL:
        return True
    return all(_singular(matrix, k, relative_error, np.random.default_rng(seed)) for seed in range(SKETCHES))


def _singular(matrix: Array, k: int, relative_error: float, rng: np.random.Generator) -> bool:
    """Whether a k×k sketch of a matrix is singular."""
    rows, columns = matrix.shape
    longer = int(columns > rows)
    sketch = _count_sketch(_count_sketch(matrix, k, rng, longer), k, rng, 1 - longer)  # the longer first: less is left
    sides = rng.standard_normal((k, 4))
    try:
        once = np.linalg.solve(sketch, sides)
        twice = np.linalg.solve(sketch.T, once / np.linalg.norm(once, axis=0))
    except np.linalg.LinAlgError:
        return True
    condition = np.max(np.linalg.norm(twice, axis=0)) * np.linalg.norm(sketch)
    buckets = math.sqrt(-(-rows // k) * -(-columns // k))
    return bool(not np.isfinite(condition) or condition * relative_error * buckets * 10 >= 1)


def _count_sketch(matrix: Array, count: int, rng: np.random.Generator, axis: int) -> Array:
    """Rows (axis 0) or columns with random signs, summed in `count` random sets of about equal size."""
    size = matrix.shape[axis]
    signs = rng.choice([-1.0, 1.0], size).reshape((-1, 1) if axis == 0 else (1, -1))
    sums: Array = np.add.reduceat(
        matrix.take(rng.permutation(size), axis) * signs, np.arange(count) * size // count, axis
    )
    return sums


def _equilibrate(matrix: Array) -> tuple[Array, Array]:
    """Powers of two for rows and for columns, by which the largest numbers of all of them come near 1 (Ruiz, 2001)."""
    sizes, rows, columns = np.abs(matrix), np.ones(len(matrix)), np.ones(matrix.shape[1])
    for _ in range(EQUILIBRATIONS):
        across, down = sizes.max(axis=1, initial=0.0), sizes.max(axis=0, initial=0.0)
        by_row, by_column = (1 / np.sqrt(np.where(v > 0, v, 1.0)) for v in (across, down))
        sizes = sizes * by_row[:, None] * by_column
        rows, columns = rows * by_row, columns * by_column
    return tuple(np.exp2(np.round(np.log2(v))) for v in (rows, columns))  # type: ignore[return-value]


def factor(linear: LinearMap, relative_error: float) -> tuple[LinearMap, LinearMap]:
    """Split an ungrouped map of low rank: ``linear = second @ first`` with rank(W) channels between.

    `first` keeps the stencil, `second` is pointwise with the bias. The rows and columns of W are first scaled to the
    same size (`_equilibrate`), so that a channel of small numbers counts as much as one of large numbers. The rank is
    the smallest for which the discarded singular values have a Frobenius norm of at most `relative_error` times that of
    the scaled W, and of each of its rows and columns. Pass half the machine epsilon of the model's type, and the split
    changes no row or column of W by more than its rounding did (Eckart and Young, 1936). Errors below √n machine
    epsilons of float64 count as none: sums of n products, and the decomposition itself, round as much (Higham and Mary,
    2019). Refused where that rank saves no weights.
    """
    g = linear.geometry
    if g.groups != 1 or g.transposed:
        raise RefusedError("only ungrouped maps are factored")
    matrix = linear.weight.reshape(g.out_channels, -1)
    if not is_finite(matrix):
        raise RefusedError("the weights are not finite")
    rows, columns = _equilibrate(matrix)
    u, s, vt = np.linalg.svd(matrix * rows[:, None] * columns, full_matrices=False)
    allowed = max(relative_error, math.sqrt(max(matrix.shape)) * sys.float_info.epsilon)
    terms = [s[None] ** 2, (u[np.any(matrix, axis=1)] * s) ** 2, (vt.T[np.any(matrix, axis=0)] * s) ** 2]
    tails = [np.sqrt(t[:, ::-1].cumsum(axis=1)[:, ::-1]) for t in terms]  # what each rank discards of W, rows, columns
    rank = max((int(np.count_nonzero(np.any(t > allowed * t[:, :1], axis=0))) for t in tails if t.size), default=0)
    if rank * sum(matrix.shape) >= matrix.size or rank == 0:
        raise RefusedError(
            f"the rank {rank} of {g.out_channels}×{matrix.shape[1]} weights is too high to save anything"
        )
    root = np.sqrt(s[:rank])
    left, right = u[:, :rank] * root / rows[:, None], root[:, None] * vt[:rank] / columns
    left[~np.any(matrix, axis=1)], right[:, ~np.any(matrix, axis=0)] = 0, 0  # nothing stays nothing
    first = LinearMap.of(replace(g, out_channels=rank, biased=False), right, moved=np.zeros(rank))
    second = LinearMap.pointwise(left, linear.bias, rank=g.rank)
    return first, replace(second, moved=linear.moved)
