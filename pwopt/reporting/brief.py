"""The top of a report for notebooks, which bring their own style: verdict, figures, notes. Needs no extra."""

from __future__ import annotations

from html import escape
from pathlib import Path

from pwopt.reporting.report import Report
from pwopt.reporting.text import harmless
from pwopt.reporting.verdicts import claims, costs, verdict


def top(report: Report) -> str:
    """A report's verdict, its few figures, sizes before and after, and notes, as HTML."""
    _, said = verdict(report.equivalence, report)
    shown = [(f"<b>{_text(figure)}</b>", _text(what)) for figure, what in claims(report.equivalence, report)]
    figures = "".join(f"<li>{figure} {what}</li>" for figure, what in shown)
    cells = [(label, "".join(f"<td>{_text(v)}</td>" for v in values)) for label, *values in costs(report)]
    rows = "".join(f"<tr><th scope='row'>{_text(label)}</th>{values}</tr>" for label, values in cells)
    head = "<tr><td></td><th scope='col'>before</th><th scope='col'>after</th><th scope='col'>change</th></tr>"
    notes = "".join(f"<p>{_text(note)}</p>" for note in report.notes)
    name = _text(Path(report.model).name)
    return f"<div><h4>{name}: {_text(said)}</h4><ul>{figures}</ul><table>{head}{rows}</table>{notes}</div>"


def _text(value: str) -> str:
    return escape(harmless(value))
