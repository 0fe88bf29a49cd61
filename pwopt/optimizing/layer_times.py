"""Where the time goes, layer by layer: operators of the original beside what stands for them now."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx

from pwopt.reporting.report import LAYOUT_CHANGES, Layer
from pwopt.rewriting.records import Rewrite
from pwopt.running.session import NodeTime
from pwopt.selecting.profile_alignment import align, sum_by_node


def compare_layers(
    before: onnx.ModelProto,
    after: onnx.ModelProto,
    rewrites: Sequence[Rewrite],
    profiles: tuple[Iterable[NodeTime], Iterable[NodeTime]],
) -> tuple[Layer, ...]:
    """Operators that belong together, before and after, with their times; what gained most comes first.

    Every operator of either model is in one layer, with those that belong together (`attribution.together`).
    """
    (old_times, old_rest), (new_times, new_rest) = (
        sum_by_node(proto, profile) for proto, profile in zip((before, after), profiles, strict=True)
    )
    found = []
    for a, b in align(before, after, rewrites, (old_times, new_times)):
        if not any(_is_operator(before, i) for i in a) and not any(_is_operator(after, j) for j in b):
            continue
        spent = sum(old_times.get(i, 0.0) for i in a), sum(new_times.get(j, 0.0) for j in b)
        found.append(Layer(_list_operators(before, a), _list_operators(after, b), *spent))
    if old_rest or new_rest:
        found.append(
            Layer((LAYOUT_CHANGES,) if old_rest else (), (LAYOUT_CHANGES,) if new_rest else (), old_rest, new_rest)
        )
    return tuple(sorted(found, key=lambda layer: layer.after_ms - layer.before_ms))


def _list_operators(proto: onnx.ModelProto, nodes: Sequence[int]) -> tuple[str, ...]:
    listed = [proto.graph.node[i] for i in nodes if _is_operator(proto, i)]
    return tuple(f"{n.op_type} {n.name or next(filter(None, n.output), '')}".strip() for n in listed)


def _is_operator(proto: onnx.ModelProto, i: int) -> bool:
    """Whether a node is an operator, not a value."""
    return bool(proto.graph.node[i].op_type != "Constant")
