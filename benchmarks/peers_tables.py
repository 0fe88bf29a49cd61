"""Tables and chart of a record of `peers.py`."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pwopt.rewriting.ratios import name_ratio

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "docs" / "pictures" / "peers.svg"
#: Characters in a line of README.md.
WIDTH = 120
Row = dict[str, Any]
#: What stands below the table of session creation.
SESSION_CREATION = (
    "The figures are times as fast as the original. A file with fewer operators loads sooner. Rewrites that add weights,"
    " such as the transformed ones of minimal filtering (RepVGG), or operators (U-Net, DBNet), take time to load. The"
    " report of every run shows both."
)


def speedup(row: Row, tool: str) -> float:
    """Of what a tool made, against onnxruntime on the original; 1 where it failed."""
    found = row["tools"].get(tool, {}).get("speedup")
    return float(found[0]) if found else 1.0


def find_best(row: Row) -> set[str]:
    """The tools whose intervals the highest speed-up does not lie above."""
    raced = {t: found["speedup"] for t, found in row["tools"].items() if "speedup" in found}
    if not raced:
        return set()
    leader = max(raced.values())
    return {t for t, (_, _, high) in raced.items() if high >= leader[1] and leader[0] > 1}


def _mean(values: list[float]) -> float:
    return statistics.geometric_mean(values)


def has_copies(record: Row) -> bool:
    """Whether copies of the originals took part. They did not before version 0.2."""
    return all("copy" in row for row in record["models"])


def write_table(record: Row) -> str:
    """Markdown: one row per model, and what it comes to."""
    rows, tools = record["models"], record["tools"]
    control = "copy | " if has_copies(record) else ""
    lines = [
        f"| model | original, ms | {control}{' | '.join(tools)} |",
        "|---|" + "--:|" * (1 + len(tools) + bool(control)),
    ]
    for row in rows:
        winners = find_best(row)
        cells = []
        for tool in tools:
            found = row["tools"].get(tool, {})
            told = f"{found['speedup'][0]:.2f}" if "speedup" in found else "—"
            cells.append(f"**{told}**" if tool in winners else told)
        copy = [f"{row['copy'][0]:.2f}"] if control else []
        shown = [row["model"], f"{row['ms']:.1f}", *copy, *cells]
        lines.append(f"| {' | '.join(shown)} |")
    values = [_mean([speedup(r, t) for r in rows]) for t in tools]
    means = [f"**{v:.3f}**" if v == max(values) else f"{v:.3f}" for v in values]
    least = [f"{min(speedup(r, t) for r in rows):.2f}" for t in tools]
    failed = [str(sum("error" in r["tools"].get(t, {}) for r in rows)) for t in tools]
    taken = [statistics.median([r["tools"][t]["seconds"] for r in rows if "seconds" in r["tools"][t]]) for t in tools]
    summary = [("geometric mean", means), ("minimum", least)]
    if control:
        copies = [r["copy"][0] for r in rows]
        starts = [_mean([r["tools"].get(t, {}).get("start", [1.0])[0] for r in rows]) for t in tools]
        nodes = [str(sum(r["tools"].get(t, {}).get("nodes", r["nodes"]) for r in rows)) for t in tools]
        summary = [
            ("geometric mean", [f"{_mean(copies):.3f}", *means]),
            ("minimum", [f"{min(copies):.2f}", *least]),
            ("session creation, geometric mean", ["", *(f"{s:.2f}" for s in starts)]),
            (f"operators ({sum(r['nodes'] for r in rows)} in the originals)", ["", *nodes]),
        ]
    blank = [""] if control else []
    summary += [
        ("failed or not equivalent", [*blank, *failed]),
        ("seconds taken, median", [*blank, *(f"{s:.1f}" for s in taken)]),
    ]
    lines += [f"| {name} | | {' | '.join(cells)} |" for name, cells in summary]
    return "\n".join(lines) + "\n"


def find_ahead(record: Row) -> list[tuple[str, str, float]]:
    """Where another tool's model is faster than pwopt's beyond doubt: model, tool, and how much."""
    found = []
    for row in record["models"]:
        mine = row["tools"].get("pwopt", {}).get("speedup", [1.0, 1.0, 1.0])
        for tool in record["tools"]:
            theirs = row["tools"].get(tool, {}).get("speedup")
            if theirs and theirs[1] > mine[2]:
                found.append((row["model"], tool, theirs[0] / mine[0]))
    return sorted(found, key=lambda f: -f[2])


def find_least(record: Row) -> str:
    """Say which of pwopt's models became slower beyond doubt, or which one gained least."""
    raced = [row for row in record["models"] if "speedup" in row["tools"].get("pwopt", {})]
    found = [(*row["tools"]["pwopt"]["speedup"], row["model"]) for row in raced]
    slower = [model for _, _, high, model in found if high < 1]
    least, low, high, model = min(found)
    if slower:
        return f"pwopt made {', '.join(slower)} slower."
    return f"pwopt made no model slower beyond doubt; the least is {model}, {least:.2f} [{low:.2f}, {high:.2f}]."


