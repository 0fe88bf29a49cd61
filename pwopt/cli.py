"""The command line."""

from __future__ import annotations

import contextlib
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from pwopt import bench, inspection, runtime, samples
from pwopt import cache as decisions
from pwopt.document import check_available, document, kind_of, latencies, spectra
from pwopt.errors import PwoptError, UsageError
from pwopt.inputs import parse_shape
from pwopt.invariants import INVARIANTS
from pwopt.laws import parse_law
from pwopt.optimizer import BUDGET, RACE_SECONDS, optimize, same_file
from pwopt.passes import PASSES
from pwopt.properties import properties
from pwopt.report import (
    SCHEMA,
    Comparison,
    Report,
    plain,
    render,
    render_benchmark,
    render_difference,
    render_elsewhere,
    render_equivalence,
    render_figures,
    render_laws,
    render_properties,
    render_samples,
    render_sizes,
    rewrites_from,
    to_json,
)
from pwopt.shapes import written
from pwopt.storage import replacing
from pwopt.targets import profile
from pwopt.verify import verify
from pwopt.wording import counted

#: Exit code for a defect of pwopt itself.
INTERNAL_ERROR = 5

app = typer.Typer(
    name="pwopt",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Make exported ONNX models faster, exactly: fold what is linear across channels, verify, measure.",
    epilog="Exit codes: 0 done; 1 not equivalent, nothing written; 2 usage; 3 model unreadable or invalid; "
    "4 execution provider unavailable; 5 internal error.",
)

ModelPath = Annotated[Path, typer.Argument(metavar="MODEL", help="The ONNX model.", show_default=False)]
Shapes = Annotated[
    list[str] | None,
    typer.Option(
        "--shape",
        metavar="NAME=1x3x640x640",
        help="Size of an input with dynamic dimensions; repeatable.",
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
Provider = Annotated[str, typer.Option(help="Execution provider: cpu, cuda, openvino… It runs there or not at all.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads per operator while verifying and timing.")]
Rtol = Annotated[
    float | None, typer.Option(help="Relative tolerance.  (default: by type, 1e-4 for float32)", show_default=False)
]
Atol = Annotated[
    float | None, typer.Option(help="Absolute tolerance.  (default: by type, 1e-5 for float32)", show_default=False)
]
Json = Annotated[
    Path | None, typer.Option("--report", metavar="FILE.json", help="Write the full report.", show_default=False)
]
Document = Annotated[
    Path | None,
    typer.Option(
        "--report", metavar="FILE.html", help="Write the full report: .html, .md or .json.", show_default=False
    ),
]


def _shapes(given: Sequence[str] | None) -> dict[str, tuple[int, ...]]:
    rounds = _rounds(given)
    if len(rounds) > 1:
        raise UsageError("an input has two sizes; only verify takes several")
    return rounds[0] if rounds else {}


def _rounds(given: Sequence[str] | None) -> list[dict[str, tuple[int, ...]]]:
    """Sizes that inputs are given k times are the k-th round; those given once hold for all."""
    sizes: dict[str, list[tuple[int, ...]]] = {}
    for name, shape in map(parse_shape, given or ()):
        sizes.setdefault(name, []).append(shape)
    count = max(map(len, sizes.values()), default=0)
    for name, shapes in sizes.items():
        if len(shapes) not in (1, count):
            raise UsageError(f"input {name!r} has {len(shapes)} sizes and another {count}; give one or as many")
    return [{name: shapes[k % len(shapes)] for name, shapes in sizes.items()} for k in range(count)]


def _list(given: str) -> list[str]:
    return [word.strip() for word in given.split(",") if word.strip()]


def _write(path: Path | None, content: str) -> None:
    if path is None:
        return
    try:
        with replacing(path) as stream:
            stream.write(content.encode())
    except OSError as error:
        raise UsageError(f"the report {str(path)!r} cannot be written: {error.strerror}") from error


def _document(path: Path | None, content: Report | Comparison) -> None:
    if path is not None:
        _write(path, document(content, kind_of(path)))


def _check_report(path: Path | None, *others: Path) -> None:
    """Refuse a report that would replace a model, or that cannot be written, before any work is done."""
    if path is None:
        return
    if any(path.absolute() == other.absolute() or same_file(path, other) for other in others):
        raise UsageError(f"the report {str(path)!r} would replace a model; choose another file")
    if not path.resolve().parent.is_dir():
        raise UsageError(f"the report {str(path)!r} cannot be written: there is no such folder")


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, float], None]]:
    if not console.is_terminal:
        yield lambda _stage, _done: None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=1.0)

        def update(stage: str, done: float) -> None:
            bar.update(task, description=stage, completed=done)

        yield update


