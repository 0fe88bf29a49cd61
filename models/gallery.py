"""Check the eighteen systems: what was rewritten, what was not, and what holds before and after."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import onnx

import pwopt
from models import (
    attention,
    beamformer,
    decoder,
    distillation_projector,
    fcn,
    fpn,
    graph_network,
    hyperspectral,
    inception,
    linear_sequence,
    network_in_network,
    physics,
    protein_distance_map,
    resnet_projection,
    rgbd_fusion,
    squeeze_excitation,
    style_transfer,
    text_detector,
)
from models.system import UNMEASURED, Figure, Refusal, System
from pwopt.graph.files import as_file
from pwopt.reporting.report import Latency, Report
from pwopt.running.session import Session

#: The simplest come first.
SYSTEMS: tuple[System, ...] = (
    linear_sequence.SYSTEM,
    network_in_network.SYSTEM,
    graph_network.SYSTEM,
    inception.SYSTEM,
    hyperspectral.SYSTEM,
    distillation_projector.SYSTEM,
    fcn.SYSTEM,
    protein_distance_map.SYSTEM,
    resnet_projection.SYSTEM,
    fpn.SYSTEM,
    rgbd_fusion.SYSTEM,
    squeeze_excitation.SYSTEM,
    attention.SYSTEM,
    style_transfer.SYSTEM,
    beamformer.SYSTEM,
    physics.SYSTEM,
    decoder.SYSTEM,
    text_detector.SYSTEM,
)


@dataclass(frozen=True)
class Row:
    """One system, checked.

    Attributes
    ----------
    system : System
    report : Report
        Of the run without timing, which is the same on every machine.
    figures : tuple of Figure
        The properties before and after.
    faults : tuple of str
        Deviations from the system's declaration; empty if there are none.
    raced : Report or None
        Of a measured run with default passes on this machine.
    """

    system: System
    report: Report
    figures: tuple[Figure, ...]
    faults: tuple[str, ...]
    raced: Report | None = None

    @property
    def rewrites(self) -> Counter[str]:
        """How often each pass acted."""
        return Counter(r.pass_name for r in self.report.rewrites)

    @property
    def latency(self) -> Latency | None:
        return None if self.raced is None else self.raced.latency


def check(system: System, seconds: float = 0.0) -> Row:
    """Build, optimise and compare a system, and race it against the original for `seconds` unless that is 0."""
    faults = [] if reproduced(system) else [f"{system.path.name} is not what its builder writes"]
    result = system.optimise()
    report = result.report
    if report.equivalence is None or not report.equivalence.passed:
        faults.append("the result is not equivalent")
    if report.after.macs > report.before.macs:
        faults.append("it takes more multiply-adds")
    acted = {r.pass_name for r in report.rewrites}
    if acted != set(system.rewrites):
        faults.append(f"the passes that acted were {sorted(acted)}")
    faults += [
        f"{r.node!r} did not stay" for r in system.refusals if not stays(r, onnx.load(system.path), result.model)
    ]
    said = [r.said for r in system.refusals if r.said]
    reasons = _reasons(system, report) if said else []
    faults += [f"no refusal says {words!r}" for words in said if not any(words in reason for reason in reasons)]
    with as_file(result.model) as after:
        sessions = Session(system.path), Session(after)
    figures = tuple(p.compare(*sessions) for p in system.properties)
    faults += [f"it does not hold that {f.claim}" for f in figures if not f.holds]
    raced = None
    if seconds:
        raced = pwopt.optimize(
            system.path,
            shapes=system.shapes,
            measuring=pwopt.Measuring(race_seconds=seconds, budget=4 * seconds),
            cache=False,
        ).report
    return Row(system, report, figures, tuple(faults), raced)


def reproduced(system: System) -> bool:
    """Whether the committed file is, byte for byte, what its builder writes."""
    return system.path.exists() and system.path.read_bytes() == serialised(system)


def serialised(system: System) -> bytes:
    """The content of the model's file."""
    data: bytes = system.build().SerializeToString(deterministic=True)
    return data


def stays(refusal: Refusal, before: onnx.ModelProto, after: onnx.ModelProto) -> bool:
    """Whether the node that must stay exists before and after, with the same operator."""
    found = [[n.op_type for n in m.graph.node if n.name == refusal.node] for m in (before, after)]
    return len(found[0]) == 1 and found[0] == found[1]


def _reasons(system: System, report: Report) -> list[str]:
    """The reasons of all refusals, in this run and in a run of only the passes that need no timing."""
    plain = pwopt.optimize(system.path, cost="analytic", shapes=system.shapes, verify=False, passes=UNMEASURED)
    return [s.reason for s in (*report.skips, *plain.report.skips)]
