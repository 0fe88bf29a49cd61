"""Definitions that a model repeats, and that onnxruntime accepts.

Some exports of GPT-2 define a constant of one name several times, and some tools add a second opset of ONNX.
onnxruntime warns, and takes the last definition. A Constant node overrides an initializer of the same name.
"""

from __future__ import annotations

from collections import Counter

import onnx

#: The names of ONNX's own domain.
STANDARD = ("", "ai.onnx")


def drop_repetitions(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Drop the definitions of constants and opsets that onnxruntime ignores.

    Returns the same model if there are none.
    """
    graph = proto.graph
    constants = [n.output[0] for n in graph.node if _is_constant(n)]
    names = Counter([t.name for t in graph.initializer] + constants)
    repeated = {name for name, count in names.items() if count > 1}
    opsets = {o.version for o in proto.opset_import if o.domain in STANDARD}
    if not repeated and len(opsets) <= 1:
        return proto
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    if len(opsets) > 1:
        _keep_last_opset(result)
    if repeated:
        _keep_last_constants(result.graph, repeated)
    return result


def _is_constant(node: onnx.NodeProto) -> bool:
    return node.op_type == "Constant" and node.domain in STANDARD and len(node.output) == 1


def _keep_last_opset(model: onnx.ModelProto) -> None:
    imports = list(model.opset_import)
    last = [o for o in imports if o.domain in STANDARD][-1]
    kept = [o for o in imports if o is last or o.domain not in STANDARD]
    content = [onnx.OperatorSetIdProto.FromString(o.SerializeToString()) for o in kept]
    del model.opset_import[:]
    model.opset_import.extend(content)


def _keep_last_constants(graph: onnx.GraphProto, repeated: set[str]) -> None:
    """Keep the last Constant node of each name, where the first one stands, or else the last initializer."""
    made: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        if _is_constant(node) and node.output[0] in repeated:
            made.setdefault(node.output[0], []).append(node)
    last = {name: onnx.NodeProto.FromString(nodes[-1].SerializeToString()) for name, nodes in made.items()}
    written: set[str] = set()
    kept = []
    for node in graph.node:
        name = node.output[0] if _is_constant(node) else ""
        if name in last:
            if name not in written:
                kept.append(last[name])
            written.add(name)
        else:
            kept.append(onnx.NodeProto.FromString(node.SerializeToString()))
    del graph.node[:]
    graph.node.extend(kept)
    held = {tensor.name: i for i, tensor in enumerate(graph.initializer)}
    for i in reversed(range(len(graph.initializer))):
        name = graph.initializer[i].name
        if name in repeated and (name in made or held[name] != i):
            del graph.initializer[i]
