"""Compare the times of layers: operators of the original and the operators that replace them."""

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
    """Divide the operators of both models into layers, and return their times, sorted by gain.

    A layer is a class of `profile_alignment.align`, so every operator is in exactly one.
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
    """Whether a node computes something, so that it is not a Constant."""
    return bool(proto.graph.node[i].op_type != "Constant")
