"""Certificates: evaluate the operators of each rewrite, before and after it, in float64 on separate probes.

Two versions that are affine in their inputs are equal for all inputs if they agree on a basis. If they agree on random
probes, they are equal except with a stated probability (Freivalds, "Probabilistic machines can use less running time",
1977; Schwartz, "Fast probabilistic algorithms for verification of polynomial identities", 1980).

The allowed difference is computed beforehand. A sequence of d maps stores new weights, each with a relative rounding
error of u. Their sums of n terms in float64 have a relative error of γₙ (Higham, "Accuracy and Stability of Numerical
Algorithms", 2002, section 3.1). Both are relative to the sum of the magnitudes of all terms. Versions that are not
affine are tested on probes of several sizes, and compared with the effect of rounding their weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pwopt.algebra import Array, Values
from pwopt.evidence.evaluation import MAX_WORK, SMALLEST_POSITIVE, Side, Tensors, TooLargeError, UnfitError
from pwopt.evidence.terms import has_equal_terms
from pwopt.evidence.traits import find_traits
from pwopt.graph.changes import Change
from pwopt.graph.dtypes import FLOATS, epsilon
from pwopt.graph.ir import Tensor
from pwopt.graph.journal import State
from pwopt.graph.view import View
from pwopt.rewriting.records import Certificate
from pwopt.rewriting.wording import format_count

#: Entries of the random probes of an affine region are ±(1 + k/PROBE_GRID).
PROBE_GRID = 2**20
#: Changes with at most this many input numbers are evaluated on zero and on each unit vector.
BASIS = 16
#: The stated probability is that of missing an error of this many times the bound in one coefficient.
FAULT = 1000.0
#: Biases that cancel up to this many units of u may have become zero (`graph.cancelling`).
CANCELLED = 8.0
#: Rounding error of an operator that is not affine, in units of u.
OPERATOR_ROUNDINGS = 8.0
#: A nonlinear change may differ by this many times the effect of rounding its weights.
JITTERS = 16.0
#: Spatial extents to try before the model's own.
EXTENTS = (8, 32)
#: Maximum number of operators of a change that is evaluated.
MAX_OPERATORS = 2000
#: Unit roundoff of the evaluation.
DOUBLE = 2.0**-53


TensorSizes = dict[Tensor, tuple[int, ...]]


@dataclass(frozen=True)
class ProbePlan:
    """Number and size of the evaluations.

    Attributes
    ----------
    probes : int
        Number of random probes of an affine change.
    scales : tuple of float
        TensorSizes of the probes of any other region, each of which has entries of both signs.
    jitters : int
        Number of random roundings of the weights of other changes.
    work : int
        Maximum number of multiply-adds and elements of one evaluation.
    """

    probes: int
    scales: tuple[float, ...]
    jitters: int
    work: int


#: The usual plan, and one with fewer but larger evaluations if the usual one would take too long.
FULL_PLAN = ProbePlan(3, (0.01, 1.0, 30.0, 1000.0), 2, MAX_WORK)
REDUCED_PLAN = ProbePlan(1, (1.0,), 1, 3 * MAX_WORK)


def skip_certificate(_region: Change, _view: View) -> Certificate:
    """Return a certificate without an evaluation, for `--no-verify`."""
    return Certificate("none", "not verified, as requested")


def certify(region: Change, view: View) -> Certificate:
    """Evaluate the operators of a rewrite before and after it, and compare the results.

    Small spatial extents that hold every window are tried first. If they do not fit, or the results differ, the model's
    own extents are used. Inputs are arbitrary. If the pass relies on facts about them, the operators that compute them
    are evaluated as well.

    Parameters
    ----------
    region : Change
    view : View
        The graph after the rewrite.

    Returns
    -------
    Certificate
    """
    lost = region.find_lost(view)
    if lost is not None:
        return Certificate("failed", f"{lost.name!r} is needed, but no operator computes it any more", math.inf)
    if not region.claims():
        return Certificate("certified", "the removed operators had no effect", probability=0.0)
    if has_equal_terms(region.widen(view) if region.context else region, view):
        return Certificate("certified", "the same operators on the same inputs", probability=0.0)
    result = _evaluate_change(region, view)
    if result.status == "failed" and region.rerouted:
        region = region.include_rerouted(view)
        result = _evaluate_change(region, view)
    while result.status in ("failed", "none") and region.context:
        region = region.widen(view)
        wider = _evaluate_change(region, view)
        result = result if wider.status == "none" else wider
    return result


def _evaluate_change(region: Change, view: View) -> Certificate:
    """Return the first agreement at any sizes, else the first difference, else the reason why there is neither."""
    if len(region.before) + len(region.after) > MAX_OPERATORS:
        return Certificate("none", f"too large: more than {MAX_OPERATORS} operators")
    sides = Side(view, region.before), Side(view, region.after)
    whole = _find_own_sizes(region, view)
    if whole is None:
        return Certificate("none", "the sizes of its inputs are not known")
    sized = any(find_traits(s.op).sized for s in (*region.before, *region.after))
    small = [s for s in _smaller_sizes(whole, max(map(_measure_reach, sides))) if s != whole]
    wholly, smaller = [(whole, FULL_PLAN), (whole, REDUCED_PLAN)], [(sizes, FULL_PLAN) for sizes in small]
    failed: Certificate | None = None
    unfit, large = "", False
    for sizes, plan in (*wholly, *smaller) if sized else (*smaller, *wholly):
        if plan is REDUCED_PLAN and not large:
            continue
        try:
            result = _compare(region, view, sides, sizes, plan)
        except (TooLargeError, MemoryError):
            unfit, large = f"too large: over {plan.work:,} multiply-adds", sizes is whole
            continue
        except UnfitError as error:
            unfit = unfit or str(error)
            continue
        if sized and sizes is not whole:  # small sizes decide nothing where positions count
            return replace(result, status="tested", probability=1.0) if result.passed else Certificate("none", unfit)
        if result.passed:
            return result
        if sized:
            return result
        failed = failed or result
    return failed or Certificate("none", unfit)


def _find_own_sizes(region: Change, view: View) -> TensorSizes | None:
    """The model's own size of every input of the change."""
    whole: TensorSizes = {}
    for t in region.sources():
        if view.constant(t) is not None:
            continue
        size, shape = view.size_of(t), view.shape(t)
        if size is None and shape is not None:
            size = tuple(d if isinstance(d, int) else 1 if a == 0 else EXTENTS[0] for a, d in enumerate(shape))
        if size is None:
            return None
        whole[t] = size
    return whole


