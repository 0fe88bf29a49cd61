from __future__ import annotations

import numpy as np
import onnx
import pytest
from helpers import build, normal, ops, run, same

from pwopt.passes.absorb_shuffle import AbsorbShuffle

PICKS = np.array([0, 3, 1, 4, 2, 5])


def model(body: str, outputs: str = "float y, float z", **more: np.ndarray) -> onnx.ModelProto:
    return build(
        f"(float[N,6,8,8] x) => ({outputs}) {{ {body} }}",
        {"p": PICKS, "u": normal(4, 6, 1, 1, dtype=np.float32), "v": normal(6, 6, 3, 3, seed=1, dtype=np.float32),
         "d": normal(6, 1, 3, 3, seed=2, dtype=np.float32), "e": normal(6, seed=3, dtype=np.float32), **more},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ("s = Gather <axis = 1> (x, p) y = Conv(s, u) z = Conv(s, v)", {"Conv": 2}),
        ("s = Gather <axis = -3> (x, p) y = Conv(s, v, e) z = Conv(s, u)", {"Conv": 2}),
        ("s = Gather <axis = 1> (x, p) a = Conv <group = 6, pads = [1,1,1,1]> (s, d, e) y = Conv(a, u) z = Conv(s, v)",
         {"Conv": 3}),
        ("s = Gather <axis = 1> (x, p) a = Conv <group = 6> (s, d) y = Conv(a, u) b = Conv <group = 6, strides = [2,2]> (s, dd) z = Conv(b, v)",
         {"Conv": 4}),
    ],
)  # fmt: skip
def test_every_reader_takes_the_permutation(body: str, wanted: dict[str, int]) -> None:
    proto = model(body, dd=normal(6, 1, 3, 3, seed=4, dtype=np.float32))
    result, outcome, _ = run(proto, AbsorbShuffle())
    left = {"Gather": 1} if "Gather" in ops(result) else {}
    assert {k: v for k, v in ops(result).items() if k != "Gather"} == wanted
    assert len(outcome.rewrites) >= 1
    assert all(r.certificate is None or r.certificate.passed for r in outcome.rewrites)
    readers = [n for n in result.graph.node if any(i == "s" for i in n.input)]
    assert len(readers) <= len(left)  # fold-chains absorbs a shuffle with one dense reader
    same(proto, result, tolerance=1e-5, x=normal(2, 6, 8, 8, seed=9, dtype=np.float32))


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("s = Gather <axis = 1> (x, p) y = Conv(s, u) z = Relu(s)", "float y, float z"),
        ("s = Gather <axis = 1> (x, p) y = Conv(s, u) z = Conv(s, v)", "float y, float z, float s"),
        ("s = Gather <axis = 1> (x, p) y = Conv(s, v) h = Conv(s, v) z = Relu(h)", "float y, float z"),
        ("s = Gather <axis = 1> (x, p) y = Conv(s, u) a = Conv <group = 6> (s, d) z = Relu(a)", "float y, float z"),
        ("s = Gather <axis = 1> (x, q) y = Conv(s, u) z = Conv(s, v)", "float y, float z"),
        ("s = Gather <axis = 2> (x, w) y = Conv(s, u) z = Conv(s, v)", "float y, float z"),
        ("s = Gather <axis = 1> (x, p) y = Conv(s, u) a = Conv <group = 6> (s, d) z = Conv(a, v)", "float y, float z, float a"),
        ("s = Gather <axis = 1> (x, p) y = Conv(s, u) z = Conv <group = 2> (s, g)", "float y, float z"),
    ],
)  # fmt: skip
def test_a_shuffle_that_somebody_else_needs_stays(body: str, outputs: str) -> None:
    more = {
        "q": np.array([0, 0, 1, 1, 2, 2]),
        "w": np.arange(8)[::-1].copy(),
        "g": normal(4, 3, 1, 1, dtype=np.float32),
    }
    proto = model(body, outputs, **more)
    result, outcome, _ = run(proto, AbsorbShuffle())
    assert not outcome.rewrites
    assert ops(result) == ops(proto)
