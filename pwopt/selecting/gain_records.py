"""What the profiles of one model say of the same operators in another: gains in milliseconds."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx

from pwopt.running.session import NodeTime
from pwopt.running.timing import Evidence
from pwopt.selecting.autotuning import Estimate
from pwopt.selecting.groups import Group
from pwopt.selecting.profile_alignment import BLOCKED, assign_to_nodes, find_kernels

#: The largest plausible time in milliseconds, and number of runs.
MAX_MS, MAX_RUNS = 1e7, 1e6
#: A recorded gain is used if it is at most this share of the time of a model.
MAX_SHARE = 0.9


@dataclass(frozen=True)
class GainRecord:
    """By how many milliseconds a group of rewrites shortens a run, according to profiles.

    Attributes
    ----------
    key : str
        A digest of the pass, the replaced operators, and the operators around them (`describe_group`).
    place : str
        Provider, onnxruntime version, processor with its features, and threads. Times hold there only.
    own, own_deviation : float
        The gain of the group's own operators, and its standard deviation over the profiled runs.
    best, best_deviation : float
        The same with what the group's neighbours gained.
    runs : float
        The number of profiled runs.
    """

    key: str
    place: str
    own: float
    own_deviation: float
    best: float
    best_deviation: float
    runs: float

    @classmethod
    def from_estimate(cls, key: str, place: str, estimate: Estimate, whole: float) -> GainRecord:
        """Convert an estimate in a model that takes `whole` milliseconds."""
        return cls(key, place, *_find_gain(estimate.own, whole), *_find_gain(estimate.best, whole), estimate.own.pairs)

    def to_estimate(self, whole: float) -> Estimate | None:
        """Estimate the speed-up of a model that takes `whole` milliseconds; None if it is too fast for such a gain."""
        if max(self.own, self.best) > MAX_SHARE * whole:
            return None
        return Estimate(
            _find_evidence(self.own, self.own_deviation, self.runs, whole),
            _find_evidence(self.best, self.best_deviation, self.runs, whole),
        )

    @property
    def plausible(self) -> bool:
        """Whether profiles can produce these figures. A damaged file may contain any."""
        numbers = self.own, self.own_deviation, self.best, self.best_deviation
        if not all(isinstance(x, float | int) and math.isfinite(x) and abs(x) <= MAX_MS for x in (*numbers, self.runs)):
            return False
        return 2 <= self.runs <= MAX_RUNS and min(self.own_deviation, self.best_deviation) >= 0


def _find_gain(evidence: Evidence, whole: float) -> tuple[float, float]:
    """Convert a speed-up into a gain in milliseconds and its standard deviation."""
    mean, seen = evidence.total / evidence.pairs, max(2, evidence.count or int(evidence.pairs))
    variance = max(0.0, evidence.squares / evidence.pairs - mean**2) / (1 - 1 / seen)
    after = whole * math.exp(-mean)
    return whole - after, after * math.sqrt(variance)


def _find_evidence(gain: float, deviation: float, runs: float, whole: float) -> Evidence:
    after = whole - gain
    return Evidence.from_moments(runs, math.log(whole / after), (deviation / after) ** 2, max(1, int(runs) - 1))


def describe_group(
    proto: onnx.ModelProto,
    sizes: Mapping[str, Sequence[int]],
    group: Group,
    run: Sequence[NodeTime],
    mark: str,
) -> str | None:
    """Return a digest of everything that the gain of a group depends on in a model; None if something is unknown.

    Parameters
    ----------
    proto : onnx.ModelProto
        The model without the group.
    sizes : mapping of tensor name to sizes
    group : Group
    run : sequence of NodeTime
        A profiled run of a marked copy of the model. It shows which operators have the blocked layout.
    mark : str
        The pass, with the fingerprint of its code where that may change.
    """
    nodes = proto.graph.node
    constants = {t.name: list(t.dims) for t in proto.graph.initializer}
    placed = [i for i, _ in assign_to_nodes(proto, run)]
    blocked = {i: t.name.endswith(BLOCKED) for i, t in zip(placed, run, strict=True) if i is not None}
    kernels = find_kernels(proto, dict.fromkeys(blocked, 1.0))
    layout = [blocked.get(kernel) for kernel in kernels]
    makers = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    own = sorted({makers[name] for name in group.tensors if name in makers})
    if not own or not makers.keys() >= group.tensors:
        return None
    described: list[object] = [mark, group.signature]
    for i in own:
        names = [*filter(None, nodes[i].input), *filter(None, nodes[i].output)]
        if any(name not in constants and name not in sizes for name in names):
            return None
        shapes = [constants[name] if name in constants else list(sizes[name]) for name in names]
        attributes = sorted(_digest(a.SerializeToString(deterministic=True)) for a in nodes[i].attribute)
        described.append([nodes[i].domain, nodes[i].op_type, attributes, shapes, layout[i]])
    inside, read = set(own), {name for i in own for name in nodes[i].input}
    written = {name for i in own for name in nodes[i].output}
    for i, node in enumerate(nodes):
        if i not in inside and (read.intersection(node.output) or written.intersection(node.input)):
            described.append([node.domain, node.op_type, layout[i]])
    return _digest(json.dumps(described).encode())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
