"""Reports as documents: a self-contained HTML page, or Markdown. Needs the extra `pwopt[report]`."""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from pwopt.evidence.equivalence import EXCUSED, FLOOR_FACTOR, OutputCheck
from pwopt.evidence.metrics import TOLERANCES
from pwopt.graph.reasons import generalize
from pwopt.graph.shapes import format_shape
from pwopt.reporting.drawing import BOX_HEIGHT, BOX_WIDTH, draw
from pwopt.reporting.drawing import format_path as wire
from pwopt.reporting.notes import explain_profile
from pwopt.reporting.report import LAYOUT_CHANGES, Comparison, Report
from pwopt.reporting.text import (
    ELEMENTWISE_FIGURES,
    FIGURE_LABELS,
    format_figures,
    format_growth,
    format_huge_pages,
    format_speedup,
    list_start_rows,
    sanitize,
)
from pwopt.reporting.verdicts import (
    format_count,
    format_percent,
    format_scientific,
    format_verdict,
    list_claims,
    list_costs,
)
from pwopt.rewriting.ratios import format_interval, format_ratio, is_vague, name_ratio
from pwopt.rewriting.records import Rewrite, Skip
from pwopt.running.bench import Row
from pwopt.selecting.weight_properties import Properties

#: Script that filters the table of layers. The content security policy of a page allows only this script, by its hash.
SCRIPT = (Path(__file__).parent / "templates" / "filter.js").read_text(encoding="utf-8").strip()
#: Number of outputs with plots; the others follow in a table.
MAX_PLOTTED = 8
#: Number of operators listed with their time; the others are summed up.
MAX_OPERATORS_LISTED = 12
#: Number of drawn rewrites per pass. More would make the page slow to open on a phone.
MAX_DRAWN = 200
#: Number of sites listed per reason for skipping them.
MAX_LISTED = 400


@dataclass(frozen=True)
class PassSummary:
    """Rewrites of one pass: identity, rewrites, multiply-adds saved, growth of weights, and certificates."""

    name: str
    formula: str
    rewrites: tuple[Rewrite, ...]
    saved: int
    growth: str
    certificates: str


@dataclass(frozen=True)
class SkipGroup:
    """Sites that one pass skipped for one reason."""

    name: str
    reason: str
    skips: tuple[Skip, ...]


def render_properties_page(found: Properties, model: Path) -> str:
    """Render a page with the properties of the weights of every pointwise map."""
    text: str = (
        load_templates("html").get_template("properties.html.j2").render(found=found, model=model.name, plot=_plot)
    )
    return text


def render_latencies(rows: Sequence[Row]) -> str:
    """Plot the results of `bench` as SVG."""
    return _plot("latencies", rows)


def render_document(content: Report | Comparison, kind: str) -> str:
    """Render a report.

    Parameters
    ----------
    content : Report or Comparison
    kind : {"html", "markdown", "json"}
    """
    if kind == "json":
        return content.to_json()
    template = load_templates(kind).get_template("report.html.j2" if kind == "html" else "report.md.j2")
    text: str = template.render(**_template_values(content), plot=_plot)
    return text if kind == "html" else re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _plot(kind: str, *values: Any) -> str:
    """Draw a plot, and only then import matplotlib, which is large and optional."""
    from pwopt.reporting import plots

    return str(getattr(plots, f"draw_{kind}")(*values))


def load_templates(kind: str) -> Any:
    """Load the templates. Every value is escaped: by jinja2 for HTML, by `escape_markdown` for Markdown."""
    jinja2 = import_module("jinja2")
    html = kind == "html"
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pwopt.reporting", "templates"), autoescape=html, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined, finalize=_sanitize_value if html else escape_markdown,
    )  # fmt: skip
    environment.filters.update(
        count=format_count, ms=lambda v: f"{v:.2f} ms", short=lambda v: format_scientific(f"{v:.2g}"),
        size=format_shape,
        clipped=clip, percent=format_percent, ratio=format_speedup, start_rows=list_start_rows, gained=format_gain,
        gain_of_pages=format_huge_pages,
        svg=jinja2.utils.markupsafe.Markup if html else str,
    )  # fmt: skip
    environment.globals.update(draw=draw, wire=wire, BOX_WIDTH=BOX_WIDTH, BOX_HEIGHT=BOX_HEIGHT)
    environment.globals.update(
        interval=format_interval, ratio_of=format_ratio, is_vague=is_vague, name_ratio=name_ratio
    )
    return environment


def _sanitize_value(value: Any) -> Any:
    """Replace control and direction characters in text; markup that jinja2 already escaped stays."""
    return sanitize(value) if type(value) is str else value


def escape_markdown(value: Any) -> str:
    """Escape text so that Markdown shows it literally, also in a table."""
    text = sanitize(" ".join(str(value).split()) if isinstance(value, str) else str(value))
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#$@])", r"\\\1", text)


def clip(text: str, most: int = 20) -> str:
    """Shorten a long name to its end, which usually distinguishes it from others."""
    return text if len(text) <= most else "…" + text[1 - most :]


