"""Short reports for notebooks and consoles. They need no optional dependency."""

from __future__ import annotations

from html import escape
from pathlib import Path

from pwopt.reporting.report import Report
from pwopt.reporting.text import format_speedup, sanitize
from pwopt.reporting.verdicts import format_verdict, list_claims, list_costs


def describe_in_one_line(report: Report) -> str:
    """Describe a result in one line: model, verdict, operators, speed-up."""
    _, title = format_verdict(report.equivalence, report)
    speed = "not timed" if report.latency is None else format_speedup(report.latency)
    operators = f"{report.before.nodes:,} → {report.after.nodes:,} operators"
    return f"{sanitize(Path(report.model).name)}: {title.lower()}, {operators}, {speed}"


def render_summary(report: Report) -> str:
    """Render the verdict, the main figures, sizes before and after, and notes as HTML."""
    _, title = format_verdict(report.equivalence, report)
    shown = [(f"<b>{_escape(figure)}</b>", _escape(what)) for figure, what in list_claims(report.equivalence, report)]
    figures = "".join(f"<li>{figure} {what}</li>" for figure, what in shown)
    cells = [(label, "".join(f"<td>{_escape(v)}</td>" for v in values)) for label, *values in list_costs(report)]
    rows = "".join(f"<tr><th scope='row'>{_escape(label)}</th>{values}</tr>" for label, values in cells)
    head = "<tr><td></td><th scope='col'>before</th><th scope='col'>after</th><th scope='col'>change</th></tr>"
    notes = "".join(f"<p>{_escape(note)}</p>" for note in report.notes)
    name = _escape(Path(report.model).name)
    return f"<div><h4>{name}: {_escape(title)}</h4><ul>{figures}</ul><table>{head}{rows}</table>{notes}</div>"


def _escape(value: str) -> str:
    return escape(sanitize(value))
