"""The matrices of linear and cubic interpolation: ONNX's Resize along one axis.

Resize is separable: it interpolates one axis after the other. Along one axis, each output is a weighted sum of inputs,
and the weights depend on the sizes only (ONNX, "Resize-19"; Keys, "Cubic convolution interpolation for digital image
processing", 1981).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from pwopt.algebra import Array

#: The coordinate transformations that do not depend on a region of interest and are not for nearest neighbours only.
TRANSFORMATIONS = ("half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric")


@dataclass(frozen=True)
class Interpolation:
    """The attributes of a Resize.

    Attributes
    ----------
    mode : {"linear", "cubic"}
    transformation : str
        One of `TRANSFORMATIONS`.
    cubic_coeff_a : float
        The coefficient a of cubic interpolation.
    exclude_outside : bool
        Whether weights of positions outside the input become zero, and the others are scaled to a sum of 1. Otherwise,
        the input is continued by its border.
    """

    mode: Literal["linear", "cubic"]
    transformation: str = "half_pixel"
    cubic_coeff_a: float = -0.75
    exclude_outside: bool = False

    def matrix(self, count: int, size: int, scale: float) -> Array:
        """The weights of all outputs.

        Parameters
        ----------
        count, size : int
            The number of positions before and after. Both are positive.
        scale : float
            The factor that the operator uses. It is about size / count.

        Returns
        -------
        array of shape (size, count)
            Each row sums to 1.

        Raises
        ------
        ValueError
            If the transformation is not one of `TRANSFORMATIONS`.
        """
        places = self._find_places(count, size, scale)
        if self.mode == "linear":
            places = np.clip(places, 0, count - 1)
            low = np.floor(places)
            offsets, weights = [0, 1], [1 - (places - low), places - low]
        else:
            low = np.floor(places)
            offsets = [-1, 0, 1, 2]
            weights = [_cubic(places - low - k, self.cubic_coeff_a) for k in offsets]
        matrix, rows = np.zeros((size, count)), np.arange(size)
        for k, weight in zip(offsets, weights, strict=True):
            column = low.astype(int) + k
            inside = (column >= 0) & (column < count)
            weight = np.where(inside, weight, 0) if self.exclude_outside else weight
            np.add.at(matrix, (rows, np.clip(column, 0, count - 1)), weight)
        return matrix / matrix.sum(axis=1, keepdims=True) if self.exclude_outside else matrix

    def _find_places(self, count: int, size: int, scale: float) -> Array:
        """The position of each output between the inputs."""
        at = np.arange(size, dtype=np.float64)
        if self.transformation not in TRANSFORMATIONS:
            raise ValueError(f"{self.transformation!r} is not one of: {', '.join(TRANSFORMATIONS)}")
        if self.transformation == "asymmetric":
            return at / scale
        if self.transformation == "align_corners":
            return at * (count - 1) / (size - 1) if size > 1 else np.zeros(1)
        if self.transformation == "pytorch_half_pixel" and size == 1:
            return np.zeros(1)
        places = (at + 0.5) / scale - 0.5
        if self.transformation == "half_pixel_symmetric":
            places += count / 2 * (1 - size / (scale * count))
        return places


def read_by_taps(matrix: Array, taps: int, stride: int, dilation: int, pads: tuple[int, int]) -> Array:
    """The matrices that give what each tap of a convolution reads of an interpolated axis.

    Tap k of output p reads position stride·p + dilation·k − pads[0] of A·x, or 0 outside it. This is row p of A_k·x,
    where row p of A_k is that row of A, or zeros. So a convolution of A·x is Σ A_k·(w_k·x): its weights may act before
    the interpolation. The zeros of the padding are part of A_k, so this is exact at the borders, too.

    Parameters
    ----------
    matrix : array of shape (size, count)
    taps, stride, dilation : int
    pads : (int, int)
        Zeros before and after the axis.

    Returns
    -------
    array of shape (taps, outputs, count)
    """
    size, count = matrix.shape
    outputs = (size + sum(pads) - dilation * (taps - 1) - 1) // stride + 1
    found = np.zeros((taps, max(0, outputs), count))
    for k in range(taps):
        places = stride * np.arange(max(0, outputs)) + dilation * k - pads[0]
        inside = (places >= 0) & (places < size)
        found[k, inside] = matrix[places[inside]]
    return found


def _cubic(distance: Array, a: float) -> Array:
    """Keys' kernel at a signed distance of at most 2."""
    d = np.abs(distance)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((d - 5) * d + 8) * a * d - 4 * a
    return np.where(d <= 1, near, far)
