"""Formatting of names, figures and reasons for every kind of report."""

from __future__ import annotations

from math import isinf

from rich.markup import escape

from pwopt.evidence.equivalence import OutputCheck
from pwopt.evidence.metrics import Agreement
from pwopt.reporting.report import Latency, Start
from pwopt.rewriting.ratios import format_interval, format_ratio


def sanitize(text: str) -> str:
    """Replace control and direction characters in text from a model."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def escape_text(text: str) -> str:
    """Sanitize text from a model for the terminal, and escape rich markup."""
    return escape(sanitize(text))


def shorten_name(name: str, width: int) -> str:
    """Shorten a name to so many characters, with an ellipsis in its middle.

    Examples
    --------
    >>> shorten_name("linear_sequence.pwopt.onnx", 16), shorten_name("small.onnx", 16)
    ('linear_s…pt.onnx', 'small.onnx')
    """
    tail = (width - 1) // 2
    return name if len(name) <= width else f"{name[: width - 1 - tail]}…{name[-tail:]}"


#: Explanation of the columns of the table of outputs.
LEGEND = (
    "noise floor: deviation of the original from itself without graph optimisation; sensitivity: deviation of the "
    "original when its inputs move by one unit in the last place. The documentation explains the rule under “How it is "
    "verified”."
)
FIGURE_LABELS = (
    "largest error / largest value", "mean error", "relative error", "units in the last place", "… of 99 % of elements",
    "1 − cosine", "signal to noise", "same largest entry", "same five largest", "unequal elements",
)  # fmt: skip
#: Figures that a single element close to zero makes large; they do not describe the output as a whole.
ELEMENTWISE_FIGURES = ("relative error", "units in the last place", "… of 99 % of elements")


def format_figures(of: OutputCheck | Agreement) -> list[str | None]:
    """Format the figures that `FIGURE_LABELS` names; None for one that is not defined or infinite."""
    cosine = None if of.cosine is None else 1 - of.cosine
    relative = of.max_abs / of.scale if of.scale else None
    patterns = ("{:.2g}", "{:.2g}", "{:.2g}", "{:,.0f}", "{:,.0f}", "{:.1g}", "{:.0f} dB", "{:.2%}", "{:.2%}", "{:.2%}")
    values = (relative, of.mean_abs, of.max_rel, of.ulp, of.ulp_p99, cosine, of.snr_db, of.top1, of.top5, of.mismatch)
    return [None if v is None or isinf(v) else p.format(v) for p, v in zip(patterns, values, strict=True)]


SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def format_speedup(measured: Latency | Start) -> str:
    """Format a speed-up with its interval, unless that is a point; "unclear" instead of one that says little."""
    low, high = measured.interval
    return f"{measured.speedup:.2f}×" if low == high else format_ratio(measured.speedup, low, high)


def format_huge_pages(gain: tuple[float, float, float], noise: float = 1.0) -> str:
    """Say in one line what huge pages bring, and how to get them.

    Parameters
    ----------
    gain : tuple of float
        The time with pages of 4 KiB over the time with huge pages, and both ends of its interval.
    noise : float
        What a copy of the original reached, at least 1. A gain is clear only beyond that.
    """
    ratio, low, high = gain
    found = f"{ratio:.2f}× as fast" if low > noise else "no clear gain"
    found += f" {format_interval(low, high)}"
    return (
        f"Huge pages instead of pages of 4 KiB: {found}. GLIBC_TUNABLES=glibc.malloc.hugetlb=1 in the environment, or "
        "pwopt.use_huge_pages() after the first run, switches them on."
    )


def format_growth(growth: int) -> str:
    """Format by how many bytes the constants of a model grow; "" for less than a kilobyte."""
    size = abs(growth)
    if size < 1_000:
        return ""
    shown = f"{size / 1e6:.3g} MB" if size >= 1e6 else f"{size / 1e3:.3g} kB"
    return f"{'+' if growth > 0 else '−'}{shown}"


def list_start_rows(latency: Latency | None) -> list[tuple[str, str, str, str]]:
    """Rows of a table on what sessions take to start: label, original, result, and their ratio."""
    start = None if latency is None else latency.start
    if start is None:
        return []
    (created, recreated), (first, second) = start.creation_ms, start.first_run_ms
    rows = [
        ("session creation", f"{created:.3g} ms", f"{recreated:.3g} ms", format_speedup(start)),
        ("first run", f"{first:.3g} ms", f"{second:.3g} ms", ""),
    ]
    if start.memory_mb is not None:
        before, after = start.memory_mb
        growth = f"{after / before - 1:+.1%}" if before > 0 else ""
        rows.append(("peak memory", f"{before:.0f} MB", f"{after:.0f} MB", growth))
    return rows
