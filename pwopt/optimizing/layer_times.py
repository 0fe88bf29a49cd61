"""Compare the times of layers: operators of the original and the operators that replace them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import onnx

from pwopt.optimizing.preparation import Problem
from pwopt.optimizing.request import Request
from pwopt.reporting.report import LAYOUT_CHANGES, Layer, Report
from pwopt.rewriting.records import Rewrite
from pwopt.running import bench
from pwopt.running.session import NodeTime
from pwopt.selecting.profile_alignment import align, sum_by_node

#: An original that is returned and was not profiled runs this often under the profiler, in so many seconds at most.
BRIEF_RUNS, BRIEF = 3, 1.0


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
    for a, b in align(before, after, ((), rewrites), (old_times, new_times)):
        if not any(_is_operator(before, i) for i in a) and not any(_is_operator(after, j) for j in b):
            continue
        spent = sum(old_times.get(i, 0.0) for i in a), sum(new_times.get(j, 0.0) for j in b)
        found.append(Layer(_list_operators(before, a), _list_operators(after, b), *spent))
    if old_rest or new_rest:
        found.append(
            Layer((LAYOUT_CHANGES,) if old_rest else (), (LAYOUT_CHANGES,) if new_rest else (), old_rest, new_rest)
        )
    return tuple(sorted(found, key=lambda layer: layer.after_ms - layer.before_ms))


def add_operator_times(report: Report, problem: Problem, request: Request) -> Report:
    """Add the operator times of an original that is returned, if that takes `BRIEF` seconds at most."""
    environment, tried = problem.environment, report.candidate
    known = report.operators if tried is None else tried.operators
    if known is not None or environment is None or not request.measured:
        return report
    worker = environment.worker
    if worker is None or not worker.ready or worker.took[0] + BRIEF_RUNS * worker.took[1] > BRIEF:
        return report
    feeds = environment.samples[0].feeds
    nodes = bench.time_nodes([problem.original], environment.provider, environment.threads, feeds, BRIEF_RUNS)[0]
    times = bench.sum_by_operator(nodes)
    return replace(report, operators={"before": times, "after": times})


def _list_operators(proto: onnx.ModelProto, nodes: Sequence[int]) -> tuple[str, ...]:
    listed = [proto.graph.node[i] for i in nodes if _is_operator(proto, i)]
    return tuple(f"{n.op_type} {n.name or next(filter(None, n.output), '')}".strip() for n in listed)


def _is_operator(proto: onnx.ModelProto, i: int) -> bool:
    """Whether a node computes something, so that it is not a Constant."""
    return bool(proto.graph.node[i].op_type != "Constant")
