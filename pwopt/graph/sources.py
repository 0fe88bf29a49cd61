"""Models as arguments: a path, a message, its bytes, or an object of another library."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from pwopt.errors import ModelError, UsageError
from pwopt.graph.model import Model

#: A path, an `onnx.ModelProto` or its bytes, a `Model`, a `torch.onnx.ONNXProgram` or an `onnx_ir.Model`.
Source = str | os.PathLike[str] | bytes | onnx.ModelProto | Model | Any


def unwrap(source: Source) -> Path | onnx.ModelProto | Model:
    """Convert an argument to one of three kinds.

    Objects of other libraries are known by what they offer: a `model_proto` (torch.onnx.ONNXProgram), or that their
    library, which is loaded already, writes them as a message (onnx_ir.Model). None of them is a dependency.

    Raises
    ------
    UsageError
        If it is no model.
    ModelError
        If bytes are no ONNX model.
    """
    if isinstance(source, (onnx.ModelProto, Model)):
        return source
    if isinstance(source, (str, os.PathLike)):
        return Path(os.fsdecode(source))
    if isinstance(source, (bytes, bytearray, memoryview)):
        try:
            read: onnx.ModelProto = onnx.ModelProto.FromString(bytes(source))
        except DecodeError as error:
            raise ModelError(f"the bytes are not an ONNX model ({error}); export it again") from error
        if not read.HasField("graph"):
            raise ModelError("the bytes are not an ONNX model (it has no graph); export it again")
        return read
    ir = sys.modules.get("onnx_ir")
    offered: object = ir.to_proto(source) if ir is not None and isinstance(source, ir.Model) else None
    offered = getattr(source, "model_proto", None) if offered is None else offered
    if isinstance(offered, onnx.ModelProto):
        return offered
    what = f"{type(source).__module__}.{type(source).__qualname__}".removeprefix("builtins.")
    kinds = "a path, bytes, an onnx.ModelProto, a torch.onnx.ONNXProgram or an onnx_ir.Model"
    raise UsageError(f"the model is of type {what}; give {kinds}")
