"""What becomes of the metadata and documentation of nodes that a rewrite replaces.

A node that stands for others keeps the `metadata_props` and the `doc_string` of one of them as its own: of the one
with its operator and name, else with its operator, else of the first. The others are listed in one property more,
`pwopt.folded`, by the node that makes the result: a JSON list of their names, operators, properties and documentation.
What does nothing and goes leaves nothing behind that could carry its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence

import onnx

from pwopt.graph.ir import Node

#: The property that lists what else a node stands for.
FOLDED = "pwopt.folded"


def inherit(new: Sequence[Node], old: Sequence[Node]) -> None:
    """Let each of `new` stand for the one of `old` that is most like it, and the last for all of them."""
    for node in new:
        alike = sorted(old, key=lambda o: (o.op != node.op, o.name != node.name))
        credit(node, alike if node is new[-1] else alike[:1])


def credit(node: Node, sources: Iterable[Node]) -> None:
    """Let a node stand for others, besides what it stands for already."""
    node.replaced = (*node.replaced, *(s for s in sources if s is not node))


def origins(node: Node, message: Callable[[Node], onnx.NodeProto | None]) -> Iterator[onnx.NodeProto]:
    """The messages that a node stands for, its own first."""
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
    """Write into the message of a node what is to be kept of those that it stands for.

    `own` is the message that it came from itself, if it is no new one.
    """
    told = [s for s in stands_for if s.metadata_props or s.doc_string]
    main = own if own is not None else told[0] if told else None
    folded = [entry for s in told for entry in _listed(s)]
    folded += [
        _entry(s) for s in told if s is not main and (s.doc_string or any(p.key != FOLDED for p in s.metadata_props))
    ]
    if main is None:
        return
    proto.doc_string = main.doc_string
    del proto.metadata_props[:]
    proto.metadata_props.extend(p for p in main.metadata_props if p.key != FOLDED)
    if folded:
        proto.metadata_props.add(key=FOLDED, value=json.dumps(folded, ensure_ascii=False))


def _entry(proto: onnx.NodeProto) -> dict[str, object]:
    metadata = {p.key: p.value for p in proto.metadata_props if p.key != FOLDED}
    return {"name": proto.name, "op_type": proto.op_type, "metadata_props": metadata, "doc_string": proto.doc_string}


def _listed(proto: onnx.NodeProto) -> list[object]:
    """What an earlier optimisation listed."""
    for p in proto.metadata_props:
        if p.key == FOLDED:
            try:
                found = json.loads(p.value)
            except (ValueError, RecursionError):
                return []
            return found if isinstance(found, list) else []
    return []
