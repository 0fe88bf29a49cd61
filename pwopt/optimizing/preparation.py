"""First stages: a request is checked, sizes and samples are found, and the model that will be rewritten is made."""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from pathlib import Path

import onnx

from pwopt.errors import UsageError
from pwopt.evidence.certify import certify, unchecked
from pwopt.graph.files import from_proto, with_fixed_inputs
from pwopt.graph.model import Model
from pwopt.graph.opset import convert_opset
from pwopt.inputs.samples import Sample, draw_samples, read_samples
from pwopt.inputs.specs import check_shapes, input_specs
from pwopt.optimizing.request import EFFORTS, Request
from pwopt.rewriting.driver import Pass
from pwopt.rewriting.records import Site
from pwopt.running import installation
from pwopt.running.session import check_settings
from pwopt.running.size_trials import ChosenSizes, Sizes, choose_rounds, choose_sizes, explain_sizes
from pwopt.running.worker import Worker
from pwopt.selecting.rewrite_selection import Compilation, Environment
from pwopt.selecting.snapshot import select_passes, without_calls

#: Names at most that are suggested for one that is not there.
NEAR = 3


@dataclass(frozen=True)
class Problem:
    """A model, and what it is judged on.

    Attributes
    ----------
    source : Model
    original : Path
        Its file, perhaps a temporary one.
    samples : list of Sample
        Empty if nothing is run.
    sizes : mapping of input name to sizes
        What all figures are for.
    guessed : bool
        Whether nobody gave those sizes.
    why : tuple of str
        What the report says of how they were chosen.
    arena : Environment or None
        Where models run; None if they do not.
    """

    source: Model
    original: Path
    samples: list[Sample]
    sizes: Sizes
    guessed: bool
    why: tuple[str, ...]
    arena: Environment | None

    def guarded(self, stack: contextlib.ExitStack) -> Problem:
        """The same with a worker that tries candidates first, for as long as the stack lasts."""
        if self.arena is None:
            return self
        arena = self.arena
        worker = Worker(self.original, arena.provider, arena.threads, arena.samples[0].feeds)
        stack.enter_context(contextlib.closing(worker))
        return replace(self, arena=replace(arena, worker=worker))


def check_request(request: Request, path: Path | None) -> None:
    """Refuse what makes no sense, before any work is done.

    Raises
    ------
    UsageError
    """
    if request.cost not in ("measured", "analytic"):
        raise UsageError(f"the cost model {request.cost!r} is not one of: measured, analytic")
    if request.effort not in EFFORTS:
        raise UsageError(f"the effort {request.effort!r} is not one of: {', '.join(EFFORTS)}")
    for name in ("opset", "budget", "max_growth"):
        value = getattr(request, name)
        if value is not None and not isinstance(value, Real):
            raise UsageError(f"{name} is {value!r}; give a number")
    if not all(isinstance(threads, Integral) for threads in request.thread_counts):
        raise UsageError(f"threads is {request.threads!r}; give a whole number, or several")
    if request.output is not None and not isinstance(request.output, (str, os.PathLike)):
        raise UsageError(f"the output {request.output!r} is not a path")
    for threads in request.thread_counts or (1,):
        check_settings(threads, request.rtol, request.atol)
    select_passes(request.passes, request.plugins)
    if request.seconds < 0:
        raise UsageError(f"nothing can be measured in {request.seconds:g} seconds; give 0 or more")
    if request.max_growth is not None and not 0 <= request.max_growth < float("inf"):
        raise UsageError(f"a model cannot grow by {request.max_growth:g} of its size at most; give 0, 0.1 or more")
    if request.output is not None and path is not None and not request.force and same_file(request.output, path):
        raise UsageError(f"the output {str(request.output)!r} is the input; choose another, or force it")


