"""Find where two models begin to differ: the first tensor, its operator, and the rewrite that created it.

Tensors are matched by name. In models that pwopt writes, a name always stands for the original's value. Other tools may
reuse a name for another value: a convolution with a folded normalisation may keep the name of the convolution. Such a
tensor differs although nothing is wrong. Therefore only tensors that a failing output depends on count, and only back
to the tensors that agree.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from pwopt.errors import ModelError
from pwopt.evidence.comparison import compare
from pwopt.evidence.equivalence import FLOOR_FACTOR, Difference, Equivalence, OutputCheck
from pwopt.graph.files import load, save
from pwopt.graph.model import find_captured_names
from pwopt.graph.shapes import as_fixed, infer
from pwopt.graph.temporary import temporary_folder
from pwopt.inputs.samples import Sample
from pwopt.rewriting.records import Rewrite, Site
from pwopt.running.providers import DEFAULT, Provider
from pwopt.running.session import Session

#: Maximum number of tensors in one run, and of their elements.
TENSORS, ELEMENTS = 48, 1 << 25
#: Deviations of up to this many roundings of a tensor's largest value are ignored, even above its noise floor: a sum of
#: n terms in another order differs by about √n roundings.
IGNORED_ROUNDINGS = 8
#: A fault increases the deviation from one tensor to the next by at least this factor; accumulated noise grows slower.
JUMP = 4.0
#: A tensor that deviates by at most the noise of the original itself is no evidence.
QUIET = 1 / FLOOR_FACTOR
#: Noise can exceed a fault by this factor until an average reduces it: the mean of n values has 1/√n of their noise but
#: all of their common error, and a small map has about 256 positions.
DROWNED = 16.0


def localise(
    original: Path,
    candidate: Path,
    failed: Equivalence,
    samples: Sequence[Sample],
    provider: Provider = DEFAULT,
    threads: int = 1,
    rewrites: Sequence[Rewrite] = (),
) -> Difference | None:
    """Find the first tensor that differs between two models that are not equivalent.

    Both models run as temporary copies with inner tensors as outputs, a limited number at a time. Each tensor has its
    own noise floor and sensitivity.

    Parameters
    ----------
    original, candidate : path
    failed : Equivalence
        Their comparison on `samples`.
    rewrites : sequence of Rewrite
        The rewrites that created the candidate, if known.

    Returns
    -------
    Difference or None
        None if no tensor differs when it is an output (onnxruntime then optimises differently), if the difference grows
        slowly from tensor to tensor like rounding errors, or if there is no space for the copies.
    """
    failing = next((o for o in failed.outputs if o.comparable and not o.passed), None)
    sample = next((s for s in samples if failing is not None and str(s.label) == failing.sample), None)
    if failing is None or sample is None:
        return None
    wrong = {o.name: o for o in failed.outputs if o.comparable and not o.passed and o.sample == failing.sample}
    with temporary_folder() as folder:
        try:
            a, b = (
                ModelCopy.from_path(original, folder / "original"),
                ModelCopy.from_path(candidate, folder / "candidate"),
            )
            checks = _check_tensors(a, b, sample, provider, threads)
        except (ModelError, OSError):
            return None
    return _find_first_difference(checks, wrong, _find_producers(b.proto), rewrites)


def _find_first_difference(
    checks: dict[str, OutputCheck], wrong: Mapping[str, OutputCheck], producers: Mapping[str, onnx.NodeProto],
    rewrites: Sequence[Rewrite],
) -> Difference | None:  # fmt: skip
    """Find the first tensor that differs, from the checks of inner tensors and of the wrong outputs."""
    excesses = {name: _measure_excess(check) for name, check in checks.items()}
    differing = {name for name, excess in excesses.items() if excess > 1}
    if not differing:
        return None
    differing.update(wrong)
    checks.update(wrong)
    tensors, _ = _trace_back(list(wrong), producers, set(checks) - differing)
    first = next(
        (name for name in producers if name in tensors & differing and _is_jump(name, producers, excesses)), None
    )
    if first is None:
        return None
    first = _find_fainter(first, producers, excesses)
    inside, agreeing = _trace_back([first], producers, set(checks) - differing)
    nodes = [node for name, node in producers.items() if name in inside and node.op_type != "Constant"]
    region, sites = tuple(dict.fromkeys(map(_format_node, nodes))), _find_sites(rewrites, inside)
    return Difference(first, _format_node(producers[first]), agreeing, region, checks[first], sites, len(checks))


def _measure_excess(check: OutputCheck) -> float:
    """The deviation of a tensor relative to its own noise; stricter than the rule for outputs."""
    if not check.resolution:
        return 0.0 if check.passed else math.inf
    noise = max(FLOOR_FACTOR * check.floor, FLOOR_FACTOR * check.sensitivity, IGNORED_ROUNDINGS * check.resolution)
    return check.max_abs / noise if noise else math.inf if check.max_abs else 0.0


def _is_jump(tensor: str, producers: Mapping[str, onnx.NodeProto], excesses: Mapping[str, float]) -> bool:
    """Whether a tensor deviates much more than the tensors before it."""
    _, before = _trace_back([tensor], producers, excesses.keys())
    return excesses.get(tensor, math.inf) >= JUMP * max((excesses[name] for name in before), default=0.0)


def _find_fainter(tensor: str, producers: Mapping[str, onnx.NodeProto], excesses: Mapping[str, float]) -> str:
    """Find the first earlier tensor that already shows the fault, within the noise or slightly above it."""
    loud = excesses.get(tensor, math.inf)
    trail, _ = _trace_back([tensor], producers, {name for name, excess in excesses.items() if excess <= QUIET})
    faint = (n for n in producers if n in trail and loud / DROWNED <= excesses.get(n, 0.0) <= loud)
    return next((n for n in faint if _is_jump(n, producers, excesses)), tensor)


def _trace_back(
    tensors: Sequence[str], producers: Mapping[str, onnx.NodeProto], agreeing: Collection[str]
) -> tuple[set[str], tuple[str, ...]]:
    """Trace tensors back to those that agree; return the tensors on the way, and the agreeing ones."""
    inside, border, left = set(tensors), dict[str, None](), [name for name in tensors if name in producers]
    while left:
        node = producers[left.pop()]
        for name in (*node.input, *find_captured_names([node])):
            if name in agreeing:
                border[name] = None
            elif name in producers and name not in inside:
                inside.add(name)
                left.append(name)
    return inside, tuple(border)


def _format_node(node: onnx.NodeProto) -> str:
    return f"{node.op_type} {node.name}".strip()


def _find_sites(rewrites: Sequence[Rewrite], tensors: Collection[str]) -> tuple[Site, ...]:
    """Find the sites of the rewrites that created one of these tensors, followed through later rewrites."""
    found = []
    for i, rewrite in enumerate(rewrites):
        names = {new for _, new in rewrite.became} | {rewrite.site.tensor}
        for later in rewrites[i + 1 :]:
            became = dict(later.became)
            names = {became.get(name, name) for name in names}
        if names.intersection(tensors):
            found.append(rewrite.site)
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class ModelCopy:
    """A model in a temporary folder, for variants with other outputs."""

    proto: onnx.ModelProto
    folder: Path

    @classmethod
    def from_path(cls, path: Path, folder: Path) -> ModelCopy:
        folder.mkdir()
        model = load(path)
        save(model, folder / "model.onnx")
        return cls(onnx.load(folder / "model.onnx", load_external_data=False), folder)

    def expose(self, tensors: Mapping[str, int]) -> Path:
        """Write the model with only these outputs, given with their element types (0 if unknown)."""
        kept = list(self.proto.graph.output)
        del self.proto.graph.output[:]
        for name, code in tensors.items():
            value = onnx.helper.make_tensor_value_info(name, code, None) if code else onnx.ValueInfoProto(name=name)
            self.proto.graph.output.append(value)
        path = self.folder / "exposed.onnx"
        path.write_bytes(self.proto.SerializeToString())
        del self.proto.graph.output[:]
        self.proto.graph.output.extend(kept)
        return path


def _find_producers(proto: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """Map each tensor to the node that computes it, in topological order."""
    return {name: node for node in proto.graph.node for name in node.output if name}


def _find_common(a: onnx.ModelProto, b: onnx.ModelProto) -> dict[str, int]:
    """Find tensors that both models compute, and their element types; inference may fail in one of the models."""
    ours, theirs, others = infer(a), infer(b), _find_producers(b)
    common = {}
    for name, node in _find_producers(a).items():
        if name in others and node.op_type != "Constant":
            codes = {types[name][0] for types in (ours, theirs) if name in types} - {0}
            if len(codes) == 1:
                common[name] = codes.pop()
    return common


def _split(tensors: Mapping[str, int], sizes: Mapping[str, Sequence[int]]) -> Iterator[dict[str, int]]:
    """Yield batches of tensors that fit in one run; an unknown size counts as the largest known one."""
    largest = max((math.prod(s) for s in sizes.values()), default=1)
    batch: dict[str, int] = {}
    elements = 0
    for name, code in tensors.items():
        size = math.prod(sizes[name]) if name in sizes else largest
        if batch and (len(batch) == TENSORS or elements + size > ELEMENTS):
            yield batch
            batch, elements = {}, 0
        batch[name] = code
        elements += size
    if batch:
        yield batch


def _check_tensors(
    a: ModelCopy, b: ModelCopy, sample: Sample, provider: Provider, threads: int
) -> dict[str, OutputCheck]:
    """Compare every tensor that both models have."""
    types = infer(a.proto, {name: value.shape for name, value in sample.feeds.items()})
    sizes = {name: size for name, (_, shape) in types.items() if (size := as_fixed(shape)) is not None}
    checks: dict[str, OutputCheck] = {}
    for batch in _split(_find_common(a.proto, b.proto), sizes):
        checks.update(_compare_batch(a, b, batch, sample, provider, threads))
    return checks


def _compare_batch(
    a: ModelCopy, b: ModelCopy, batch: Mapping[str, int], sample: Sample, provider: Provider, threads: int
) -> dict[str, OutputCheck]:
    """Compare each tensor of a batch; split the batch if a tensor cannot be an output, and leave that tensor out."""
    ours, theirs = a.expose(batch), b.expose(batch)
    try:
        result = compare(
            Session(ours, provider, threads),
            Session(ours, provider, threads, optimise=False),
            Session(theirs, provider, threads),
            [sample],
            brief=True,
        )
    except ModelError:
        if len(batch) == 1:
            return {}
        names = list(batch)
        half = len(names) // 2
        return {
            name: check
            for part in (names[:half], names[half:])
            for name, check in _compare_batch(a, b, {n: batch[n] for n in part}, sample, provider, threads).items()
        }
    return {o.name: o for o in result.outputs if o.comparable and o.compared}
