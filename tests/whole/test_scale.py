"""The number of function calls grows in proportion to the model."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import normal, ops
from onnx import helper, numpy_helper

import pwopt

#: The largest accepted exponent of (calls ratio) = (size ratio) ** exponent.
MAX_EXPONENT = 1.15


def count_calls(model: onnx.ModelProto) -> int:
    """Count the Python and C functions that an optimisation calls."""
    count = 0

    def note(_frame: object, event: str, _argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        pwopt.optimize(model, cost="analytic", verify=False)
    finally:
        sys.setprofile(before)
    return count


def make_model(
    nodes: list[onnx.NodeProto], outputs: list[str], weights: dict[str, Any], channels: int = 4
) -> onnx.ModelProto:
    ends = [helper.make_tensor_value_info(t, 1, [1, c, 4, 4]) for t, c in [("x", 4), *((o, channels) for o in outputs)]]
    stored = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "scale", ends[:1], ends[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def weight(*shape: int) -> Any:
    return normal(*shape, 1, 1, dtype=np.float32)


def sum_of_convolutions(size: int, copies: int) -> onnx.ModelProto:
    """A Sum of convolutions, `copies` of each."""
    nodes = [helper.make_node("Conv", ["x", f"w{i // copies}"], [f"a{i}"]) for i in range(size)]
    nodes.append(helper.make_node("Sum", [f"a{i}" for i in range(size)], ["y"]))
    return make_model(nodes, ["y"], {f"w{i}": weight(4, 4) for i in range(-(-size // copies))})


def different(size: int) -> onnx.ModelProto:
    return sum_of_convolutions(size, 1)


def partly_equal(size: int) -> onnx.ModelProto:
    return sum_of_convolutions(size, 4)


def hub(size: int) -> onnx.ModelProto:
    """One operator that reads the results of many without effect."""
    nodes = [helper.make_node("Identity", ["x"], [f"a{i}"]) for i in range(size)]
    nodes.append(helper.make_node("Concat", [f"a{i}" for i in range(size)], ["y"], axis=1))
    return make_model(nodes, ["y"], {}, 4 * size)


def many_outputs(size: int) -> onnx.ModelProto:
    nodes = [helper.make_node("Conv", ["x", f"w{i}"], [f"a{i}"]) for i in range(size)]
    return make_model(nodes, [f"a{i}" for i in range(size)], {f"w{i}": weight(4, 4) for i in range(size)})


def concatenated(size: int) -> onnx.ModelProto:
    """Layers whose results are appended to their inputs."""
    nodes, weights, last = [], {}, "x"
    for i in range(size):
        nodes += [
            helper.make_node("Relu", [last], [f"r{i}"]),
            helper.make_node("Conv", [f"r{i}", f"w{i}"], [f"a{i}"]),
            helper.make_node("Concat", [last, f"a{i}"], [f"c{i}"], axis=1),
        ]
        weights[f"w{i}"], last = weight(2, 4 + 2 * i), f"c{i}"
    return make_model(nodes, [last], weights, 4 + 2 * size)


def dense(links: int) -> onnx.ModelProto:
    """Layers that read the results of all layers before them, with about `links` links in total."""
    nodes, weights, made = [], {}, ["x"]
    for i in range(math.isqrt(2 * links)):
        nodes += [
            helper.make_node("Concat", made, [f"c{i}"], axis=1),
            helper.make_node("Relu", [f"c{i}"], [f"r{i}"]),
            helper.make_node("Conv", [f"r{i}", f"w{i}"], [f"a{i}"]),
        ]
        weights[f"w{i}"] = weight(1, 4 + i)
        made = [*made, f"a{i}"]
    nodes.append(helper.make_node("Concat", made, ["y"], axis=1))
    return make_model(nodes, ["y"], weights, 3 + len(made))


def blocks(size: int) -> onnx.ModelProto:
    nodes, weights, last = [], {"s": np.array([0.5], np.float32)}, "x"
    for i in range(size // 4):
        nodes += [
            helper.make_node("Conv", [last, f"w{i}"], [f"a{i}"]),
            helper.make_node("Mul", [f"a{i}", "s"], [f"b{i}"]),
            helper.make_node("Add", [f"b{i}", "s"], [f"c{i}"]),
            helper.make_node("Relu", [f"c{i}"], [f"d{i}"]),
        ]
        weights[f"w{i}"], last = weight(4, 4), f"d{i}"
    return make_model(nodes, [last], weights)


@pytest.mark.parametrize(
    ("build", "small", "large"),
    [
        (different, 100, 400),
        (partly_equal, 100, 400),
        (hub, 100, 400),
        (many_outputs, 100, 400),
        (concatenated, 50, 200),
        (dense, 500, 2000),
        (blocks, 200, 800),
    ],
)
def test_calls_grow_with_the_model(build: Callable[[int], onnx.ModelProto], small: int, large: int) -> None:
    count_calls(build(8))  # imports and caches
    few, many = (count_calls(build(size)) for size in (small, large))
    assert math.log(many / few, large / small) <= MAX_EXPONENT


@pytest.mark.parametrize("size", [8, 200])
def test_hubs_are_rewritten_as_small_nodes_are(size: int) -> None:
    """The producers of a node with very many inputs are not offered again, but the next round finds them."""
    assert ops(pwopt.optimize(hub(size), cost="analytic", verify=False).model) == {"Concat": 1}
    assert ops(pwopt.optimize(partly_equal(size), cost="analytic", verify=False).model) == {"Conv": 1}
