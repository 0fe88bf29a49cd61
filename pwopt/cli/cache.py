"""pwopt cache"""

from __future__ import annotations

from pwopt.cli import options
from pwopt.errors import UsageError


def cache(action: options.Action = "show", json: options.Json = False, debug: options.Debug = False) -> None:
    """Decisions of races on this machine: which measured rewrites pay."""
    from pwopt.cli import output as said
    from pwopt.reporting.report import to_json
    from pwopt.reporting.terminal import render_decisions
    from pwopt.rewriting.wording import counted
    from pwopt.selecting import cache as decisions

    console = said.console(wide=True)
    if action not in ("show", "clear"):
        raise UsageError(f"there is no action {action!r}; there are show and clear")
    if action == "clear":
        forgotten = decisions.forget()
        if json:
            said.as_json(to_json({"forgotten": forgotten}))
        else:
            console.print(f"{counted(forgotten, 'decision')} forgotten")
        return
    found = sorted(decisions.entries(), key=lambda e: (e.place, e.pass_name, e.signature))
    if json:
        said.as_json(to_json({"folder": str(decisions.folder()), "decisions": [e.told() for e in found]}))
        return
    render_decisions(found, said.console())
    console.print(f"{counted(len(found), 'decision')} in {said.plain(str(decisions.folder()))}")
