"""What Python hands over as a model, and parameters by their old names."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from helpers import MODELS

import pwopt
from pwopt.errors import ModelError, UsageError
from pwopt.graph.sources import unwrap

PATH = MODELS / "linear_sequence.onnx"


class Program:
    """What torch.onnx.ONNXProgram offers."""

    model_proto = onnx.load(PATH)


def test_every_kind_gives_the_same_model(tmp_path: Path) -> None:
    proto = onnx.load(PATH)
    kinds = (PATH, str(PATH), PATH.read_bytes(), bytearray(PATH.read_bytes()), proto, pwopt.load(PATH), Program())
    for kind in kinds:
        result = pwopt.optimize(kind, cost="analytic", verify=False)
        assert result.report.after.nodes == 1
        assert result.report.model == (str(PATH) if kind in (PATH, str(PATH)) else "<model in memory>")
    assert len(pwopt.inspect(Program())) == 4


def test_verification_takes_them_too() -> None:
    pytest.importorskip("onnxruntime")
    assert pwopt.verify(PATH.read_bytes(), Program(), shapes={"x": (1, 64, 2, 2)}).passed


def test_models_of_onnx_ir() -> None:
    ir = pytest.importorskip("onnx_ir")
    result = pwopt.optimize(ir.load(PATH), cost="analytic", verify=False)
    assert result.report.after.nodes == 1


@pytest.mark.parametrize("other", [None, 3, ["m.onnx"], object(), PATH.open])
def test_anything_else_is_refused_with_a_sentence(other: object) -> None:
    with pytest.raises(UsageError, match=r"the model is of type .*; give a path, bytes"):
        pwopt.optimize(other)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x00" * 40])
def test_bytes_that_are_no_model(content: bytes) -> None:
    with pytest.raises(ModelError, match="the bytes are not an ONNX model"):
        unwrap(content)


@pytest.mark.parametrize("shapes", ["x=1x64x2x2", ["x"], {"x": "1x64x2x2"}, {"x": 3}, {"x": (1, -1, 2, 2)}])
def test_shapes_that_are_no_mapping(shapes: object) -> None:
    with pytest.raises(UsageError, match=r"shape.* is not a sequence of sizes|are not a mapping"):
        pwopt.optimize(PATH, shapes=shapes, verify=False)  # type: ignore[arg-type]
