"""Large weights lie in a temporary file while a model is optimised, and nobody can see that in the results."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import normal, parse
from onnx import TensorProto, helper, numpy_helper

import pwopt
from pwopt.errors import ModelError
from pwopt.graph import moved_weights
from pwopt.graph.files import load, save, save_temporary
from pwopt.graph.moved_weights import MOVED_FILES, has_moved, load_moved, move_weights, write_inline
from pwopt.graph.storage import find_locations

#: Prints by how many bytes an optimisation raises the peak memory of its process.
PEAK = """
import json, resource, sys
import numpy, onnxruntime, pwopt
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = pwopt.optimize(sys.argv[1], sys.argv[2], cost="analytic", verify=False).report
print(json.dumps([len(report.rewrites), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10]))
"""


@pytest.fixture(autouse=True)
def move_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moved_weights, "MIN_MODEL_BYTES", 1)
    monkeypatch.setattr(moved_weights, "MIN_TENSOR_BYTES", 128)


def model() -> onnx.ModelProto:
    made = parse(
        "(float[1,8,5,5] x) => (float[1,8,5,5] y) {"
        " a = Conv(x, u) b = Mul(a, s) c = Relu(b) d = Conv(c, v) e = Relu(d) y = Conv(e, w) }",
        u=normal(8, 8, 1, 1, dtype=np.float32), v=normal(8, 8, 1, 1, dtype=np.float32),
        w=normal(8, 8, 1, 1, dtype=np.float32), s=normal(8, 1, 1, dtype=np.float32),
    )  # fmt: skip
    made.doc_string, made.graph.doc_string = "about the model", "about the graph"
    helper.set_model_props(made, {"key": "value"})
    made.graph.initializer[0].doc_string = "a weight"
    made.graph.initializer[1].data_location = TensorProto.DEFAULT  # explicitly, as onnx.load leaves it
    return made


def test_moved_weights_are_written_back_byte_for_byte(tmp_path: Path) -> None:
    given, stream = model(), io.BytesIO()
    content = given.SerializeToString(deterministic=True)
    moved = move_weights(given, tmp_path)
    assert given.SerializeToString(deterministic=True) == content  # nobody's message was changed
    assert [len(t.raw_data) for t in moved.graph.initializer] == [0, 0, 0, 32]  # the scale is small
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(MOVED_FILES)
    write_inline(moved, tmp_path, stream)
    assert stream.getvalue() == content
    assert load_moved(moved, tmp_path).SerializeToString(deterministic=True) == content


def test_lengths_of_many_bytes_are_written_as_protobuf_does(tmp_path: Path) -> None:
    given, stream = model(), io.BytesIO()
    given.graph.initializer[2].CopyFrom(numpy_helper.from_array(normal(300, 300, dtype=np.float32), "w"))
    write_inline(move_weights(given, tmp_path), tmp_path, stream)
    assert stream.getvalue() == given.SerializeToString(deterministic=True)


def test_a_message_over_two_gigabytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = move_weights(model(), tmp_path)
    monkeypatch.setattr(moved_weights, "MAX_MESSAGE_BYTES", 800)
    with pytest.raises(ModelError, match="over 2 GB"):
        write_inline(moved, tmp_path, io.BytesIO())


def test_a_model_with_unknown_fields_or_external_data_stays_as_it_is(tmp_path: Path) -> None:
    odd = onnx.ModelProto.FromString(model().SerializeToString() + b"\xf8\x7f\x01")  # field 2047
    assert move_weights(odd, tmp_path) is odd
    outside = model()
    outside.graph.initializer[0].data_location = TensorProto.EXTERNAL
    assert move_weights(outside, tmp_path) is outside
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("in_memory", [False, True])
def test_results_are_those_of_weights_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: bool
) -> None:
    onnx.save(model(), tmp_path / "m.onnx")
    given = model() if in_memory else tmp_path / "m.onnx"
    moved = pwopt.optimize(given, tmp_path / "a.onnx", cost="analytic")
    monkeypatch.setattr(moved_weights, "MIN_MODEL_BYTES", 1 << 40)
    held = pwopt.optimize(given, tmp_path / "b.onnx", cost="analytic")
    assert len(moved.report.rewrites) == len(held.report.rewrites) > 0
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert moved.model.SerializeToString(deterministic=True) == held.model.SerializeToString(deterministic=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "b.onnx", "m.onnx"]


def test_an_original_that_comes_back_is_whole(tmp_path: Path) -> None:
    given = parse("(float[1,8,5,5] x) => (float[1,8,5,5] y) { a = Conv(x, u) y = Relu(a) }",
                  u=normal(8, 8, 1, 1, dtype=np.float32))  # fmt: skip
    result = pwopt.optimize(given, tmp_path / "a.onnx", cost="analytic", verify=False)
    assert not result.report.rewrites
    assert result.model == onnx.load(tmp_path / "a.onnx") == given


def test_candidates_share_the_weights_that_did_not_change(tmp_path: Path) -> None:
    onnx.save(model(), tmp_path / "m.onnx")
    folder = tmp_path / "folder"
    folder.mkdir()
    source = load(tmp_path / "m.onnx", folder)
    assert has_moved(source.proto)
    changed = onnx.ModelProto()
    changed.CopyFrom(source.proto)
    new = normal(16, 16, 1, 1, dtype=np.float32)
    changed.graph.initializer[0].CopyFrom(numpy_helper.from_array(new, "u"))
    save_temporary(changed, folder / "c.onnx", source)
    written = onnx.load(folder / "c.onnx", load_external_data=False)
    assert set(find_locations(written).values()) == {*MOVED_FILES, "c.onnx.data"}
    assert (folder / "c.onnx.data").stat().st_size == new.nbytes
    read = onnx.load(folder / "c.onnx")
    assert np.array_equal(numpy_helper.to_array(read.graph.initializer[0]), new)
    kept = [onnx.load(tmp_path / "m.onnx").graph.initializer[2], read.graph.initializer[2]]
    assert np.array_equal(*map(numpy_helper.to_array, kept))
    other = tmp_path / "other"
    other.mkdir()
    save(load(folder / "c.onnx"), other / "d.onnx")  # as the search for the first difference does
    assert list(onnx.load(other / "d.onnx").graph.initializer) == list(read.graph.initializer)


@pytest.mark.skipif(sys.platform != "linux", reason="units of ru_maxrss")
@pytest.mark.parametrize("external", [False, True])
def test_peak_memory_is_at_most_three_times_the_weights(tmp_path: Path, external: bool) -> None:
    pytest.importorskip("onnxruntime")
    tables = [numpy_helper.from_array(np.full((8192, 256), i + 1, np.float32), f"t{i}") for i in range(9)]
    weights = sum(len(t.raw_data) for t in tables)
    scale, matrix = (numpy_helper.from_array(v, n) for v, n in ((np.float32(0.5), "s"), (np.eye(256, dtype="f4"), "w")))
    nodes = [helper.make_node("Gather", ["i", f"t{k}"][::-1], [f"g{k}"]) for k in range(9)]
    nodes += [helper.make_node("Sum", [f"g{k}" for k in range(9)], ["h"])]
    nodes += [helper.make_node("MatMul", ["h", "w"], ["p"]), helper.make_node("Mul", ["p", "s"], ["y"])]
    ends = [helper.make_tensor_value_info(n, t, [2, *d]) for n, t, d in (("i", 7, []), ("y", 1, [256]))]
    graph = helper.make_graph(nodes, "large", ends[:1], ends[1:], [*tables, scale, matrix])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(made, tmp_path / "m.onnx", save_as_external_data=external, location="w.bin" if external else None)
    command = [sys.executable, "-c", PEAK, str(tmp_path / "m.onnx"), str(tmp_path / "o.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rewrites, grown = json.loads(done.stdout)
    assert rewrites
    assert grown < 3 * weights, grown / weights
