"""A sequence of linear 1×1 convolutions, as an over-parameterised export has it: 64→128→192→128→32.

Without activations between them the four are one map 64→32. ExpandNets (Guo et al., NeurIPS 2020) train
such expansions on purpose and contract them afterwards; exports that forgot to are what pwopt finds.
Expected: one convolution of 64·32 weights and 32 biases.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WIDTHS = (64, 128, 192, 128, 32)


def build() -> onnx.ModelProto:
    """The model: x (batch, 64, height, width) float32 → y (batch, 32, height, width)."""
    rng = np.random.default_rng(0)
    nodes, weights, tensor = [], [], "x"
    for i, (inn, out) in enumerate(itertools.pairwise(WIDTHS), 1):
        output = "y" if i == len(WIDTHS) - 1 else f"h{i}"
        weight = rng.normal(0, inn**-0.5, (out, inn, 1, 1)).astype(np.float32)
        bias = rng.normal(0, 0.1, out).astype(np.float32)
        weights += [numpy_helper.from_array(weight, f"conv{i}.weight"), numpy_helper.from_array(bias, f"conv{i}.bias")]
        inputs = [tensor, f"conv{i}.weight", f"conv{i}.bias"]
        nodes.append(helper.make_node("Conv", inputs, [output], f"conv{i}", kernel_shape=[1, 1]))
        tensor = output
    space = ["height", "width"]
    graph = helper.make_graph(
        nodes,
        "linear_sequence",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTHS[0], *space])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", WIDTHS[-1], *space])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="pwopt")


if __name__ == "__main__":
    onnx.save(build(), sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_suffix(".onnx"))
