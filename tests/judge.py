"""Whether passes keep a model's answers, by onnxruntime on the original."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from strategies import Sample

import pwopt
from pwopt.graph.files import from_proto
from pwopt.passes import FractionalStride, Polyphase, Winograd
from pwopt.rewriting.records import Rewrite
from pwopt.selecting.compilation import Compilation
from pwopt.selecting.pass_list import resolve_passes

Feeds = dict[str, np.ndarray]
Runner = Callable[[Feeds], list[np.ndarray]]

#: Deviation allowed, relative to an output's largest element: a few hundred roundings, as `pwopt.verify` has it.
TOLERANCES = {"float64": 1e-9, "float32": 3e-4, "float16": 3e-2, "bfloat16": 2e-1}
#: Floating-point types.
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
#: Deviation allowed, in multiples of what one rounding of the inputs does, of onnxruntime's own noise, or of what the
#: original itself is off.
FACTOR = 8.0
#: Beyond this, sums in another order may overflow; not a number is not below it either.
LARGEST = 2.0**100
#: How often the inputs are moved by a rounding, to see what that does: much where something is divided by almost zero.
NUDGES = 16
#: Where rounding to integers follows, elements that may fall on the other side of a step.
FLIPPED = 0.02


class WrongError(AssertionError):
    """A rewritten model does not load, or does not give the original's answers."""


def runtime(model: onnx.ModelProto, optimise: bool = False) -> Runner:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda feeds: list(session.run(None, feeds))


def widened(model: onnx.ModelProto) -> Runner:
    """onnxruntime on the same model in float32, for types that it has no kernels for."""
    run = runtime(_stored(model, TensorProto.FLOAT))
    return lambda feeds: run({n: v.astype(np.float32) if v.dtype.kind in "fV" else v for n, v in feeds.items()})


def exact(model: onnx.ModelProto) -> Runner:
    """onnx's reference evaluator on the same model in float64; the results in the types that the model has."""
    run = ReferenceEvaluator(_stored(model, TensorProto.DOUBLE))
    kinds = [helper.tensor_dtype_to_np_dtype(o.type.tensor_type.elem_type) for o in model.graph.output]

    def results(feeds: Feeds) -> list[np.ndarray]:
        found = run.run(None, {n: v.astype(np.float64) if v.dtype.kind in "fV" else v for n, v in feeds.items()})
        return [np.asarray(v).astype(kind) for v, kind in zip(found, kinds, strict=True)]

    return results


