"""Reports as documents: one self-contained HTML page, or Markdown. Needs the extra `pwopt[report]`."""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from pwopt.errors import UsageError
from pwopt.evidence.equivalence import EXCUSED, FLOOR_FACTOR, OutputCheck
from pwopt.evidence.metrics import TOLERANCES
from pwopt.graph.shapes import written
from pwopt.reporting.drawing import HEIGHT, WIDTH, draw
from pwopt.reporting.drawing import path as wire
from pwopt.reporting.report import LAYOUT, Comparison, Report
from pwopt.reporting.text import ELEMENTWISE, FIGURES, figures, general, harmless
from pwopt.reporting.verdicts import claims, costs, count, percent, scientific, verdict
from pwopt.rewriting.records import Rewrite, Skip
from pwopt.running.bench import Row
from pwopt.selecting.weight_properties import Properties

#: The format that the end of a file's name asks for.
KINDS = {".html": "html", ".htm": "html", ".md": "markdown", ".markdown": "markdown", ".json": "json"}
#: The filter of the table of layers; a page allows this script by its hash, and no other.
SCRIPT = (Path(__file__).parent / "templates" / "filter.js").read_text(encoding="utf-8").strip()
#: Outputs that are shown with plots; the figures of the others follow in a list.
PLOTTED = 8
#: Operators whose times are shown by name; the others are summed up.
TIMED = 12
#: Rewrites of one pass that are drawn; more make the page slow to open on a phone.
DRAWN = 200
#: Places listed for one reason to leave them alone.
LISTED = 400


@dataclass(frozen=True)
class Group:
    """What one pass did: its identity, its rewrites, and sums over them."""

    name: str
    formula: str
    rewrites: tuple[Rewrite, ...]
    saved: int
    certificates: str


@dataclass(frozen=True)
class Refusals:
    """Places that one pass left alone for one reason."""

    name: str
    reason: str
    skips: tuple[Skip, ...]


def check_available(path: Path | None) -> None:
    """Refuse a document or plot for which a library is missing, before any work is done.

    Raises
    ------
    UsageError
        If jinja2 or matplotlib cannot be imported.
    """
    if path is None or path.suffix.lower() == ".json":
        return
    try:
        import_module("jinja2")
        import_module("matplotlib")
    except ImportError as error:
        what = path.suffix.lstrip(".").upper()
        raise UsageError(f"{what} needs {error.name}; pip install 'pwopt[report]', or write a .json") from error


def kind_of(path: Path) -> str:
    """The format that a file's name asks for: html, markdown or json.

    Raises
    ------
    UsageError
        If it asks for none of them.
    """
    kind = KINDS.get(path.suffix.lower())
    if kind is None:
        raise UsageError(f"a report ends in .html, .md or .json, which {str(path)!r} does not; call it so")
    return kind


def spectra(found: Properties, model: Path) -> str:
    """A page of what the weights of every pointwise map are."""
    text: str = (
        templates("html").get_template("properties.html.j2").render(found=found, model=model.name, plots=_plots())
    )
    return text


def latencies(rows: Sequence[Row]) -> str:
    """A plot of what `bench` measured, as SVG."""
    return str(_plots().latencies(rows))


def document(content: Report | Comparison, kind: str) -> str:
    """A report as text.

    Parameters
    ----------
    content : Report or Comparison
    kind : {"html", "markdown", "json"}
    """
    if kind == "json":
        return content.to_json()
    template = templates(kind).get_template("report.html.j2" if kind == "html" else "report.md.j2")
    text: str = template.render(**_facts(content), plots=_plots() if kind == "html" else None)
    return text if kind == "html" else re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _plots() -> ModuleType:
    """The module of plots, which needs matplotlib: an extra."""
    from pwopt.reporting import plots

    return plots


def templates(kind: str) -> Any:
    """Templates in which every value is escaped: by jinja2 for HTML, as `in_markdown` says for Markdown."""
    jinja2 = import_module("jinja2")
    html = kind == "html"
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pwopt.reporting", "templates"), autoescape=html, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined, finalize=_visible if html else in_markdown,
    )  # fmt: skip
    environment.filters.update(
        count=count, ms=lambda v: f"{v:.2f} ms", short=lambda v: scientific(f"{v:.2g}"), size=written, clipped=clipped,
        percent=percent, gained=gained, svg=jinja2.utils.markupsafe.Markup if html else str,
    )  # fmt: skip
    environment.globals.update(draw=draw, wire=wire, WIDTH=WIDTH, HEIGHT=HEIGHT)
    return environment


def _visible(value: Any) -> Any:
    """Text without control and direction characters; what is safe already stays."""
    return harmless(value) if type(value) is str else value


