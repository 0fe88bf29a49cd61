"""Where two models begin to differ: the first tensor, what makes it, and the rewrite that made that.

Tensors are matched by name. In what pwopt writes, a name stands for the original's value or for nothing; other tools
may give an old name to a new value (a convolution that has swallowed its normalisation, under the convolution's
name), and such a tensor differs though nothing is wrong. So only what a failing output is computed from counts, and
only as far back as the tensors that agree.
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
from pwopt.graph.model import captured_names
from pwopt.graph.shapes import infer, known
from pwopt.graph.temporary import temporary_folder
from pwopt.inputs.samples import Sample
from pwopt.rewriting.records import Rewrite, Site
from pwopt.running.providers import DEFAULT, Provider
from pwopt.running.session import Session

#: Tensors that are looked at in one run, and the elements that they may have together.
TENSORS, ELEMENTS = 48, 1 << 25
#: Deviations of so many roundings of a tensor's largest value are not a difference, whatever its noise floor: a sum of
#: n terms in another order differs by some √n.
ROUNDINGS = 8
#: A fault shows as a step from one tensor to the next; what grows by less is noise that accumulates, nobody's fault.
JUMP = 4.0
#: A tensor that differs by no more than the original does from itself tells nothing.
QUIET = 1 / FLOOR_FACTOR
#: Noise can drown a fault so many times over before something averages it away: the mean of n values has 1/√n of their
#: noise and all of their common error, and a small map has some 256 positions.
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

    Both models run with their inner tensors as outputs, on temporary copies, a bounded number of them at a time; each
    tensor is held against its own noise floor and sensitivity.

    Parameters
    ----------
    original, candidate : path
    failed : Equivalence
        Their comparison on `samples`.
    rewrites : sequence of Rewrite
        What made the candidate of the original, where that is known.

    Returns
    -------
    Difference or None
        None if no tensor differs once it is looked at, so that the fault lies in what onnxruntime makes of the whole;
        if the difference grows from tensor to tensor without a step, as rounding does; or if there is no room for the
        copies.
    """
    failing = next((o for o in failed.outputs if o.comparable and not o.passed), None)
    sample = next((s for s in samples if failing is not None and s.label == failing.sample), None)
    if failing is None or sample is None:
        return None
    wrong = {o.name: o for o in failed.outputs if o.comparable and not o.passed and o.sample == failing.sample}
    with temporary_folder() as folder:
        try:
            a, b = _Copy.of(original, folder / "original"), _Copy.of(candidate, folder / "candidate")
            checks = _checks(a, b, sample, provider, threads)
        except (ModelError, OSError):
            return None
    excesses = {name: _excess(check) for name, check in checks.items()}
    differing = {name for name, excess in excesses.items() if excess > 1}
    if not differing:
        return None
    differing.update(wrong)
    checks.update(wrong)
    made = _made(b.proto)
    tensors, _ = _back_from(list(wrong), made, set(checks) - differing)
    first = next((name for name in made if name in tensors & differing and _steps(name, made, excesses)), None)
    if first is None:
        return None
    first = _fainter(first, made, excesses)
    inside, agreeing = _back_from([first], made, set(checks) - differing)
    nodes = [node for name, node in made.items() if name in inside and node.op_type != "Constant"]
    region = tuple(dict.fromkeys(map(_title, nodes)))
    return Difference(
        first, _title(made[first]), agreeing, region, checks[first], _sites(rewrites, inside), len(checks)
    )


def _excess(check: OutputCheck) -> float:
    """How many times its own noise a tensor differs by; stricter than the rule for outputs, which may be lenient."""
    if not check.resolution:
        return 0.0 if check.passed else math.inf
    noise = max(FLOOR_FACTOR * check.floor, FLOOR_FACTOR * check.sensitivity, ROUNDINGS * check.resolution)
    return check.max_abs / noise if noise else math.inf if check.max_abs else 0.0


def _steps(tensor: str, made: Mapping[str, onnx.NodeProto], excesses: Mapping[str, float]) -> bool:
    """Whether a tensor differs by much more than those before it."""
    _, before = _back_from([tensor], made, excesses.keys())
    return excesses.get(tensor, math.inf) >= JUMP * max((excesses[name] for name in before), default=0.0)