@app.command("optimize")
def optimize_command(
    context: typer.Context,
    model: ModelPath,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The new model.  (default: MODEL.pwopt.onnx)", show_default=False),
    ] = None,
    provider: Provider = "cpu",
    cost: Annotated[
        str, typer.Option(help="measured: race the result; analytic: decide from shapes alone.")
    ] = "measured",
    shape: Shapes = None,
    inputs: Inputs = None,
    passes: Annotated[
        str | None, typer.Option(help="Passes to run, comma-separated.  (default: all)", show_default=False)
    ] = None,
    deny: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SITE", help="Leave this place alone (a site from a report); repeatable.", show_default=False
        ),
    ] = None,
    threads: Threads = 1,
    budget: Annotated[
        float, typer.Option(help="Seconds at most for racing rewrites that only a clock can judge.")
    ] = BUDGET,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Neither use nor keep the decisions of races on this machine.")
    ] = False,
    target_profile: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Decide as `pwopt profile` found on another machine.", show_default=False),
    ] = None,
    static: Annotated[bool, typer.Option("--static", help="Fix the inputs to --shape in the result.")] = False,
    opset: Annotated[int | None, typer.Option(help="Convert to this opset first.", show_default=False)] = None,
    report: Document = None,
    rtol: Rtol = None,
    atol: Atol = None,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not compare the result with the original.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Allow the output to replace the input.")] = False,
    details: Annotated[bool, typer.Option("--details", help="Print every rewrite and every refusal.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback for errors.")] = False,
) -> None:
    """Optimise MODEL, verify the result against it, and write it only if equivalent."""
    out = output if output is not None else model.parent / f"{model.stem}.pwopt.onnx"
    if not force and same_file(out, model):
        raise UsageError(f"the output {str(out)!r} is the input; choose another -o, or pass --force")
    _check_report(report, model, out)
    check_available(report)
    console = Console(highlight=False)
    try:
        with _progress(Console(stderr=True)) as progress:
            result = optimize(
                model,
                out,
                provider=provider,
                cost_model=cost,
                shapes=_shapes(shape),
                inputs=inputs or None,
                passes=None if passes is None else _list(passes),
                deny=deny or (),
                threads=threads,
                static=static,
                opset=opset,
                rtol=rtol,
                atol=atol,
                check=not no_verify,
                race_seconds=RACE_SECONDS,
                budget=budget,
                cache=not no_cache,
                target_profile=target_profile,
                force=force,
                progress=progress,
            )
    except PwoptError as error:
        failed = getattr(error, "report", None)
        if failed is not None:
            render_equivalence(failed.equivalence, console)
            render_difference(failed.equivalence, console)
            _document(report, replace(failed, command=context.obj))
        raise
    render(result.report, console, details)
    _document(report, replace(result.report, command=context.obj))
    console.print(f"wrote {plain(str(out))}" + (f" and {plain(str(report))}" if report else ""), soft_wrap=True)