def format_gain(milliseconds: float) -> str:
    """Format a number with its sign, or without one if it rounds to zero."""
    text = f"{milliseconds:+.3f}".replace("-", "−")
    return text if text.strip("+−0.") else text[1:]


def _template_values(content: Report | Comparison) -> dict[str, Any]:
    """Collect the values that the templates use."""
    equivalence, report = content.equivalence, content if isinstance(content, Report) else None
    tone, title = format_verdict(equivalence, report)
    listed = (report.layers if report is not None else None) or ()
    outputs = sorted(equivalence.outputs, key=lambda o: (o.passed, -o.max_abs)) if equivalence is not None else []
    tried = report.candidate if report is not None else None
    operators = tried.operators if tried is not None else report.operators if report is not None else None
    raced = tried.latency if tried is not None else report.latency if report is not None else None
    return {
        "report": report,
        "content": content,
        "equivalence": equivalence,
        "model": Path(content.model).name,
        "result": Path(content.result).name if content.result else "",
        "tone": tone,
        "verdict": title,
        "claims": list(list_claims(equivalence, report)),
        "costs": list_costs(report) if report is not None else [],
        "outputs": outputs[:MAX_PLOTTED],
        "others": outputs[MAX_PLOTTED:],
        "figures": _figure_rows,
        "times": _operator_times(operators) if operators else [],
        "profiled": list(explain_profile(raced, operators)) if raced is not None else [],
        "raced": raced,
        "longest": max([1e-9, *(max(x.before_ms, x.after_ms) for x in listed)]),
        "total": sum(x.before_ms for x in listed),
        "layout": LAYOUT_CHANGES,
        "script": SCRIPT,
        "script_hash": f"sha256-{base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}",
        "groups": _group_rewrites(report) if report is not None else [],
        "refusals": _group_skips(report.skips) if report is not None else [],
        "drawn": MAX_DRAWN,
        "listed": MAX_LISTED,
        "pages": ", huge pages" if report is not None and report.has_huge_pages else "",
        "factor": f"{FLOOR_FACTOR:g}×",
        "excused": f"{EXCUSED:g}×",
        "tolerances": {
            name: f"{format_scientific(f'{r:g}')} · |value| + {format_scientific(f'{a:g}')}"
            for name, (r, a) in TOLERANCES.items()
        },
    }


def _operator_times(operators: Mapping[str, Mapping[str, float]]) -> list[tuple[str, float, float]]:
    """List (operator, milliseconds before, milliseconds after), the slowest first."""
    before, after = operators["before"], operators["after"]
    names = sorted({*before, *after}, key=lambda op: (-max(before.get(op, 0.0), after.get(op, 0.0)), op))
    rows = [(op, before.get(op, 0.0), after.get(op, 0.0)) for op in names]
    rest = rows[MAX_OPERATORS_LISTED:]
    return rows[:MAX_OPERATORS_LISTED] + (
        [(f"{len(rest)} others", sum(b for _, b, _ in rest), sum(a for *_, a in rest))] if rest else []
    )


def _figure_rows(output: OutputCheck, elementwise: bool = False) -> list[tuple[str, str, str]]:
    """Rows of a table: label, candidate, and noise floor. They describe the whole output, or single elements."""
    rows = zip(FIGURE_LABELS, format_figures(output), format_figures(output.noise), strict=True)
    shown = [
        (label, mine, own or "–")
        for label, mine, own in rows
        if mine is not None and (label in ELEMENTWISE_FIGURES) == elementwise
    ]
    if not elementwise:
        shown.insert(0, ("largest error", f"{output.max_abs:.2g}", f"{output.floor:.2g}"))
    return [(label, format_scientific(mine), format_scientific(own)) for label, mine, own in shown]


def _group_rewrites(report: Report) -> list[PassSummary]:
    found: dict[str, list[Rewrite]] = {}
    for r in report.rewrites:
        found.setdefault(r.pass_name, []).append(r)
    return [
        PassSummary(
            name,
            report.passes.get(name, ""),
            tuple(rs),
            sum(r.macs_before - r.macs_after for r in rs),
            format_growth(sum(r.growth for r in rs)),
            _summarize_certificates(rs),
        )
        for name, rs in found.items()
    ]


def _summarize_certificates(rewrites: Sequence[Rewrite]) -> str:
    names: Mapping[str, str] = {"certified": "certified", "tested": "tested", "none": "not evaluated"}
    held = Counter(r.certificate.status for r in rewrites if r.certificate is not None)
    return ", ".join(f"{held[status]} {name}" for status, name in names.items() if held[status])


def _group_skips(skips: Sequence[Skip]) -> list[SkipGroup]:
    found: dict[tuple[str, str], list[Skip]] = {}
    for s in skips:
        found.setdefault((s.pass_name, generalize(s.reason)), []).append(s)
    groups = [SkipGroup(name, reason, tuple(listed)) for (name, reason), listed in found.items()]
    return sorted(groups, key=lambda g: -len(g.skips))
