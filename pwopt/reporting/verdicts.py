"""The head of a report: verdict, main figures, and table of sizes."""

from __future__ import annotations

from collections import Counter

import numpy as np

from pwopt.evidence.equivalence import Equivalence
from pwopt.maps.cost import Cost
from pwopt.reporting.report import Latency, Report
from pwopt.reporting.text import SUPERSCRIPTS
from pwopt.rewriting.ratios import format_interval, is_vague, name_ratio


def format_scientific(text: str) -> str:
    """Format a number such as 6e-08 as 6×10⁻⁸, without a possible line break."""
    mantissa, sign, exponent = text.partition("e")
    shown = f"{mantissa}×10{str(int(exponent)).translate(SUPERSCRIPTS)}" if sign else text
    return shown.replace("-", "−")


def format_percent(change: float) -> str:
    return f"{change:+.1%}".replace("-", "−")


def format_count(value: float) -> str:
    """Format a count with four digits and a unit."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.4g} {unit}"
    return f"{value:,.0f}"


def format_verdict(equivalence: Equivalence | None, report: Report | None) -> tuple[str, str]:
    if equivalence is None:
        untouched = report is not None and not report.rewrites
        return "neutral", "Unchanged" if untouched else "Not verified"
    tones = {"equivalent": "good", "not equivalent": "bad", "not comparable": "neutral"}
    return tones[equivalence.verdict], equivalence.verdict.capitalize()


def list_claims(equivalence: Equivalence | None, report: Report | None) -> list[tuple[str, str]]:
    """List the main figures, each with its description."""
    found = []
    if report is not None and report.latency is not None:
        found.append(_claim_speedup(report.latency, returned=report.candidate is None))
    saved = report.before.change(report.after) if report is not None else None
    if saved is not None:
        found.append((format_percent(saved), "multiply-adds"))
    if report is not None and report.rewrites:
        held = Counter(r.certificate.status for r in report.rewrites if r.certificate is not None)
        found.append((f"{held['certified']} of {len(report.rewrites)}", "rewrites certified for every input"))
    worst = equivalence.worst() if equivalence is not None else None
    if worst is not None and np.isfinite(worst.max_abs):
        noise = format_scientific(f"{worst.floor:.2g}")
        found.append(
            (format_scientific(f"{worst.max_abs:.2g}"), f"largest deviation; noise floor of the original: {noise}")
        )
    return found


def _claim_speedup(t: Latency, *, returned: bool) -> tuple[str, str]:
    """State the speed-up; not as a figure if its interval is too wide."""
    interval = "99 % interval {} to {}".format(*format_interval(*t.interval).strip("[]").split(", "))
    if not returned:
        return f"{t.speedup:.2f}×", "as fast, because the original is returned"
    if is_vague(*t.interval):
        shown = name_ratio(t.speedup, *t.interval)
        fast = (
            "how fast, because measurements varied too much"
            if shown == "unclear"
            else "as fast, but measurements varied"
        )
        return shown, f"{fast}: {interval}"
    if t.interval[0] > 1 and not t.faster:
        return (
            f"{t.speedup:.2f}×",
            f"as fast, {interval}: not clear, since a copy of the original reached {t.control:.2f}×",
        )
    return f"{t.speedup:.2f}×", f"as fast, {interval}"


def list_costs(report: Report) -> list[tuple[str, str, str, str]]:
    def row(label: str, before: float, after: float, known: bool = True) -> tuple[str, str, str, str]:
        change = format_percent((after - before) / before) if before and known else ""
        return label, format_count(before), format_count(after), change

    def rows(after: Cost, of: str = "") -> list[tuple[str, str, str, str]]:
        a = report.before
        return [
            row(f"operators{of}", a.nodes, after.nodes),
            row(f"parameters{of}", a.params, after.params),
            row(f"multiply-adds{of}", a.macs, after.macs, a.change(after) is not None),
        ]

    tried = report.candidate
    return rows(report.after) + (rows(tried.cost, ", candidate (not returned)") if tried is not None else [])