@app.command("verify")
def verify_command(
    context: typer.Context,
    original: Annotated[Path, typer.Argument(metavar="A", help="The original.", show_default=False)],
    candidate: Annotated[Path, typer.Argument(metavar="B", help="The model to compare with it.", show_default=False)],
    provider: Provider = "cpu",
    shape: Annotated[
        list[str] | None,
        typer.Option(
            "--shape",
            metavar="NAME=1x3x640x640",
            help="Size of a dynamic input; again for another round.  (default: two likely ones)",
            show_default=False,
        ),
    ] = None,
    inputs: Inputs = None,
    kinds: Annotated[
        str, typer.Option("--samples", help=f"Random inputs, comma-separated: {', '.join(samples.KINDS)}.")
    ] = ",".join(samples.DEFAULT_KINDS),
    ranges: Annotated[
        list[str] | None,
        typer.Option(
            "--range",
            metavar="NAME=0:255",
            help="Smallest and largest value of a random input; repeatable.",
            show_default=False,
        ),
    ] = None,
    invariants: Annotated[
        list[str] | None,
        typer.Option(
            "--invariant",
            metavar="NAME[:KEY=VALUE…]",
            help=f"Also measure a law on both models: {', '.join(INVARIANTS)}; repeatable.",
            show_default=False,
        ),
    ] = None,
    rewrites: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="The report of the optimisation that made B, so that a rewrite at fault is named.",
            show_default=False,
        ),
    ] = None,
    details: Annotated[
        bool, typer.Option("--details", help="Print every figure of every output, relative errors and units too.")
    ] = False,
    no_locate: Annotated[
        bool, typer.Option("--no-locate", help="Do not look for the first tensor that differs.")
    ] = False,
    threads: Threads = 1,
    rtol: Rtol = None,
    atol: Atol = None,
    report: Document = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback for errors.")] = False,
) -> None:
    """Compare two models, whoever made the second: exit 0 if equivalent, 1 if not, more if they cannot be compared."""
    _check_report(report, original, candidate)
    check_available(report)
    records = () if rewrites is None else rewrites_from(rewrites)
    asked = [parse_law(text) for text in invariants or ()]
    console = Console(highlight=False)
    with _progress(Console(stderr=True)) as progress:
        equivalence = verify(
            original, candidate, provider=provider, threads=threads, shapes=_rounds(shape), inputs=inputs or None,
            kinds=_list(kinds), ranges=dict(map(samples.parse_range, ranges or ())), rtol=rtol, atol=atol,
            locate=not no_locate, rewrites=records, laws=asked, progress=lambda stage: progress(stage, 0.0),
        )  # fmt: skip
    console.print("[green]equivalent[/green]" if equivalence.passed else "[red]not equivalent[/red]")
    render_samples(equivalence, provider, console)
    render_equivalence(equivalence, console)
    render_figures(equivalence, console, details)
    render_laws(equivalence, console)
    render_difference(equivalence, console)
    render_elsewhere(equivalence, console)
    environment = runtime.environment(provider, threads)
    content = Comparison(str(original), str(candidate), provider, environment, equivalence, context.obj)
    _document(report, content)
    raise typer.Exit(0 if equivalence.passed else 1)


@app.command("inspect")
def inspect_command(
    model: ModelPath,
    shape: Shapes = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    every: Annotated[bool, typer.Option("--all", help="List k×k convolutions too, not only pointwise maps.")] = False,
    weights: Annotated[
        bool,
        typer.Option("--properties", help="The weights of pointwise maps instead: rank, spectrum, kind, channels."),
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html",
            help="With --properties: write them as a page with spectra, or as .json.",
            show_default=False,
        ),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback for errors.")] = False,
) -> None:
    """List every pointwise map of MODEL: its size, its chain, what would be done with it and why not more."""
    if weights:
        _check_report(report, model)
        check_available(report)
        listed = properties(model, shapes=_shapes(shape))
        if report is not None:
            _write(
                report, spectra(listed, model) if kind_of(report) == "html" else to_json([asdict(m) for m in listed])
            )
        if json:
            sys.stdout.write(to_json([asdict(m) for m in listed]))
        else:
            render_properties(listed, Console(highlight=False))
        return
    if report is not None:
        raise UsageError("only --properties are written to a file; add it, or use --json")
    found = inspection.inspect(model, shapes=_shapes(shape))
    maps = [m for m in found if every or m.single_tap]
    if json:
        sys.stdout.write(to_json([asdict(m) for m in maps]))
        return
    console = Console(highlight=False, soft_wrap=True)
    for m in maps:
        kernel = "×".join(map(str, m.kernel)) or "pointwise"
        space = written(m.space) if m.space is not None else "?"
        work = f"{m.macs:,} multiply-adds" if m.macs is not None else "size not known"
        chain = f"  [cyan]chain {m.chain}[/cyan]" if m.chain is not None else ""
        console.print(f"[bold]{plain(m.tensor)}[/bold]  {m.op} {m.channels}  {kernel}  at {space}  {work}{chain}")
        alone = "nothing to do: no linear map feeds or reads it directly"
        for line in m.decisions or (alone if m.chain is None else "first of its chain",):
            console.print(f"    {plain(line)}", style="dim")
    render_sizes(found.shapes, console)
    console.print(counted(len(maps), "map"))


@app.command("passes")
def passes_command() -> None:
    """List the passes: what each one rewrites, and when."""
    console = Console(highlight=False)
    for p in PASSES:
        identity, _, rest = (p.__doc__ or "").partition("\n\n")
        console.print(f"[bold]{p.name}[/bold]  [dim]({p.policy})[/dim]\n  {' '.join(identity.split())}")
        console.print(f"  [dim]{' '.join(rest.split())}[/dim]\n", soft_wrap=False)


