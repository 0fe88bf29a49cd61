from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from pwopt.algebra.geometry import Refusal
from pwopt.graph.shapes import Shape
from pwopt.rewriting.driver import Rewriter
from pwopt.rewriting.interleaving import check_interleaving


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((2, 3, 4), ""),
        (("N", 3, "H", None), ""),
        (None, "the rank of its output is not known"),
        ((2, 3), "the rank of its output is not known"),
        ((2, "C", 4), "the rank of its output is not known"),
        ((2, 3, 4, 0), "its output is empty"),
    ],
)
def test_what_phases_are_put_together_into(shape: Shape | None, reason: str) -> None:
    output = gs.Variable("y", np.dtype(np.float32), shape)
    found = check_interleaving(Rewriter(gs.Graph(outputs=[output])), output)
    assert found == (Refusal(reason) if reason else None)
