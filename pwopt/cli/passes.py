"""pwopt passes"""

from __future__ import annotations


def passes() -> None:
    """List the passes: what each one rewrites, and when."""
    from pwopt.cli import output as said
    from pwopt.passes import PASSES

    console = said.console()
    for p in PASSES:
        identity, _, rest = (p.__doc__ or "").partition("\n\n")
        console.print(f"[bold]{p.name}[/bold]  [dim]({p.policy})[/dim]\n  {' '.join(identity.split())}")
        console.print(f"  [dim]{' '.join(rest.split())}[/dim]\n", soft_wrap=False)
