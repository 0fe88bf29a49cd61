"""From a model to a rewritten one: sizes, passes, opset conversion. Runs nothing."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx

from pwopt.errors import UsageError
from pwopt.graph import calls, values
from pwopt.graph.calls import branch_taken, with_branches
from pwopt.graph.files import annotate, from_proto
from pwopt.graph.functions import expanded, functions
from pwopt.graph.memo import digest, remembered
from pwopt.graph.model import Model
from pwopt.graph.shapes import Shape, infer, known, skeleton
from pwopt.graph.view import View
from pwopt.maps.cost import Cost, measure
from pwopt.passes import PASSES, CleanUp, SettleShapes
from pwopt.rewriting.driver import Certifier, Pass, Rewriter, describe
from pwopt.rewriting.pipeline import Fixpoint, Pipeline
from pwopt.rewriting.records import Outcome, Rewrite, Site
from pwopt.selecting import plugins

#: A pass as it is asked for: its name, its class, or made already.
Wanted = str | type[Pass] | Pass

#: What lets constants settle shapes, and shapes constants.
SETTLING: tuple[type[Pass], ...] = (CleanUp, SettleShapes)


def select_passes(wanted: Sequence[Wanted] | None, beside: Sequence[Wanted] = ()) -> list[Pass]:
    """Passes made anew, in the order given; by default pwopt's own, those of installed packages, and `beside`.

    Measured ones act wherever they are exact if they are asked for by name, and where a race or a shape says so
    otherwise.

    Raises
    ------
    UsageError
        If a name is unknown, two passes share one, or a class breaks the contract.
    """
    available: dict[str, type[Pass] | Pass] = {}
    for p in (*PASSES, *plugins.installed(), *plugins.resolved(beside, None)):
        if available.setdefault(_checked(p).name, p) is not p:
            raise UsageError(f"two passes are called {p.name!r}; leave one out")
    chosen: dict[str, tuple[Wanted, Pass]] = {}
    for want in available.values() if wanted is None else wanted:
        if isinstance(want, str) and want not in available:
            raise UsageError(f"there is no pass {want!r}; there are {', '.join(available)}")
        kind = available[want] if isinstance(want, str) else _checked(want)
        made = plugins.construct(kind) if isinstance(kind, type) else copy.copy(kind)
        if made.eager or isinstance(want, str):
            made.scope = "requested"
        if chosen.setdefault(made.name, (want, made))[0] != want:
            raise UsageError(f"two passes are called {made.name!r}; leave one out")
    return [made for _, made in chosen.values()]


def _checked(p: type[Pass] | Pass) -> type[Pass] | Pass:
    kind = p if isinstance(p, type) else type(p)
    plugins.checked(kind, f"{kind.__module__}.{kind.__qualname__}")
    return p


def settle(
    model: Model,
    deny: Iterable[Site] = (),
    certifier: Certifier | None = None,
    passes: Sequence[type[Pass]] = SETTLING,
    sizes: dict[str, tuple[int, ...]] | None = None,
) -> tuple[Rewrite, ...]:
    """While shapes are open, clean up and infer in turn until neither has news: constants may settle more shapes.

    An If whose condition is settled becomes the body that it runs. `sizes` takes every shape that is known on the way.
    """
    if sizes is not None:
        sizes.update(_numbers(infer(model.proto)))
    rewrites: list[Rewrite] = []
    pipeline = Pipeline([p() for p in passes])
    while _open(model):
        taken = _take_branches(model, frozenset(deny)) if CleanUp in passes else []
        done = pipeline.run(model.graph, denied=deny, reserved=model.names(), certifier=certifier).rewrites
        if not done and not taken:
            break
        rewrites += [*taken, *done]
        types = infer(model.to_proto())
        annotate(model, types)
        if sizes is not None:
            sizes.update(_numbers(types))
    return tuple(rewrites)


def _open(model: Model) -> bool:
    """Whether there are sizes that are not known, or an If whose condition may turn out to be constant."""
    nodes = model.graph.nodes
    return any(n.op == "If" for n in nodes) or any(known(t.shape) is None for n in nodes for t in n.outputs if t.name)


def _take_branches(model: Model, denied: Collection[Site]) -> list[Rewrite]:
    """Put the body in the place of every If whose condition is a constant."""
    view = View(model.graph)
    taken: dict[str, bool] = {}
    rewrites = []
    for node in model.graph.nodes:
        condition = values.whole(values.entries(view, node.inputs[0])) if view.op(node) == "If" else None
        message = model.message(node)
        if (
            condition is None
            or len(condition) != 1
            or message is None
            or Site(CleanUp.name, node.outputs[0].name) in denied
        ):
            continue
        body = branch_taken(message, bool(condition[0]))
        if body is None:
            continue
        taken[node.outputs[0].name] = bool(condition[0])
        reason = f"its condition is always {'true' if condition[0] else 'false'}"
        added = tuple(f"{n.op_type} {n.name}".strip() for n in body.node)
        site = Site(CleanUp.name, node.outputs[0].name)
        rewrites.append(Rewrite(reason, (describe(node),), added, site=site))
    if taken:
        model.become(from_proto(with_branches(model.to_proto(), taken), model.folder))
    return rewrites


def without_calls(
    model: Model, passes: Sequence[Pass], deny: Iterable[Site], sizes: Mapping[str, Sequence[int]]
) -> Model:
    """The model with those functions inlined whose operators a rewrite changes then, and those that call them.

    Found out by doing it, but for measured passes. Functions that would become too many operators all stay.
    """
    listed = functions(model.proto)
    if not listed or expanded(model.proto) is None:
        return model
    try:
        whole = calls.inlined(model.proto, listed.keys(), tagged=True)
    except Exception:  # the inliner has several ways of refusing a model; the runtime may take it still
        return model
    candidate = from_proto(whole, model.folder)
    _, outcome, _ = run_pipeline(candidate, passes, tuple(deny), sizes, frozenset())
    replaced = frozenset(old for r in outcome.rewrites for old, _ in r.became)
    chosen = calls.touched(model.proto, whole, candidate.to_proto(), replaced)
    return from_proto(calls.inlined(model.proto, chosen), model.folder) if chosen else model


def concrete_sizes(proto: onnx.ModelProto, sizes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Shapes in numbers of every tensor for inputs of the given sizes, as far as they follow."""
    return dict(_concrete(skeleton(proto, sizes)))


