from __future__ import annotations

import helpers
import numpy as np
import onnx
import pytest
from helpers import normal, ops, parse, run, same

from pwopt.graph.files import from_proto
from pwopt.graph.view import View
from pwopt.maps.cost import measure
from pwopt.passes import FractionalStride, Polyphase
from pwopt.rewriting.driver import Pass


def eager(kind: type[Pass] = Polyphase) -> Pass:
    """The pass on maps of any size."""
    p = helpers.eager(kind)
    p.least = -1e9  # type: ignore[attr-defined]
    return p


def macs(model: onnx.ModelProto) -> int:
    return measure(View(from_proto(model).graph)).macs


UP = 'u = Resize<mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor">(x, , s) '
S = {"s": np.array([1, 1, 2, 2], np.float32)}


@pytest.mark.parametrize("kind", [Polyphase, FractionalStride])
def test_smoke(kind) -> None:
    model = parse(
        "(double[2,4,5,7] x) => (double[N] y) {" + UP + "c = Conv<pads=[1,1,1,1]>(u, w, b) y = Relu(c) }",
        w=normal(6, 4, 3, 3),
        b=normal(6),
        **S,
    )
    result, outcome, _ = run(model, eager(kind))
    print(ops(result), outcome)
    assert outcome.rewrites[0].certificate.status in ("tested", "certified")
    same(model, result, x=normal(2, 4, 5, 7))
    model = parse(
        "(double[2,4,5,7] x, double[2,3,10,14] z) => (double[N] y) {"
        + UP
        + "k = Concat<axis=1>(u,z) c = Conv<pads=[1,1,1,1]>(k, w, b) y = Relu(c) }",
        w=normal(6, 7, 3, 3),
        b=normal(6),
        **S,
    )
    result, outcome, _ = run(model, eager(kind))
    print(ops(result), outcome)
    assert outcome.rewrites[0].certificate.status in ("tested", "certified")
    same(model, result, x=normal(2, 4, 5, 7), z=normal(2, 3, 10, 14))