def write_section(record: Row) -> str:
    """What stands in README.md: machine, versions, table, and where others are ahead."""
    machine, versions = record["environment"], record["versions"]
    named = ", ".join(f"{tool} {version}" for tool, version in versions.items() if tool != "pwopt")
    others = [f"{tool} on {model} ({times:.2f}×)" for model, tool, times in find_ahead(record)]
    behind = f"Clearly faster than pwopt: {', '.join(others)}." if others else "No tool is clearly faster than pwopt."
    failures = [
        f"{tool} on {row['model']} ({row['tools'][tool]['error'].rstrip('.')})"
        for row in record["models"]
        for tool in record["tools"]
        if "error" in row["tools"].get(tool, {})
    ]
    broken = f" Failed: {'; '.join(failures)}." if failures else ""
    copies = has_copies(record)
    how = "come from pairs of fresh sessions with huge pages" if copies else "are medians of interleaved runs"
    told = "The column copy is a copy of the original in the same race: it shows the error of the measurement. "
    head = (
        f"The table shows speed-ups over onnxruntime {machine['onnxruntime']} on the original model. The figures"
        f" {how}, measured on {record['date']} on one thread ({machine['cpu']}) with {named}."
        " onnxruntime runs the models that the tools write. OpenVINO runs the original model in its own runtime. "
        f"{told if copies else ''}Bold marks the fastest tool, and every tool whose interval overlaps with that of the"
        " fastest. A dash marks a result"
        " that failed or was not equivalent. Such a result counts as 1 in the geometric mean and in the minimum."
    )
    means = [f"{t} {_mean([speedup(r, t) for r in record['models']]):.2f}" for t in record["tools"]]
    seen = f"A dot for each of {len(record['models'])} models and each tool. Geometric means: {', '.join(means)}"
    chart = f"![{seen}]({CHART.relative_to(ROOT).as_posix()})"
    paragraphs = (
        textwrap.fill(head, WIDTH),
        chart,
        write_table(record).rstrip(),
        textwrap.fill(f"{find_least(record)} {behind}{broken}", WIDTH),
    )
    return "\n\n".join(paragraphs) + "\n"


def write_start_table(record: Row) -> str:
    """Markdown: operators and session creation of each model and of what each tool made of it, if recorded."""
    if not has_copies(record):
        return ""
    rows = record["models"]
    tools = [t for t in record["tools"] if any("nodes" in r["tools"].get(t, {}) for r in rows)]

    def write(title: str, original: str, name: Callable[[Row], str], describe: Callable[[Row], str]) -> list[str]:
        head = [f"| model | {original} | {' | '.join(tools)} |", "|---|--:|" + "--:|" * len(tools)]
        cells = [[r["model"], name(r), *(describe(r["tools"].get(t, {})) for t in tools)] for r in rows]
        return [f"## {title}", "", *head, *(f"| {' | '.join(row)} |" for row in cells), ""]

    return "\n".join(
        [
            *write("Operators", "original", lambda r: str(r["nodes"]), lambda f: str(f.get("nodes", "—"))),
            textwrap.fill(summarize(record), WIDTH),
            "",
            *write(
                "Session creation",
                "original, ms",
                lambda r: f"{r['start_ms']:.0f}",
                lambda f: name_ratio(*f["start"]) if "start" in f else "—",
            ),
            textwrap.fill(SESSION_CREATION, WIDTH),
            "",
        ]
    )


def summarize(record: Row) -> str:
    """Say how often pwopt returned the original, how often it would have by an earlier rule, and what became slower."""
    rows = [r for r in record["models"] if "speedup" in r["tools"].get("pwopt", {})]
    originals = [r["model"] for r in rows if r["tools"]["pwopt"]["returned"] != "result"]
    instead = f", and the original of {', '.join(originals)}" if originals else ""
    open_ones = [
        r for r in rows if r["tools"]["pwopt"]["returned"] == "result" and r["tools"]["pwopt"]["speedup"][1] <= 1
    ]
    slower = [r["model"] for r in rows if r["tools"]["pwopt"]["speedup"][2] < 0.99]
    return (
        f"pwopt returned a rewritten model for {len(rows) - len(originals)} of {len(rows)} models{instead}."
        f" {len(open_ones)} of them were not clearly faster: a rule that keeps only what is clearly faster would have"
        f" returned the original. Slower than the original by more than 1 %: {', '.join(slower) or 'none'}."
    )


def draw(record: Row) -> None:
    """A dot per model and tool, models in the order of pwopt's speed-up."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "pwopt"  # the same bytes for the same figures
    from matplotlib import pyplot

    rows = sorted(record["models"], key=lambda r: speedup(r, "pwopt"))
    figure, axes = pyplot.subplots(figsize=(8, 0.26 * len(rows) + 1.4))
    marks = dict(zip(record["tools"], ("o", "v", "^", "s", "D", "x"), strict=False))
    colours = dict(
        zip(record["tools"], ("#0b6e4f", "#9aa5b1", "#c08497", "#7a9cc6", "#b3a369", "#d1495b"), strict=False)
    )
    for tool in reversed(record["tools"]):
        places = [(speedup(r, tool), i) for i, r in enumerate(rows) if "speedup" in r["tools"].get(tool, {})]
        first = tool == "pwopt"
        axes.scatter(
            [p[0] for p in places],
            [p[1] for p in places],
            marker=marks[tool],
            color=colours[tool],
            s=46 if first else 26,
            zorder=3 if first else 2,
            label=tool,
        )
    axes.axvline(1.0, color="#555555", linewidth=1)
    axes.set_xscale("log")
    ticks = [t for t in (0.5, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0, 3.0) if axes.get_xlim()[0] <= t <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_xticks([], minor=True)
    axes.set_yticks(range(len(rows)), [r["model"] for r in rows], fontsize=8)
    axes.set_xlabel("times as fast as onnxruntime alone on the original")
    axes.grid(axis="both", color="#dddddd", linewidth=0.5)
    axes.set_axisbelow(True)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], fontsize=8, loc="lower right")
    CHART.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(CHART, metadata={"Date": None}, bbox_inches="tight")
