"""pwopt passes"""

from __future__ import annotations

#: Kinds of execution provider (`pwopt.rewriting.Pass.pays_on`).
EVERYWHERE = 3


def passes() -> None:
    """List the passes: what each one rewrites, and when."""
    from pwopt.cli import output as said
    from pwopt.passes import PASSES

    console = said.console()
    for p in PASSES:
        identity, _, rest = (p.__doc__ or "").partition("\n\n")
        where = "" if len(p.pays_on) == EVERYWHERE else f", on {' and '.join(sorted(p.pays_on))} providers"
        console.print(f"[bold]{p.name}[/bold]  [dim]({p.policy}{where})[/dim]\n  {' '.join(identity.split())}")
        console.print(f"  [dim]{' '.join(rest.split())}[/dim]\n", soft_wrap=False)
