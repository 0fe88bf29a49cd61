"""Invariants of a model, such as conservation laws and symmetries, each measured as one residual.

An invariant takes a function from one array to one array (`function_of` creates one from a model) and an input. It
returns a relative residual without unit: 0 if the law holds exactly, a few machine epsilons (1e-7 in float32) if it
holds up to rounding, and infinity if an output is not finite. All sums are in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from pwopt.algebra import Array, Values
from pwopt.errors import UsageError
from pwopt.graph.files import Source, as_file
from pwopt.running.providers import Provider, as_provider
from pwopt.running.session import Session

ArrayFunction = Callable[[Values], Values]

#: Seed of perturbations and permutations, for reproducible figures.
SEED = 0


def function_of(
    model: Source | Session,
    input: str | None = None,
    output: str | None = None,
    others: Mapping[str, Values] | None = None,
    provider: str | Provider = "cpu",
) -> ArrayFunction:
    """Return a function from one input of a model to one of its outputs, run by onnxruntime.

    Parameters
    ----------
    model : path, onnx.ModelProto, Model or Session
    input, output : str, optional
        Names; by default the first input and the first output.
    others : mapping, optional
        Values of the model's other inputs.
    provider : str or Provider
        Execution provider, unless `model` is a session already.

    Raises
    ------
    UsageError
        If there is no such input or output.
    """
    if isinstance(model, Session):
        session = model
    else:
        with as_file(model) as path:
            session = Session(path, as_provider(provider))
    chosen = input or session.inputs[0]
    wanted = output or session.outputs[0]
    for kind, name, names in (("input", chosen, session.inputs), ("output", wanted, session.outputs)):
        if name not in names:
            raise UsageError(f"{name!r} is not an {kind} of the model; it has {', '.join(map(repr, names))}")
    index = session.outputs.index(wanted)

    def run(x: Values) -> Values:
        return np.asarray(session.run({**(others or {}), chosen: x})[index])

    return run


def conservation(f: ArrayFunction, x: Values, matrix: ArrayLike, axis: int = 1) -> float:
    """A·f(x) = A·x: f conserves the sums that the rows of A define at each position (mass, energy, charge).

    Parameters
    ----------
    f : callable
        As many channels, and positions, as its input has.
    x : array
    matrix : array_like, shape (laws, channels)
    axis : int
        The channel axis of x and f(x).

    Returns
    -------
    float
        The largest |A·f(x) − A·x| of any law, relative to the largest |A·x| of that law.
    """
    a = np.atleast_2d(np.asarray(matrix, np.float64))
    before, after = _mapped(a, x, axis), _mapped(a, f(x), axis)
    _fit(before, after)
    return max(_relative(after[i], before[i]) for i in range(len(a)))


def isometry(f: ArrayFunction, x: Values, axis: int = 1, stride: int = 1) -> float:
    """‖f(x)‖ = ‖x‖ at every position, as for y = Wx with WᵀW = I.

    Parameters
    ----------
    f : callable
    x : array
    axis : int
        The channel axis of x and f(x).
    stride : int
        f reads every stride-th position of each axis after the channels.

    Returns
    -------
    float
        The largest difference of two norms, relative to the largest norm.

    Examples
    --------
    >>> import numpy as np
    >>> from pwopt.invariants import isometry
    >>> x = np.ones((1, 4, 8, 8))
    >>> isometry(lambda x: -x, x), isometry(lambda x: 1.5 * x, x)
    (0.0, 0.5)
    """
    seen = x[(slice(None),) * (axis + 1) + (slice(None, None, stride),) * (x.ndim - axis - 1)]
    before, after = (np.linalg.norm(np.asarray(v, np.float64), axis=axis) for v in (seen, f(x)))
    return _relative(after, before)


def gram(f: ArrayFunction, x: Values, matrix: ArrayLike, axis: int = 1) -> float:
    """G(f(x)) = W·G(x)·Wᵀ for G(x) = x·xᵀ summed over all positions, as for y = Wx.

    Parameters
    ----------
    f : callable
    x : array
    matrix : array_like, shape (out, in)
        W.
    axis : int
        The channel axis of x and f(x).

    Returns
    -------
    float
        The largest difference of two entries, relative to the largest entry of W·G(x)·Wᵀ.
    """
    w = np.asarray(matrix, np.float64)
    return _relative(_gram(f(x), axis), w @ _gram(x, axis) @ w.T)


def translation(f: ArrayFunction, x: Values, shift: int = 1, stride: int = 1, margin: int = 0, axis: int = 2) -> float:
    """f(shifted x) = shifted f(x): features move with the input (translation equivariance).

    Parameters
    ----------
    f : callable
    x : array
        An input that is zero near the border, so that nothing is shifted in or out.
    shift : int
        Positions to move x along all axes from `axis` on, 0 or more.
    stride : int
        Positions of x per position of f(x); `shift` is a multiple of it.
    margin : int
        Positions of f(x) at each border to leave out because of padding.
    axis : int
        The first spatial axis of x and f(x).

    Returns
    -------
    float
        The largest difference inside, relative to the largest value inside.
    """
    if shift % stride:
        raise UsageError(f"the shift {shift} is not a multiple of the stride {stride}")
    axes = tuple(range(axis, x.ndim))
    still, moved = f(x), f(np.roll(x, (shift,) * len(axes), axes))
    step = shift // stride
    for a in axes:
        size = still.shape[a] - 2 * margin - step
        still = np.take(still, range(margin, margin + size), a)
        moved = np.take(moved, range(margin + step, margin + step + size), a)
    return _relative(moved, still)


def permutation(f: ArrayFunction, x: Values, axis: int = 1, output_axis: int | None = None, seed: int = SEED) -> float:
    """f(Px) = P·f(x): the order of nodes, tokens or points does not matter (permutation equivariance).

    Parameters
    ----------
    f : callable
    x : array
    axis : int
        The axis whose entries are reordered at random.
    output_axis : int, optional
        The same axis in f(x); `axis` by default.
    seed : int

    Returns
    -------
    float
        The largest difference, relative to the largest value.
    """
    order = np.random.default_rng(seed).permutation(x.shape[axis])
    wanted = np.take(f(x), order, axis=axis if output_axis is None else output_axis)
    return _relative(f(np.take(x, order, axis=axis)), wanted)


def locality(
    f: ArrayFunction, x: Values, axis: int = 1, output_axis: int | None = None, index: int = 0, seed: int = SEED
) -> float:
    """f(x)ᵢ depends on xᵢ only, not on other nodes, pixels or tokens.

    Parameters
    ----------
    f : callable
    x : array
    axis : int
        The axis of the nodes.
    output_axis : int, optional
        The same axis in f(x); `axis` by default.
    index : int
        The node i that is kept; noise of the same size replaces all others.
    seed : int

    Returns
    -------
    float
        The largest change of f(x)ᵢ, relative to its largest value.
    """
    noise = np.random.default_rng(seed).normal(0, max(float(np.std(x)), 1e-6), x.shape).astype(x.dtype)
    kept = np.expand_dims(np.take(x, index, axis), axis)
    at = (slice(None),) * axis + (slice(index, index + 1),)
    noise[at] = kept
    where = axis if output_axis is None else output_axis
    return _relative(np.take(f(noise), index, where), np.take(f(x), index, where))


def symmetry(f: ArrayFunction, x: Values, axes: tuple[int, int] = (-2, -1)) -> float:
    """f(x)ᵢⱼ = f(x)ⱼᵢ: distances and contacts have no direction.

    Parameters
    ----------
    f : callable
    x : array
    axes : tuple of int
        The axes i and j of f(x).

    Returns
    -------
    float
        The largest difference, relative to the largest value.
    """
    y = f(x)
    return _relative(np.swapaxes(y, *axes), y)


@dataclass(frozen=True)
class Invariant:
    """A named invariant: its formula, and the function that measures its residual."""

    name: str
    formula: str
    residual: Callable[..., float]


#: All invariants by name.
INVARIANTS: Mapping[str, Invariant] = {
    law.name: law
    for law in (
        Invariant("conservation", "A·f(x) = A·x", conservation),
        Invariant("isometry", "‖f(x)‖ = ‖x‖ at every position, as for y = Wx with WᵀW = I", isometry),
        Invariant("gram", "G(f(x)) = W·G(x)·Wᵀ for G(x) = x·xᵀ summed over all positions, as for y = Wx", gram),
        Invariant("translation", "f(shifted x) = shifted f(x)", translation),
        Invariant("permutation", "f(Px) = P·f(x)", permutation),
        Invariant("locality", "f(x)ᵢ depends on xᵢ only", locality),
        Invariant("symmetry", "f(x)ᵢⱼ = f(x)ⱼᵢ", symmetry),
    )
}


def _fit(a: Array, b: Array) -> None:
    if a.shape != b.shape:
        raise UsageError(f"the shapes {a.shape} and {b.shape}, which the invariant compares, differ")


def _relative(found: Values, wanted: Values) -> float:
    """max |found − wanted| / max |wanted|; 0 for 0 / 0."""
    a, b = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    _fit(a, b)
    if not (np.all(np.isfinite(a)) and np.all(np.isfinite(b))):
        return float("inf")
    off, size = float(np.max(np.abs(a - b), initial=0.0)), float(np.max(np.abs(b), initial=0.0))
    return off / size if size else (float("inf") if off else 0.0)


def _mapped(matrix: Array, x: Values, axis: int) -> Array:
    """matrix · x along one axis, which becomes the first axis of the result."""
    if matrix.shape[1] != x.shape[axis]:
        raise UsageError(f"the matrix has {matrix.shape[1]} columns, and axis {axis} has {x.shape[axis]} channels")
    mapped: Array = np.asarray(np.tensordot(matrix, np.asarray(x, np.float64), axes=(1, axis)), np.float64)
    return mapped


def _gram(x: Values, axis: int) -> Array:
    rows = np.moveaxis(np.asarray(x, np.float64), axis, 0).reshape(x.shape[axis], -1)
    product: Array = rows @ rows.T
    return product
