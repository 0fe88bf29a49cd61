"""pwopt doctor"""

from __future__ import annotations

from dataclasses import asdict

import typer

from pwopt.cli import options


def doctor(
    provider: options.OnlyProvider = None,
    provider_option: options.ProviderOptions = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Say what is installed, which execution providers really start, why others do not, and what would mend it."""
    from pwopt.cli import output as said
    from pwopt.errors import ProviderError
    from pwopt.reporting.report import to_json
    from pwopt.reporting.terminal import render_findings
    from pwopt.running.doctor import examine

    wanted = None if provider is None else options.placed(provider, provider_option)
    found = examine(wanted)
    if json:
        said.as_json(to_json([asdict(f) for f in found]))
    else:
        render_findings(found, said.console())
    last = found[-1]
    starts = last.ok if wanted is not None else any(f.ok for f in found if f.subject.endswith("ExecutionProvider"))
    raise typer.Exit(0 if starts else ProviderError.exit_code)
