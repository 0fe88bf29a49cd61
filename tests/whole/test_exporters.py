"""What people reported of optimisers, and what exporters write: whole models, as a user runs them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
from helpers import normal, ops, parse
from onnx import TensorProto, helper, numpy_helper

import pwopt


def optimised(model: onnx.ModelProto, folder: Path) -> tuple[onnx.ModelProto, int, int]:
    """The model after a run on files, and the sizes of both."""
    before, after = folder / "a.onnx", folder / "b.onnx"
    onnx.save(model, before)
    pwopt.optimize(before, after, cost="analytic")
    return onnx.load(after), os.path.getsize(before), os.path.getsize(after)


def test_constants_that_only_broadcast_do_not_grow_the_file(tmp_path: Path) -> None:
    shape = [1, 24, 100, 100]
    held, nodes, previous = [numpy_helper.from_array(np.array(shape), "s")], [], "x"
    for j in range(40):
        held.append(numpy_helper.from_array(np.full((1, 24, 1, 1), 0.1 * j, np.float32), f"k{j}"))
        nodes += [
            helper.make_node("Expand", [f"k{j}", "s"], [f"t{j}"]),
            helper.make_node("Add", [previous, f"t{j}"], [f"a{j}"]),
        ]
        previous = f"a{j}"
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("x", previous)]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    result, before, after = optimised(model, tmp_path)
    assert after <= before
    assert ops(result) == {"Add": 1}


def test_a_tied_embedding_is_stored_once(tmp_path: Path) -> None:
    body = "(int64[B,S] ids) => (float[B,S,V] y) { e = Gather(w, ids) r = Relu(e) t = Transpose<perm=[1,0]>(w) y = MatMul(r, t) }"
    model = parse(body, w=normal(3000, 64, dtype=np.float32))
    result, before, after = optimised(model, tmp_path)
    assert after <= 1.01 * before
    assert len(result.graph.initializer) == 1


def test_the_namespace_of_a_folded_convolution_is_kept(tmp_path: Path) -> None:
    norm = {k: (normal(6, seed=i) ** 2 + 0.1).astype(np.float32) for i, k in enumerate("sbmv")}
    body = "(float[N,4,8,8] x) => (float[A,B,C,D] y) { c = Conv(x, w) y = BatchNormalization(c, s, b, m, v) }"
    model = parse(body, w=normal(6, 4, 3, 3, dtype=np.float32), **norm)
    for node, place in zip(model.graph.node, ("conv", "bn"), strict=True):
        node.metadata_props.add(key="namespace", value=f"net/block/{place}")
    result, _, _ = optimised(model, tmp_path)
    (node,) = result.graph.node
    assert {p.key: p.value for p in node.metadata_props}["namespace"] == "net/block/conv"
    assert any("net/block/bn" in p.value for p in node.metadata_props)


def csp(channels: int) -> onnx.ModelProto:
    """A block whose halves are sliced by arithmetic on its own shape, as YOLO's are, with all other sizes open."""
    half = channels // 2
    weights = {
        "w1": normal(channels, channels, 1, 1, dtype=np.float32),
        "w2": normal(half, half, 3, 3, dtype=np.float32),
        "w3": normal(channels, 3 * half, 1, 1, dtype=np.float32),
        **{n: np.array([v]) for n, v in (("zero", 0), ("one", 1), ("two", 2))},
    }
    body = """{ h = Conv(x, w1) s = Shape(h) g = Gather(s, one) a = Add(g, one) d = Div(a, two) m = Mul(d, one) n = Mul(d, two)
        p = Slice(h, zero, m, one) q = Slice(h, m, n, one) r = Conv<pads=[1,1,1,1]>(q, w2) t = Add(q, r)
        c = Concat<axis=1>(p, q, t) y = Conv(c, w3) }"""
    return parse(f"(float[N,{channels},H,W] x) => (float[A,B,C,D] y) {body}", **weights)


def test_the_halves_of_a_csp_block_are_seen(tmp_path: Path) -> None:
    model = csp(8)
    result, _, _ = optimised(model, tmp_path)
    assert not {"Shape", "Gather", "Div", "Mul"} & set(ops(result))
    assert [o.name for o in result.graph.output] == ["y"]
    assert list(result.graph.input) == list(model.graph.input)
    for shape in ((1, 8, 6, 5), (3, 8, 4, 7)):
        assert pwopt.verify(tmp_path / "a.onnx", tmp_path / "b.onnx", shapes=[{"x": shape}]).passed


def attention() -> onnx.ModelProto:
    """One head-split attention with every shape written out, as the dynamo exporter does for open sizes."""
    r = {n: normal(32, 32, seed=i, dtype=np.float32) for i, n in enumerate(("wq", "wk", "wv", "wo"))}
    numbers = {"heads": 4, "depth": 8, "width": 32, "m1": -1, "m2": -2, "far": 2**63 - 1, "low": -(2**63)}
    consts = {n: np.array([v]) for n, v in numbers.items()} | {"half": np.float32(8**-0.25)}
    body = """{ n = Shape<start=0, end=1>(x) l = Shape<start=1, end=2>(x) s = Concat<axis=0>(n, l, heads, depth)
        q0 = MatMul(x, wq) q1 = Reshape<allowzero=1>(q0, s) q2 = Transpose<perm=[0,2,1,3]>(q1) q = Mul(q2, half)
        k0 = MatMul(x, wk) k1 = Reshape<allowzero=1>(k0, s) k2 = Transpose<perm=[0,2,1,3]>(k1)
        v0 = MatMul(x, wv) v1 = Reshape<allowzero=1>(v0, s) v = Transpose<perm=[0,2,1,3]>(v1)
        ksh = Shape(k2) kd = Slice(ksh, m1, far) kl = Slice(ksh, m2, m1) kb = Slice(ksh, low, m2)
        ka = Concat<axis=0>(m1, kl, kd) kr = Reshape(k2, ka) kp = Transpose<perm=[0,2,1]>(kr) kc = Concat<axis=0>(kb, kd, kl)
        kt = Reshape(kp, kc) ks = Mul(kt, half) e = MatMul(q, ks) p = Softmax(e) o = MatMul(p, v) ot = Transpose<perm=[0,2,1,3]>(o)
        os = Concat<axis=0>(n, l, width) oj = Reshape<allowzero=1>(ot, os) y = MatMul(oj, wo) }"""
    return parse(f"(float[N,L,32] x) => (float[A,B,C] y) {body}", opset=19, **r, **consts)


def test_attention_as_the_dynamo_exporter_spells_it(tmp_path: Path) -> None:
    model = attention()
    result, _, _ = optimised(model, tmp_path)
    left = ops(result)
    assert not {"Shape", "Slice", "Concat", "Mul"} & set(left)
    assert left["Transpose"] == 4
    assert [0, 2, 3, 1] in [list(a.ints) for n in result.graph.node for a in n.attribute if a.name == "perm"]
    for shape in ((1, 5, 32), (2, 3, 32)):
        assert pwopt.verify(tmp_path / "a.onnx", tmp_path / "b.onnx", shapes=[{"x": shape}]).passed
