"""Rewrite one model repeatedly, each time with other sites allowed or denied."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx

from pwopt.graph.files import save_temporary
from pwopt.graph.memo import LATEST, digest
from pwopt.graph.model import Model
from pwopt.graph.reasons import Reason
from pwopt.graph.shapes import make_skeleton
from pwopt.graph.storage import count_bytes, find_free
from pwopt.rewriting.driver import Certifier, Pass
from pwopt.rewriting.records import Rewrite, Site, Skip
from pwopt.rewriting.wording import format_count
from pwopt.selecting.candidate_base import RewriteResult, Snapshot

#: The clause on a rewrite of pwopt that its certificate refuses.
CERTIFICATE_DEFECT = "a defect of pwopt, please report it with the model"
#: How often the model is rewritten again without what certificates or the limit of growth refused.
MAX_REFUSALS = 8


@dataclass(frozen=True)
class Compilation:
    """A model to rewrite as often as needed, and a folder for the results.

    Attributes
    ----------
    target : Model
        The model that passes rewrite, in the requested opset and with the requested fixed inputs.
    source : Model
        The original.
    passes : tuple of Pass
        Each run copies them.
    denied : collection of Site
    sizes : mapping of input name to sizes
    folder : Path
    provider_kind : {"cpu", "gpu", "other"}
    max_growth : float or None
        The fraction by which the model may grow; None for any.
    refused : mapping of Site to Skip
        Sites to leave out because a model with them failed, was wrong or was slower.
    certifier : callable or None
        Gives each rewrite of a result its certificate.
    snapshots : dict
        Models after all passes that need no measurement, by the sites denied to those; shared by all copies.
    notes : tuple of str
        Sentences on `refused`, for the report.
    """

    target: Model
    source: Model
    passes: tuple[Pass, ...]
    denied: Collection[Site]
    sizes: Mapping[str, tuple[int, ...]]
    folder: Path
    provider_kind: str = "cpu"
    max_growth: float | None = None
    refused: Mapping[Site, Skip] = field(default_factory=dict)
    certifier: Certifier | None = None
    snapshots: dict[frozenset[Site], Snapshot] = field(default_factory=dict, repr=False, compare=False)
    notes: tuple[str, ...] = ()

    def rewrite(
        self, allowed: frozenset[Site] | None, certifier: Certifier | None = None, refused: Iterable[Site] = ()
    ) -> RewriteResult:
        """Rewrite the model, with measured rewrites at the `allowed` sites; None lets shapes alone decide."""
        denied = (*self.denied, *self.refused, *refused)
        return self.snapshot(denied).branch(denied, certifier, eager=allowed is not None).finish(allowed)

    def rewrite_certified(self, allowed: frozenset[Site] | None) -> RewriteResult:
        """Rewrite the model, without the rewrites whose certificates fail or that let the model grow too much.

        Raises
        ------
        RuntimeError
            If rewrites are still refused after `MAX_REFUSALS` attempts.
        """
        builtin = {p.name for p in self.passes if p.builtin}
        refused, failed = dict(self.refused), dict[Site, Rewrite]()
        for _ in range(MAX_REFUSALS):
            done = self.rewrite(allowed, self.certifier, refused)
            wrong = [r for r in done.rewrites if r.certificate is not None and not r.certificate.passed]
            heavy = [] if wrong else self._find_heavy(done)
            if not wrong and not heavy:
                skips = (*(s for s in done.skips if s.site not in refused), *refused.values())
                return replace(done, skips=skips, failed=tuple(failed.values()))
            failed.update((r.site, r) for r in wrong)
            refused.update((r.site, Skip(_explain_failure(r, r.pass_name in builtin), r.site)) for r in wrong)
            refused.update((r.site, Skip(_explain_growth(r), r.site)) for r in heavy)
        raise RuntimeError(f"certificates refuse rewrites at {', '.join(map(str, refused))}")

    def _find_heavy(self, done: RewriteResult) -> list[Rewrite]:
        """Find the largest rewrites of a result that grew too much."""
        if self.max_growth is None:
            return []
        before = count_bytes(self.source.proto)
        excess = count_bytes(done.proto) - before - self.max_growth * before
        found = []
        for r in sorted(done.rewrites, key=lambda r: -r.growth):
            if excess <= 0 or r.growth <= 0:
                break
            found.append(r)
            excess -= r.growth
        return found

    def snapshot(self, denied: Collection[Site]) -> Snapshot:
        """The model after all passes that need no measurement. It depends on the sites denied to those only."""
        passes = self.candidates()
        measured = {p.name for p in passes if p.policy == "measured"}
        key = frozenset(site for site in denied if site.pass_name not in measured)
        if key not in self.snapshots:
            if len(self.snapshots) >= LATEST:
                self.snapshots.clear()
            self.snapshots[key] = Snapshot.from_model(self.target.copy(), passes, denied, self.sizes, self.certifier)
        return self.snapshots[key]

    def leave_out(self, rewrites: Iterable[Rewrite], reason: str) -> Compilation:
        """The same without the sites of some rewrites; the reason is a clause."""
        left_out = {r.site: Skip(Reason("left out ({}): {}", reason, r.reason), r.site) for r in rewrites}
        names = ", ".join(dict.fromkeys(s.pass_name for s in left_out.values()))
        note = f"Left out: {names} at {format_count(len(left_out), 'place')}, {reason}."
        return replace(self, refused={**self.refused, **left_out}, notes=(*self.notes, note))

    def candidates(self) -> list[Pass]:
        """The passes that were requested by name, or that may pay on this kind of provider."""
        return [p for p in self.passes if p.requested or self.provider_kind in p.pays_on]

    def unfit(self) -> list[str]:
        """Names of the passes that may pay on onnxruntime's CPU provider but not on this kind of provider."""
        fit = {p.name for p in self.candidates()}
        return [p.name for p in self.passes if p.name not in fit and "cpu" in p.pays_on]

    def digest(self) -> str:
        """Return a digest of the operators, attributes and sizes of the model, without its large weights."""
        return digest(make_skeleton(self.target.proto, self.sizes))

    def find_opportunities(self) -> tuple[list[Rewrite], list[Skip]]:
        """Find all rewrites that each measured pass could make alone, and its refusals."""
        found: list[Rewrite] = []
        refused: list[Skip] = []
        snapshot, branch = self.snapshot(tuple(self.denied)), None
        for p in snapshot.passes:
            if p.needs_measuring:
                branch = branch or snapshot.branch(self.denied, eager=True)
                outcome = branch.run_alone(p.name)
                found += [r for r in outcome.rewrites if r.pass_name == p.name]
                refused += [s for s in outcome.skips if s.pass_name == p.name]
                if outcome.rewrites:
                    branch = None
        return found, refused

    def write_file(self, proto: onnx.ModelProto) -> Path:
        """Write a candidate into the folder."""
        path = find_free(self.folder, "candidate")
        save_temporary(proto, path, self.source)
        return path


def _explain_failure(rewrite: Rewrite, builtin: bool) -> str:
    c = rewrite.certificate
    assert c is not None
    fault = CERTIFICATE_DEFECT if builtin else Reason("the pass {!r} is wrong here", rewrite.pass_name)
    return Reason(
        "refused by its certificate ({}: residual {:.2g}, bound {:.2g}): {}", c.reason, c.residual, c.bound, fault
    )


def _explain_growth(rewrite: Rewrite) -> str:
    return Reason(
        "{}, but its constants take {} more than --max-growth leaves",
        rewrite.reason,
        format_count(rewrite.growth, "byte"),
    )