def check_sites(sites: Iterable[Site], proto: onnx.ModelProto, *, renamed: bool, more: Sequence[Pass] = ()) -> None:
    """Refuse places to leave alone that no pass could name, before any work is done.

    Parameters
    ----------
    sites : iterable of Site
        The tensor is one that a node makes, or that a pass makes and calls by another tensor's name and
        a suffix.
    proto : onnx.ModelProto
    renamed : bool
        Whether tensors may get other names before the first pass runs.
    more : sequence of Pass
        Passes that run beside pwopt's and those of installed packages.

    Raises
    ------
    UsageError
        With the nearest names.
    """
    passes = [p.name for p in (*select_passes(None), *more)]
    tensors = dict.fromkeys(name for node in proto.graph.node for name in (*node.output, node.name) if name)
    named = (*tensors, *(t.name for t in (*proto.graph.input, *proto.graph.initializer)))
    made = tuple(f"{name}_" for name in named)
    for site in sites:
        name, tensor = site.pass_name, site.tensor
        if name in passes and (renamed or tensor in tensors or tensor.startswith(made)):
            continue
        wrong = f"no operator makes {tensor!r}" if name in passes else f"there is no pass {name!r}"
        likely = [name] if name in passes else difflib.get_close_matches(name, passes, 1)
        near = [tensor] if tensor in tensors else difflib.get_close_matches(tensor, tensors, NEAR, 0.5)
        found = [repr(f"{p}:{t}") for p in likely for t in near]
        hint = f"did you mean {' or '.join(found)}?" if found else "--details lists the sites of a model"
        raise UsageError(f"there is no place {str(site)!r} to leave alone: {wrong}; {hint}")


def same_file(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> bool:
    """Whether two paths name one existing file."""
    return os.path.exists(a) and os.path.exists(b) and os.path.samefile(a, b)


def gather(source: Model, original: Path, request: Request) -> Problem:
    """Sizes and samples, given or likely ones.

    Raises
    ------
    UsageError, ModelError, ProviderError
        If they do not fit the model, or it does not run.
    """
    specs, given = input_specs(source.proto), request.rounds
    first = given[0] if given else None
    for shapes in given:
        check_shapes(specs, shapes)
    if request.inputs is not None and len(given) > 1:
        raise UsageError("given inputs have their own sizes; several of --shape are for random ones")
    if request.verify and request.measured:
        installation.import_onnxruntime()
    runs = request.verify and installation.is_available()
    samples = [] if request.inputs is None else read_samples(request.inputs, specs, first)
    request.progress("choosing inputs", 0.0)
    if samples:
        chosen = [ChosenSizes({name: value.shape for name, value in samples[0].feeds.items()})]
    elif runs:
        chosen = choose_rounds(specs, source.proto, original, request.execution_provider, given, request.progress)
        samples = draw_samples(specs, [c.sizes for c in (chosen[:1] if request.static else chosen)])
    else:
        chosen = [choose_sizes(specs, source.proto, shapes=first)]
    guessed = not given and request.inputs is None and bool(specs)
    arena = Environment(request.execution_provider, request.first_threads, samples) if runs else None
    return Problem(source, original, samples, chosen[0].sizes, guessed, tuple(explain_sizes(chosen[0])), arena)


def plan(subject: Problem, request: Request, folder: Path) -> Compilation:
    """What will be rewritten: the model, in the opset and with the fixed inputs that were asked for.

    Raises
    ------
    UsageError
        If it cannot be converted.
    """
    target = source = subject.source
    if request.opset is not None and request.opset != source.opset:
        target = from_proto(convert_opset(source, request.opset), source.folder)
    if request.static:
        target = from_proto(with_fixed_inputs(target.proto, subject.sizes), source.folder)
    passes = select_passes(request.passes, request.plugins)
    target = without_calls(target, passes, request.denied, subject.sizes)
    kind = request.execution_provider.kind
    return Compilation(
        target, source, passes, request.denied, subject.sizes, folder, kind, request.max_growth,
        certifier=certify if request.verify else unchecked, thorough=request.effort == "thorough",
    )  # fmt: skip
