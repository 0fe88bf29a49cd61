"""Which operators of two models belong together, and what each took under the profiler."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import onnx

from pwopt.algebra.unions import Unions
from pwopt.graph.files import save
from pwopt.graph.operators import WEIGHTED_OPERATORS
from pwopt.graph.storage import find_locations
from pwopt.rewriting.records import Rewrite
from pwopt.running.session import NodeTime

#: What a node is called while it is timed, so that onnxruntime's names of what it fuses tell where it came from.
MARK = re.compile(r"@(\d+)@")
#: Operators that nothing before them is fused into.
#: What onnxruntime calls an operator in its blocked layout: the tensor that it makes, and this.
BLOCKED = "_nchwc"


def save_marked(proto: onnx.ModelProto, path: Path) -> Path | None:
    """A copy of a model whose nodes can be told apart in a profile; None for one with external data.

    Parameters
    ----------
    proto : onnx.ModelProto
    path : Path
        Where the copy goes.
    """
    if find_locations(proto):
        return None
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for i, node in enumerate(copy.graph.node):
        node.name = f"@{i}@"
    path.parent.mkdir(exist_ok=True)
    save(copy, path)
    return path


def assign_to_nodes(proto: onnx.ModelProto, profile: Iterable[NodeTime]) -> list[tuple[int | None, float]]:
    """Node and milliseconds, in the order in which operators of a marked copy ran; None for what belongs to none."""
    made = {name: i for i, node in enumerate(proto.graph.node) for name in node.output if name}
    found = []
    for timed in profile:
        mark = MARK.search(timed.name)
        found.append((int(mark[1]) if mark else made.get(timed.name.removesuffix(BLOCKED)), timed.seconds * 1e3))
    return found


def sum_by_node(proto: onnx.ModelProto, profile: Iterable[NodeTime]) -> tuple[dict[int, float], float]:
    """Milliseconds by node, from the profile of a marked copy, and of what belongs to none: changes of layout."""
    times: defaultdict[int | None, float] = defaultdict(float)
    for i, spent in assign_to_nodes(proto, profile):
        times[i] += spent
    rest = times.pop(None, 0.0)
    return {i: t for i, t in times.items() if i is not None}, rest


def find_kernels(proto: onnx.ModelProto, times: Mapping[int, float]) -> list[int]:
    """For each node the one as which it ran: itself if it was timed, or what onnxruntime fused it into.

    That is what reads it, such as the normalisation that a convolution folds into; where that begins a kernel of its
    own, or there are several, it is what makes its input, such as the convolution that an activation ends.
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
    rewrites: Sequence[Rewrite],
    times: tuple[Mapping[int, float], Mapping[int, float]],
) -> list[tuple[list[int], list[int]]]:
    """Numbers of operators of both models that belong together: every one of either model once.

    Operators belong together if onnxruntime ran them as one (those that have no time of their own), or if one stands
    for the other (`Rewrite.became`), directly or through others.
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
    before: onnx.ModelProto, after: onnx.ModelProto, rewrites: Sequence[Rewrite], joined: Unions[int]
) -> None:
    """Join operators of the original with those that stand for them, and new ones that stand for none with a reader."""
    first = len(before.graph.node)
    became = _find_replacements(rewrites)
    made = {name: j for j, node in enumerate(after.graph.node) for name in node.output if name}
    reader = {name: j for j, node in reversed(list(enumerate(after.graph.node))) for name in node.input if name}
    linked = set()
    for i, node in enumerate(before.graph.node):
        for name in filter(None, node.output):
            j = made.get(_follow(name, became))
            if j is not None:
                joined.join(i, first + j)
                linked.add(j)
    for j, node in enumerate(after.graph.node):
        read = [reader[name] for name in node.output if name in reader]
        if j not in linked and read:
            joined.join(first + j, first + min(read))


def _find_replacements(rewrites: Sequence[Rewrite]) -> dict[str, str]:
    """Tensor → the one that stood for it after the first rewrite that took it away."""
    found: dict[str, str] = {}
    for r in rewrites:
        for old, new in r.became:
            if old != new:
                found.setdefault(old, new)
    return found


def _follow(name: str, became: Mapping[str, str]) -> str:
    """What stands for a tensor in the end."""
    seen = {name}
    while name in became and became[name] not in seen:
        name = became[name]
        seen.add(name)
    return name
