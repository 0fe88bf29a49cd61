"""`pwopt.properties`: properties of the matrix of every pointwise map: spectrum, kind, channels and cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pwopt.algebra import Array
from pwopt.algebra.linear import LinearMap
from pwopt.graph.dtypes import epsilon
from pwopt.graph.files import Source
from pwopt.graph.view import View
from pwopt.maps import forms
from pwopt.maps.cost import macs
from pwopt.maps.scans import flush_subnormals
from pwopt.selecting.map_records import Listing, load_sized
from pwopt.selecting.shape_folding import infer_sizes

#: The largest number of weights of a block with a spectrum: the decomposition of 2048×2048 weights takes seconds.
MAX_SPECTRUM_WEIGHTS = 1 << 22


@dataclass(frozen=True)
class MapProperties:
    """Properties of the matrix W (out, in) of a pointwise map. A grouped map has a block diagonal matrix.

    Attributes
    ----------
    tensor : str
        The output of the map, which identifies it.
    op : str
    rows, columns, groups : int
    kind : str
        permutation, selection (every row has a single 1, or only zeros), diagonal, orthogonal (WᵀW = I to the type's
        rounding), low rank, or dense.
    singular_values : tuple of float
        min(rows, columns) values in descending order; empty if W is too large for a decomposition.
    rank : int or None
        Number of singular values above max(rows, columns) · ε · the largest one, where ε is that of the model's type
        (as in `numpy.linalg.matrix_rank`).
    effective_rank : float or None
        exp of the entropy of the singular values divided by their sum (Roy and Vetterli, "The effective rank: a measure
        of effective dimensionality", 2007).
    condition : float or None
        The largest singular value divided by the smallest; infinite if the smallest is zero.
    orthogonality_defect : float or None
        ‖WᵀW − I‖₂. It is 0 if W keeps norms, and at least 1 if there are fewer rows than columns.
    column_sums : tuple of float
        1ᵀW. All are 1 if the map conserves the sum of its channels; otherwise the sum of the outputs is the sum of the
        inputs with these weights, up to the bias.
    dead_inputs : tuple of int
        Input channels whose weights are all zero.
    constant_outputs : tuple of int
        Output channels that equal the bias for every input.
    intensity : float or None
        Floating-point operations per byte of input, output and weights, each moved once (Williams et al., "Roofline",
        2009); None if sizes are unknown.
    """

    tensor: str
    op: str
    rows: int
    columns: int
    groups: int
    kind: str
    singular_values: tuple[float, ...]
    rank: int | None
    effective_rank: float | None
    condition: float | None
    orthogonality_defect: float | None
    column_sums: tuple[float, ...]
    dead_inputs: tuple[int, ...]
    constant_outputs: tuple[int, ...]
    intensity: float | None


class Properties(Listing[MapProperties]):
    """Properties of the weights of the pointwise maps of a model."""


def properties(
    model: Source,
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> Properties:
    """Compute the properties of the weights of every pointwise map of a model.

    Parameters
    ----------
    model : path, onnx.ModelProto or Model
    shapes : mapping of input name to sizes, optional
        Sizes of dynamic inputs. By default, likely sizes are used.

    Returns
    -------
    Properties
        One record for each map with constant, finite weights.

    Raises
    ------
    UsageError, ModelError
        See `pwopt.errors`.

    Examples
    --------
    >>> import pwopt
    >>> for m in pwopt.properties("models/linear_sequence.onnx").maps[:2]:
    ...     print(m.tensor, m.rows, m.columns, m.rank, m.kind)
    h1 128 64 64 dense
    h2 192 128 128 dense
    """
    original, sizes = load_sized(model, shapes)
    view = View(original.graph, infer_sizes(original.proto, sizes))
    found = []
    for node in view.nodes():
        reading = forms.linear(view, node)
        if reading is None or not reading.weighted or len(reading.nodes) > 1 or reading.geometry.taps != 1:
            continue
        linear = reading.try_load()
        if linear is not None:
            found.append(_properties(view, reading, linear))
    return Properties(tuple(found), sizes)


def _properties(view: View, reading: forms.Reading, linear: LinearMap) -> MapProperties:
    g = reading.geometry
    dtype = view.dtype(reading.output)
    weight = flush_subnormals(linear.weight, dtype).reshape(
        g.groups, g.out_channels // g.groups, g.in_channels // g.groups
    )
    values = spectrum(weight)
    rank = None if values is None else int(np.sum(values > _roundoff(values, g.out_channels, g.in_channels, dtype)))
    defect = None if values is None else _defect(values, g.in_channels)
    return MapProperties(
        reading.output.name,
        reading.node.op,
        g.out_channels,
        g.in_channels,
        g.groups,
        _kind(weight, rank, defect, epsilon(dtype)),
        () if values is None else tuple(values.tolist()),
        rank,
        None if values is None else effective_rank(values),
        None if values is None else _condition(values),
        defect,
        tuple(weight.sum(1).reshape(-1).tolist()),
        tuple(np.flatnonzero(~np.any(weight, axis=1)).tolist()),
        tuple(np.flatnonzero(~np.any(weight, axis=2)).tolist()),
        _intensity(view, reading),
    )


def spectrum(blocks: Array) -> Array | None:
    """Singular values of a block diagonal matrix, largest first; None where a block is too large.

    Parameters
    ----------
    blocks : array, shape (groups, out / groups, in / groups)
    """
    if math.prod(blocks.shape[1:]) > MAX_SPECTRUM_WEIGHTS:
        return None
    values: Array = np.sort(np.linalg.svd(blocks, compute_uv=False).reshape(-1))[::-1]
    return values


def effective_rank(values: Array) -> float:
    """Return exp(−Σ p·log p) with p = s / Σ s; 0 if all s are zero."""
    total = float(np.sum(values))
    p = values[values > 0] / total if total else values[:0]
    return float(np.exp(-np.sum(p * np.log(p)))) if p.size else 0.0


def _roundoff(values: Array, rows: int, columns: int, dtype: np.dtype[np.generic] | None) -> float:
    return float(values[0]) * max(rows, columns) * epsilon(dtype)


def _condition(values: Array) -> float:
    return float(values[0] / values[-1]) if values[-1] else math.inf


def _defect(values: Array, columns: int) -> float:
    """‖WᵀW − I‖₂ from the singular values of W: WᵀW has the eigenvalues s² and, if W is wide, 0."""
    return max(float(np.max(np.abs(values**2 - 1))), 1.0 if len(values) < columns else 0.0)


def _kind(blocks: Array, rank: int | None, defect: float | None, eps: float) -> str:
    groups, rows, columns = blocks.shape
    picks = np.all((blocks == 0) | (blocks == 1)) and np.all(np.sum(blocks, axis=2) <= 1)
    if picks and rows == columns and np.all(np.sum(blocks, axis=1) == 1) and np.all(np.sum(blocks, axis=2) == 1):
        return "permutation"
    if picks:
        return "selection"
    if rows == columns and not np.any(blocks[:, ~np.eye(rows, dtype=bool)]):
        return "diagonal"
    if defect is not None and defect <= groups * rows * eps:
        return "orthogonal"
    if rank is not None and rank < groups * min(rows, columns):
        return "low rank"
    return "dense"


def _intensity(view: View, reading: forms.Reading) -> float | None:
    work = macs(view, reading.node)
    before, after = view.size_of(reading.source), view.size_of(reading.output)
    dtype = view.dtype(reading.output)
    if not work or before is None or after is None or dtype is None:
        return None
    elements = math.prod(before) + math.prod(after) + reading.geometry.weights
    return 2 * work / (elements * dtype.itemsize)
