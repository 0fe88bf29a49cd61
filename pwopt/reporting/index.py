"""An HTML index of the reports of many models. Needs the extra `pwopt[report]`."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from math import exp, log
from pathlib import Path
from typing import Any

from pwopt.graph.storage import name_beside
from pwopt.reporting.document import load_templates
from pwopt.rewriting.ratios import is_vague


def render_index(rows: Sequence[Any], folder: Path) -> str:
    """Render the index of a folder of results as HTML.

    Parameters
    ----------
    rows : sequence of pwopt.optimizing.batch.BatchRow
    folder : Path
        Folder of the index. Reports that exist there are linked.
    """
    shown = sorted((r for r in rows if r.status != "failed"), key=lambda r: -(r.speedup or 0.0))
    measured = [r for r in rows if r.speedup is not None]
    clear = [r.speedup for r in measured if not is_vague(r.low, r.high)]
    links = {r.output: found for r in rows if (found := _find_report(folder, r.output))}
    text: str = (
        load_templates("html")
        .get_template("index.html.j2")
        .render(
            rows=shown,
            failed=[r for r in rows if r.status == "failed"],
            links=defaultdict(str, links),
            most=max([1.0, *clear]),
            mean=exp(sum(map(log, clear)) / len(clear)) if clear else None,
            measured=len(measured),
            clear=len(clear),
            faster=sum(r.faster for r in rows),
            pages=any(r.small_pages for r in shown),
            starts=any(r.start for r in shown),
        )
    )
    return text


def _find_report(folder: Path, output: str) -> str:
    path = name_beside(Path(output), ".report.html")
    return path.as_posix() if os.path.exists(folder / path) else ""
