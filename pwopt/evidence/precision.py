"""The coarsest floating-point type that an output is computed in."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx

from pwopt.evidence.metrics import TOLERANCES
from pwopt.graph.dtypes import epsilon
from pwopt.graph.shapes import infer


def find_coarsest_types(proto: onnx.ModelProto) -> Mapping[str, np.dtype[np.generic]]:
    """Find the coarsest floating-point type between the inputs and each output of a model.

    Constants do not count: half-precision weights that are cast to float32 leave the computation in float32.

    Parameters
    ----------
    proto : onnx.ModelProto

    Returns
    -------
    mapping of output name to dtype
        Only outputs with at least one floating-point type of `TOLERANCES` on the way to them.
    """
    types = infer(proto)
    constant = {t.name for t in (*proto.graph.initializer, *(s.values for s in proto.graph.sparse_initializer))}
    coarsest: dict[str, np.dtype[np.generic]] = {}
    moving = {i.name for i in proto.graph.input if i.name not in constant}
    coarsest.update({name: dtype for name in moving if (dtype := _float_type(types, name)) is not None})
    for node in proto.graph.node:
        if not moving.intersection(node.input) and not any(a.HasField("g") for a in node.attribute):
            continue
        before = [coarsest[name] for name in node.input if name in coarsest]
        for name in filter(None, node.output):
            moving.add(name)
            own = _float_type(types, name)
            found = [*before, *([own] if own is not None else [])]
            if found:
                coarsest[name] = max(found, key=epsilon)
    return {o.name: coarsest[o.name] for o in proto.graph.output if o.name in coarsest}


def _float_type(types: Mapping[str, tuple[int, object]], name: str) -> np.dtype[np.generic] | None:
    code = types[name][0] if name in types else 0
    if not code:
        return None
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(code))
    return dtype if str(dtype) in TOLERANCES else None
