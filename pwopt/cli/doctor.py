"""`pwopt doctor`: check the installation."""

from __future__ import annotations

from dataclasses import asdict

import typer

from pwopt.cli import options


def doctor(
    provider: options.OnlyProvider = None,
    provider_option: options.ProviderOptions = None,
    provider_library: options.ProviderLibrary = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Check the installation: versions, which execution providers start, why others fail, and how to fix that."""
    from pwopt.cli.output import open_console, print_json
    from pwopt.errors import ProviderError
    from pwopt.reporting.report import to_json
    from pwopt.reporting.terminal import render_findings
    from pwopt.running.doctor import ProviderFinding, check_installation

    wanted = None if provider is None else options.parse_provider(provider, provider_option, provider_library)
    found = check_installation(wanted)
    if json:
        print_json(to_json([asdict(f) for f in found]))
    else:
        render_findings(found, open_console())
    last = found[-1]
    starts = last.ok if wanted is not None else any(f.ok for f in found if isinstance(f, ProviderFinding))
    raise typer.Exit(0 if starts else ProviderError.exit_code)
