"""Whether passes keep a model's answers, by onnxruntime on the original.

A deviation beyond the tolerance is compared with the original's own deviations: with its inputs or weights moved by
some roundings, with graph optimisation, and between its types and float64 in onnx's reference evaluator. A step (Where,
Floor, Round, TopK, arg max) turns a rounding into a jump, so the size of the original's largest deviation excuses
nothing by itself: there must also be about as many elements that deviate by as much. Sequences are compared element by
element.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from strategies import Sample

import pwopt
from pwopt.graph.files import from_proto
from pwopt.passes import FoldInterpolation, FractionalStride, Polyphase, Winograd
from pwopt.rewriting.records import Rewrite
from pwopt.selecting.compilation import Compilation
from pwopt.selecting.pass_list import resolve_passes

Feeds = dict[str, np.ndarray]
Runner = Callable[[Feeds], list[Any]]

#: Deviation allowed, relative to an output's largest element: a few hundred roundings, as `pwopt.verify` has it.
TOLERANCES = {"float64": 1e-9, "float32": 3e-4, "float16": 3e-2, "bfloat16": 2e-1}
#: Floating-point types.
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
#: Deviation allowed, in multiples of what one rounding of the inputs does, of onnxruntime's own noise, or of what the
#: original itself is off.
FACTOR = 8.0
#: Beyond this, sums in another order may overflow; not a number is not below it either.
LARGEST = 2.0**100
#: How often the inputs are moved by a rounding, and how often by `FACTOR` roundings, to see what that does: much where
#: something is divided by almost zero.
NUDGES = 8
#: How often the weights are moved too: equal rows and constants on a threshold are moved by nothing else.
WEIGHT_NUDGES = 4
#: A rewritten model may have this many times as many elements that deviate by some size as the original has in all of
#: its own runs together, and as many more as chance explains: three standard deviations of a Poisson distribution.
SHARE, SPREAD = 2.0, 3.0


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


def rounding_errors(model: onnx.ModelProto, feeds: Feeds) -> list[np.ndarray]:
    """What onnx's reference evaluator deviates by between the model's own types and float64.

    Both runs use the evaluator, because it differs from onnxruntime in more than roundings on some operators.
    """
    narrow = ReferenceEvaluator(model).run(None, feeds)
    wide = {n: v.astype(np.float64) if v.dtype.kind in "fV" else v for n, v in feeds.items()}
    found = ReferenceEvaluator(_stored(model, TensorProto.DOUBLE)).run(None, wide)

    def convert(value: Any, like: Any) -> Any:
        if isinstance(value, list):
            return [convert(v, w) for v, w in zip(value, like, strict=True)]
        return None if value is None else np.asarray(value).astype(np.asarray(like).dtype)

    return deviations(narrow, convert(found, narrow))


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
            tensor_type = _tensor_type(value.type)
            if tensor_type.elem_type in FLOATS:
                tensor_type.elem_type = kind
        for tensor in graph.initializer:
            _store(tensor, kind)
    for attribute in (a for node in nodes for a in node.attribute):
        if attribute.HasField("t"):
            _store(attribute.t, kind)
        elif attribute.name == "to" and attribute.i in FLOATS:
            attribute.i = kind
    return wide


def _tensor_type(value: onnx.TypeProto) -> onnx.TypeProto.Tensor:
    """The type of a tensor, or of the tensors in a sequence or an optional."""
    while (kind := value.WhichOneof("value")) in ("sequence_type", "optional_type"):
        value = getattr(value, kind).elem_type
    return value.tensor_type


def _store(tensor: TensorProto, kind: int) -> None:
    if tensor.data_type in FLOATS and tensor.data_type != kind:
        with np.errstate(over="ignore"):
            values = numpy_helper.to_array(tensor).astype(helper.tensor_dtype_to_np_dtype(kind))
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def answers(run: Runner, feeds: Sequence[Feeds]) -> list[list[Any] | None]:
    """The outputs for each feed; None for those that the model does not take."""
    found: list[list[Any] | None] = []
    for f in feeds:
        try:
            with np.errstate(all="ignore"):
                found.append(run(f))
        except Exception:
            found.append(None)
    return found


def choose(
    model: onnx.ModelProto, feeds: Sequence[Feeds]
) -> tuple[Callable[[onnx.ModelProto], Runner] | None, list[list[Any] | None]]:
    """The first judge that runs the original, and what it says."""
    for make in (runtime, widened):
        try:
            given = answers(make(model), feeds)
        except Exception:
            continue
        if given[0] is not None:
            return make, given
    return None, []


def nudged(feeds: Feeds, seed: int, least: float = 0.0, roundings: float = 1.0) -> Feeds:
    """Every floating-point element moved by some roundings, each of `least` at least, up or down at random."""
    rng, moved = np.random.default_rng(seed), {}
    for name, value in feeds.items():
        if value.dtype.kind not in "fV":
            moved[name] = value
            continue
        eps = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float64": 2.0**-52}.get(str(value.dtype), 2.0**-23)
        eps = roundings * max(eps, least)
        factors = np.where(rng.integers(2, size=value.shape), 1 + eps, 1 - eps)
        moved[name] = (value.astype(np.float64) * factors).astype(value.dtype)
    return moved


def nudged_weights(model: onnx.ModelProto, seed: int, least: float) -> onnx.ModelProto:
    """The model with its weights moved by `FACTOR` roundings; not the scales of Resize, which decide about sizes."""
    moved = onnx.ModelProto()
    moved.CopyFrom(model)
    sizes = {n for node in model.graph.node if node.op_type in ("Resize", "Upsample") for n in node.input[1:]}
    for i, tensor in enumerate(moved.graph.initializer):
        if tensor.data_type in FLOATS and tensor.name not in sizes and f"{tensor.name}_same" not in sizes:
            values = nudged({"": numpy_helper.to_array(tensor)}, seed + i, least, FACTOR)[""]
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return moved


def leaves(values: Sequence[Any]) -> list[tuple[int, np.ndarray]]:
    """The tensors of each output, with its number; those of a sequence after their count, and 0 for an absent one."""
    found: list[tuple[int, np.ndarray]] = []
    for i, value in enumerate(values):
        if value is None or isinstance(value, list):
            parts = value or []
            found += [(i, np.array(len(parts) if value is not None else -1)), *((i, v) for _, v in leaves(parts))]
        else:
            found.append((i, np.asarray(value)))
    return found


def deviations(expected: Sequence[Any], found: Sequence[Any]) -> list[np.ndarray]:
    """Absolute deviations of the tensors in all outputs; infinite where one is not a number and the other is.

    None where the original has its type's lowest number: that is what some of onnxruntime's pooling kernels make of
    NaN, of which the specification says nothing, and others do not.
    """
    result = []
    ours, theirs = leaves(expected), leaves(found)
    if [i for i, _ in ours] != [i for i, _ in theirs]:
        raise WrongError("sequences of another length, or optionals that are there in one model only")
    for (_, a), (_, b) in zip(ours, theirs, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise WrongError(f"{b.dtype}{b.shape} instead of {a.dtype}{a.shape}")
        x, y = a.astype(np.float64), b.astype(np.float64)
        with np.errstate(all="ignore"):
            same = (x == y) | (np.isnan(x) & np.isnan(y))
            if a.dtype.kind == "f":
                same |= a == np.finfo(a.dtype).min
            result.append(np.where(same, 0.0, np.where(np.isfinite(x - y), abs(x - y), np.inf)))
    return result


def own_deviations(
    sample: Sample, feeds: Feeds, expected: Sequence[Any], make: Callable[[onnx.ModelProto], Runner]
) -> list[np.ndarray]:
    """What the original's tensors deviate by in its own runs at most, times `FACTOR` where little was moved."""
    least = 0.0 if make is runtime else 2.0**-23
    original = make(sample.model)
    runs = [(FACTOR, answers(original, [nudged(feeds, seed, least)])[0]) for seed in range(NUDGES)]
    runs += [(1.0, answers(original, [nudged(feeds, NUDGES + i, least, FACTOR)])[0]) for i in range(NUDGES)]
    for seed in range(WEIGHT_NUDGES):
        with contextlib.suppress(Exception):
            runs.append((1.0, answers(make(nudged_weights(sample.model, 1000 * seed, least)), [feeds])[0]))
    if make is runtime:
        runs.append((FACTOR, answers(runtime(sample.model, optimise=True), [feeds])[0]))
    worst = [np.zeros(np.shape(v)) for _, v in leaves(expected)]
    for factor, values in runs:
        if values is not None:
            with contextlib.suppress(WrongError):  # sizes that depend on values
                worst = [np.maximum(w, factor * d) for w, d in zip(worst, deviations(expected, values), strict=True)]
    if make is runtime:
        with contextlib.suppress(Exception), np.errstate(all="ignore"):  # what the evaluator lacks
            errors = rounding_errors(sample.model, feeds)
            if [w.shape for w in worst] == [e.shape for e in errors]:
                worst = [np.maximum(w, FACTOR * e) for w, e in zip(worst, errors, strict=True)]
    return worst


