"""Arguments and options of the commands, each written once, and how their texts are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from pwopt.errors import UsageError

ModelPath = Annotated[Path, typer.Argument(metavar="MODEL", help="The ONNX model.", show_default=False)]
Original = Annotated[Path, typer.Argument(metavar="A", help="The original.", show_default=False)]
Candidate = Annotated[Path, typer.Argument(metavar="B", help="The model to compare with it.", show_default=False)]
Raced = Annotated[
    list[Path], typer.Argument(metavar="MODEL", help="The models; the first is the one to beat.", show_default=False)
]
Recorded = Annotated[
    list[Path],
    typer.Argument(metavar="MODEL", help="Models like those to be optimised for this machine.", show_default=False),
]
Action = Annotated[str, typer.Argument(help="show: list the decisions; clear: forget them.")]

Output = Annotated[
    Path | None, typer.Option("-o", "--output", help="The new model.  (default: MODEL.pwopt.onnx)", show_default=False)
]
ProfileOutput = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE.json",
        help="Where to write the profile; with --scheduler, a folder.",
        show_default=False,
    ),
]
Provider = Annotated[
    str, typer.Option(help="Execution provider: cpu, cuda, cuda:1, openvino… It runs there or not at all.")
]
OnlyProvider = Annotated[
    str | None, typer.Option("--provider", help="Start only this one.  (default: all)", show_default=False)
]
ProviderOptions = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE", help="Option of the provider, as onnxruntime names it; repeatable.", show_default=False
    ),
]
Cost = Annotated[str, typer.Option(help="measured: race the result; analytic: decide from shapes alone.")]
Shapes = Annotated[
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
        help="Size of a dynamic input; again for another round.  (default: two likely ones)",
        show_default=False,
    ),
]
Inputs = Annotated[
    list[Path] | None,
    typer.Option(
        "--input",
        metavar="FILE",
        help="Inputs to run on: .npz, .npy, .pb, or a folder of them; repeatable.",
        show_default=False,
    ),
]
Passes = Annotated[str | None, typer.Option(help="Passes to run, comma-separated.  (default: all)", show_default=False)]
Deny = Annotated[
    list[str] | None,
    typer.Option(metavar="SITE", help="Leave this place alone (a site from a report); repeatable.", show_default=False),
]
Threads = Annotated[int, typer.Option(min=1, help="Threads per operator while verifying and timing.")]
ThreadCounts = Annotated[
    str | None,
    typer.Option(
        "--threads",
        metavar="1,4",
        help="Threads per operator: the first number is optimised for, the others must not get slower.  "
        "(default: 1, and as many as onnxruntime takes)",
        show_default=False,
    ),
]
Effort = Annotated[
    str, typer.Option(metavar="quick|normal|thorough", help="How long to measure: 10, 40 or 180 seconds at most.")
]
Budget = Annotated[
    float | None,
    typer.Option(help="Seconds at most for all measuring, instead of what --effort says.", show_default=False),
]
ModelBudget = Annotated[float, typer.Option(help="Seconds of racing for each model.")]
Seconds = Annotated[float, typer.Option(help="Time to race the models, per batch size.")]
NoCache = Annotated[
    bool, typer.Option("--no-cache", help="Neither use nor keep the decisions of races on this machine.")
]
TargetProfile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Decide as `pwopt profile` found on another machine.", show_default=False),
]
MaxGrowth = Annotated[
    float | None,
    typer.Option(metavar="FRACTION", help="The model grows by this fraction at most.", show_default=False),
]
Static = Annotated[bool, typer.Option("--static", help="Fix the inputs to --shape in the result.")]
Opset = Annotated[int | None, typer.Option(help="Convert to this opset first.", show_default=False)]
NameNodes = Annotated[
    bool, typer.Option("--name-nodes", help="Give every operator without a name one, such as Conv_y.")
]
Rtol = Annotated[
    float | None, typer.Option(help="Relative tolerance.  (default: by type, 1e-4 for float32)", show_default=False)
]
Atol = Annotated[
    float | None, typer.Option(help="Absolute tolerance.  (default: by type, 1e-5 for float32)", show_default=False)
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
        help="Also measure a law on both models: conservation, isometry, gram, translation, permutation, "
        "locality, symmetry; repeatable.",
        show_default=False,
    ),
]
Rewrites = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.json",
        help="The report of the optimisation that made B, so that a rewrite at fault is named.",
        show_default=False,
    ),
]
NoLocate = Annotated[bool, typer.Option("--no-locate", help="Do not look for the first tensor that differs.")]
Batch = Annotated[
    str | None, typer.Option(metavar="1,8,32", help="Batch sizes to try, for dynamic first axes.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]
Every = Annotated[bool, typer.Option("--all", help="List k×k convolutions too, not only pointwise maps.")]
Weights = Annotated[
    bool, typer.Option("--properties", help="The weights of pointwise maps instead: rank, spectrum, kind, channels.")
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
        help="With --properties: write them as a page with spectra, or as .json.",
        show_default=False,
    ),
]
Plot = Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Draw the latencies.", show_default=False)]
RewriteDetails = Annotated[bool, typer.Option("--details", help="Print every rewrite and every refusal.")]
FigureDetails = Annotated[
    bool, typer.Option("--details", help="Print every figure of every output, relative errors and units too.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback for errors.")]

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Also say why each stage is taken, which sizes were tried, and races.")
]
PassName = Annotated[
    str | None, typer.Argument(metavar="NAME", help="A pass to read everything about.", show_default=False)
]
Plugins = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        metavar="MODULE:CLASS",
        help="A pass of your own: a module beside the model, or path/to/module.py:Class; repeatable.",
        show_default=False,
    ),
]
Models = Annotated[
    list[Path],
    typer.Argument(
        metavar="MODEL", help="The ONNX model; or several, folders and patterns, with -d.", show_default=False
    ),
]
Folder = Annotated[
    Path | None,
    typer.Option("-d", "--directory", metavar="OUT", help="Folder for the results of many models.", show_default=False),
]
Workers = Annotated[int, typer.Option(min=1, help="With -d: processes; their races wait for each other.")]
Scheduler = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="A dask.distributed scheduler whose workers do the work; needs pwopt[fleet].",
        show_default=False,
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        metavar="LABEL", help="With --scheduler: only workers started with --resources LABEL=1.", show_default=False
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be rewritten and raced; race, verify and write nothing.")
]


def placed(provider: str, given: Sequence[str] | None) -> str:
    """A provider with its options, as one text."""
    from pwopt.running.providers import Provider, with_options

    pairs = [text.partition("=") for text in given or ()]
    for text, (key, equals, _) in zip(given or (), pairs, strict=True):
        if not key or not equals:
            raise UsageError(f"the provider option {text!r} is not of the form KEY=VALUE")
    named = with_options(provider, {key: value for key, _, value in pairs})
    Provider.parse(named)
    return named


def one_round(given: Sequence[str] | None) -> dict[str, tuple[int, ...]]:
    """Texts of the form ``NAME=1x3x640x640`` as sizes by name; an input may have one only."""
    found = rounds(given)
    if len(found) > 1:
        raise UsageError("an input has two sizes; only optimize and verify take several")
    return found[0] if found else {}


def rounds(given: Sequence[str] | None) -> list[dict[str, tuple[int, ...]]]:
    """Sizes that inputs are given k times are the k-th round; those given once hold for all."""
    from pwopt.inputs.specs import parse_shape

    sizes: dict[str, list[tuple[int, ...]]] = {}
    for name, shape in map(parse_shape, given or ()):
        sizes.setdefault(name, []).append(shape)
    count = max(map(len, sizes.values()), default=0)
    for name, shapes in sizes.items():
        if len(shapes) not in (1, count):
            raise UsageError(f"input {name!r} has {len(shapes)} sizes and another {count}; give one or as many")
    return [{name: shapes[k % len(shapes)] for name, shapes in sizes.items()} for k in range(count)]


def thread_counts(given: str | None) -> tuple[int, ...]:
    """Numbers of threads from a list with commas; none if none were given."""
    try:
        return tuple(map(int, words(given or "")))
    except ValueError as error:
        raise UsageError(f"the threads {given!r} are not of the form 1,4") from error


def words(given: str) -> list[str]:
    """The parts of a list with commas."""
    return [word.strip() for word in given.split(",") if word.strip()]
