"""`pwopt cache`: show or clear the tuning records of this machine."""

from __future__ import annotations

from pwopt.cli import options
from pwopt.errors import UsageError


def cache(
    action: options.Action = "show",
    details: options.DecisionDetails = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show or clear the decisions of earlier races on this machine: which measured rewrites are faster."""
    from pwopt.cli.output import escape_text, open_console, print_json
    from pwopt.reporting.report import to_json
    from pwopt.reporting.terminal import render_decisions, summarize_decisions
    from pwopt.rewriting.wording import format_count
    from pwopt.selecting import tuning_cache as decisions

    console = open_console(wide=True)
    if action not in ("show", "clear"):
        raise UsageError(f"{action!r} is not an action; choose show or clear")
    if action == "clear":
        forgotten = decisions.clear()
        if json:
            print_json(to_json({"forgotten": forgotten}))
        else:
            console.print(f"{format_count(forgotten, 'decision')} forgotten")
        return
    found = sorted(decisions.read_decisions(), key=lambda e: (e.place, e.pass_name, e.signature))
    if json:
        print_json(to_json({"folder": str(decisions.find_folder()), "decisions": [e.to_dict() for e in found]}))
        return
    (render_decisions if details else summarize_decisions)(found, open_console())
    console.print(f"{format_count(len(found), 'decision')} in {escape_text(str(decisions.find_folder()))}")