def _stored(model: onnx.ModelProto, kind: int) -> onnx.ModelProto:
    """The same model with every floating-point number of another type in this one."""
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    graphs = [wide.graph]
    nodes = [node for function in wide.functions for node in function.node]
    for graph in graphs:  # grows as bodies are found
        nodes += graph.node
        graphs += [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type in FLOATS:
                value.type.tensor_type.elem_type = kind
        for tensor in graph.initializer:
            _store(tensor, kind)
    for attribute in (a for node in nodes for a in node.attribute):
        if attribute.HasField("t"):
            _store(attribute.t, kind)
        elif attribute.name == "to" and attribute.i in FLOATS:
            attribute.i = kind
    return wide


def _store(tensor: TensorProto, kind: int) -> None:
    if tensor.data_type in FLOATS and tensor.data_type != kind:
        values = numpy_helper.to_array(tensor).astype(helper.tensor_dtype_to_np_dtype(kind))
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def answers(run: Runner, feeds: Sequence[Feeds]) -> list[list[np.ndarray] | None]:
    """The outputs for each feed; None for those that the model does not take."""
    found: list[list[np.ndarray] | None] = []
    for f in feeds:
        try:
            with np.errstate(all="ignore"):
                found.append(run(f))
        except Exception:
            found.append(None)
    return found


def choose(
    model: onnx.ModelProto, feeds: Sequence[Feeds]
) -> tuple[Callable[[onnx.ModelProto], Runner] | None, list[list[np.ndarray] | None]]:
    """The first judge that runs the original, and what it says."""
    for make in (runtime, widened):
        try:
            given = answers(make(model), feeds)
        except Exception:
            continue
        if given[0] is not None:
            return make, given
    return None, []


def nudged(feeds: Feeds, seed: int, least: float = 0.0) -> Feeds:
    """Every element moved by a rounding, of `least` at least, up or down at random."""
    rng, moved = np.random.default_rng(seed), {}
    for name, value in feeds.items():
        eps = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float64": 2.0**-52}.get(str(value.dtype), 2.0**-23)
        eps = max(eps, least)
        factors = np.where(rng.integers(2, size=value.shape), 1 + eps, 1 - eps)
        moved[name] = (value.astype(np.float64) * factors).astype(value.dtype)
    return moved


def deviations(expected: list[np.ndarray], found: list[np.ndarray]) -> list[np.ndarray]:
    """Absolute deviations of each output; infinite where one is not a number and the other is.

    None where the original has its type's lowest number: that is what some of onnxruntime's pooling kernels make of
    NaN, of which the specification says nothing, and others do not.
    """
    result = []
    for a, b in zip(expected, found, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise WrongError(f"{b.dtype}{b.shape} instead of {a.dtype}{a.shape}")
        x, y = a.astype(np.float64), b.astype(np.float64)
        with np.errstate(all="ignore"):
            same = (x == y) | (np.isnan(x) & np.isnan(y))
            if a.dtype.kind == "f":
                same |= a == np.finfo(a.dtype).min
            result.append(np.where(same, 0.0, np.where(np.isfinite(x - y), abs(x - y), np.inf)))
    return result


def optimised(sample: Sample, passes: Sequence[str] | None) -> tuple[onnx.ModelProto, Sequence[Rewrite]]:
    """What users get from all passes; some passes are run without what `pwopt.optimize` does around them."""
    small = ((Winograd, 0.0), (Polyphase, -1e9), (FractionalStride, -1e9))  # on small models too
    with contextlib.ExitStack() as stack:
        for p, least in small:
            stack.enter_context(mock.patch.object(p, "min_gain", least))
        return _optimised(sample, passes)


def _optimised(sample: Sample, passes: Sequence[str] | None) -> tuple[onnx.ModelProto, Sequence[Rewrite]]:
    shapes = {n: v.shape for n, v in sample.feeds[0].items()}
    if passes is None:
        result = pwopt.optimize(sample.model, cost="analytic", verify=False, shapes=shapes)
        return result.model, result.report.rewrites
    source = from_proto(sample.model)
    done = Compilation(source, source, resolve_passes(passes), (), shapes, Path()).rewrite(None)
    return done.proto, done.rewrites


def judge(
    sample: Sample,
    passes: Sequence[str] | None,
    given: list[list[np.ndarray] | None],
    make: Callable[[onnx.ModelProto], Runner],
) -> Counter[str]:
    """Rewrites applied, by pass.

    Raises
    ------
    WrongError
        If the result is not sound, or not equivalent.
    """
    model, rewrites = optimised(sample, passes)
    applied = Counter(r.pass_name for r in rewrites)
    if model is sample.model:
        return applied
    old, new = sample.model.graph, model.graph
    if [i.name for i in old.input] != [i.name for i in new.input] or list(old.output) != list(new.output):
        raise WrongError("inputs or outputs changed")
    try:
        run = make(model)
        onnx.checker.check_model(model)
    except Exception as error:
        raise WrongError(f"does not load: {error}") from error
    discrete = any(n.op_type == "QuantizeLinear" for n in old.node)
    original: Runner | None = None
    for feeds, expected, found in zip(sample.feeds, given, answers(run, sample.feeds), strict=True):
        if expected is None:
            continue
        if found is None:
            raise WrongError("does not run on inputs that the original runs on")
        for i, off in enumerate(deviations(expected, found)):
            size = float(np.max(np.abs(expected[i].astype(np.float64)), initial=0.0))
            if not size < LARGEST:
                continue  # the algebra is one of real numbers: what is infinite inside may become anything
            kind = str(next(iter(feeds.values()), expected[i]).dtype)
            allowed = max(TOLERANCES.get(kind, 0.0), TOLERANCES.get(str(expected[i].dtype), 0.0)) * size + 1e-30
            if not (off > allowed).any():
                continue
            original = original or make(sample.model)
            least = 0.0 if make is runtime else 2.0**-23
            others = answers(original, [nudged(feeds, seed, least) for seed in range(NUDGES)])
            if make is runtime:
                others.append(answers(runtime(sample.model, optimise=True), [feeds])[0])
                with contextlib.suppress(Exception):  # what the evaluator lacks
                    others.append(answers(exact(sample.model), [feeds])[0])
            noise = max(float(np.max(deviations(expected, o)[i], initial=0.0)) for o in others if o is not None)
            wrong = off > max(allowed, FACTOR * noise)
            if wrong.any() and not (discrete and wrong.mean() <= FLIPPED):
                raise WrongError(
                    f"output {old.output[i].name} deviates by {off.max():.3g} of {size:.3g} (noise {noise:.3g})"
                )
    return applied
