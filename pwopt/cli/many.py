"""`pwopt optimize` of many models, and the manner in which a command speaks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pwopt.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from pwopt.optimizing.batch import BatchRow, Runner
    from pwopt.optimizing.fleet import Fleet
    from pwopt.optimizing.request import Request


@dataclass(frozen=True)
class Manner:
    """How much is said, in which form, and the command line that asked for it."""

    details: bool
    json: bool
    quiet: bool
    verbose: bool
    debug: bool
    command: str


def fleet(scheduler: str | None, target: str | None) -> Fleet | None:
    """The cluster that was asked for."""
    if scheduler is None:
        if target is not None:
            raise UsageError("--target names workers of a cluster; add --scheduler ADDRESS")
        return None
    from pwopt.optimizing.fleet import Fleet, distributed

    distributed()
    return Fleet(scheduler, target)


def many(
    models: Sequence[Path],
    folder: Path,
    request: Request,
    manner: Manner,
    *,
    workers: int,
    report: Path | None,
    runner: Runner | None = None,
) -> None:
    """Optimise many models, a line for each as soon as it is known; ends with the largest of their exit codes."""
    from pwopt.cli import output as said
    from pwopt.optimizing.batch import index_json, jobs, optimize_many

    for given, name in ((request.output, "-o"), (report, "--report")):
        if given is not None:
            raise UsageError(f"{name} is for one model; with -d, results and reports go into the folder")
    console = said.console(quiet=manner.quiet or manner.json)
    if request.dry_run:
        for job in jobs(models, folder, request):
            console.print(f"{said.plain(str(job.model))} → {said.plain(str(job.output))}", soft_wrap=True)
        return
    with said.telling_progress(debug=manner.debug, quiet=manner.quiet, verbose=manner.verbose) as progress:

        def told(row: BatchRow) -> None:
            silent = manner.quiet or manner.json
            _line(row, said.console(stderr=True) if silent and row.status == "failed" else console)

        rows = optimize_many(models, folder, request, workers=workers, runner=runner, progress=progress, told=told)
    if manner.json:
        said.as_json(index_json(rows))
    done = [r for r in rows if r.status != "failed"]
    console.print(f"{len(done)} of {len(rows)} models in {said.plain(str(folder))}", soft_wrap=True)
    raise typer.Exit(max(r.code for r in rows))


def _line(row: BatchRow, console: Console) -> None:
    """What became of one model, on one line."""
    from pwopt.reporting.text import plain

    name = plain(Path(row.model).name)
    if row.status == "failed":
        console.print(f"[red]failed[/red]     {name}: {plain(row.sentence)}", soft_wrap=True)
        return
    faster = "           " if row.speedup is None else f"{row.speedup:5.2f}× [dim]±{_half(row):4.2f}[/dim]"
    nodes = f"{row.nodes[0]:>6,} → {row.nodes[1]:<6,}"
    colour = "green" if row.status == "done" else "dim"
    took = f"{row.seconds:5.0f} s"
    console.print(f"[{colour}]{row.status:<9}[/{colour}]  {faster}  {nodes} {took}  {name}", soft_wrap=True)


def _half(row: BatchRow) -> float:
    """Half of the interval of the speed-up."""
    return ((row.high or 0.0) - (row.low or 0.0)) / 2
