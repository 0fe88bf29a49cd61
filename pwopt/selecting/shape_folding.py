"""Alternate folding of shape arithmetic and shape inference until neither finds anything new."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import onnx

from pwopt.graph import values
from pwopt.graph.calls import find_branch, inline_branches
from pwopt.graph.files import annotate, from_proto
from pwopt.graph.memo import memoize
from pwopt.graph.model import Model
from pwopt.graph.shapes import Shape, as_fixed, infer, make_skeleton
from pwopt.graph.unknown_targets import follow_targets
from pwopt.graph.view import View
from pwopt.passes import CleanUp, SettleShapes
from pwopt.rewriting.driver import Certifier, Pass, describe
from pwopt.rewriting.pipeline import Pipeline
from pwopt.rewriting.records import Rewrite, Site

#: The passes that fold shape arithmetic.
SHAPE_PASSES: tuple[type[Pass], ...] = (CleanUp, SettleShapes)


def fold_shapes(
    model: Model,
    deny: Iterable[Site] = (),
    certifier: Certifier | None = None,
    passes: Sequence[type[Pass]] = SHAPE_PASSES,
    sizes: dict[str, tuple[int, ...]] | None = None,
) -> tuple[Rewrite, ...]:
    """Alternate constant folding and shape inference while shapes are unknown and either finds something new.

    A new constant may determine a shape, and a new shape may determine a constant. Both may determine the condition of
    an If, which is then replaced by the branch that it runs.

    Parameters
    ----------
    model : Model
        Edited in place.
    deny : iterable of Site
    certifier : callable, optional
    passes : sequence of pass classes
    sizes : dict, optional
        Receives every shape that becomes known.
    """
    if sizes is not None:
        sizes.update(_select_known_sizes(infer(model.proto)))
    rewrites: list[Rewrite] = []
    pipeline = Pipeline([p() for p in passes])
    if passes and has_unknowns(model):
        found = follow_targets(model.graph)
        if sizes is not None:
            sizes.update(_select_fixed(found))
    while has_unknowns(model):
        taken = _inline_branches(model, frozenset(deny)) if CleanUp in passes else []
        done = pipeline.run(model.graph, denied=deny, reserved=model.names(), certifier=certifier).rewrites
        if not done and not taken:
            break
        rewrites += [*taken, *done]
        types = infer(model.to_proto())
        annotate(model, types)
        if sizes is not None:
            sizes.update(_select_known_sizes(types))
    return tuple(rewrites)


def has_unknowns(model: Model) -> bool:
    """Whether a shape is unknown, or there is an If whose condition may turn out to be constant."""
    nodes = model.graph.nodes
    return any(n.op == "If" for n in nodes) or any(
        as_fixed(t.shape) is None for n in nodes for t in n.outputs if t.name
    )


def _inline_branches(model: Model, denied: Collection[Site]) -> list[Rewrite]:
    """Replace every If whose condition is constant by the branch that it runs."""
    view = View(model.graph)
    taken: dict[str, bool] = {}
    rewrites = []
    for node in model.graph.nodes:
        condition = values.as_numbers(values.read_entries(view, node.inputs[0])) if view.op(node) == "If" else None
        message = model.message(node)
        if (
            condition is None
            or len(condition) != 1
            or message is None
            or Site(CleanUp.name, node.outputs[0].name) in denied
        ):
            continue
        body = find_branch(message, bool(condition[0]))
        if body is None:
            continue
        taken[node.outputs[0].name] = bool(condition[0])
        reason = f"its condition is always {'true' if condition[0] else 'false'}"
        added = tuple(f"{n.op_type} {n.name}".strip() for n in body.node)
        site = Site(CleanUp.name, node.outputs[0].name)
        rewrites.append(Rewrite(reason, (describe(node),), added, site=site))
    if taken:
        model.become(from_proto(inline_branches(model.to_proto(), taken), model.folder))
    return rewrites


def infer_sizes(proto: onnx.ModelProto, sizes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Infer the sizes of all tensors for the given input sizes; tensors of unknown size are missing."""
    return dict(_infer_all_sizes(make_skeleton(proto, sizes)))


def infer_ranks(proto: onnx.ModelProto, sizes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Infer the ranks of all tensors whose sizes follow from the given input sizes."""
    return {name: len(size) for name, size in infer_sizes(proto, sizes).items()}


@memoize
def _infer_all_sizes(light: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    types = infer(light)
    found = _select_known_sizes(types)
    if all(name in found for node in light.graph.node for name in node.output if name):
        return found
    model = from_proto(light)
    found.update(_select_fixed(follow_targets(model.graph)))
    pipeline = Pipeline([p() for p in SHAPE_PASSES])
    while has_unknowns(model) and pipeline.run(model.graph).rewrites:
        types = infer(model.to_proto())
        annotate(model, types)
        found.update(_select_known_sizes(types))
    return found


def _select_known_sizes(types: Mapping[str, tuple[int, Shape | None]]) -> dict[str, tuple[int, ...]]:
    return _select_fixed({name: shape for name, (_, shape) in types.items()})


def _select_fixed(shapes: Mapping[str, Shape | None]) -> dict[str, tuple[int, ...]]:
    return {name: numbers for name, shape in shapes.items() if (numbers := as_fixed(shape)) is not None}
