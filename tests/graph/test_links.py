"""Models and data behind links, and names as long as file systems allow."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import normal, parse

import pwopt
from pwopt.cli import main
from pwopt.errors import ModelError, UsageError
from pwopt.graph.storage import name_beside
from pwopt.inputs.samples import load_array_file
from pwopt.running.session import Session

if sys.platform == "win32":
    pytest.skip("links need rights there", allow_module_level=True)

F = np.float32


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with external data, `m.onnx` and `m.data`."""
    model = parse(
        "(float[1,64,4,4] x) => (float[N] y) { h = Conv(x, w) y = Conv(h, v) }",
        w=normal(64, 64, 1, 1, dtype=F), v=normal(8, 64, 1, 1, seed=1, dtype=F),
    )  # fmt: skip
    path = tmp_path / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, location="m.data", size_threshold=0)
    return tmp_path


def optimise(path: Path, out: Path) -> int:
    pytest.importorskip("onnxruntime")
    result = pwopt.optimize(path, out, cost="analytic", threads=1)
    assert result.report.equivalence is not None
    return result.report.after.nodes


def test_the_cache_of_a_model_hub(folder: Path) -> None:
    """The model and its data are links into another folder, where they have other names."""
    blobs, snapshot = folder / "blobs", folder / "snapshot"
    for made in (blobs, snapshot):
        made.mkdir()
    for name, blob in (("m.onnx", "1a"), ("m.data", "2b")):
        (folder / name).rename(blobs / blob)
        (snapshot / name).symlink_to(f"../blobs/{blob}")
    assert optimise(snapshot / "m.onnx", folder / "out.onnx") == 1
    (blobs / "2b").rename(folder / "secret")
    (snapshot / "m.data").unlink()
    (snapshot / "m.data").symlink_to("../secret")
    with pytest.raises(ModelError, match="outside the model's folder"):
        pwopt.load(snapshot / "m.onnx")


def test_links_inside_the_folder(folder: Path) -> None:
    (folder / "m.data").rename(folder / "other.data")
    (folder / "m.data").symlink_to("other.data")
    assert optimise(folder / "m.onnx", folder / "out.onnx") == 1


def test_a_link_to_a_model_with_data_beside_it(folder: Path) -> None:
    """onnxruntime does not load it; pwopt writes one that it loads."""
    pytest.importorskip("onnxruntime")
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "link.onnx").symlink_to(folder / "m.onnx")
    path = folder / "elsewhere" / "link.onnx"
    assert pwopt.optimize(path, folder / "out.onnx", cost="analytic", verify=False).report.after.nodes == 1
    Session(folder / "out.onnx")


def test_data_outside_is_refused(folder: Path) -> None:
    (folder / "inner").mkdir()
    (folder / "m.onnx").rename(folder / "inner" / "m.onnx")
    (folder / "inner" / "m.data").symlink_to(folder / "m.data")
    with pytest.raises(ModelError, match="outside the model's folder"):
        pwopt.load(folder / "inner" / "m.onnx")


def test_links_to_themselves(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loop = folder / "loop.onnx"
    loop.symlink_to("loop.onnx")
    with pytest.raises(UsageError, match="there is no file"):
        pwopt.load(loop)
    with pytest.raises(SystemExit) as end:
        main(["optimize", str(loop), "--cost", "analytic"])
    assert end.value.code == 2
    (folder / "m.data").unlink()
    (folder / "m.data").symlink_to("m.data")
    with pytest.raises(ModelError, match="is missing"):
        pwopt.load(folder / "m.onnx")


@pytest.mark.parametrize("name", ["n" * 245 + ".onnx", "ü" * 122 + ".onnx"])
def test_long_names(name: str, folder: Path) -> None:
    long = folder / name
    (folder / "m.onnx").rename(long)
    (folder / "out").mkdir()
    assert optimise(long, folder / "out" / name) == 1
    assert optimise(long, folder / "out" / name) == 1
    assert len(os.listdir(folder / "out")) == 2
    with pytest.raises(SystemExit) as end:
        main(["optimize", str(long), "--cost", "analytic", "--quiet", "--no-verify"])
    assert end.value.code == 0
    assert name_beside(long, ".pwopt.onnx").exists()
    rows = pwopt.optimize_many([long], folder / "many", pwopt.Request(cost="analytic", verify=False))
    assert [r.status for r in rows] == ["done"]


def test_names_beside_are_short_and_tell_apart() -> None:
    paths = [Path("a" * 248 + c + ".onnx") for c in "xy"]
    made = {name_beside(path, ".report.json").name for path in paths}
    assert len(made) == 2
    assert all(len(name.encode()) <= 250 for name in made)
    assert name_beside(Path("b/m.onnx"), ".pwopt.onnx") == Path("b/m.pwopt.onnx")


def test_damaged_arrays_are_refused_without_unsafe_advice(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, x=np.zeros((4, 4), F), o=np.array([{}], object))
    whole = path.read_bytes()
    model = parse("(float[4,4] x) => (float[4,4] y) { y = Relu(x) }")
    contents = (
        whole,
        whole[:60],
        whole[:-30],
        b"PK" + whole[5:],
        b"",
        b"\x80\x04]",
        whole[:80] + b"\xff" * 40 + whole[120:],
    )
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(UsageError) as error:
            pwopt.verify(model, model, inputs=path)
        assert "pickle" not in str(error.value)
        assert "unsafe" not in str(error.value)
    with pytest.raises(UsageError, match="No such file"):
        load_array_file(tmp_path / "none.npz")
