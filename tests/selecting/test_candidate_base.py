"""What is settled is settled once: every candidate begins at one snapshot, and is what a run of its own would make."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import onnx
import pytest
from helpers import MODELS, normal, parse, plant, planted_race
from strategies import random_sample

import pwopt
from pwopt.evidence.certify import certify
from pwopt.graph.files import from_proto, load
from pwopt.inputs.input_specs import input_specs
from pwopt.rewriting.records import Rewrite, Site, Skip
from pwopt.selecting import compilation
from pwopt.selecting.candidate_base import Snapshot, run_passes
from pwopt.selecting.compilation import Compilation
from pwopt.selecting.pass_list import resolve_passes

F = np.float32
#: A chain that folds, siblings that may be merged, and an activation by name.
BODY = "(float[1,6,5,7] x) => (float[N] a, float[N] b) { t = Conv(x, s) u = Conv(t, v) r = Relu(u) a = Conv(r, w) b = Conv(r, z) }"
WEIGHTS = {k: normal(6, 6, 1, 1, seed=i).astype(F) for i, k in enumerate("svwz")}


def sizes(proto: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    return {s.name: tuple(d if isinstance(d, int) else 4 for d in s.shape or ()) for s in input_specs(proto)}


Records = tuple[tuple[Rewrite, ...], tuple[Skip, ...]]


def apart(proto: onnx.ModelProto, folder: Path | None, allowed: frozenset[Site] | None) -> tuple[bytes, Records]:
    """A run from the original to the end, on one graph."""
    model, passes = from_proto(proto, folder), [p for p in resolve_passes() if "cpu" in p.pays_on]
    for p in passes:
        if p.policy == "measured" and allowed is not None:
            p.scope = "exact"
    done = run_passes(model, passes, (), sizes(proto), allowed)
    return done.proto.SerializeToString(deterministic=True), (done.rewrites, done.skips)


def every(proto: onnx.ModelProto, work: Compilation) -> list[tuple[onnx.ModelProto, frozenset[Site]]]:
    """A model with no measured rewrite, with each kind by itself, with all, and with none again."""
    sites: dict[str, list[Site]] = {}
    for r in work.find_opportunities()[0]:
        sites.setdefault(r.pass_name, []).append(r.site)
    asked = [
        frozenset[Site](),
        *map(frozenset, sites.values()),
        frozenset(s for found in sites.values() for s in found),
    ]
    return [(work.rewrite(allowed).proto, allowed) for allowed in (*asked, frozenset[Site]())]


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.onnx")), ids=lambda p: p.stem)
def test_candidates_of_one_snapshot_are_what_runs_of_their_own_make(path: Path) -> None:
    source = load(path)
    work = Compilation(source, source, resolve_passes(), (), sizes(source.proto), Path())
    for proto, allowed in every(source.proto, work):
        assert proto.SerializeToString(deterministic=True) == apart(source.proto, source.folder, allowed)[0]


def test_so_are_those_of_random_models() -> None:
    for number in range(60):
        source = from_proto(random_sample(Random(number)).model)
        work = Compilation(source, source, resolve_passes(), (), sizes(source.proto), Path())
        for allowed in (frozenset[Site](), frozenset(r.site for r in work.find_opportunities()[0])):
            done = work.rewrite(allowed)
            wanted, records = apart(source.proto, None, allowed)
            assert done.proto.SerializeToString(deterministic=True) == wanted
            assert (done.rewrites, done.skips) == records


def test_a_branch_leaves_the_snapshot_alone() -> None:
    proto = parse(BODY, **WEIGHTS)
    snapshot = Snapshot.from_model(from_proto(proto), resolve_passes(), (), {})
    before = snapshot.model.to_proto().SerializeToString(deterministic=True)
    first = snapshot.branch(eager=True)
    first.finish()
    assert first.model.to_proto().SerializeToString(deterministic=True) != before
    assert snapshot.model.to_proto().SerializeToString(deterministic=True) == before
    assert not any(p.eager for p in snapshot.passes)


def test_metadata_and_bodies_survive_in_a_branch() -> None:
    """Nodes keep the messages that they came from, whatever was copied in between."""
    body = (
        "(float[1,6,5,7] x, bool c) => (float[N] y) { t = Conv(x, s) u = Conv(t, v) "
        "y = If(c) <then_branch = g1 () => (float[N] z) { z = Relu(u) }, else_branch = g2 () => (float[N] z) { z = Neg(u) }> }"
    )
    proto = parse(body, s=WEIGHTS["s"], v=WEIGHTS["v"])
    for node in proto.graph.node:
        node.doc_string = f"was {node.op_type}"
    work = Compilation(from_proto(proto), from_proto(proto), resolve_passes(), (), sizes(proto), Path())
    made = work.rewrite(frozenset()).proto
    conv, branch = made.graph.node
    assert conv.doc_string == "was Conv"
    assert branch == proto.graph.node[-1]


def test_one_optimisation_takes_one_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Races are planted: a real one under load may find no speed-up, and then other passes are tried as well."""
    pytest.importorskip("onnxruntime")
    plant(monkeypatch, lambda *_, **__: planted_race(np.full(40, 2.0), np.full(40, 1.0)))
    settled: list[object] = []
    real = Snapshot.from_model.__func__  # type: ignore[attr-defined]

    def counted(cls: type[Snapshot], *arguments: object, **options: object) -> Snapshot:
        settled.append(arguments)
        return real(cls, *arguments, **options)

    monkeypatch.setattr(Snapshot, "from_model", classmethod(counted))
    monkeypatch.setattr(compilation, "LATEST", 4)
    pwopt.optimize(parse(BODY, **WEIGHTS), measuring=pwopt.Measuring(budget=600.0), cache=False, threads=1)
    assert len(settled) == 1


def test_what_is_denied_to_a_measured_pass_settles_nothing_anew() -> None:
    source = from_proto(parse(BODY, **WEIGHTS))
    work = Compilation(source, source, resolve_passes(), (), {}, Path(), certifier=certify)
    (merge,) = (r for r in work.find_opportunities()[0] if r.pass_name == "merge-siblings")
    without = work.leave_out([merge], "it is slow")
    (fold,) = (r for r in work.rewrite(frozenset()).rewrites if r.pass_name == "fold-chains")
    assert without.rewrite(frozenset({merge.site})).rewrites == work.rewrite(frozenset()).rewrites
    assert len(work.snapshots) == 1
    assert ops_of(without.leave_out([fold], "it is wrong").rewrite(frozenset()).proto) == 4
    assert len(work.snapshots) == 2
    assert fold.certificate is not None
    assert fold.certificate.passed


def ops_of(proto: onnx.ModelProto) -> int:
    return sum(n.op_type == "Conv" for n in proto.graph.node)


def test_a_pass_that_keeps_lists_is_copied_with_them() -> None:
    """What a pass notes while one candidate is made is not known where the next begins."""
    p = resolve_passes(["factor-ranks"])[0]
    p.seen = [1]  # type: ignore[attr-defined]
    twin = p.branch()
    twin.seen.append(2)  # type: ignore[attr-defined]
    assert p.seen == [1]  # type: ignore[attr-defined]
    assert resolve_passes()[0] is not p
