"""Paddings that are read as borders of a feature map."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from branching import AROUND, SIDE, B, Net, border, build, read, scatter_border
from helpers import normal
from onnx import helper

from pwopt.maps.forms import Reading


@pytest.mark.parametrize("value", [0.0, -1.5])
@pytest.mark.parametrize("opset", [1, 2, 10, 11, 13, 18, 21])
def test_padding_around_a_feature_map_is_a_border(opset: int, value: float) -> None:
    old = f"Pad<{'paddings' if opset == 1 else 'pads'}=[0,0,1,2,0,0,0,3], value={value}>(x)"
    pad = old if opset < 11 else "Pad(x, p, v)" if opset < 18 else "Pad(x, q, v, a)"
    weights = {"p": np.array([0, 0, 1, 2, 0, 0, 0, 3]), "v": np.float64(value)}
    model = build(SIDE + f"{{ y = {pad} }}", opset, **weights, q=np.array([2, 1, 3, 0]), a=np.array([-1, 2]))
    reading = read(model) if opset == 1 else border(model)  # the reference evaluator begins at opset 2
    assert isinstance(reading, Reading)
    assert reading.geometry.pads == (1, 2, 0, 3)
    assert (reading.fill is None) if value == 0 else (reading.fill is not None and reading.fill.tolist() == [value] * 4)


def test_padding_of_sequences_and_volumes() -> None:
    model = build("(double[2,4,6] x) => (double[N] y) { y = Pad(x, p) }", p=np.array([0, 0, 1, 0, 0, 2]))
    assert border(model, normal(2, 4, 6)).geometry.pads == (1, 2)
    pads = np.array([0, 0, 0, 1, 2, 0, 0, 3, 0, 1])
    model = build("(double[2,3,2,3,4] x) => (double[N] y) { y = Pad(x, p, v) }", p=pads, v=np.float64(2))
    assert border(model, normal(2, 3, 2, 3, 4)).geometry.pads == (0, 1, 2, 3, 0, 1)


@pytest.mark.parametrize(
    "pad",
    [
        'Pad<mode="reflect">(x, p)', 'Pad<mode="edge">(x, p)', "Pad(x, negative)", "Pad(x, channels)",
        "Pad(x, nothing)", "Pad(x, p, infinite)", "Pad(x, computed)", "Pad(x, p, number)",
    ],
)  # fmt: skip
def test_other_paddings_are_not_borders(pad: str) -> None:
    weights = {
        "p": AROUND, "nothing": 0 * AROUND, "infinite": np.float64(-np.inf),
        "negative": np.array([0, 0, -1, 1, 0, 0, 1, 1]), "channels": np.array([0, 1, 1, 0, 0, 0, 0, 0]),
    }  # fmt: skip
    side = "(double[2,4,6,6] x, int64[8] computed, double number) => (double[N,M,H,W] y) "
    assert read(build(side + f"{{ y = {pad} }}", **weights)) is None


@pytest.mark.parametrize("fill", [np.zeros(4), B])
def test_an_overwritten_border(fill: np.ndarray) -> None:
    net = Net(2, 4, 6, 6)
    reading = border(net.model(scatter_border(net, "x", fill)))
    assert reading.geometry.pads == (1, 1, 1, 1)
    assert len(reading.nodes) == 10
    assert reading.source.name == "x"
    assert fill.tolist() == ([0] * 4 if reading.fill is None else reading.fill.tolist())


def test_a_partly_overwritten_border() -> None:
    """Padded with 2, then overwritten with 2 in one column."""
    net = Net(2, 4, 6, 6)
    y = net("Transpose", net("Pad", "x", np.array([0, 0, 1, 1, 0, 0, 0, 0]), np.asarray(2.0)), perm=[3, 1, 2, 0])
    y = net("ScatterND", y, np.array([[0]]), np.full((1, 4, 7, 2), 2.0))
    reading = border(net.model(net("Transpose", y, perm=[3, 1, 2, 0])))
    assert reading.geometry.pads == (1, 1, 0, 0)
    assert reading.fill is not None
    assert reading.fill.tolist() == [2] * 4


def test_a_border_overwritten_position_by_position() -> None:
    places = np.array([[[[n, c, h, 0] for h in range(6)] for c in range(4)] for n in range(2)])
    updates = np.broadcast_to(B.reshape(1, 4, 1), (2, 4, 6)).copy()
    body = SIDE + "{ p = Pad(x, a) y = ScatterND(p, i, v) }"
    weights: dict[str, Any] = {"a": np.array([0, 0, 0, 1, 0, 0, 0, 0]), "i": places}
    fill = border(build(body, v=updates, **weights)).fill
    assert fill is not None
    assert fill.tolist() == B.tolist()
    updates[1, 2, 3] += 1
    assert read(build(body, v=updates, **weights)) is None


@pytest.mark.parametrize(
    "change", ["spoiled", "gap", "inside", "reader", "output", "updates", "indices", "added", "order", "size", "edge"]
)
def test_other_overwrites_are_not_borders(change: str) -> None:
    net = Net(2, 4, 6, "W" if change == "size" else 6)
    top = {"gap": [1], "inside": [0, 1]}.get(change, [0])
    outputs = [scatter_border(net, "x", B, 1e-9 if change == "spoiled" else 0.0, top)]
    if change == "reader":
        outputs.append(net("Relu", "t4"))
    if change == "output":
        outputs.append("t4")
    if change == "order":
        net.nodes[-1].attribute[0].ints[:] = [3, 1, 0, 2]
    if change == "added":
        net.nodes[2].attribute.append(helper.make_attribute("reduction", "add"))
    if change == "edge":
        net.nodes[0].attribute.append(helper.make_attribute("mode", "edge"))
    model = net.model(*outputs)
    if change in ("updates", "indices"):  # callers may override them
        name = net.nodes[2].input[2 if change == "updates" else 1]
        held = next(t for t in net.weights if t.name == name)
        model.graph.input.append(helper.make_tensor_value_info(name, held.data_type, held.dims))
    assert read(model) is None