def _smaller_sizes(whole: TensorSizes, reach: int) -> Iterator[TensorSizes]:
    """Yield smaller sizes to try, at least `reach` along each axis that windows slide over."""
    for first, extent in ((2, EXTENTS[0]), (2, EXTENTS[1]), (2, 0), (1, EXTENTS[0])):
        sizes = _shrink(whole, first, max(extent, reach)) if extent else _divide(whole, max(4, reach))
        if sizes is not None:
            yield sizes


def _measure_reach(side: Side) -> int:
    """The extent of the largest window plus its stride; with that many positions, every weight has an effect."""
    reach = 1
    for s in side.states:
        kernel = s.attrs.get("kernel_shape") or ()
        if s.op in ("Conv", "ConvTranspose"):
            kernel = tuple((side.view.constant(s.inputs[1]) or s.inputs[1]).shape or ())[2:]
        for a, k in enumerate(kernel):
            stride, dilation = (list(s.attrs.get(name) or [1] * len(kernel))[a] for name in ("strides", "dilations"))
            reach = max(reach, dilation * (k - 1) + 1 + stride)
    return reach


def _shrink(whole: TensorSizes, first: int, extent: int) -> TensorSizes | None:
    """Limit axes from `first` on to `extent`, if they are the same (or 1) in all inputs."""
    end = None if first > 1 else 2
    planes = {size[first:end] for size in whole.values() if len(size) >= 3 and any(d != 1 for d in size[first:end])}
    if len(planes) > 1:
        return None
    return {
        key: (*size[:first], *(min(d, extent) for d in size[first:end]), *(size[end:] if end else ()))
        if len(size) >= 3
        else size
        for key, size in whole.items()
    }


