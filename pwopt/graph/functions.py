"""The functions of a model, and the number of operators after inlining."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx

#: Domain and name of a function.
Function = tuple[str, str]
#: The largest number of operators after inlining, and more for each operator of the graph.
MAX_INLINED, MAX_GROWTH = 1 << 12, 4


def functions(proto: onnx.ModelProto) -> dict[Function, onnx.FunctionProto]:
    """The functions of a model."""
    return {(f.domain, f.name): f for f in proto.functions}


def bodies_of(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs in the attributes of a node."""
    for attribute in node.attribute:
        yield from [attribute.g] if attribute.HasField("g") else attribute.graphs


def nodes_within(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Yield these nodes, each followed by the nodes of its bodies."""
    pending = list(nodes)[::-1]
    while pending:
        node = pending.pop()
        yield node
        pending.extend(reversed([inner for body in bodies_of(node) for inner in body.node]))


def drop_unused_opsets(model: onnx.ModelProto) -> None:
    """Remove the opset imports that no operator and no function needs, and duplicates.

    ONNX's own domain has two names, and always stays. A function names its opsets itself; whoever loads the model may
    look them up here all the same.
    """
    if len(model.opset_import) < 2:
        return
    needed = {"", *(f.domain for f in model.functions), *(o.domain for f in model.functions for o in f.opset_import)}
    graphs = [model.graph, *(g for t in model.training_info for g in (t.initialization, t.algorithm))]
    needed |= {n.domain for nodes in (*graphs, *model.functions) for n in nodes_within(nodes.node)}
    kept: dict[tuple[str, int], onnx.OperatorSetIdProto] = {}
    for entry in model.opset_import:
        domain = "" if entry.domain == "ai.onnx" else entry.domain
        if domain in needed:
            kept.setdefault((domain, entry.version), entry)
    if len(kept) < len(model.opset_import):
        imports = list(kept.values())
        del model.opset_import[:]
        model.opset_import.extend(imports)


def callers(proto: onnx.ModelProto) -> dict[Function, set[Function]]:
    """Function → the functions that call it."""
    known = functions(proto)
    found: dict[Function, set[Function]] = {key: set() for key in known}
    for key, function in known.items():
        for node in nodes_within(function.node):
            if (node.domain, node.op_type) in known:
                found[node.domain, node.op_type].add(key)
    return found


def count_expanded(proto: onnx.ModelProto) -> int | None:
    """Count the operators of a model after inlining; None if there are too many, or if a function calls itself."""
    known = functions(proto)
    limit = MAX_INLINED + MAX_GROWTH * len(proto.graph.node)
    sizes: dict[Function, int] = {}

    def total(nodes: Iterable[onnx.NodeProto]) -> int | None:
        counted = [
            sizes.get((n.domain, n.op_type)) if (n.domain, n.op_type) in known else 1 for n in nodes_within(nodes)
        ]
        found = [c for c in counted if c is not None]
        return sum(found) if len(found) == len(counted) and sum(found) <= limit else None

    for _ in known:  # the largest possible depth of calls
        waiting = [(key, total(f.node)) for key, f in known.items() if key not in sizes]
        ready = {key: size for key, size in waiting if size is not None}
        if not ready:
            break
        sizes.update(ready)
    return total(proto.graph.node)
