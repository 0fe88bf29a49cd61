"""Converts a model to another opset, with the converter of onnx."""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from pwopt.errors import UsageError
from pwopt.graph.model import Model
from pwopt.graph.shapes import Shape, infer, make_skeleton


def convert_opset(model: Model, target: int, ranks: Mapping[str, int] | None = None) -> onnx.ModelProto:
    """Convert a model to another opset with the converter of onnx, and keep the metadata that the converter drops.

    Parameters
    ----------
    ranks : mapping of tensor name to int, optional
        Ranks that inference does not find. Without its rank, a Softmax below opset 13 is converted into several
        operators.

    Raises
    ------
    UsageError
        If onnx cannot convert it.
    """
    newest = onnx.defs.onnx_opset_version()
    if target < model.opset:
        raise UsageError(f"opset {target} is older than the model's {model.opset}, and pwopt converts upwards only")
    if target > newest:
        raise UsageError(f"opset {target} is newer than the installed onnx knows ({newest}); upgrade onnx")
    light = make_skeleton(model.proto)
    _declare_ranks(light, infer(model.proto), ranks or {})
    try:
        converted = onnx.version_converter.convert_version(light, target)
    except Exception as error:
        raise UsageError(
            f"onnx cannot convert this model to opset {target} ({type(error).__name__}); leave --opset out"
        ) from error
    out = onnx.ModelProto()
    out.CopyFrom(model.proto)
    originals = {(n.op_type, *n.output): n for n in model.proto.graph.node}
    names = {n.name for n in originals.values()}
    del out.graph.node[:]
    for node in converted.graph.node:
        old = originals.get((node.op_type, *node.output))
        if old is not None:  # the converter keeps neither metadata nor documentation
            node.name, node.doc_string = old.name, old.doc_string
            node.metadata_props.extend(old.metadata_props)
        elif node.name in names:
            node.name = ""  # it splits operators into several of one name, which onnxruntime refuses
        out.graph.node.append(node)
    have = {t.name for t in out.graph.initializer}
    out.graph.initializer.extend(t for t in converted.graph.initializer if t.name not in have)
    for entry in out.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = target
    out.ir_version = max(
        out.ir_version, onnx.helper.find_min_ir_version_for(list(out.opset_import), ignore_unknown=True)
    )
    return out


def _declare_ranks(
    light: onnx.ModelProto, types: Mapping[str, tuple[int, Shape | None]], ranks: Mapping[str, int]
) -> None:
    """Declare the types and the ranks of inner tensors, in place."""
    known = {v.name for v in (*light.graph.output, *light.graph.value_info)}
    for name in dict.fromkeys(name for node in light.graph.node for name in node.output if name not in known):
        element, shape = types.get(name, (0, None))
        rank = len(shape) if shape is not None else ranks.get(name)
        if element and rank is not None:
            light.graph.value_info.append(onnx.helper.make_tensor_value_info(name, element, [None] * rank))