def in_markdown(value: Any) -> str:
    """Text that Markdown shows as it is, in a table too."""
    text = harmless(" ".join(str(value).split()) if isinstance(value, str) else str(value))
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#$@])", r"\\\1", text)


def clipped(text: str, most: int = 20) -> str:
    """The end of a long name, which tells it from others."""
    return text if len(text) <= most else "…" + text[1 - most :]


def gained(milliseconds: float) -> str:
    """With its sign, unless it rounds to nothing."""
    text = f"{milliseconds:+.3f}".replace("-", "−")
    return text if text.strip("+−0.") else text[1:]


def _facts(content: Report | Comparison) -> dict[str, Any]:
    """What the templates show of a report."""
    equivalence, report = content.equivalence, content if isinstance(content, Report) else None
    tone, said = verdict(equivalence, report)
    listed = (report.layers if report is not None else None) or ()
    outputs = sorted(equivalence.outputs, key=lambda o: (o.passed, -o.max_abs)) if equivalence is not None else []
    tried = report.candidate if report is not None else None
    operators = tried.operators if tried is not None else report.operators if report is not None else None
    return {
        "report": report,
        "content": content,
        "equivalence": equivalence,
        "model": Path(content.model).name,
        "result": Path(content.result).name if content.result else "",
        "tone": tone,
        "verdict": said,
        "claims": list(claims(equivalence, report)),
        "costs": costs(report) if report is not None else [],
        "outputs": outputs[:PLOTTED],
        "others": outputs[PLOTTED:],
        "figures": _figures,
        "times": _times(operators) if operators else [],
        "raced": tried.latency if tried is not None else report.latency if report is not None else None,
        "longest": max([1e-9, *(max(x.before_ms, x.after_ms) for x in listed)]),
        "total": sum(x.before_ms for x in listed),
        "layout": LAYOUT,
        "script": SCRIPT,
        "script_hash": f"sha256-{base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}",
        "groups": _groups(report) if report is not None else [],
        "refusals": _refusals(report.skips) if report is not None else [],
        "drawn": DRAWN,
        "listed": LISTED,
        "factor": f"{FLOOR_FACTOR:g}×",
        "excused": f"{EXCUSED:g}×",
        "tolerances": {
            name: f"{scientific(f'{r:g}')} · |value| + {scientific(f'{a:g}')}" for name, (r, a) in TOLERANCES.items()
        },
    }


def _times(operators: Mapping[str, Mapping[str, float]]) -> list[tuple[str, float, float]]:
    """Operator, milliseconds before and after, the largest first."""
    before, after = operators["before"], operators["after"]
    names = sorted({*before, *after}, key=lambda op: (-max(before.get(op, 0.0), after.get(op, 0.0)), op))
    rows = [(op, before.get(op, 0.0), after.get(op, 0.0)) for op in names]
    rest = rows[TIMED:]
    return rows[:TIMED] + (
        [(f"{len(rest)} others", sum(b for _, b, _ in rest), sum(a for *_, a in rest))] if rest else []
    )


def _figures(output: OutputCheck, elementwise: bool = False) -> list[tuple[str, str, str]]:
    """Rows of a table: figure, candidate, and the original against itself; of the whole, or of single elements."""
    rows = zip(FIGURES, figures(output), figures(output.noise), strict=True)
    shown = [
        (label, mine, own or "–")
        for label, mine, own in rows
        if mine is not None and (label in ELEMENTWISE) == elementwise
    ]
    if not elementwise:
        shown.insert(0, ("largest error", f"{output.max_abs:.2g}", f"{output.floor:.2g}"))
    return [(label, scientific(mine), scientific(own)) for label, mine, own in shown]


def _groups(report: Report) -> list[Group]:
    found: dict[str, list[Rewrite]] = {}
    for r in report.rewrites:
        found.setdefault(r.pass_name, []).append(r)
    return [
        Group(name, report.passes.get(name, ""), tuple(rs), sum(r.macs_before - r.macs_after for r in rs), _held(rs))
        for name, rs in found.items()
    ]


def _held(rewrites: Sequence[Rewrite]) -> str:
    names: Mapping[str, str] = {"certified": "certified", "tested": "tested", "none": "not evaluated"}
    held = Counter(r.certificate.status for r in rewrites if r.certificate is not None)
    return ", ".join(f"{held[status]} {name}" for status, name in names.items() if held[status])


def _refusals(skips: Sequence[Skip]) -> list[Refusals]:
    found: dict[tuple[str, str], list[Skip]] = {}
    for s in skips:
        found.setdefault((s.pass_name, general(s)), []).append(s)
    groups = [Refusals(name, reason, tuple(listed)) for (name, reason), listed in found.items()]
    return sorted(groups, key=lambda g: -len(g.skips))
