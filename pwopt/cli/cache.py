"""pwopt cache"""

from __future__ import annotations

from pwopt.cli import options
from pwopt.errors import UsageError


def cache(action: options.Action = "show", debug: options.Debug = False) -> None:
    """Decisions of races on this machine: which measured rewrites pay."""
    from pwopt.cli import output as said
    from pwopt.rewriting.wording import counted
    from pwopt.selecting import cache as decisions

    console = said.console(wide=True)
    if action == "clear":
        console.print(f"{counted(decisions.clear(), 'decision')} forgotten")
        return
    if action != "show":
        raise UsageError(f"there is no action {action!r}; there are show and clear")
    found = list(decisions.entries())
    for entry in found:
        verdict = "[green]kept[/green]" if entry.low > 1 else "[yellow]dropped[/yellow]"
        interval = f"{entry.speedup:.3f}× \\[{entry.low:.3f}, {entry.high:.3f}]"
        console.print(f"{verdict}  {entry.pass_name}  {said.plain(entry.signature)}  {interval}")
        console.print(f"  [dim]{said.plain(entry.place)}[/dim]")
    console.print(f"{counted(len(found), 'decision')} in {said.plain(str(decisions.folder()))}")