@app.command("bench")
def bench_command(
    models: Annotated[
        list[Path],
        typer.Argument(metavar="MODEL", help="The models; the first is the one to beat.", show_default=False),
    ],
    provider: Provider = "cpu",
    threads: Threads = 1,
    shape: Shapes = None,
    batch: Annotated[
        str | None,
        typer.Option(metavar="1,8,32", help="Batch sizes to try, for dynamic first axes.", show_default=False),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Time to race the models, per batch size.")] = RACE_SECONDS,
    report: Json = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Draw the latencies.", show_default=False)
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback for errors.")] = False,
) -> None:
    """Time models side by side: latency, cold start, memory, and where the time goes."""
    _check_report(report, *models)
    if report is not None and kind_of(report) != "json":
        raise UsageError(f"bench reports in JSON only; call it {str(report.with_suffix('.json'))!r}")
    _check_report(plot, *models)
    if plot is not None and plot.suffix.lower() != ".svg":
        raise UsageError(f"the plot is an SVG; call it {str(plot.with_suffix('.svg'))!r}")
    check_available(plot)
    try:
        batches = [int(b) for b in batch.split(",")] if batch else []
    except ValueError as error:
        raise UsageError(f"the batch sizes {batch!r} are not of the form 1,8,32") from error
    with _progress(Console(stderr=True)) as progress:
        rows = bench.benchmark(
            models, provider=provider, threads=threads, shapes=_shapes(shape), batches=batches, seconds=seconds,
            progress=progress,
        )  # fmt: skip
    render_benchmark(rows, Console(highlight=False))
    content = {
        "schema": SCHEMA,
        "environment": runtime.environment(provider, threads),
        "rows": [asdict(r) for r in rows],
    }
    _write(report, to_json(content))
    if plot is not None:
        _write(plot, latencies(rows))


@app.command("profile")
def profile_command(
    models: Annotated[
        list[Path],
        typer.Argument(metavar="MODEL", help="Models like those to be optimised for this machine.", show_default=False),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.json", help="Where to write the profile.")],
    provider: Provider = "cpu",
    threads: Threads = 1,
    shape: Shapes = None,
    budget: Annotated[float, typer.Option(help="Seconds of racing for each model.")] = BUDGET,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback for errors.")] = False,
) -> None:
    """Record which measured rewrites pay on this machine, for `optimize --target-profile` on another."""
    _check_report(output, *models)
    with _progress(Console(stderr=True)) as progress:
        found = profile(
            models, provider=provider, threads=threads, shapes=_shapes(shape), budget=budget, progress=progress
        )
    found.save(output)
    Console(highlight=False, soft_wrap=True).print(
        f"{sum(e.low > 1 for e in found.entries)} of {len(found.entries)} kinds of rewrites pay here; "
        f"wrote {plain(str(output))}"
    )


@app.command("cache")
def cache_command(
    action: Annotated[str, typer.Argument(help="show: list the decisions; clear: forget them.")] = "show",
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback for errors.")] = False,
) -> None:
    """Decisions of races on this machine: which measured rewrites pay."""
    console = Console(highlight=False, soft_wrap=True)
    if action == "clear":
        console.print(f"{counted(decisions.clear(), 'decision')} forgotten")
        return
    if action != "show":
        raise UsageError(f"there is no action {action!r}; there are show and clear")
    found = list(decisions.entries())
    for entry in found:
        verdict = "[green]kept[/green]" if entry.low > 1 else "[yellow]dropped[/yellow]"
        interval = f"{entry.speedup:.3f}× \\[{entry.low:.3f}, {entry.high:.3f}]"
        console.print(f"{verdict}  {entry.pass_name}  {plain(entry.signature)}  {interval}")
        console.print(f"  [dim]{plain(entry.place)}[/dim]")
    console.print(f"{counted(len(found), 'decision')} in {plain(str(decisions.folder()))}")


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"pwopt {runtime.environment('cpu', 1)['pwopt']}")
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: errors become one sentence on stderr and an exit code; with --debug, a traceback as well."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    try:
        if not debug:
            runtime.silence()
        app(arguments, obj=shlex.join(["pwopt", *arguments]))
    except PwoptError as error:
        _fail(str(error), error.exit_code, debug)
    except Exception as error:
        text = f"internal error ({type(error).__name__}: {error}); please report it with the output of --debug"
        _fail(text, INTERNAL_ERROR, debug)


def _fail(sentence: str, code: int, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    Console(stderr=True, highlight=False).print(f"[red]pwopt:[/red] {plain(sentence)}", soft_wrap=True)
    raise SystemExit(code)
