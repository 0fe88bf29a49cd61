"""`pwopt passes`: list the passes."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from pwopt.cli import options
from pwopt.errors import UsageError

if TYPE_CHECKING:
    from pwopt.rewriting.driver import Pass

#: Number of kinds of execution provider (`pwopt.rewriting.Pass.pays_on`).
PROVIDER_KINDS = 3


def passes(
    name: options.PassName = None,
    plugin: options.Plugins = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """List all passes: what each one rewrites, and when. With NAME, print the documentation of one pass."""
    from pwopt.cli.output import escape_text, open_console, print_json
    from pwopt.reporting.report import to_json
    from pwopt.rewriting.wording import suggest
    from pwopt.selecting.pass_list import resolve_passes
    from pwopt.selecting.plugins import describe_origin

    found = list(resolve_passes(None, plugin or ()))
    if name is not None:
        known = [p.name for p in found]
        found = [p for p in found if p.name == name]
        if not found:
            raise UsageError(f"there is no pass {name!r}; {suggest(name, known)}")
    if json:
        records = [_record(p) for p in found]
        print_json(to_json(records if name is None else records[0]))
        return
    console = open_console()
    for p in found:
        where = "" if len(p.pays_on) == PROVIDER_KINDS else f", on {' and '.join(sorted(p.pays_on))} providers"
        source = "" if p.builtin else f", from {escape_text(describe_origin(p))}"
        console.print(f"[bold]{p.name}[/bold]  [dim]({p.policy}{where}{source})[/dim]", soft_wrap=True)
        console.print(f"  {escape_text(p.identity())}", soft_wrap=False)
        if name is not None:
            rest = (inspect.getdoc(type(p)) or "").partition("\n\n")[2]
            console.print("\n" + "\n".join(map(escape_text, rest.splitlines())), soft_wrap=True)
    if name is None:
        console.print("[dim]pwopt passes NAME prints the documentation of one pass[/dim]")


def _record(p: Pass) -> dict[str, object]:
    from pwopt.selecting.plugins import describe_origin

    return {
        "name": p.name,
        "policy": p.policy,
        "pays_on": sorted(p.pays_on),
        "identity": p.identity(),
        "origin": describe_origin(p),
        "documentation": inspect.getdoc(type(p)) or "",
    }
