"""Targets: the runtime that a result is written for, and what that changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import onnx

from pwopt.errors import UsageError
from pwopt.graph.files import from_proto
from pwopt.graph.model import Model
from pwopt.graph.opset import convert_opset
from pwopt.graph.view import View
from pwopt.maps import idioms
from pwopt.optimizing.request import KINDS, Target
from pwopt.selecting.shape_folding import infer_ranks

#: The opset with HardSwish, which every runtime reads well. In older opsets it is spelled x·HardSigmoid(x), which
#: onnxruntime fuses into convolutions, and OpenVINO does not.
HARD_SWISH_SINCE = 14


def find_kind(target: Target, provider_kind: str) -> str:
    """The kind of provider whose lowered forms a result takes."""
    return KINDS.get(target, provider_kind)


def raise_opset(model: Model, target: Target, sizes: Mapping[str, Sequence[int]]) -> Model:
    """Convert a model that spells out HardSwish to the opset that has it, unless the target needs no portable form.

    The model stays as it is if onnx cannot convert it, or if the conversion would add or replace an operator.
    """
    if target.startswith("onnxruntime") or model.opset >= HARD_SWISH_SINCE or not _spells_hard_swish(model):
        return model
    if model.proto.functions or any(a.HasField("g") or a.graphs for n in model.proto.graph.node for a in n.attribute):
        return model  # the converter leaves the operators of functions and subgraphs as they are
    try:
        converted = convert_opset(model, HARD_SWISH_SINCE, infer_ranks(model.proto, sizes))
    except UsageError:
        return model
    same = _count_operators(converted) == _count_operators(model.proto)
    return from_proto(converted, model.folder) if same else model


def _spells_hard_swish(model: Model) -> bool:
    view = View(model.graph)
    for node in view.nodes():
        found = idioms.activation(view, node)
        if found is not None and found.op == "HardSwish":
            return True
    return False


def _count_operators(proto: onnx.ModelProto) -> Counter[tuple[str, str]]:
    """Count the operators by type; constants do not count, since some attributes become inputs in newer opsets."""
    return Counter((n.domain, n.op_type) for n in proto.graph.node if n.op_type != "Constant")
