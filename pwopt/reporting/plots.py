"""Plots as SVG for HTML pages. Text stays text, and colours come from the style of the page."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from pwopt.evidence.metrics import Histogram
from pwopt.graph.shapes import format_shape
from pwopt.reporting.report import Latency
from pwopt.reporting.text import SUPERSCRIPTS
from pwopt.running.bench import Row

#: Placeholder colours, replaced by variables of the page's style so that plots follow dark mode.
COLOURS = {"#010101": "var(--ink)", "#020202": "var(--line)", "#030303": "var(--after)", "#040404": "var(--before)"}
INK, GRID, AFTER, BEFORE = COLOURS
#: The same colours for a separate SVG file.
FILE_COLOURS = {INK: "#24292f", GRID: "#d0d7de", AFTER: "#0b6bcb", BEFORE: "#8a939c"}
#: Up to this many elements, counts use a linear scale and points are drawn large.
FEW_POINTS = 20
SETTINGS: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "pwopt", "font.family": "sans-serif", "font.size": 9,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GRID, "xtick.color": INK, "ytick.color": INK,
    "grid.color": GRID, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.linewidth": 0.6, "legend.frameon": False, "text.parse_math": False,
}  # fmt: skip


def _format_power(value: float, _place: int) -> str:
    """Format a power of ten with superscripts."""
    exponent = round(np.log10(value)) if value > 0 else 0
    return "0" if value <= 0 else "1" if exponent == 0 else "10" + str(exponent).translate(SUPERSCRIPTS)


@contextmanager
def _open_axes(width: float, height: float) -> Iterator[Any]:
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure.subplots()


def _to_svg(axes: Any, title: str) -> str:
    """Convert a figure to an SVG element that scales with the page; `title` is for screen readers."""
    target = io.StringIO()
    axes.figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    axes.figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None, "Title": title})
    text = target.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    text = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg role="img" \1>', text, count=1)
    text = re.sub(r' id="(?:figure|axes|patch|matplotlib\.axis|text|line2d|xtick|ytick|legend)_\d+"', "", text)
    for colour, variable in COLOURS.items():
        text = text.replace(colour, variable)
    return text


def draw_latencies(rows: Sequence[Row]) -> str:
    """Plot median, minimum and ratio to the first model for each model, by input shapes; return an SVG file."""
    cases = list(dict.fromkeys(tuple(row.shapes.items()) for row in rows))
    with _open_axes(6.4, 0.8 + 0.42 * len(rows) + 0.3 * len(cases)) as axes:
        place, ticks = 0.0, []
        for case in cases:
            axes.text(0, place, ", ".join(f"{n} {format_shape(s)}" for n, s in case), va="center", fontsize=8)
            for row in (r for r in rows if tuple(r.shapes.items()) == case):
                place += 1
                axes.barh([place], [row.median_ms], 0.7, color=AFTER if row.ratio > 1 else BEFORE)
                axes.plot([row.minimum_ms] * 2, [place - 0.35, place + 0.35], color=INK, linewidth=1.2)
                low, high = row.interval
                ratio = "" if row.ratio == 1 else f", {row.ratio:.2f}× [{low:.2f}, {high:.2f}]"
                axes.annotate(
                    f"{row.median_ms:.3g} ms{ratio}", (row.median_ms, place), (4, 0),
                    textcoords="offset points", va="center", fontsize=8,
                )  # fmt: skip
                ticks.append((place, Path(row.model).name))
            place += 1.2
        axes.set_yticks([p for p, _ in ticks], [name for _, name in ticks])
        axes.set_xlim(0, 1.45 * max(row.median_ms for row in rows))
        axes.set_ylim(place - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("milliseconds per run: median; the line is the minimum")
        target = io.StringIO()
        axes.figure.patch.set_facecolor("white")
        axes.figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None, "Title": "Latency"})
        text = target.getvalue()
        for colour, real in FILE_COLOURS.items():
            text = text.replace(colour, real)
        return text


def draw_errors(found: Histogram, noise: Histogram, discrete: bool = False) -> str:
    """Plot histograms of the absolute errors of an output and of its noise floor."""
    with _open_axes(4.8, 2.5) as axes:
        used = [i for i, (a, b) in enumerate(zip(found.counts, noise.counts, strict=True)) if a or b]
        first, last = (max(0, used[0] - 1), min(len(found.counts), used[-1] + 2)) if used else (12, 24)
        edges = found.edges[first : last + 1]
        axes.stairs(noise.counts[first:last], edges, fill=True, color=BEFORE, alpha=0.35, label="noise floor")
        axes.stairs(found.counts[first:last], edges, color=AFTER, linewidth=1.6, label="candidate")
        if max(*found.counts, *noise.counts) > FEW_POINTS:
            axes.set_yscale("symlog", linthresh=1)
            axes.yaxis.set_major_formatter(FuncFormatter(_format_power))
        else:
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.set_xlabel("log₁₀ of the absolute error")
        axes.set_ylabel("elements")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=8)
        return _to_svg(axes, "Histogram of absolute errors")


def draw_scatter(pairs: Sequence[tuple[float, float]]) -> str:
    """Plot values of the candidate over values of the original."""
    with _open_axes(4.8, 2.8) as axes:
        xs, ys = zip(*pairs, strict=True)
        low, high = min(*xs, *ys), max(*xs, *ys)
        axes.plot([low, high], [low, high], color=GRID, linewidth=1)
        axes.plot(
            xs,
            ys,
            linestyle="",
            marker="o",
            markersize=5 if len(pairs) <= FEW_POINTS else 2.2,
            color=AFTER,
            alpha=0.6,
            markeredgewidth=0,
        )
        axes.set_xlabel("original")
        axes.set_ylabel("candidate")
        return _to_svg(axes, "Values of both models")


def draw_speed(latency: Latency) -> str:
    """Plot the speed-up and its interval next to 1."""
    with _open_axes(4.8, 0.95) as axes:
        low, high = latency.interval
        axes.plot([low, high], [0, 0], color=AFTER, linewidth=6, solid_capstyle="round", alpha=0.45)
        axes.plot([latency.speedup], [0], marker="o", color=AFTER, markersize=7)
        axes.axvline(1.0, color=INK, linewidth=1)
        axes.set_ylim(-1, 1)
        axes.set_xlim(min(0.9, low - 0.1), max(1.1, high + 0.1))
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("speed-up (1 = original)")
        return _to_svg(axes, "Speed-up with its interval")


def draw_operators(rows: Sequence[tuple[str, float, float]], after: str = "after") -> str:
    """Plot milliseconds per run by operator. Rows are name, before and after; `after` is the label of the last."""
    with _open_axes(5.2, 0.7 + 0.25 * len(rows)) as axes:
        places = range(len(rows))
        axes.barh([p - 0.2 for p in places], [b for _, b, _ in rows], 0.38, color=BEFORE, label="before")
        axes.barh([p + 0.2 for p in places], [a for _, _, a in rows], 0.38, color=AFTER, label=after)
        axes.set_yticks(list(places), [op for op, _, _ in rows])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("milliseconds per run, under the profiler")
        axes.legend(loc="lower right", fontsize=8)
        return _to_svg(axes, "Time by operator")


def draw_spectrum(values: Sequence[float], rank: int | None) -> str:
    """Plot singular values in descending order, and mark the rank."""
    with _open_axes(4.8, 2.2) as axes:
        axes.plot(
            range(1, len(values) + 1),
            values,
            color=AFTER,
            marker="o" if len(values) <= 64 else "",
            markersize=2.5,
            linewidth=1.2,
        )
        positive = [v for v in values if v > 0]
        if positive and max(positive) > 100 * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(_format_power))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(bottom=0)
        if rank is not None and rank < len(values):
            axes.axvline(rank + 0.5, color=INK, linewidth=1, linestyle="--")
        axes.set_xlabel("index")
        axes.set_ylabel("singular value")
        return _to_svg(axes, "Spectrum")
