"""Linear maps without numbers, and how they combine: every exactness rule, with its proof."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

#: The most results that each function of geometries caches: a model has many maps of few kinds.
MANY = 1024


@dataclass(frozen=True)
class Refusal:
    """Why an operation would not be exact, as a clause that completes a sentence. Planners get it as an answer."""

    reason: str


class RefusedError(Exception):
    """An operation on numbers was not carried out, because its result would not be exact.

    The driver of the passes turns it into a `Skip` with this reason.

    Parameters
    ----------
    reason : str
        A clause that completes a sentence.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def attempt(operation: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | Refusal:
    """The result of an operation, or why it raised `RefusedError`."""
    try:
        return operation(*args, **kwargs)
    except RefusedError as error:
        return Refusal(error.reason)


def require(answer: T | Refusal) -> T:
    """The answer to a planner's question.

    Raises
    ------
    RefusedError
        If the answer is a `Refusal`.
    """
    if isinstance(answer, Refusal):
        raise RefusedError(answer.reason)
    return answer


@dataclass(frozen=True)
class Geometry:
    """A linear map without its numbers.

    Parameters
    ----------
    out_channels, in_channels, groups : int
        Output block j reads input block j only, as in ONNX ``Conv``.
    kernel, strides, dilations : tuple of int, one per spatial axis
    pads : tuple of int
        Zeros added: all begins, then all ends. Never negative.
    auto_pad : str
        "SAME_UPPER" or "SAME_LOWER" where the pads follow from an input size that is not known, or would be negative;
        `pads` is then meaningless. Otherwise "".
    transposed : bool
        The adjoint form (ONNX ``ConvTranspose``): zeros are inserted between inputs instead.
    output_padding : tuple of int
        Of a transposed map only.
    biased : bool
        Whether any bias is non-zero.
    """

    out_channels: int
    in_channels: int
    groups: int = 1
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    auto_pad: str = ""
    transposed: bool = False
    output_padding: tuple[int, ...] = ()
    biased: bool = False

    @property
    def rank(self) -> int:
        """Number of spatial axes."""
        return len(self.kernel)

    @cached_property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @property
    def weights(self) -> int:
        """Number of weights, and of multiply-adds per output position (per input position if transposed)."""
        return self.out_channels * (self.in_channels // self.groups) * self.taps

    @cached_property
    def pointwise(self) -> bool:
        """One tap at every position: y[:, p] depends on x[:, p] only."""
        return self.taps == 1 and not self.transposed and not self.padded and all(s == 1 for s in self.strides)

    @property
    def diagonal(self) -> bool:
        """A scale and a shift per channel."""
        return self.pointwise and self.groups == self.in_channels == self.out_channels

    @cached_property
    def padded(self) -> bool:
        return bool(self.auto_pad) or any(self.pads)

    def at_rank(self, rank: int) -> Geometry:
        """The same pointwise map over `rank` spatial axes."""
        if rank == self.rank:
            return self
        return pointwise_geometry(
            self.out_channels, self.in_channels, groups=self.groups, rank=rank, biased=self.biased
        )

    def broadcast(self, channels: int) -> Geometry:
        """A diagonal map of one channel, repeated for `channels` channels; any other map is returned unchanged."""
        if self.out_channels != 1 or not self.diagonal:
            return self
        return pointwise_geometry(channels, channels, groups=channels, rank=self.rank, biased=self.biased)


#: A `Geometry`, the same object for the same arguments: what it derives from them is computed once.
make_geometry = lru_cache(MANY)(Geometry)


@lru_cache(MANY)
def pointwise_geometry(
    out_channels: int, in_channels: int, *, groups: int = 1, rank: int = 0, biased: bool = False
) -> Geometry:
    ones = (1,) * rank
    return Geometry(out_channels, in_channels, groups, ones, ones, ones, (0,) * 2 * rank, biased=biased)


@lru_cache(MANY)
def with_bias(geometry: Geometry, biased: bool) -> Geometry:
    return geometry if geometry.biased == biased else replace(geometry, biased=biased)


@lru_cache(MANY)
def compose_geometry(second: Geometry, first: Geometry) -> Geometry | Refusal:
    """Geometry of ``second ∘ first``, or why it is not one map.

    Substitute y[m, q] = b₁[m] + Σ W₁[m, i, k₁]·x[i, s₁q + d₁k₁ − p₁] into the second map. At q inside
    y's bounds, every product lands on tap s₁d₂k₂ + d₁k₁ of one stencil of stride s₁s₂.
    At q outside, the second map reads 0 (its padding) where the formula would give y[q]. Per axis
    those agree in two cases only: the second map never looks outside (no padding), or y[q] is
    itself 0 there, that is, the first map has one tap on that axis (which lands outside x then, where
    x is 0 too) and no bias. Paddings add up as p₁ + s₁p₂. Output sizes agree since ⌊⌊a/s₁⌋/s₂⌋ = ⌊a/(s₁s₂)⌋.

    A transposed map inserts zeros, then is a stencil: a pointwise map after it is always exact; one
    before it only without bias, since an inserted zero is not the image of zero.
    """
    if first.out_channels != second.in_channels:
        return Refusal(f"{first.out_channels} output channels do not fit {second.in_channels} input channels")
    if first.rank != second.rank:
        if first.pointwise and first.rank < second.rank:
            first = first.at_rank(second.rank)
        elif second.pointwise and second.rank < first.rank:
            second = second.at_rank(first.rank)
        else:
            return Refusal(f"a {first.rank}-D map and a {second.rank}-D map do not compose")
    if second.pointwise:
        return _spanning(first, first, second)
    if second.padded and first.biased:
        return Refusal("the first map's bias would be missing in the zero padding of the second")
    if second.transposed and first.biased:
        return Refusal("the first map's bias would be missing at the zeros that a transposed convolution inserts")
    if first.pointwise:
        return _spanning(second, first, second)
    if first.transposed or second.transposed:
        return Refusal("a transposed convolution composes with pointwise maps only")
    if first.auto_pad or second.auto_pad:
        return Refusal("automatic padding depends on an input size that is not known")

    rank, kernel, dilations, begins, ends = first.rank, [], [], [], []
    for axis in range(rank):
        k1, k2 = first.kernel[axis], second.kernel[axis]
        s1, d1, d2 = first.strides[axis], first.dilations[axis], second.dilations[axis]
        pads1, pads2 = first.pads[axis::rank], second.pads[axis::rank]
        if any(pads2) and k1 > 1:
            return Refusal(
                "the second map's zero padding lies inside the first map's reach, so the border would change"
            )
        step = math.gcd(s1 * d2 if k2 > 1 else 0, d1 if k1 > 1 else 0) or 1
        kernel.append(((k1 - 1) * d1 + (k2 - 1) * s1 * d2) // step + 1)
        dilations.append(step)
        begins.append(pads1[0] + s1 * pads2[0])
        ends.append(pads1[1] + s1 * pads2[1])
    return replace(
        _spanning(first, first, second),
        kernel=tuple(kernel),
        strides=tuple(a * b for a, b in zip(first.strides, second.strides, strict=True)),
        dilations=tuple(dilations),
        pads=(*begins, *ends),
    )


def homogeneous_geometry(first: Geometry) -> Geometry | Refusal:
    """Geometry of a map of (x, 1), one channel more that is 1 wherever x is: its weight there is the bias of `first`.

    W·x + b = (W b)·(x; 1) at every position inside x. A map that comes next may pad: it reads 0 outside, and padding
    the channel of ones with 0 like all others gives W·0 + b·0 = 0 there, too. The map itself must not read outside x,
    and it must have one tap, so that each of its positions reads one position of x.
    """
    if first.taps > 1 or first.padded or first.transposed:
        return Refusal("only a map with one tap sees the channel of ones at every position")
    return replace(first, in_channels=first.in_channels + 1, groups=1, biased=False)


def _spanning(stencil: Geometry, first: Geometry, second: Geometry) -> Geometry:
    """The given stencil from the inputs of `first` to the outputs of `second`."""
    s = stencil  # spelled out, since dataclasses.replace costs more than all the rest of a composition
    return Geometry(
        second.out_channels, first.in_channels, math.gcd(first.groups, second.groups), s.kernel, s.strides, s.dilations,
        s.pads, s.auto_pad, s.transposed, s.output_padding, first.biased or second.biased,
    )  # fmt: skip


def align_geometry(maps: Sequence[Geometry]) -> Geometry | Refusal:
    """The stencil that contains every tap of `maps`, which read the same input.

    Tap k of a map reads x[s·p + d·k − pad]. So maps of equal stride share a stencil whose offsets are the union of all
    d·k − pad. Their output sizes are equal for every input size if and only if pad_begin + pad_end − d(k − 1) agree.
    Channels, groups and bias are those of the first map.
    """
    if any(m.auto_pad or m.transposed for m in maps):
        return Refusal("automatic padding and transposed convolutions are not aligned")
    rank = max(m.rank for m in maps)
    if any(m.rank != rank and not m.pointwise for m in maps):
        return Refusal("maps of different spatial ranks are not aligned")
    maps = [m if m.rank == rank else m.at_rank(rank) for m in maps]
    if len({m.strides for m in maps}) > 1:
        return Refusal("the strides differ")
    kernel, dilations, begins, ends = [], [], [], []
    for axis in range(rank):
        slack = {m.pads[axis] + m.pads[axis + rank] - m.dilations[axis] * (m.kernel[axis] - 1) for m in maps}
        if len(slack) > 1:
            return Refusal("the output sizes differ")
        offsets = {m.dilations[axis] * k - m.pads[axis] for m in maps for k in range(m.kernel[axis])}
        low, high = min(offsets), max(offsets)
        step = math.gcd(*(o - low for o in offsets)) or 1
        kernel.append((high - low) // step + 1)
        dilations.append(step)
        begins.append(-low)
        ends.append(slack.pop() + high)
    if min(begins + ends, default=0) < 0:
        return Refusal("a shared stencil would need negative padding")
    return replace(maps[0], kernel=tuple(kernel), dilations=tuple(dilations), pads=(*begins, *ends))


def add_geometry(maps: Sequence[Geometry]) -> Geometry | Refusal:
    """Geometry of the sum of parallel maps, or why it is not one map."""
    if len({(m.out_channels, m.in_channels) for m in maps}) > 1:
        return Refusal("the channels differ")
    stencil = align_geometry(maps)
    if isinstance(stencil, Refusal):
        return stencil
    return replace(stencil, groups=math.gcd(*(m.groups for m in maps)), biased=any(m.biased for m in maps))
