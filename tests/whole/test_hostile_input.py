"""Sound models that mean harm: they take no more memory and time than their size, and print nothing harmful."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

import pwopt
from pwopt import cli
from pwopt.cli import output
from pwopt.graph import shapes
from pwopt.graph.limits import run_isolated
from pwopt.graph.shapes import infer
from pwopt.optimizing.optimizer import Result

F = np.float32
TERA = 1 << 20  # squared
pytestmark = pytest.mark.memory_limit


def text(body: str, **weights: Any) -> onnx.ModelProto:
    """A model from onnx's text syntax; nothing is inferred."""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g {body}')
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), n) for n, v in weights.items())
    model.graph.output[0].type.tensor_type.ClearField("shape")
    return model


def chain(size: int, node: Callable[[int], onnx.NodeProto]) -> onnx.ModelProto:
    """Nodes from tensor t0 to tensor t<size>."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4, 2, 2]) for name in ("t0", f"t{size}")]
    weights = [np.linalg.qr(np.random.default_rng(i).normal(size=(4, 4)))[0].astype(F) for i in range(16)]
    tensors = [numpy_helper.from_array(w.reshape(4, 4, 1, 1), f"w{i}") for i, w in enumerate(weights)]
    tensors.append(numpy_helper.from_array(F(1.001), "s"))
    graph = helper.make_graph([node(i) for i in range(size)], "chain", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def algebra(model: onnx.ModelProto) -> Result:
    """What pwopt does by itself; onnxruntime, which computes what a model says, takes what that takes."""
    return pwopt.optimize(model, cost="analytic", verify=False, shapes={"x": (1, 4)} if _dynamic(model) else None)


def _dynamic(model: onnx.ModelProto) -> bool:
    return any(d.dim_param for d in model.graph.input[0].type.tensor_type.shape.dim)


DOUBLINGS = " ".join(f"c{i + 1} = Concat<axis=0>(c{i}, c{i})" for i in range(40))
TERABYTES = {
    "ConstantOfShape": text("(float[1] x) => (float[N] y) { c = ConstantOfShape(s) y = Add(x, c) }", s=[TERA, TERA]),
    "Expand": text("(float[1] x) => (float[N] y) { c = Expand(k, s) y = Add(x, c) }", k=F(1), s=[TERA, TERA]),
    "Tile": text("(float[1] x) => (float[N] y) { c = Tile(k, s) y = Add(x, c) }", k=F([[1]]), s=[TERA, TERA]),
    "Range": text("(float[1] x) => (float[N] y) { c = Range(a, b, d) y = Add(x, c) }", a=F(0), b=F(1e12), d=F(1)),
    "Range of integers": text("(int64[1] x) => (int64[N] y) { c = Range(a, b, d) y = Add(x, c) }", a=0, b=10**15, d=1),
    "Pad": text("(float[1] x) => (float[N] y) { c = Pad(k, p) y = Add(x, c) }", k=F([[1]]), p=[0, 0, TERA, TERA]),
    "OneHot": text("(float[1] x) => (float[N] y) { c = OneHot(i, d, v) y = Add(x, c) }", i=[0] * 99, d=1 << 40, v=F([0, 1])),
    "a chain of each": text(
        "(float[1] x) => (float[N] y) { t = Concat<axis=0>(s, s) c = ConstantOfShape(t) e = Expand(c, u) f = Tile(e, v) y = Add(x, f) }",
        s=[1024], u=[1024, 1024, 1024], v=[1024, 1024, 1]),
    "forty doublings": text(f"(float[1] x) => (float[N] y) {{ {DOUBLINGS} y = Add(x, c40) }}", c0=np.ones(1024, F)),
    "forty doublings of a shape": text(f"(float[N,4] x) => (float[K] y) {{ c0 = Shape(x) {DOUBLINGS} y = Reshape(x, c40) }}"),
    "a product of sizes": text("(float[1] x) => (float[N] y) { m = Mul(a, a) c = ConstantOfShape(m) y = Add(x, c) }", a=[TERA]),
    "a product of an unknown's sizes": text(
        "(float[N,4] x) => (float[K] y) { s = Shape(x) g = Gather(s, i) h = Mul(g, a) c = ConstantOfShape(h) y = Add(c, k) }",
        i=[1], a=[TERA * TERA // 4], k=F([1])),
    "a long input": text("(float[1000000000000] x) => (float[N] y) { a = Add(x, x) y = Mul(a, k) }", k=F(2)),
    "the size of a long input": text("(float[4611686018427387904,8] x) => (int64[N] y) { s = Size(x) y = Add(s, o) }", o=[1]),
    "a selection as a matrix": text(
        "(float[1,200000,2] x) => (float[N] y) { a = Gather<axis=1>(x, i) y = Conv(a, v) }",
        i=np.arange(200000)[::-1].copy(), v=np.ones((1, 200000, 1), F)),
    "a pooling as a stencil": text(
        "(float[1,4,8,8] x) => (float[N] y) { b = AveragePool<kernel_shape=[100000,100000],pads=[50000,50000,50000,50000],count_include_pad=1>(x) y = Conv(b, v) }",
        v=np.ones((4, 4, 1, 1), F)),
    "channels of padding": text(
        "(float[1,200000,2] x) => (float[N] y) { b = Pad(x, p) y = Conv(b, v) }", p=[0, 50000, 0, 0, 50000, 0], v=np.ones((1, 300000, 1), F)),
    "an outer product": text(
        "(float[1,50000] x) => (float[N] y) { a = MatMul(x, u) y = MatMul(a, v) }", u=np.ones((50000, 1), F), v=np.ones((1, 50000), F)),
    "positions of padding": text(
        "(float[1,4,8,8] x) => (float[N] y) { b = Conv<pads=[1000000000,0,1000000000,0]>(x, u) y = Conv(b, v) }",
        u=np.ones((4, 4, 1, 1), F), v=np.ones((4, 4, 1, 1), F)),
}  # fmt: skip


@pytest.mark.parametrize("model", TERABYTES.values(), ids=TERABYTES)
def test_what_would_take_terabytes_is_left_alone(model: onnx.ModelProto) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = algebra(model)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < peak + (3 << 19)  # KiB
    assert result.model.ByteSize() < 2 * model.ByteSize() + (1 << 22)


#: Graphs in which following values could take much, each for one reason; and one in which it cannot.
WILD = {
    "a size by value": "c = ConstantOfShape(s) y = Add(x, c)",
    "an unknown domain": "y = foreign.Add(x, x)",
    "a row of everything": "y = Reshape(x, one)",
    "a large attribute": "y = MaxPool<kernel_shape=[1,1], pads=[0,0,100000,0]>(x)",
    "doublings": f"c0 = Shape(x) {DOUBLINGS} y = Reshape(x, c40)",
}


@pytest.mark.parametrize("body", WILD.values(), ids=WILD)
def test_values_are_followed_without_a_bound_in_bounded_graphs_only(body: str) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17, "foreign" : 1]> g (float[N,4,6,5] x) => (float[K] y) '
        f"<int64[2] s = {{3, 4}}, int64[1] one = {{-1}}, int64[2] two = {{0, -1}}> {{ {body} }}"
    )
    assert not shapes._is_bounded(model)
    del model.graph.node[:]
    model.graph.node.append(helper.make_node("Reshape", ["x", "two"], ["y"]))
    assert shapes._is_bounded(model)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 1 << 40
    assert not shapes._is_bounded(model)


def test_many_constants_below_the_limit_have_a_limit_together() -> None:
    count = 400
    made = " ".join(f"c{i} = ConstantOfShape(s) d{i} = Add(c{i}, x)" for i in range(count))
    total = f"y = Sum({', '.join(f'd{i}' for i in range(count))})"
    model = text(f"(float[1] x) => (float[N] y) {{ {made} {total} }}", s=[1 << 18])
    result = algebra(model)
    assert result.model.ByteSize() < 3 << 26
    assert any("bytes (limit" in s.reason for s in result.report.skips)


@pytest.mark.skipif(sys.platform != "linux", reason="the bound is Linux's")
def test_a_bound_on_memory_holds_for_the_copy_alone() -> None:
    assert run_isolated(lambda: b"answer", 1 << 26) == b"answer"
    assert run_isolated(lambda: b"x" * (1 << 22), 1 << 26) == b"x" * (1 << 22)
    assert run_isolated(lambda: bytes(1 << 28), 1 << 26) is None
    assert run_isolated(lambda: os.kill(os.getpid(), 11) or b"", 1 << 26) is None  # type: ignore[func-returns-value]
    assert len(bytes(1 << 28)) == 1 << 28


def test_sizes_that_are_only_known_by_following_data_still_are() -> None:
    model = text(
        "(float[N,6,4] x) => (float[K] y) { s = Shape(x) n = Gather(s, z) m = Gather(s, o) h = Mul(m, t) "
        "u = Unsqueeze(n, a) v = Unsqueeze(h, a) c = Concat<axis=0>(u, v) y = Reshape(x, c) }",
        z=0, o=1, t=4, a=[0],
    )  # fmt: skip
    assert infer(model)["y"][1] == ("N", 24)


DEEP: dict[str, Callable[[int], onnx.NodeProto]] = {
    "Identity": lambda i: helper.make_node("Identity", [f"t{i}"], [f"t{i + 1}"]),
    "Relu": lambda i: helper.make_node("Relu", [f"t{i}"], [f"t{i + 1}"]),
    "Transpose": lambda i: helper.make_node("Transpose", [f"t{i}"], [f"t{i + 1}"], perm=[0, 1, 3, 2]),
    "Add to itself": lambda i: helper.make_node("Add", [f"t{i}", f"t{i}"], [f"t{i + 1}"]),
    "Add to the one before": lambda i: helper.make_node("Add", [f"t{i}", f"t{max(0, i - 1)}"], [f"t{i + 1}"]),
    "Swish": lambda i: helper.make_node(("Sigmoid", "Mul")[i % 2], [f"t{i}", f"t{i - 1}"][: 1 + i % 2], [f"t{i + 1}"]),
    "shared Conv": lambda i: helper.make_node("Conv", [f"t{i}", "w0"], [f"t{i + 1}"]),
}


@pytest.mark.parametrize("node", DEEP.values(), ids=DEEP)
def test_deep_chains_do_not_recurse(node: Callable[[int], onnx.NodeProto]) -> None:
    """Deeper than Python's recursion limit; benchmarks/size.py goes to 100,000."""
    result = algebra(chain(1500, node))
    onnx.checker.check_model(result.model)


