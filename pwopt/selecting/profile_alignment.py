"""Align the operators of two models, and attribute the times of a profile to them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import onnx

from pwopt.algebra.unions import Unions
from pwopt.graph.files import save_temporary
from pwopt.graph.model import Model
from pwopt.graph.operators import WEIGHTED_OPERATORS
from pwopt.rewriting.records import Rewrite
from pwopt.running.session import NodeTime

#: The name of a node in a profile. onnxruntime's names of fused operators contain it.
MARK = re.compile(r"@(\d+)@")
#: onnxruntime names an operator in its blocked layout after its output, with this suffix.
BLOCKED = "_nchwc"


def save_marked(proto: onnx.ModelProto, path: Path, source: Model) -> Path:
    """Write a copy of a model with numbered nodes into a temporary file, so that a profile identifies them.

    Parameters
    ----------
    proto : onnx.ModelProto
    path : Path
        The file of the copy.
    source : Model
        The model that `proto` was made from. The copy shares its external data.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for i, node in enumerate(copy.graph.node):
        node.name = f"@{i}@"
    save_temporary(copy, path, source)
    return path


def assign_to_nodes(proto: onnx.ModelProto, profile: Iterable[NodeTime]) -> list[tuple[int | None, float]]:
    """Return (node, milliseconds) in the order of execution, from the profile of a marked copy.

    The node is None for an operator that onnxruntime added.
    """
    made = {name: i for i, node in enumerate(proto.graph.node) for name in node.output if name}
    found = []
    for timed in profile:
        mark = MARK.search(timed.name)
        found.append((int(mark[1]) if mark else made.get(timed.name.removesuffix(BLOCKED)), timed.seconds * 1e3))
    return found


def sum_by_node(proto: onnx.ModelProto, profile: Iterable[NodeTime]) -> tuple[dict[int, float], float]:
    """Sum the milliseconds by node, from the profile of a marked copy, and those of changes of layout."""
    times: defaultdict[int | None, float] = defaultdict(float)
    for i, spent in assign_to_nodes(proto, profile):
        times[i] += spent
    rest = times.pop(None, 0.0)
    return {i: t for i, t in times.items() if i is not None}, rest


def find_kernels(proto: onnx.ModelProto, times: Mapping[int, float]) -> list[int]:
    """Find for each node the node under whose name it ran: itself if it was timed, else the one it was fused into.

    A node without a time is fused into its reader, as a convolution into a normalisation. If it has several readers, or
    the reader starts a kernel of its own, it is fused into the producer of its input, as an activation into a
    convolution.
    """
    nodes = proto.graph.node
    readers: dict[str, list[int]] = {}
    maker: dict[str, int] = {}
    for i, node in enumerate(nodes):
        for name in dict.fromkeys(filter(None, node.input)):
            readers.setdefault(name, []).append(i)
        maker.update(dict.fromkeys(node.output, i))
    owner = list(range(len(nodes)))
    for i in range(len(nodes) - 1, -1, -1):
        if i not in times:
            after = [j for name in nodes[i].output for j in readers.get(name, ())]
            ends = {owner[j] for j in after if nodes[j].op_type not in WEIGHTED_OPERATORS}
            if len(ends) == 1 and all(nodes[j].op_type not in WEIGHTED_OPERATORS for j in after):
                owner[i] = ends.pop()
    for i, node in enumerate(nodes):
        if owner[i] == i and i not in times:
            before = {owner[maker[name]] for name in node.input if name in maker} & times.keys()
            owner[i] = max(before, default=i)
    return [owner[j] for j in owner]


def align(
    before: onnx.ModelProto,
    after: onnx.ModelProto,
    rewrites: tuple[Sequence[Rewrite], Sequence[Rewrite]],
    times: tuple[Mapping[int, float], Mapping[int, float]],
) -> list[tuple[list[int], list[int]]]:
    """Divide the operators of both models into classes, and return the numbers of the nodes of each class.

    Two operators are in one class if onnxruntime fused them, if one replaces the other, or if both replace one operator
    of the model that they were made from (`Rewrite.became`). These relations are transitive.
    """
    joined, first = Unions[int](), len(before.graph.node)  # the result's operators are numbered after the original's
    for start, proto, spent in ((0, before, times[0]), (first, after, times[1])):
        for i, j in enumerate(find_kernels(proto, spent)):
            joined.join(start + i, start + j)
    _join_replacements(before, after, rewrites, joined)
    groups: dict[int, tuple[list[int], list[int]]] = {}
    for i in range(first + len(after.graph.node)):
        mine = groups.setdefault(joined.root(i), ([], []))
        mine[i >= first].append(i if i < first else i - first)
    return list(groups.values())


def _join_replacements(
    before: onnx.ModelProto,
    after: onnx.ModelProto,
    rewrites: tuple[Sequence[Rewrite], Sequence[Rewrite]],
    joined: Unions[int],
) -> None:
    """Join each operator with its replacement, and each new operator that replaces none with its first reader."""
    first = len(before.graph.node)
    origins, became = find_origins(rewrites[0]), _find_replacements(rewrites[1])
    made = {name: j for j, node in enumerate(after.graph.node) for name in node.output if name}
    reader = {name: j for j, node in reversed(list(enumerate(after.graph.node))) for name in node.input if name}
    linked = set()
    for i, node in enumerate(before.graph.node):
        for name in (old for new in filter(None, node.output) for old in (new, *origins.get(new, ()))):
            j = made.get(_follow(name, became))
            if j is not None:
                joined.join(i, first + j)
                linked.add(j)
    for j, node in enumerate(after.graph.node):
        read = [reader[name] for name in node.output if name in reader]
        if j not in linked and read:
            joined.join(first + j, first + min(read))


def find_origins(rewrites: Sequence[Rewrite]) -> dict[str, list[str]]:
    """Map each tensor of a rewritten model to the tensors that it replaced."""
    became = _find_replacements(rewrites)
    found: defaultdict[str, list[str]] = defaultdict(list)
    for old in became:
        found[_follow(old, became)].append(old)
    return dict(found)


def _find_replacements(rewrites: Sequence[Rewrite]) -> dict[str, str]:
    """Map each tensor to the one that replaced it in the first rewrite that removed it."""
    found: dict[str, str] = {}
    for r in rewrites:
        for old, new in r.became:
            if old != new:
                found.setdefault(old, new)
    return found


def _follow(name: str, became: Mapping[str, str]) -> str:
    """Follow the replacements of a tensor to the last one."""
    seen = {name}
    while name in became and became[name] not in seen:
        name = became[name]
        seen.add(name)
    return name
