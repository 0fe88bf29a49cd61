"""`python -m models`: build, optimise and check all systems, print a table, and write README.md if all were raced."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import track

from models import page
from models.gallery import SYSTEMS, check, serialised
from pwopt.errors import PwoptError
from pwopt.running.installation import silence_onnxruntime

app = typer.Typer(add_completion=False)


@app.command()
def main(
    names: Annotated[list[str] | None, typer.Argument(help="Systems to check; all by default.")] = None,
    build: Annotated[bool, typer.Option("--build", help="Write the .onnx files again first.")] = False,
    seconds: Annotated[
        float, typer.Option(help="Race each result against its original for this long; 0 for no races.")
    ] = 2.0,
    readme: Annotated[
        bool | None,
        typer.Option(
            "--readme/--no-readme",
            help="Write README.md; needs all systems.  (default: if all of them are raced)",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Build, optimise, check and race the systems of the gallery."""
    known = {s.name: s for s in SYSTEMS}
    unknown = set(names or ()) - set(known)
    if unknown:
        raise typer.BadParameter(f"there is no system {sorted(unknown)[0]!r}; there are {', '.join(known)}")
    complete = set(names or known) == set(known)
    if readme and not complete:
        raise typer.BadParameter("README.md covers all systems: name no system, or leave --readme out")
    silence_onnxruntime()
    chosen = [known[name] for name in names or known]
    for system in chosen if build else ():
        system.path.write_bytes(serialised(system))
    console = Console(emoji=False)
    try:
        rows = [check(s, seconds) for s in track(chosen, "checking", console=console, transient=True)]
    except PwoptError as error:
        console.print(f"[red]{escape(str(error))}[/red]")
        raise typer.Exit(error.exit_code) from error
    console.print(page.table(rows) if console.width >= page.WIDTH else page.blocks(rows))
    for row in rows:
        for fault in row.faults:
            console.print(f"[red]{row.system.name}: {escape(fault)}[/red]")
    if readme or (readme is None and complete and seconds > 0):
        path = Path(__file__).with_name("README.md")
        path.write_text(page.markdown(rows), encoding="utf-8")
        console.print(f"wrote {escape(str(path))}", soft_wrap=True)
    raise typer.Exit(1 if any(row.faults for row in rows) else 0)


if __name__ == "__main__":
    app(prog_name="python -m models")
