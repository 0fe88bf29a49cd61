"""Where inputs come from: distributions, ranges, files, sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import parse
from onnx import numpy_helper

from pwopt.errors import UsageError
from pwopt.inputs.input_specs import input_specs
from pwopt.inputs.samples import SAMPLE_KINDS, check_kinds, draw_feeds, parse_range, read_samples
from pwopt.running.size_trials import choose_rounds, narrow_specs

pytest.importorskip("onnxruntime")

ALL = "(float[2,3] f, float16[2,3] h, int64[2,3] i, uint8[2,3] u, bool[2,3] b, string[2,3] s) => (float[N] y) { y = Neg(f) }"
SHAPES = dict.fromkeys("fhiubs", (50, 40))


def test_every_type_is_drawn_and_stays_its_type() -> None:
    specs = input_specs(parse(ALL))
    for kind in SAMPLE_KINDS:
        feeds = draw_feeds(specs, SHAPES, kind)
        assert [feeds[s.name].dtype for s in specs] == [s.dtype for s in specs]
        again = draw_feeds(specs, SHAPES, kind)
        assert all(np.array_equal(feeds[n], again[n]) for n in feeds)
    assert np.ptp(draw_feeds(specs, SHAPES, "uniform")["f"]) < 1
    assert np.std(draw_feeds(specs, SHAPES, "large")["f"]) == pytest.approx(1000, rel=0.1)
    zeros = draw_feeds(specs, SHAPES, "zeros")
    assert not any(np.any(zeros[n]) for n in "fhiub")
    assert set(draw_feeds(specs, SHAPES)["s"].reshape(-1)) == {"0", "1"}


def test_ranges() -> None:
    specs = input_specs(parse(ALL))
    feeds = draw_feeds(specs, SHAPES, "zeros", ranges={"f": (-2.0, 5.0), "i": (10, 12), "u": (0, 255)})
    assert feeds["f"].min() >= -2
    assert 4 < feeds["f"].max() <= 5
    assert set(feeds["i"].reshape(-1)) == {10, 11, 12}
    assert feeds["u"].max() > 250
    assert parse_range("a=b:0=-1.5:2e3") == ("a=b:0", (-1.5, 2000.0))
    for text in ("x=3", "x=2:1", "=0:1", "x=a:b"):
        with pytest.raises(UsageError, match="not of the form"):
            parse_range(text)
    with pytest.raises(UsageError, match="no numeric input 's'"):
        check_kinds(["normal"], specs, {"s": (0, 1)})
    with pytest.raises(UsageError, match="no distribution 'gaussian'"):
        check_kinds(["gaussian"], specs, {})


BODY = "(float[N,3] x, int64[N] n) => (float[N,3] y) { y = Neg(x) }"
X, N = np.ones((2, 3), np.float32), np.array([4, 5])


def save_pb(path: Path, value: np.ndarray, name: str = "") -> None:
    path.write_bytes(numpy_helper.from_array(value, name).SerializeToString())


def test_test_data_folders(tmp_path: Path) -> None:
    """As published beside ONNX models: one folder per set, files in the order of the inputs, names optional."""
    specs = input_specs(parse(BODY))
    for k in range(11):
        folder = tmp_path / f"test_data_set_{k}"
        folder.mkdir()
        save_pb(folder / "input_0.pb", X * k)
        save_pb(folder / "input_1.pb", N)
        save_pb(folder / "output_0.pb", -X * k)
    found = read_samples(tmp_path, specs)
    assert [s.feeds["x"][0, 0] for s in found] == list(range(11))
    assert found[10].label.source.endswith("test_data_set_10")
    (named,) = read_samples(tmp_path / "test_data_set_3", specs)
    assert np.array_equal(named.feeds["n"], N)
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    save_pb(swapped / "input_0.pb", N, "n")
    save_pb(swapped / "input_1.pb", X, "x")
    assert np.array_equal(read_samples(swapped, specs)[0].feeds["x"], X)
    (swapped / "input_1.pb").unlink()
    with pytest.raises(UsageError, match="lacks the inputs 'x'"):
        read_samples(swapped, specs)


def test_folders_of_arrays(tmp_path: Path) -> None:
    specs = input_specs(parse(BODY))
    one, many, single = tmp_path / "one", tmp_path / "many", tmp_path / "single"
    for folder in (one, many, single):
        folder.mkdir()
    np.save(one / "x.npy", X)
    np.save(one / "n.npy", N)
    assert np.array_equal(read_samples(one, specs)[0].feeds["n"], N)
    for k in range(3):
        np.savez(many / f"{k}.npz", x=X * k, n=N)
        np.save(single / f"photo{k}.npy", X * k)
    assert [s.feeds["x"][0, 0] for s in read_samples([many, one], specs)] == [0, 1, 2, 1]
    assert len(read_samples(single, specs[:1])) == 3
    with pytest.raises(UsageError, match="holds one array"):
        read_samples(single, specs)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no inputs in the folder"):
        read_samples(tmp_path / "empty", specs)
    (many / "0.npz").write_bytes(b"PK")
    with pytest.raises(UsageError, match="cannot be read"):
        read_samples(many, specs)


def test_numbers_are_not_bent_to_fit() -> None:
    specs = input_specs(parse(BODY))
    with pytest.raises(UsageError, match="do not fit int64"):
        read_samples({"x": X, "n": np.array([0.5, 1])}, specs)
    assert read_samples({"x": X, "n": np.array([2.0, 1])}, specs)[0].feeds["n"].dtype == np.int64


def test_dynamic_inputs_are_tried_at_two_sizes(tmp_path: Path) -> None:
    model = parse("(float[N,3,H,W] x) => (float[N] y) { y = Relu(x) }")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    specs = input_specs(model)
    first, second = (c.sizes for c in choose_rounds(specs, model, tmp_path / "m.onnx"))
    assert first == {"x": (1, 3, 224, 224)}
    assert all(a != b for a, b in zip(first["x"], second["x"], strict=True) if a != 3)
    given = [{"x": (1, 3, 8, 8)}, {"x": (2, 3, 9, 7)}]
    assert [c.sizes for c in choose_rounds(specs, model, tmp_path / "m.onnx", given=given)] == given
    fixed = parse("(float[1,3,8,8] x) => (float[N] y) { y = Relu(x) }")
    (tmp_path / "f.onnx").write_bytes(fixed.SerializeToString())
    assert len(choose_rounds(input_specs(fixed), fixed, tmp_path / "f.onnx")) == 1
    assert narrow_specs(specs, input_specs(fixed))[0].shape == (1, 3, 8, 8)


def test_a_second_size_only_where_the_model_runs(tmp_path: Path) -> None:
    """A network that takes a height of 48 and any width."""
    model = parse("(float[1,3,H,W] x) => (float[N] y) { y = Add(x, rows) }", rows=np.zeros((48, 1), np.float32))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    first, second = (c.sizes for c in choose_rounds(input_specs(model), model, tmp_path / "m.onnx"))
    assert (first["x"][2], second["x"][2]) == (48, 48)
    assert first["x"][3] != second["x"][3]
    only = parse("(float[1,3,H,W] x) => (float[N] y) { y = Reshape(x, a) }", a=np.array([1, 3, 224, 224]))
    (tmp_path / "o.onnx").write_bytes(only.SerializeToString())
    assert [c.sizes for c in choose_rounds(input_specs(only), only, tmp_path / "o.onnx")] == [{"x": (1, 3, 224, 224)}]
