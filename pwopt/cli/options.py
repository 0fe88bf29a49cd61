"""Arguments and options of the commands, each defined once, and functions that parse their values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pwopt.errors import UsageError

if TYPE_CHECKING:
    from pwopt.running.providers import Provider as ExecutionProvider


def _number(
    option: str,
    takes: str,
    help: str,
    metavar: str = "NUMBER",
    *,
    kind: Callable[[Any], float] = float,
    least: float | None = None,
    show_default: bool = False,
) -> Any:
    """Define a numeric option. A value that is not such a number is refused in one sentence.

    Parameters
    ----------
    option : str
    takes : str
        What the option takes, with an example: the middle of that sentence.
    help, metavar : str
    kind : callable
        `int` or `float`.
    least : float, optional
        The smallest value.
    show_default : bool
    """

    def parse(text: Any) -> float:
        try:
            value = kind(text)
        except ValueError as error:
            noun = "whole number" if kind is int else "number"
            raise UsageError(f"{option} takes {takes}; {text!r} is no {noun}") from error
        if least is not None and value < least:
            raise UsageError(f"{option} takes {takes}; {text!r} is less than {least:g}")
        return value

    return typer.Option(option, parser=parse, metavar=metavar, help=help, show_default=show_default)


ModelPath = Annotated[Path, typer.Argument(metavar="MODEL", help="The ONNX model.", show_default=False)]
Original = Annotated[Path, typer.Argument(metavar="A", help="The original model.", show_default=False)]
Candidate = Annotated[Path, typer.Argument(metavar="B", help="The model to compare with it.", show_default=False)]
Raced = Annotated[
    list[Path],
    typer.Argument(metavar="MODEL", help="Models to time; ratios are relative to the first.", show_default=False),
]
Recorded = Annotated[
    list[Path],
    typer.Argument(
        metavar="MODEL", help="Models similar to those that will be optimised for this machine.", show_default=False
    ),
]
Action = Annotated[str, typer.Argument(help="show: list the decisions; clear: delete them.")]

Output = Annotated[
    Path | None,
    typer.Option(
        "-o", "--output", help="File for the optimised model.  (default: MODEL.pwopt.onnx)", show_default=False
    ),
]
ProfileOutput = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE.json",
        help="File for the results; with --scheduler, a folder.",
        show_default=False,
    ),
]
Provider = Annotated[
    str,
    typer.Option(
        help="Execution provider: cpu, cuda, cuda:1, openvino, webgpu, tensorrt-rtx:0… There is no fallback to another "
        "provider."
    ),
]
OnlyProvider = Annotated[
    str | None,
    typer.Option("--provider", help="Check only this execution provider.  (default: all)", show_default=False),
]
ProviderOptions = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="Provider option, named as in onnxruntime; repeatable.", show_default=False),
]
ProviderLibrary = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Library of a plug-in provider, if no installed wheel contains it; --provider then gives the provider's "
        "own name.",
        show_default=False,
    ),
]
Cost = Annotated[str, typer.Option(help="measured: decide by timing; analytic: decide from shapes only.")]
SingleShapes = Annotated[
    list[str] | None,
    typer.Option(
        "--shape",
        metavar="NAME=1x3x640x640",
        help="Size of an input with dynamic dimensions; repeatable.",
        show_default=False,
    ),
]
Rounds = Annotated[
    list[str] | None,
    typer.Option(
        "--shape",
        metavar="NAME=1x3x640x640",
        help="Size of a dynamic input; repeat for further rounds.  (default: two likely sizes)",
        show_default=False,
    ),
]
Inputs = Annotated[
    list[Path] | None,
    typer.Option(
        "--input",
        metavar="FILE",
        help="Input data: .npz, .npy, .pb, or a folder of such files; repeatable.",
        show_default=False,
    ),
]
Passes = Annotated[str | None, typer.Option(help="Passes to run, comma-separated.  (default: all)", show_default=False)]
Deny = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SITE|PASS",
        help="Do not rewrite this site (as listed in a report), or leave out this pass; repeatable.",
        show_default=False,
    ),
]
Threads = Annotated[
    int,
    _number(
        "--threads",
        "a whole number, such as 4",
        "Threads per operator for verifying and timing.",
        kind=int,
        least=1,
        show_default=True,
    ),
]
ThreadCounts = Annotated[
    str | None,
    typer.Option(
        "--threads",
        metavar="1,4",
        help="Threads per operator: optimise for the first number; do not get slower with the others.  "
        "(default: 1, and onnxruntime's own default)",
        show_default=False,
    ),
]
Effort = Annotated[
    str, typer.Option(metavar="quick|normal|thorough", help="Time limit for measuring: 10, 40 or 180 seconds.")
]
Budget = Annotated[
    float | None,
    _number(
        "--budget", "seconds, such as 30", "Time limit for all measuring in seconds; overrides --effort.", "SECONDS"
    ),
]
ModelBudget = Annotated[
    float, _number("--budget", "seconds, such as 30", "Seconds of timing per model.", "SECONDS", show_default=True)
]
Seconds = Annotated[
    float, _number("--seconds", "seconds, such as 8", "Seconds of timing per batch size.", "SECONDS", show_default=True)
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Do not use or store decisions of races on this machine.")]
TargetProfile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Use decisions that `pwopt profile` recorded on the target machine.", show_default=False
    ),
]
MaxGrowth = Annotated[
    float | None,
    _number("--max-growth", "a fraction, such as 0.1", "Let the model grow by at most this fraction.", "FRACTION"),
]
Target = Annotated[
    str,
    typer.Option(
        help="Runtime that the result is written for: portable, onnxruntime-cpu, onnxruntime-gpu or openvino."
    ),
]
Static = Annotated[bool, typer.Option("--static", help="Make the input sizes of --shape static in the result.")]
Opset = Annotated[
    int | None, _number("--opset", "a whole number, such as 17", "Convert the model to this opset first.", kind=int)
]
NameNodes = Annotated[bool, typer.Option("--name-nodes", help="Name every unnamed operator, for example Conv_y.")]
Rtol = Annotated[
    float | None,
    _number("--rtol", "a number, such as 1e-4", "Relative tolerance.  (default: by type, 1e-4 for float32)"),
]
Atol = Annotated[
    float | None,
    _number("--atol", "a number, such as 1e-5", "Absolute tolerance.  (default: by type, 1e-5 for float32)"),
]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Do not compare the result with the original.")]
Force = Annotated[bool, typer.Option("--force", help="Allow the output to replace the input.")]
Kinds = Annotated[str, typer.Option("--samples", help="Random inputs, comma-separated: normal, uniform, zeros, large.")]
Ranges = Annotated[
    list[str] | None,
    typer.Option(
        "--range",
        metavar="NAME=0:255",
        help="Smallest and largest value of a random input; repeatable.",
        show_default=False,
    ),
]
Invariants = Annotated[
    list[str] | None,
    typer.Option(
        "--invariant",
        metavar="NAME[:KEY=VALUE…]",
        help="Also measure an invariant on both models: conservation, isometry, gram, translation, permutation, "
        "locality, symmetry; repeatable.",
        show_default=False,
    ),
]
Rewrites = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.json",
        help="Report of the optimisation that produced B; names the rewrite that causes a difference.",
        show_default=False,
    ),
]
NoLocate = Annotated[bool, typer.Option("--no-locate", help="Do not look for the first tensor that differs.")]
Batch = Annotated[
    str | None,
    typer.Option(
        metavar="1,8,32", help="Batch sizes to time, for inputs with a dynamic first axis.", show_default=False
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")]
Every = Annotated[bool, typer.Option("--all", help="Also list convolutions with larger kernels.")]
Weights = Annotated[
    bool,
    typer.Option(
        "--properties", help="Describe the weights of pointwise maps instead: rank, spectrum, kind, unused channels."
    ),
]
Document = Annotated[
    Path | None,
    typer.Option(
        "--report", metavar="FILE.html", help="Write the full report: .html, .md or .json.", show_default=False
    ),
]
JsonReport = Annotated[
    Path | None, typer.Option("--report", metavar="FILE.json", help="Write the full report.", show_default=False)
]
Spectra = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="FILE.html",
        help="With --properties: write an HTML page with spectra, or .json.",
        show_default=False,
    ),
]
Plot = Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Plot the latencies.", show_default=False)]
RewriteDetails = Annotated[bool, typer.Option("--details", help="Print every rewrite and every skipped site.")]
DecisionDetails = Annotated[
    bool, typer.Option("--details", help="List every decision, not only their number for each kind of rewrite.")
]
FigureDetails = Annotated[
    bool,
    typer.Option(
        "--details", help="Print all figures of every output, including relative errors and units in the last place."
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Print a traceback for errors.")]

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors.")]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", help="Also print why each stage runs, which sizes were tried, and the results of races."
    ),
]
PassName = Annotated[
    str | None, typer.Argument(metavar="NAME", help="Print the documentation of this pass.", show_default=False)
]
Plugins = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        metavar="MODULE:CLASS",
        help="Add your own pass: a module next to the model, or path/to/module.py:Class; repeatable.",
        show_default=False,
    ),
]
Models = Annotated[
    list[Path],
    typer.Argument(
        metavar="MODEL", help="The ONNX model. With -d: several models, folders or patterns.", show_default=False
    ),
]
Folder = Annotated[
    Path | None,
    typer.Option("-d", "--directory", metavar="OUT", help="Folder for the results of many models.", show_default=False),
]
Workers = Annotated[
    int,
    _number(
        "--workers",
        "a whole number, such as 4",
        "With -d: number of processes. Only one of them measures at a time.",
        kind=int,
        least=1,
        show_default=True,
    ),
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Run on the workers of this dask.distributed scheduler; needs the package distributed.",
        show_default=False,
    ),
]
WorkerLabel = Annotated[
    str | None,
    typer.Option(
        metavar="LABEL", help="With --scheduler: only workers started with --resources LABEL=1.", show_default=False
    ),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Report what would be rewritten and timed; do not time, verify or write anything."),
]


def parse_provider(text: str, given: Sequence[str] | None, library: str | None = None) -> ExecutionProvider:
    """Parse a provider, and add its options and the file of its library."""
    from pwopt.running.providers import LIBRARY, Provider

    for pair in given or ():
        key, equals, _ = pair.partition("=")
        if not key or not equals:
            raise UsageError(f"the provider option {pair!r} is not of the form KEY=VALUE")
    if library is None:
        return Provider.parse(text).with_options(dict(pair.split("=", 1) for pair in given or ()))
    if text == "cpu":
        raise UsageError("--provider-library needs the name of a provider in that library; add --provider NAME")
    if "," in library:
        raise UsageError(f"the path {library!r} contains a comma; give --provider-library a path without one")
    return Provider.parse(",".join((text, f"{LIBRARY}={library}", *(given or ()))))


def parse_single_round(given: Sequence[str] | None) -> dict[str, tuple[int, ...]]:
    """Parse ``NAME=1x3x640x640`` into sizes by input name, with one size per input."""
    found = parse_rounds(given)
    if len(found) > 1:
        raise UsageError("only optimize and verify accept several sizes for one input; give one")
    return found[0] if found else {}


def parse_rounds(given: Sequence[str] | None) -> list[dict[str, tuple[int, ...]]]:
    """Parse ``NAME=1x3x640x640`` into rounds of sizes.

    The k-th size of an input belongs to round k. An input with a single size has it in all rounds.
    """
    from pwopt.inputs.input_specs import parse_shape

    sizes: dict[str, list[tuple[int, ...]]] = {}
    for name, shape in map(parse_shape, given or ()):
        sizes.setdefault(name, []).append(shape)
    count = max(map(len, sizes.values()), default=0)
    for name, shapes in sizes.items():
        if len(shapes) not in (1, count):
            raise UsageError(f"input {name!r} has {len(shapes)} sizes and another input has {count}; give 1 or {count}")
    return [{name: shapes[k % len(shapes)] for name, shapes in sizes.items()} for k in range(count)]


def parse_thread_counts(given: str | None) -> tuple[int, ...]:
    """Parse a comma-separated list of thread counts; an empty tuple if none is given."""
    try:
        return tuple(map(int, split_list(given or "")))
    except ValueError as error:
        raise UsageError(f"--threads takes numbers separated by commas, such as 1,4, not {given!r}") from error


def split_list(given: str) -> list[str]:
    """Split a comma-separated list."""
    return [word.strip() for word in given.split(",") if word.strip()]