@remembered
def _concrete(light: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    types = infer(light)
    found = _numbers(types)
    if all(name in found for node in light.graph.node for name in node.output if name):
        return found
    model = from_proto(light)
    pipeline = Pipeline([p() for p in SETTLING])
    while pipeline.run(model.graph).rewrites:
        types = infer(model.to_proto())
        annotate(model, types)
        found.update(_numbers(types))
    return found


def _numbers(types: Mapping[str, tuple[int, Shape | None]]) -> dict[str, tuple[int, ...]]:
    return {name: numbers for name, (_, shape) in types.items() if (numbers := known(shape)) is not None}


@dataclass(frozen=True)
class Snapshot:
    """A model that all passes but the measured ones are done with: whatever those do begins here.

    Attributes
    ----------
    model : Model
    passes : sequence of Pass
    fixpoint : Fixpoint
        On the model's graph.
    done : tuple of Rewrite
        What settled its shapes, before.
    sizes : dict
        Representative sizes of all tensors.
    inputs : mapping of input name to sizes
    before : Cost
        Of the model as it was.
    """

    model: Model
    passes: Sequence[Pass]
    fixpoint: Fixpoint
    done: tuple[Rewrite, ...]
    sizes: Mapping[str, Sequence[int]]
    inputs: Mapping[str, Sequence[int]]
    before: Cost

    @classmethod
    def of(
        cls,
        model: Model,
        passes: Sequence[Pass],
        deny: Collection[Site],
        inputs: Mapping[str, Sequence[int]],
        certifier: Certifier | None = None,
    ) -> Snapshot:
        """Settle a model, in place."""
        settling = [kind for kind in SETTLING if any(type(p) is kind for p in passes)]
        given = digest(skeleton(model.proto, inputs)) == digest(skeleton(model.proto))
        if given and settling == list(SETTLING) and not deny:  # what settles the model settles its sizes
            original, sizes = model.copy(), dict[str, tuple[int, ...]]()
            done = settle(model, deny, certifier, settling, sizes)
            before = measure(View(original.graph, sizes))
        else:
            sizes = concrete_sizes(model.proto, inputs)
            before = measure(View(model.graph, sizes))
            done = settle(model, deny, certifier, settling)
        rw = Rewriter(model.graph, deny, sizes, model.names(), certifier)
        return cls(model, passes, Pipeline(passes).run_to_fixpoint(rw), done, sizes, inputs, before)

    def branch(self, deny: Iterable[Site] = (), certifier: Certifier | None = None, *, eager: bool = False) -> Snapshot:
        """A copy to go on with; `eager` lets measured passes act wherever they may."""
        model, passes = self.model.copy(), [p.branch() for p in self.passes]
        for p in passes:
            if eager and p.policy == "measured" and not p.eager:
                p.scope = "exact"
        return replace(self, model=model, passes=passes, fixpoint=self.fixpoint.branch(model.graph, deny, certifier))

    def finish(self, allowed: Collection[Site] | None = None) -> tuple[Cost, Outcome, Cost]:
        """Run what is left, in place; see `run_pipeline`."""
        outcome, graph = Pipeline(self.passes).finish(self.fixpoint, allowed), self.model.graph
        after = measure(View(graph, self.sizes))
        if after.unknown > self.before.unknown:  # tensors that passes made
            after = measure(View(graph, concrete_sizes(self.model.to_proto(), self.inputs)))
        return self.before, Outcome((*self.done, *outcome.rewrites), outcome.skips), after

    def could(self, name: str) -> Outcome:
        """What a measured pass does by itself, in place."""
        return Pipeline(self.passes).try_pass(self.fixpoint, name)


def run_pipeline(
    model: Model,
    passes: Sequence[Pass],
    deny: Collection[Site],
    sizes: Mapping[str, Sequence[int]],
    allowed: Collection[Site] | None = None,
    certifier: Certifier | None = None,
) -> tuple[Cost, Outcome, Cost]:
    """Run passes over a model in place; returns its cost before, what was done, and its cost after.

    `allowed` lists the sites where measured passes may act; None for all. `certifier` gives rewrites their
    certificates.
    """
    return Snapshot.of(model, passes, deny, sizes, certifier).finish(allowed)
