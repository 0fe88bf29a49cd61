"""Tensors inside sequences, optionals and maps, so that each is compared like any other tensor."""

from __future__ import annotations

from typing import Any

import numpy as np

from pwopt.algebra import Values


def find_leaves(value: Any) -> tuple[Any, list[Values]]:
    """Split a value that onnxruntime returns into its structure and its tensors.

    Parameters
    ----------
    value : array, list, dict or None
        A tensor, a sequence, a map, or an absent optional. The values of a map form one tensor.

    Returns
    -------
    structure
        Two values have the same structure if these are equal.
    leaves : list of array
        In order.

    Examples
    --------
    >>> find_leaves([np.ones(2), np.ones(3)])[0]
    ('sequence', 'tensor', 'tensor')
    """
    if value is None:
        return "none", []
    if isinstance(value, dict):
        keys = sorted(value, key=str)
        leaf = np.asarray([value[k] for k in keys])
        return ("map", *keys), [leaf.astype(np.float32) if leaf.dtype == np.float64 else leaf]
    if isinstance(value, (list, tuple)):
        parts = [find_leaves(v) for v in value]
        return ("sequence", *(s for s, _ in parts)), [leaf for _, leaves in parts for leaf in leaves]
    return "tensor", [np.asarray(value)]