@pytest.mark.parametrize("op", ["Mul", "Add", "Conv"])
def test_deep_linear_chains_fold(op: str) -> None:
    weights = ["s"] if op != "Conv" else [f"w{i}" for i in range(16)]
    model = chain(1500, lambda i: helper.make_node(op, [f"t{i}", weights[i % len(weights)]], [f"t{i + 1}"]))
    assert algebra(model).report.after.nodes <= (1 if op != "Conv" else 1500)


def nested(depth: int) -> onnx.ModelProto:
    """If in If in If…: each body reads the outermost x."""
    output = [helper.make_tensor_value_info("b", TensorProto.FLOAT, [2])]
    node = helper.make_node("Neg", ["x"], ["b"])
    for _ in range(depth):
        graph = helper.make_graph([node], "body", [], output)
        node = helper.make_node("If", ["c"], ["b"])
        node.attribute.append(helper.make_attribute("then_branch", graph))
        other = helper.make_graph([helper.make_node("Identity", ["x"], ["b"])], "other", [], output)
        node.attribute.append(helper.make_attribute("else_branch", other))
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [2]),
        helper.make_tensor_value_info("c", TensorProto.BOOL, []),
    ]
    graph = helper.make_graph([node], "g", inputs, output)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_nested_bodies(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(nested(20).SerializeToString())
    pwopt.optimize(path, cost="analytic", shapes={"c": ()})

    def wrapped(field: int, content: bytes) -> bytes:
        size, count = b"", len(content)
        while count >= 128:
            size, count = size + bytes([count % 128 + 128]), count // 128
        return bytes([field * 8 + 2]) + size + bytes([count]) + content

    graph = b""
    for _ in range(10_000):  # GraphProto.node.attribute.g, deeper than protobuf reads
        graph = wrapped(1, wrapped(5, wrapped(6, graph)))
    path.write_bytes(wrapped(7, graph))
    with pytest.raises(pwopt.ModelError, match="not an ONNX model"):
        pwopt.load(path)


NAMES = {
    "markup": "<script>alert(1)</script><img src=x onerror=alert(1)>[bold red]x[/]",
    "terminal": "\x1b[31mred\x1b[2J\x1b]0;title\x07\x9b31m",
    "lines": "a\r\nb\u2028c\u0085d\x00e\x7f",
    "paths": "../../../../etc/passwd",
    "right to left": "\u202egnp.\u2066exe\u200f\u061c",
    "long": "n" * 5000,
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_names_are_harmless_wherever_they_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(output, "STAGE_WIDTH", 10_000)  # so that no name is cut before its markup
    body = "(float[1,4,N,2] a) => (float[K] y) { h = Conv(a, w) k = Mul(h, s) g = Conv(k, v) y = Relu(g) }"
    model = text(body, w=np.ones((4, 4, 1, 1), F), v=np.ones((4, 4, 1, 1), F), s=F(2))
    onnx_names = {n: name + n for n in ("h", "k", "g", "w", "v", "y")} | {"a": name}
    for node in model.graph.node:
        node.input[:] = [onnx_names.get(i, i) for i in node.input]
        node.output[:] = [onnx_names.get(o, o) for o in node.output]
        node.name = f"{name} of {node.op_type} {node.output[0]}"
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        value.name = onnx_names.get(value.name, value.name)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = name
    model.producer_name = model.graph.name = model.doc_string = name
    path, out, report = tmp_path / "m.onnx", tmp_path / "o.onnx", tmp_path / "r.json"
    path.write_bytes(model.SerializeToString())
    broken = tmp_path / "broken.onnx"
    model.graph.node[1].input[0] = f"{name} missing"
    broken.write_bytes(model.SerializeToString())
    plain = {" ", "\n"}
    for arguments in (
        ["optimize", path, "-o", out, "--cost", "analytic", "--details", "--report", report],
        ["optimize", path, "--cost", "analytic", "--shape", f"{name}=1x4x3x3", "-o", out],
        ["inspect", path], ["inspect", path, "--json"], ["verify", path, out], ["optimize", broken],
        ["optimize", path, "--deny", f"fold-affine:{name}", "--cost", "analytic", "-o", out],
    ):  # fmt: skip
        with pytest.raises(SystemExit) as end:
            cli.main([str(a) for a in arguments])
        assert end.value.code in (0, 2, 3)
        for shown in capsys.readouterr():
            assert all(c.isprintable() or c in plain for c in shown)
            assert "onerror" not in shown or "[bold red]" in shown  # markup is shown, not obeyed
    assert all(c.isprintable() or c in plain for c in report.read_text())
    assert {r["site"].partition(":")[2] for r in json.loads(report.read_text())["rewrites"]} <= set(onnx_names.values())
    assert {p.name for p in tmp_path.iterdir()} <= {"m.onnx", "o.onnx", "r.json", "broken.onnx"}