def _fainter(tensor: str, made: Mapping[str, onnx.NodeProto], excesses: Mapping[str, float]) -> str:
    """The first tensor before this one where its fault already shows, fainter, within the noise or little above it."""
    loud = excesses.get(tensor, math.inf)
    trail, _ = _back_from([tensor], made, {name for name, excess in excesses.items() if excess <= QUIET})
    faint = (n for n in made if n in trail and loud / DROWNED <= excesses.get(n, 0.0) <= loud)
    return next((n for n in faint if _steps(n, made, excesses)), tensor)


def _back_from(
    tensors: Sequence[str], made: Mapping[str, onnx.NodeProto], agreeing: Collection[str]
) -> tuple[set[str], tuple[str, ...]]:
    """What `tensors` are computed from, back to those that agree: the tensors on the way, and the agreeing ones."""
    inside, border, left = set(tensors), dict[str, None](), [name for name in tensors if name in made]
    while left:
        node = made[left.pop()]
        for name in (*node.input, *captured_names([node])):
            if name in agreeing:
                border[name] = None
            elif name in made and name not in inside:
                inside.add(name)
                left.append(name)
    return inside, tuple(border)


def _title(node: onnx.NodeProto) -> str:
    return f"{node.op_type} {node.name}".strip()


def _sites(rewrites: Sequence[Rewrite], tensors: Collection[str]) -> tuple[Site, ...]:
    """Sites of the rewrites that made one of these tensors, followed through the rewrites after them."""
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
class _Copy:
    """A model whose weights lie in a temporary folder, for variants of it with other outputs."""

    proto: onnx.ModelProto
    folder: Path

    @classmethod
    def of(cls, path: Path, folder: Path) -> _Copy:
        folder.mkdir()
        model = load(path)
        save(model, folder / "model.onnx")
        return cls(onnx.load(folder / "model.onnx", load_external_data=False), folder)

    def exposing(self, tensors: Mapping[str, int]) -> Path:
        """The model with just these outputs, each of its element type."""
        kept = list(self.proto.graph.output)
        del self.proto.graph.output[:]
        for name, code in tensors.items():
            self.proto.graph.output.append(onnx.helper.make_tensor_value_info(name, code, None))
        path = self.folder / "exposed.onnx"
        path.write_bytes(self.proto.SerializeToString())
        del self.proto.graph.output[:]
        self.proto.graph.output.extend(kept)
        return path


def _made(proto: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """Tensor → the node that makes it, in the file's (topological) order."""
    return {name: node for node in proto.graph.node for name in node.output if name}


def _common(a: onnx.ModelProto, b: onnx.ModelProto) -> dict[str, int]:
    """Tensors that both models compute, with their element type; inference may not get that far in one of them."""
    ours, theirs, others = infer(a), infer(b), _made(b)
    common = {}
    for name, node in _made(a).items():
        if name in others and node.op_type != "Constant":
            codes = {types[name][0] for types in (ours, theirs) if name in types} - {0}
            if len(codes) == 1:
                common[name] = codes.pop()
    return common


def _batches(tensors: Mapping[str, int], sizes: Mapping[str, Sequence[int]]) -> Iterator[dict[str, int]]:
    """Runs of tensors, as many as fit; one of unknown size counts as the largest known."""
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


def _checks(a: _Copy, b: _Copy, sample: Sample, provider: Provider, threads: int) -> dict[str, OutputCheck]:
    """How every tensor agrees that both models have."""
    types = infer(a.proto, {name: value.shape for name, value in sample.feeds.items()})
    sizes = {name: size for name, (_, shape) in types.items() if (size := known(shape)) is not None}
    checks: dict[str, OutputCheck] = {}
    for batch in _batches(_common(a.proto, b.proto), sizes):
        checks.update(_compared(a, b, batch, sample, provider, threads))
    return checks


def _compared(
    a: _Copy, b: _Copy, batch: Mapping[str, int], sample: Sample, provider: Provider, threads: int
) -> dict[str, OutputCheck]:
    """How each tensor agrees; by halves where a tensor cannot be an output, and without it in the end."""
    ours, theirs = a.exposing(batch), b.exposing(batch)
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
            for name, check in _compared(a, b, {n: batch[n] for n in part}, sample, provider, threads).items()
        }
    return {o.name: o for o in result.outputs if o.comparable and o.compared}
