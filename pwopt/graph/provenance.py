"""Keeps the metadata and the documentation of nodes that a rewrite replaces.

A new node takes over the `metadata_props` and the `doc_string` of one of the nodes that it replaces: the one with the
same operator and name, else the one with the same operator, else the first. The node that computes the result lists the
others in the property `pwopt.folded`, a JSON list of their names, operators, properties and documentation. If a node is
removed without a replacement, its metadata is lost.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence

import onnx

from pwopt.graph.ir import Node

#: The property that lists the other nodes that a node replaces.
FOLDED = "pwopt.folded"


def inherit(new: Sequence[Node], old: Sequence[Node]) -> None:
    """Record that each of `new` replaces the most similar one of `old`, and that the last replaces all."""
    for node in new:
        alike = sorted(old, key=lambda o: (o.op != node.op, o.name != node.name))
        credit(node, alike if node is new[-1] else alike[:1])


def credit(node: Node, sources: Iterable[Node]) -> None:
    """Record that a node also replaces others."""
    node.replaced = (*node.replaced, *(s for s in sources if s is not node))


def find_origins(node: Node, message: Callable[[Node], onnx.NodeProto | None]) -> Iterator[onnx.NodeProto]:
    """The messages of the nodes that a node replaces, after its own."""
    pending, seen = [node], set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        found = message(node)
        if found is not None:
            yield found
        pending.extend(reversed(node.replaced))


def write_documentation(
    proto: onnx.NodeProto, own: onnx.NodeProto | None, stands_for: Sequence[onnx.NodeProto]
) -> None:
    """Write the metadata and documentation of the nodes that a node replaces into its message.

    `own` is the original message of the node; None for a new node.
    """
    documented = [s for s in stands_for if s.metadata_props or s.doc_string]
    main = own if own is not None else documented[0] if documented else None
    folded = [entry for s in documented for entry in _read_earlier(s)]
    folded += [
        _describe(s)
        for s in documented
        if s is not main and (s.doc_string or any(p.key != FOLDED for p in s.metadata_props))
    ]
    if main is None:
        return
    proto.doc_string = main.doc_string
    del proto.metadata_props[:]
    proto.metadata_props.extend(p for p in main.metadata_props if p.key != FOLDED)
    if folded:
        proto.metadata_props.add(key=FOLDED, value=json.dumps(folded, ensure_ascii=False))


def _describe(proto: onnx.NodeProto) -> dict[str, object]:
    metadata = {p.key: p.value for p in proto.metadata_props if p.key != FOLDED}
    return {"name": proto.name, "op_type": proto.op_type, "metadata_props": metadata, "doc_string": proto.doc_string}


def _read_earlier(proto: onnx.NodeProto) -> list[object]:
    """The list that an earlier optimisation wrote."""
    for p in proto.metadata_props:
        if p.key == FOLDED:
            try:
                found = json.loads(p.value)
            except (ValueError, RecursionError):
                return []
            return found if isinstance(found, list) else []
    return []
