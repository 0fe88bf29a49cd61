"""A model after all passes that need no measurement, as the starting point of every candidate. Runs no model."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx

from pwopt.graph.model import Model
from pwopt.graph.shapes import read_dims
from pwopt.graph.view import View
from pwopt.maps.cost import Cost, measure
from pwopt.rewriting.driver import Certifier, Pass, Rewriter
from pwopt.rewriting.pipeline import Fixpoint, Pipeline
from pwopt.rewriting.records import Outcome, Rewrite, Site, Skip
from pwopt.selecting.shape_folding import SHAPE_PASSES, fold_shapes, has_unknowns, infer_sizes


@dataclass(frozen=True)
class RewriteResult:
    """A rewritten model, and what was done to it.

    Attributes
    ----------
    model : Model
    rewrites : tuple of Rewrite
    skips : tuple of Skip
    before : Cost
        Of the model before the rewrites.
    sizes : mapping of str to sizes
        Sizes of the tensors before the rewrites.
    inputs : mapping of input name to sizes
    failed : tuple of Rewrite
        Rewrites that were left out because their certificates failed.
    """

    model: Model
    rewrites: tuple[Rewrite, ...]
    skips: tuple[Skip, ...]
    before: Cost
    sizes: Mapping[str, Sequence[int]]
    inputs: Mapping[str, Sequence[int]]
    failed: tuple[Rewrite, ...] = ()

    @functools.cached_property
    def proto(self) -> onnx.ModelProto:
        return self.model.to_proto()

    @functools.cached_property
    def after(self) -> Cost:
        """The cost of the rewritten model. Candidates need none, and sizes of new tensors take a while to infer."""
        after = measure(View(self.model.graph, self.sizes))
        if after.unknown > self.before.unknown:  # the passes created tensors
            after = measure(View(self.model.graph, infer_sizes(self.proto, self.inputs)))
        return after


@dataclass(frozen=True)
class Snapshot:
    """A model in which all passes have finished except the measured ones.

    Attributes
    ----------
    model : Model
    passes : sequence of Pass
    fixpoint : Fixpoint
        The state of the pipeline, on the model's graph.
    done : tuple of Rewrite
        The rewrites that folded its shapes first.
    sizes : dict
        Representative sizes of all tensors.
    inputs : mapping of input name to sizes
    before : Cost
        Of the original model.
    """

    model: Model
    passes: Sequence[Pass]
    fixpoint: Fixpoint
    done: tuple[Rewrite, ...]
    sizes: Mapping[str, Sequence[int]]
    inputs: Mapping[str, Sequence[int]]
    before: Cost

    @classmethod
    def from_model(
        cls,
        model: Model,
        passes: Sequence[Pass],
        deny: Collection[Site],
        inputs: Mapping[str, Sequence[int]],
        certifier: Certifier | None = None,
    ) -> Snapshot:
        """Run all passes that need no measurement over a model, in place."""
        passes = [p.branch() for p in passes]
        folding = [kind for kind in SHAPE_PASSES if any(type(p) is kind for p in passes)]
        declared = _declares(model.proto, inputs)
        if declared and folding == list(SHAPE_PASSES) and not deny:  # folding the model also finds its sizes
            original, sizes = model.copy() if has_unknowns(model) else model, dict[str, tuple[int, ...]]()
            done = fold_shapes(model, deny, certifier, folding, sizes)
            before = measure(View(original.graph, sizes))
        else:
            sizes = infer_sizes(model.proto, inputs)
            before = measure(View(model.graph, sizes))
            done = fold_shapes(model, deny, certifier, folding)
        rw = Rewriter(model.graph, deny, sizes, model.names(), certifier)
        return cls(model, passes, Pipeline(passes).run_to_fixpoint(rw), done, sizes, inputs, before)

    def branch(self, deny: Iterable[Site] = (), certifier: Certifier | None = None, *, eager: bool = False) -> Snapshot:
        """Copy the snapshot; `eager` lets measured passes act wherever they are exact."""
        model, passes = self.model.copy(), [p.branch() for p in self.passes]
        for p in passes:
            if eager and p.policy == "measured" and not p.eager:
                p.scope = "exact"
        return replace(self, model=model, passes=passes, fixpoint=self.fixpoint.branch(model.graph, deny, certifier))

    def finish(self, allowed: Collection[Site] | None = None) -> RewriteResult:
        """Run the measured passes at the `allowed` sites, in place; None allows every site."""
        outcome = Pipeline(self.passes).finish(self.fixpoint, allowed)
        rewrites = (*self.done, *outcome.rewrites)
        return RewriteResult(self.model, rewrites, outcome.skips, self.before, self.sizes, self.inputs)

    def run_alone(self, name: str) -> Outcome:
        """Run one measured pass alone, in place."""
        return Pipeline(self.passes).try_pass(self.fixpoint, name)


def _declares(proto: onnx.ModelProto, inputs: Mapping[str, Sequence[int]]) -> bool:
    """Whether a model declares these sizes of its inputs."""
    return all(
        read_dims(value.type) == tuple(inputs[value.name])
        and not any(d.denotation for d in value.type.tensor_type.shape.dim)
        for value in proto.graph.input
        if value.name in inputs
    )


def run_passes(
    model: Model,
    passes: Sequence[Pass],
    deny: Collection[Site],
    sizes: Mapping[str, Sequence[int]],
    allowed: Collection[Site] | None = None,
    certifier: Certifier | None = None,
) -> RewriteResult:
    """Run passes over a model, in place.

    Parameters
    ----------
    model : Model
    passes : sequence of Pass
    deny : collection of Site
        Places that must not be rewritten.
    sizes : mapping of input name to sizes
    allowed : collection of Site, optional
        The places where measured passes may act; by default all.
    certifier : callable, optional
        Gives each rewrite its certificate.
    """
    return Snapshot.from_model(model, passes, deny, sizes, certifier).finish(allowed)
