"""Nothing is lost between file and graph, and files appear whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import evaluate, normal, ops, parse, weight
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import ExternalDataInfo, convert_model_to_external_data

import pwopt
from pwopt.errors import ModelError, UsageError
from pwopt.graph.files import from_proto, load, save
from pwopt.graph.storage import replacing
from pwopt.passes import FoldAffine, FoldChains


def rich_model(foldable: bool = True) -> onnx.ModelProto:
    """A model with everything that a file can carry besides the computation."""
    model = parse(
        "(double[N,4,H,W] x, double[5,1,1] t) => (double[N,5,H,W] y, double z) {"
        " h = Conv(x, w) k = %s u = Add(k, t) y = Relu(u) z = ReduceMax<keepdims=0>(y) }"
        % ("Mul(h, s)" if foldable else "Relu(h)"),
        w=normal(5, 4, 1, 1),
        **({"s": normal(5, 1, 1)} if foldable else {}),
        t=normal(5, 1, 1),
    )
    model.producer_name, model.producer_version, model.domain = "exporter", "1.2", "org.example"
    model.model_version, model.doc_string = 7, "about the model"
    helper.set_model_props(model, {"names": "{0: 'cat'}", "stride": "32"})
    model.graph.doc_string = "about the graph"
    model.graph.metadata_props.add(key="graph key", value="graph value")
    model.graph.input[0].doc_string = "an image"
    model.graph.input[0].metadata_props.add(key="input key", value="input value")
    model.graph.input[0].type.denotation = "IMAGE"
    model.graph.input[0].type.tensor_type.shape.dim[1].denotation = "DATA_CHANNEL"
    model.graph.output[0].doc_string = "features"
    for node in model.graph.node:
        node.name, node.doc_string = f"node_{node.output[0]}", f"makes {node.output[0]}"
        node.metadata_props.add(key="node key", value=node.output[0])
    model.graph.value_info.append(helper.make_tensor_value_info("h", TensorProto.DOUBLE, ["N", 5, "H", "W"]))
    model.graph.value_info.append(helper.make_tensor_value_info("u", TensorProto.DOUBLE, ["N", 5, "H", "W"]))
    annotation = model.graph.quantization_annotation.add(tensor_name="u")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="t")
    model.graph.sparse_initializer.append(
        helper.make_sparse_tensor(
            numpy_helper.from_array(np.ones(1, np.float32), "sparse"),
            numpy_helper.from_array(np.zeros(1, np.int64)),
            [3],
        )
    )
    model.graph.initializer.append(numpy_helper.from_array(np.ones(2, np.float32), "nobody reads this"))
    model.opset_import.append(helper.make_opsetid("com.example", 3))
    odd = helper.make_node("Odd", ["y"], ["side"], "odd", domain="com.example", blob=b"\xff\xfe\x00", text="ok")
    odd.attribute.append(helper.make_attribute("kind", helper.make_tensor_type_proto(TensorProto.FLOAT, [1])))
    model.graph.node.append(odd)
    model.graph.output.append(helper.make_tensor_value_info("side", TensorProto.FLOAT, None))
    body = [helper.make_node("Neg", ["p"], ["q"])]
    model.functions.append(
        helper.make_function("com.example", "Local", ["p"], ["q"], body, [helper.make_opsetid("", 17)])
    )
    return model


def test_a_model_on_which_nothing_applies_comes_back_the_same() -> None:
    model = rich_model(foldable=False)
    loaded = from_proto(model)
    FoldAffine().run(loaded.graph)
    FoldChains().run(loaded.graph)
    assert loaded.to_proto().SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)


def test_what_is_not_rewritten_survives_verbatim() -> None:
    model = rich_model()
    loaded = from_proto(model)
    assert FoldAffine().run(loaded.graph, reserved=loaded.names()).rewrites
    result = loaded.to_proto()
    expected, found = onnx.ModelProto(), onnx.ModelProto()
    expected.CopyFrom(model)
    found.CopyFrom(result)
    for m in (expected, found):  # all that may differ: two nodes became one, on one tensor less
        for keep in (m.graph.node, m.graph.initializer, m.graph.value_info):
            del keep[:]
    assert found == expected
    assert [n for n in result.graph.node if n.output[0] in ("u", "y", "z", "side")] == [
        n for n in model.graph.node if n.output[0] in ("u", "y", "z", "side")
    ]
    assert [v.name for v in result.graph.value_info] == ["u"]
    assert [t.name for t in result.graph.initializer] == ["w", "t", "nobody reads this"]


def test_editing_a_constant_or_an_attribute_by_hand_is_written() -> None:
    model = parse("(double[2,4] x) => (double[N] y) { h = Mul(x, c) y = Flatten<axis=1>(h) }", c=normal(4))
    loaded = from_proto(model)
    loaded.graph.nodes[0].inputs[1].values = np.ones(4)
    loaded.graph.nodes[1].attrs["axis"] = 0
    result = loaded.to_proto()
    np.testing.assert_array_equal(weight(result, "c"), np.ones(4))
    assert result.graph.node[1].attribute[0].i == 0


def external(folder: Path, single: bool = True) -> Path:
    model = parse(
        "(float[1,64,2,2] x) => (float[N] y) { h = Conv(x, w) k = Mul(h, s) y = Conv(k, v) }",
        w=normal(64, 64, 1, 1, dtype=np.float32),
        s=normal(64, 1, 1, dtype=np.float32),
        v=normal(8, 64, 1, 1, dtype=np.float32),
    )
    convert_model_to_external_data(model, single, "weights.bin" if single else None, size_threshold=1024)
    path = folder / "model.onnx"
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("single", [True, False])
def test_external_data_stays_external(tmp_path: Path, single: bool) -> None:
    source = external(tmp_path, single)
    model = load(source)
    assert FoldAffine().run(model.graph, reserved=model.names()).rewrites
    save(model, tmp_path / "new.onnx")
    result = onnx.load(tmp_path / "new.onnx", load_external_data=False)
    places = {
        t.name: ExternalDataInfo(t).location
        for t in result.graph.initializer
        if t.data_location == TensorProto.EXTERNAL
    }
    assert set(places) == {"w", "v"}
    assert len(set(places.values())) == (1 if single else 2)
    assert all(name.startswith("new.onnx.") for name in places.values())
    x = normal(1, 64, 2, 2, dtype=np.float32)
    np.testing.assert_allclose(
        evaluate(onnx.load(tmp_path / "new.onnx"), x=x)[0], evaluate(onnx.load(source), x=x)[0], atol=1e-4
    )
    offsets = [ExternalDataInfo(t).offset for t in result.graph.initializer if t.name in places]
    assert all(o % 4096 == 0 for o in offsets if o)


def test_writing_again_replaces_the_old_data_files(tmp_path: Path) -> None:
    model = load(external(tmp_path))
    for _ in range(3):
        save(model, tmp_path / "new.onnx")
    assert len(list(tmp_path.glob("new.onnx*"))) == 2
    assert (tmp_path / "weights.bin").exists()
    onnx.checker.check_model(str(tmp_path / "new.onnx"))


@pytest.mark.parametrize("location", ["../outside.bin", "/etc/hostname", "link.bin"])
def test_external_data_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    source = external(inner)
    (tmp_path / "outside.bin").write_bytes((inner / "weights.bin").read_bytes())
    (inner / "link.bin").symlink_to(tmp_path / "outside.bin")
    model = onnx.load(source, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    source.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="outside the model's folder"):
        load(source)


def test_missing_and_truncated_external_data(tmp_path: Path) -> None:
    source = external(tmp_path)
    os.truncate(tmp_path / "weights.bin", 100)
    with pytest.raises(ModelError, match="too short"):
        load(source)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ModelError, match="missing"):
        load(source)


def test_bad_files(tmp_path: Path) -> None:
    bad = tmp_path / "bad.onnx"
    for content in (b"", b"PK\x03\x04 a zip", b"hello world\n" * 10, os.urandom(1000)):
        bad.write_bytes(content)
        with pytest.raises(ModelError, match=r"bad\.onnx"):
            load(bad)
    with pytest.raises(ModelError, match="folder"):
        load(tmp_path)
    with pytest.raises(UsageError, match="no file"):
        load(tmp_path / "nothing.onnx")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda g: g.node.append(helper.make_node("Neg", ["missing"], ["q"])), "nothing defines it"),
        (lambda g: g.node.append(helper.make_node("Neg", ["x"], ["y"])), "defined twice"),
        (lambda g: g.input.append(g.input[0]), "defined twice"),
        (
            lambda g: g.node.extend([helper.make_node("Neg", ["b"], ["a"]), helper.make_node("Neg", ["a"], ["b"])]),
            "its own output",
        ),
    ],
)
def test_graphs_that_are_not_graphs(change: object, word: str) -> None:
    model = parse("(double[2,4] x) => (double[N] y) { y = Neg(x) }")
    change(model.graph)  # type: ignore[operator]
    with pytest.raises(ModelError, match=word):
        load(model)


def test_a_future_opset_is_refused() -> None:
    model = parse("(double[2,4] x) => (double[N] y) { y = Neg(x) }")
    model.opset_import[0].version = 999
    with pytest.raises(ModelError, match="upgrade onnx"):
        load(model)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), replacing(path) as stream:
        stream.write(b"new")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    with replacing(path) as stream:
        stream.write(b"new")
    assert path.read_bytes() == b"new"
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_initializers_of_old_files_stay_listed_as_inputs() -> None:
    body = "(double[2,4,3,3] x, double[5,4,1,1] w, double[5,1,1] s) => (double[N] y) { h = Conv(x, w) y = Mul(h, s) }"
    model = parse(body, 8, 3, w=normal(5, 4, 1, 1), s=normal(5, 1, 1))
    loaded = from_proto(model)
    FoldAffine().run(loaded.graph, reserved=loaded.names())
    result = loaded.to_proto()
    assert ops(result) == {"Conv": 1}
    onnx.checker.check_model(result)
    assert [i.name for i in result.graph.input] == ["x", "w"]


def test_new_initializers_of_old_files_are_listed_too() -> None:
    body = "(double[2,4,3,3] x, double[5,4,1,1] w, double[5,1,1] t) => (double[N] y) { h = Conv(x, w) y = Add(h, t) }"
    model = parse(body, 8, 3, w=normal(5, 4, 1, 1), t=normal(5, 1, 1))
    loaded = from_proto(model)
    FoldAffine().run(loaded.graph, reserved=loaded.names())
    result = loaded.to_proto()
    onnx.checker.check_model(result)
    assert [i.name for i in result.graph.input] == ["x", "w", "y_bias"]


def test_public_api() -> None:
    assert {"optimize", "verify", "inspect", "load", "save"} <= set(pwopt.__all__)


def test_a_cycle_is_reported_by_a_node_on_it() -> None:
    """The first node only reads the cycle; it is not on it."""
    model = parse("(float[N] x) => (float[N] y) { y = Relu(x) a = Add(x, x) b = Neg(a) c = Abs(b) }")
    model.graph.node[0].input[0] = "c"
    model.graph.node[1].input[1] = "b"
    for node in model.graph.node:
        node.name = f"makes {node.output[0]}"
    with pytest.raises(ModelError, match="node 'makes a' depends on its own output"):
        load(model)


def test_a_node_that_reads_itself_is_a_cycle() -> None:
    model = parse("(float[N] x) => (float[N] y) { a = Abs(x) y = Add(a, x) }")
    model.graph.node[1].input[1] = "y"
    with pytest.raises(ModelError, match="node 'y' depends on its own output"):
        load(model)


def sparse(indices: list[object], sizes: list[int]) -> onnx.ModelProto:
    """y = x + 2c for a Constant c that is a sparse tensor."""
    values = helper.make_tensor("v", TensorProto.FLOAT, [2], [1.0, 2.0])
    places = numpy_helper.from_array(np.array(indices, np.int64), "p")
    held = helper.make_sparse_tensor(values, places, sizes)
    nodes = [
        helper.make_node("Constant", [], ["c"], sparse_value=held),
        helper.make_node("Mul", ["c", "two"], ["d"]),
        helper.make_node("Add", ["x", "d"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, sizes) for n in ("x", "y")]
    two = numpy_helper.from_array(np.array(2, np.float32), "two")
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [two])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("indices", [[1, 6], [[0, 1], [1, 2]]])
def test_a_sparse_constant_is_read_like_a_dense_one(indices: list[object]) -> None:
    model = sparse(indices, [3, 4])
    assert pwopt.load(model).to_proto() == model
    result = pwopt.optimize(model, cost="analytic").model
    assert [n.op_type for n in result.graph.node] == ["Add"]
    held = numpy_helper.to_array(result.graph.initializer[0])
    assert held.reshape(-1)[[1, 6]].tolist() == [2, 4]
    assert held.sum() == 6


@pytest.mark.parametrize(
    ("indices", "sizes"),
    [
        ([1, 12], [3, 4]),
        ([-1, 1], [3, 4]),
        ([1, 1], [3, 4]),
        ([1], [3, 4]),
        ([[0, 4], [1, 2]], [3, 4]),
        ([1, 2], [1 << 20]),
    ],
)
def test_a_sparse_constant_that_is_large_or_contradicts_itself_stays(indices: list[object], sizes: list[int]) -> None:
    loaded = pwopt.load(sparse(indices, sizes))
    assert not loaded.graph.nodes[0].attrs
