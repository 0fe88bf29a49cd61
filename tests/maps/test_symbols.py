"""Symbols of sizes: what is proved equal is equal when models run."""

from __future__ import annotations

from random import Random

import numpy as np
import onnx
import pytest
from helpers import normal, open_session, parse
from strategies import random_sample

from pwopt.graph.files import from_proto
from pwopt.graph.view import View
from pwopt.maps.symbols import Sizes, infer_symbols


def symbols(model: onnx.ModelProto) -> dict[str, Sizes]:
    return {t.name: sizes for t, sizes in infer_symbols(View(from_proto(model).graph)).items()}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y = Conv<pads=[1,1,1,1]>(x, w)", ("N", 4, "H", "W")),
        ("y = Conv<pads=[2,2,2,2], dilations=[2,2]>(x, w)", ("N", 4, "H", "W")),
        ('y = Conv<auto_pad="SAME_UPPER">(x, w)', ("N", 4, "H", "W")),
        ("a = Conv(x, w) y = Conv<pads=[2,2,2,2]>(a, w)", ("N", 4, "H", "W")),
        ("a = Conv<pads=[1,1,1,1]>(x, w) b = LeakyRelu(a) y = Add(b, a)", ("N", 4, "H", "W")),
        ("y = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(x)", ("N", 4, "H", "W")),
        ("y = GlobalAveragePool(x)", ("N", 4, 1, 1)),
        ("a = GlobalAveragePool(x) y = Mul(a, x)", ("N", 4, "H", "W")),
        ("y = Concat<axis=1>(x, x)", ("N", 8, "H", "W")),
        ("y = Transpose<perm=[0,2,3,1]>(x)", ("N", "H", "W", 4)),
        ("y = Softmax<axis=1>(x)", ("N", 4, "H", "W")),
        ("k = Constant<value_ints=[3,1]>() s, y = Split<axis=1>(x, k)", ("N", 1, "H", "W")),
        ("k = Constant<value_ints=[3,1]>() s, y = Split<axis=-3>(x, k)", ("N", 1, "H", "W")),
    ],
)
def test_sizes_that_stay(body: str, expected: Sizes) -> None:
    model = parse(f"(float[N,4,H,W] x) => (float[A,B,C,D] y) {{ {body} }}", w=normal(4, 4, 3, 3, dtype=np.float32))
    assert symbols(model)["y"] == expected


def test_parts_of_unknown_size_are_not_equal() -> None:
    found = symbols(
        parse("(float[N,4,H,W] x) => (float[A,B,C,D] y) { s, t = Split<axis=2, num_outputs=2>(x) y = Neg(t) }")
    )
    assert len({found["x"][2], found["s"][2], found["t"][2]}) == 3


def test_equal_windows_have_equal_sizes() -> None:
    body = """(float[N,4,H,W] x) => (float[A,B,C,D] y) {
        a = Conv<strides=[2,2], pads=[1,1,1,1]>(x, w) b = MaxPool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(x)
        c = Conv<strides=[2,2]>(x, w) y = Conv<pads=[1,1,1,1]>(a, w) }"""
    found = symbols(parse(body, w=normal(4, 4, 3, 3, dtype=np.float32)))
    assert found["a"] == found["b"] == found["y"]
    assert found["a"][2] != found["c"][2]
    assert found["a"][2] != found["a"][3]


def test_sizes_that_may_differ_are_not_equal() -> None:
    body = """(float[N,4,T] x, float[N,4,T] z, float[M,4,?] u) => (float[A,B,C] y) {
        s = Add(x, z) y = Relu(u) k = MaxPool<kernel_shape=[2], strides=[2], ceil_mode=1>(u) }"""
    found = symbols(parse(body))
    assert len({found["x"][0], found["z"][0]}) == 2  # one name for two inputs may mean two sizes
    assert len({found["x"][2], found["z"][2], found["s"][2]}) == 3  # either may be 1
    assert found["y"] == ("M", 4, found["u"][2])
    assert found["k"][2] not in found["u"]


def test_names_that_a_file_declares_are_not_given_to_other_sizes() -> None:
    """A result of pwopt that is optimised again already has symbols, which mean what they meant."""
    body = """(float[N,4,H,W] x) => (float[A,B,C,D] y) {
        a = Conv<strides=[2,2]>(x, w) b = Relu(a) c = Conv<strides=[3,3]>(x, w) d = Relu(c) y = Neg(b) }"""
    model = parse(body, w=normal(4, 4, 3, 3, dtype=np.float32))
    first = symbols(model)
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("c", onnx.TensorProto.FLOAT, first["a"]))
    assert not set(first["a"][2:]) & set(symbols(model)["b"][2:])


@pytest.mark.parametrize("seed", range(120))
def test_symbols_hold_in_random_models(seed: int) -> None:
    sample = random_sample(Random(seed))
    if len(sample.feeds) < 3:
        pytest.skip("no dynamic sizes")
    found = symbols(sample.model)
    exposed = onnx.ModelProto()
    exposed.CopyFrom(sample.model)
    known = {v.name for v in exposed.graph.output}
    made = [n for node in exposed.graph.node for n in node.output if n in found and n not in known]
    exposed.graph.output.extend(onnx.ValueInfoProto(name=n) for n in made)
    try:
        session = open_session(exposed, optimise=False)
    except Exception as error:
        pytest.skip(f"onnxruntime does not load it: {error}")
    for feeds in sample.feeds:
        try:
            results = session.run(None, feeds)
        except Exception:
            continue
        sizes: dict[str, int] = {}
        values = zip([o.name for o in session.get_outputs()], results, strict=True)
        for name, value in (*feeds.items(), *values):
            if name not in found or not isinstance(value, np.ndarray):
                continue
            assert len(found[name]) == value.ndim, name
            for size, actual in zip(found[name], value.shape, strict=True):
                assert (size if isinstance(size, int) else sizes.setdefault(size, actual)) == actual, (name, size)