def _divide(whole: TensorSizes, least: int) -> TensorSizes | None:
    """Divide the extents by a common factor, so that the smallest is as close to `least` as possible."""
    extents = {d for size in whole.values() if len(size) >= 3 for d in size[2:] if d > 1}
    common = math.gcd(*extents) if extents else 1
    divisors = [k for k in range(2, common + 1) if common % k == 0 and min(extents) // k >= least]
    if not divisors:
        return None
    k = max(divisors)
    return {
        key: (*size[:2], *(d // k if d > 1 else d for d in size[2:])) if len(size) >= 3 else size
        for key, size in whole.items()
    }


def _compare(region: Change, view: View, sides: tuple[Side, Side], sizes: TensorSizes, plan: ProbePlan) -> Certificate:
    states = (*region.before, *region.after)
    computed = {t for s in states if s.op not in ("Shape", "Size") for t in s.inputs}
    computed |= {t for pair in region.claims() for t in pair}
    given = [t for t in region.sources() if t in sizes]
    inputs = [t for t in given if t in computed]
    if sum(math.prod(sizes[t]) for t in inputs) > plan.work // 16:
        raise TooLargeError
    for side in sides:
        side.limit = plan.work
        side.shapes = {t: np.broadcast_to(0.0, sizes[t]) for t in given if t not in computed}
    floating = all(_find_kind(view, t) == "f" for t in inputs)
    moving = set(inputs)
    affine = floating and all(_is_affine(side, moving) for side in sides)
    return (_compare_affine if affine else _compare_other)(region, view, sides, inputs, sizes, plan)


def _find_kind(view: View, tensor: Tensor) -> str:
    dtype = view.dtype(tensor)
    if dtype is None or str(dtype) in FLOATS:
        return "f"
    if dtype.kind not in "iub":
        raise UnfitError(f"{tensor.name!r} does not hold numbers")
    return dtype.kind


def _compare_affine(
    region: Change, view: View, sides: tuple[Side, Side], inputs: Sequence[Tensor], sizes: TensorSizes, plan: ProbePlan
) -> Certificate:
    """Check affine changes: |after − before| ≤ bound · M at every element, on a basis or on random probes."""
    count = sum(math.prod(sizes[t]) for t in inputs)
    basis = count <= BASIS
    probes = _draw_unit_vectors(inputs, sizes) if basis else _draw_random_probes(inputs, sizes, plan.probes)
    largest = {t: np.full(sizes[t], 1.0 if basis else 2.0) for t in inputs}
    unit = max(DOUBLE, *(side.unit() for side in sides))

    def outward(value: Array, tensor: Tensor) -> Array:
        kind = str(tensor.dtype)
        return np.abs(value) + SMALLEST_POSITIVE.get(kind, 0.0) * 2 / epsilon(
            np.dtype(tensor.dtype) if kind in FLOATS else None
        )

    zero = {key: np.zeros_like(value) for key, value in largest.items()}
    old_sizes, new_sizes = (side.run(largest, outward, absolute=True) for side in sides)
    biases = sides[0].run(zero, outward, absolute=True)
    depths = [_measure_depth(side, inputs) for side in sides]
    bound = depths[1] * unit
    cancelled, summed = CANCELLED * depths[0] * unit / bound, 4 * _count_terms(sides) * DOUBLE / bound
    shifts = sides[1].run(zero, None)

    def scale(old: Tensor, new: Tensor) -> Array:
        parts = np.where(sides[1].value(new, shifts) == 0, sides[0].value(old, biases), 0.0)
        return sides[1].value(new, new_sizes) + cancelled * parts + summed * sides[0].value(old, old_sizes)

    worst = 0.0
    for feeds in probes:
        before, after = (side.run(feeds, None) for side in sides)
        for old, new in region.claims():
            a, b = sides[0].value(old, before), sides[1].value(new, after)
            if not _is_comparable(a, b):
                return Certificate("failed", _describe_mismatch(old, a, b), math.inf, bound)
            gap = np.abs(np.subtract(a, b, dtype=np.float64))
            worst = max(worst, _largest_ratio(gap, scale(old, new)))
    how = f"a basis of {count + 1}" if count else "recomputed constants"
    how = how if basis else format_count(plan.probes, "random probe")
    if not worst <= bound:
        return Certificate("failed", f"on {how}", worst, bound)
    return Certificate("certified", how, worst, bound, 0.0 if basis else (1 / FAULT + 0.5 / PROBE_GRID) ** plan.probes)


def _compare_other(
    region: Change, view: View, sides: tuple[Side, Side], inputs: Sequence[Tensor], sizes: TensorSizes, plan: ProbePlan
) -> Certificate:
    """Check other changes: |after − before| is at most the effect of rounding the weights of either version."""
    unit = max(DOUBLE, *(side.unit() for side in sides))
    rng = np.random.default_rng(0)

    def round_randomly(value: Array, _tensor: Tensor) -> Array:
        return value * (1 + unit * rng.choice((-1.0, 1.0), value.shape))

    worst, bound, finite = 0.0, math.inf, False
    for size in plan.scales:
        feeds = {t: _draw_probe(view, t, sizes[t], size, rng) for t in inputs}
        before, after = (side.run(feeds, None) for side in sides)
        nearby = [[side.run(feeds, round_randomly) for _ in range(plan.jitters)] for side in sides]
        for old, new in region.claims():
            a, b = sides[0].value(old, before), sides[1].value(new, after)
            if not _is_comparable(a, b):
                return Certificate("failed", _describe_mismatch(old, a, b), math.inf)
            if not np.array_equal(np.isfinite(a), np.isfinite(b)):
                return Certificate("failed", f"{old.name!r} is finite at different places", math.inf)
            fine = np.isfinite(a)
            finite = finite or bool(fine.any())
            scale = float(np.max(np.abs(a[fine]), initial=0.0))
            gap = float(np.max(np.abs(np.subtract(a[fine], b[fine], dtype=np.float64)), initial=0.0))
            owners = zip(sides, nearby, ((old, a), (new, b)), strict=True)
            moved = max(_largest_change(side.value(t, run), value) for side, runs, (t, value) in owners for run in runs)
            steps = len(region.before) + len(region.after)
            allowed = (JITTERS * moved / scale if scale else 0.0) + OPERATOR_ROUNDINGS * steps * unit
            here = gap / scale if scale else math.inf if gap else 0.0
            if bound == math.inf or here * bound > worst * allowed or (here == worst and allowed < bound):
                worst, bound = here, allowed
            if not here <= allowed:
                return Certificate("failed", f"on probes of size {size:g}", here, allowed)
    if not finite:
        return Certificate("none", "no probe gives a finite value")
    first, last = plan.scales[0], plan.scales[-1]
    of = f"sizes {first:g} to {last:g}" if first != last else f"size {first:g}"
    return Certificate("tested", f"not affine: {format_count(len(plan.scales), 'probe')} of {of}", worst, bound)


def _is_comparable(a: Values, b: Values) -> bool:
    if {a.dtype.kind, b.dtype.kind} - set("fiub"):
        raise UnfitError("its results are not numbers")
    if not a.size:
        raise UnfitError("its results are empty")
    return a.shape == b.shape and a.dtype.kind == b.dtype.kind


def _describe_mismatch(tensor: Tensor, a: Values, b: Values) -> str:
    return f"{tensor.name!r} was {a.dtype}{list(a.shape)}, and is {b.dtype}{list(b.shape)}"


def _largest_ratio(gap: Array, scale: Array | float) -> float:
    """The largest gap / scale; 0 / 0 is 0, and NaN is infinite."""
    with np.errstate(all="ignore"):
        ratio = np.where(gap == 0, 0.0, gap / scale)
    return math.inf if np.isnan(ratio).any() else float(np.max(ratio, initial=0.0))


def _largest_change(value: Values, reference: Values) -> float:
    if value.shape != reference.shape:
        return 0.0
    with np.errstate(all="ignore"):
        gap = np.abs(np.subtract(value, reference, dtype=np.float64))
    return float(np.max(gap[np.isfinite(gap)], initial=0.0))


def _draw_unit_vectors(inputs: Sequence[Tensor], sizes: TensorSizes) -> Iterator[Tensors]:
    zero = {t: np.zeros(sizes[t]) for t in inputs}
    yield zero
    for t in inputs:
        for i in range(math.prod(sizes[t])):
            unit = np.zeros(sizes[t])
            unit.flat[i] = 1.0
            yield {**zero, t: unit}


def _draw_random_probes(inputs: Sequence[Tensor], sizes: TensorSizes, count: int) -> Iterator[Tensors]:
    """Yield probes whose entries are one of 2 PROBE_GRID numbers, none smaller than 1 in magnitude.

    A single wrong coefficient always shows. In each probe, several cancel with a probability of at most
    1 / (2 PROBE_GRID).
    """
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield {t: _draw_signed(rng, sizes[t]) for t in inputs}


def _draw_signed(rng: np.random.Generator, size: tuple[int, ...]) -> Array:
    return np.asarray((1.0 + rng.integers(0, PROBE_GRID, size) / PROBE_GRID) * rng.choice((-1.0, 1.0), size))


def _draw_probe(view: View, tensor: Tensor, size: tuple[int, ...], scale: float, rng: np.random.Generator) -> Values:
    kind = _find_kind(view, tensor)
    if kind == "f":
        return _draw_signed(rng, size) * scale
    return rng.integers(0, 2, size).astype(view.dtype(tensor))


def _measure_depth(side: Side, sources: Sequence[Tensor]) -> int:
    """The largest number of successive operators that compute with constants; at least 1."""
    depth = dict.fromkeys(sources, 0)
    for s in side.states:
        moving = [depth[t] for t in s.inputs if t in depth]
        if moving:
            stored = any(t.name and t not in depth for t in (s.inputs[i] for i in _find_numeric_inputs(s)))
            depth.update((t, max(moving) + stored) for t in s.outputs)
    return max((1, *depth.values()))


def _find_numeric_inputs(state: State) -> list[int]:
    return [i for i in find_traits(state.op).numbers if i < len(state.inputs)]


def _count_terms(sides: tuple[Side, Side]) -> int:
    """The total number of terms in the longest successive sums."""
    weights = [
        side.constant(t)
        for side in sides
        for s in side.states
        for t in s.inputs
        if find_traits(s.op).numbers and t.name
    ]
    sums = [w.size // max(1, min(w.shape, default=1)) if w.ndim else 1 for w in weights if w is not None]
    return 8 + sum(sums)


def _is_affine(side: Side, moving: set[Tensor]) -> bool:
    """Whether every output is affine in the inputs."""
    moving = set(moving)
    for s in side.states:
        where = [i for i, t in enumerate(s.inputs) if t in moving]
        if not where or s.op in ("Shape", "Size"):
            continue
        affine = find_traits(s.op).affine
        product = affine == "product" and not {0, 1} <= set(where)
        if not (product or affine == "all" or (affine == "first" and where == [0])) or not side.view.op(s.node):
            return False
        if s.op == "Cast" and "float" not in str(s.outputs[0].dtype):
            return False
        moving.update(t for t in s.outputs)
    return True