def overflowing(deviations: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """Deviations, infinite where they exceed the largest number of a floating-point type: beside a pole, float16 ends."""
    if dtype.kind not in "fV":
        return deviations
    return np.where(deviations > float(ml_dtypes.finfo(dtype).max), np.inf, deviations)


def excessive(off: np.ndarray, own: np.ndarray, allowed: float) -> bool:
    """Whether more elements deviate by some size beyond `allowed` than the original's own deviations explain."""
    sizes = np.sort(off[off > allowed])
    found = np.arange(len(sizes), 0, -1)  # that deviate by so much, or more
    explained = own.size - np.searchsorted(np.sort(own, axis=None), sizes)
    return bool((found > SHARE * explained + SPREAD * np.sqrt(SHARE * explained)).any())


def optimised(sample: Sample, passes: Sequence[str] | None) -> tuple[onnx.ModelProto, Sequence[Rewrite]]:
    """What users get from all passes; some passes are run without what `pwopt.optimize` does around them."""
    small = (
        (Winograd, 0.0),
        (Polyphase, -1e9),
        (FractionalStride, -1e9),
        (FoldInterpolation, 0.0),
    )  # on small models too
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


def check(model: onnx.ModelProto) -> None:
    """Check a model by onnx's checker, as if GroupNormalization of before opset 21 was an operator of another domain.

    The checker calls it deprecated. onnxruntime runs it.

    Raises
    ------
    onnx.checker.ValidationError
        If the checker refuses the model.
    """
    checked = onnx.ModelProto()
    checked.CopyFrom(model)
    opsets = {o.domain: o.version for o in model.opset_import}
    old = [n for n in checked.graph.node if (n.op_type, n.domain) == ("GroupNormalization", "")]
    if old and opsets[""] < 21:
        for node in old:
            node.domain = "deprecated"
        checked.opset_import.append(helper.make_opsetid("deprecated", 1))
    onnx.checker.check_model(checked)


def judge(
    sample: Sample,
    passes: Sequence[str] | None,
    given: list[list[Any] | None],
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
        check(model)
    except Exception as error:
        raise WrongError(f"does not load: {error}") from error
    for feeds, expected, found in zip(sample.feeds, given, answers(run, sample.feeds), strict=True):
        if expected is not None:
            compare(sample, feeds, expected, found, make)
    return applied


def compare(
    sample: Sample,
    feeds: Feeds,
    expected: list[Any],
    found: list[Any] | None,
    make: Callable[[onnx.ModelProto], Runner],
) -> None:
    """Compare what a rewritten model gives with what the original gives.

    Raises
    ------
    WrongError
        If they are not equivalent.
    """
    if found is None:
        raise WrongError("does not run on inputs that the original runs on")
    own: list[np.ndarray] = []
    for i, (off, (output, reference)) in enumerate(zip(deviations(expected, found), leaves(expected), strict=True)):
        size = float(np.max(np.abs(reference.astype(np.float64)), initial=0.0))
        if not size < LARGEST:
            continue  # the algebra is one of real numbers: what is infinite inside may become anything
        kind = str(next(iter(feeds.values()), reference).dtype)
        allowed = 0.0
        if reference.dtype.kind in "fV":
            allowed = max(TOLERANCES.get(kind, 0.0), TOLERANCES.get(str(reference.dtype), 0.0)) * size + 1e-30
        if not (off > allowed).any():
            continue
        own = own or [
            overflowing(worst, values.dtype)
            for worst, (_, values) in zip(own_deviations(sample, feeds, expected, make), leaves(expected), strict=True)
        ]
        if excessive(off, own[i], allowed):
            raise WrongError(
                f"output {sample.model.graph.output[output].name} deviates by {off.max():.3g} of {size:.3g}, "
                f"{(off > allowed).mean():.2%} of it beyond the tolerance; the original's own runs explain "
                f"{own[i].max():.3g}, and {(own[i] > allowed).mean():.2%}"
            )
