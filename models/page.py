"""Show the gallery as a table in the terminal and as README.md."""

from __future__ import annotations

import inspect
import itertools
import textwrap
from collections import Counter
from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

import models
from models.gallery import Row
from pwopt.graph.shapes import format_shape
from pwopt.rewriting.records import Rewrite
from pwopt.rewriting.wording import format_count

#: Line width of the file, as everywhere in this repository.
WIDTH = 120
#: Line width in a terminal that is too narrow for the table.
NARROW = 80
#: Columns of the table and their widths in a terminal of `WIDTH`; the property takes the remaining width.
WIDTHS = {
    "system": 13,
    "rewrites": 19,
    "refused": 7,
    "multiply-adds": 13,
    "speed-up": 9,
    "property": None,
    "before": 9,
    "after": 9,
    "verdict": 7,
}
#: Columns with one line per property.
PER_PROPERTY = ("property", "before", "after")


def cells(row: Row) -> dict[str, str]:
    """The text of each column for a system; each rewrite and each property has its own line."""
    marks = {name: " *" if name in row.system.measured else "" for name in row.rewrites}
    before, after = row.report.before.macs, row.report.after.macs
    return {
        "system": row.system.name.replace("_", " "),
        "rewrites": "\n".join(f"{name} ×{n}{marks[name]}" for name, n in row.rewrites.items()),
        "refused": str(len(row.system.refusals) or ""),
        "multiply-adds": f"{millions(before)} → {millions(after)}",
        "speed-up": speed(row),
        "property": "\n".join(f.claim for f in row.figures),
        "before": "\n".join(f.before for f in row.figures),
        "after": "\n".join(f.after for f in row.figures),
        "verdict": "fails" if row.faults else "holds",
    }


def millions(count: int) -> str:
    return f"{count / 1e6:.3g} M"


def speed(row: Row) -> str:
    """The measured speed-up and its interval; "" if nothing was raced."""
    if row.raced is None:
        return ""
    if row.latency is None or not row.raced.rewrites:
        return "1, original kept"
    low, high = row.latency.interval
    return f"{row.latency.speedup:.2f}× ({low:.2f} to {high:.2f})"


def columns(rows: Sequence[Row]) -> list[str]:
    """The columns that are not empty."""
    return [name for name in WIDTHS if any(cells(r)[name] for r in rows)]


def blocks(rows: Sequence[Row]) -> Text:
    """A few lines per system, for a terminal narrower than the table."""
    result = Text()
    for row in rows:
        said = cells(row)
        result.append(said["system"], "bold").append(": ").append(said["verdict"], "red" if row.faults else "green")
        lines = [f"rewrites {said['rewrites'].replace(chr(10), ', ')}"]
        lines += [f"{name} {said[name]}" for name in ("refused", "multiply-adds", "speed-up") if said[name]]
        lines += [f"{f.claim}: {f.before} before, {f.after} after" for f in row.figures]
        for line in lines:
            result.append("\n" + textwrap.fill(line, NARROW, initial_indent="    ", subsequent_indent="      "))
        result.append("\n")
    return result


def table(rows: Sequence[Row]) -> Table:
    """A row per system, and one more for each further property, for a terminal of at least `WIDTH`."""
    shown = columns(rows)
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
    for name in shown:
        result.add_column(name, width=WIDTHS[name], ratio=1 if name == "property" else None, overflow="fold")
    for row in rows:
        said = cells(row)
        parts = (said[name].split("\n") if name in PER_PROPERTY else [said[name]] for name in shown)
        lines = list(itertools.zip_longest(*parts, fillvalue=""))
        for number, line in enumerate(lines, 1):
            verdict = Text(line[-1], "red" if row.faults else "green")
            result.add_row(*line[:-1], verdict, end_section=number == len(lines))
    return result


def markdown(rows: Sequence[Row]) -> str:
    """The text of README.md: an introduction, the table, and a chapter per system."""
    title, _, introduction = inspect.cleandoc(models.__doc__ or "").partition("\n\n")
    shown = columns(rows)
    lines = [f"# {title.rstrip('.')}", "", introduction, ""]
    lines += ["| " + " | ".join(shown) + " |", "|" + "---|" * len(shown)]
    for row in rows:
        said = cells(row)
        said["system"] = f"[{said['system']}](#{anchor(row)})"
        lines.append("| " + " | ".join(said[n].replace("*", "\\*").replace("\n", "<br>") for n in shown) + " |")
    lines += ["", _legend(rows), "", _how(rows)]
    for row in rows:
        lines += ["", *_chapter(row)]
    return "\n".join(lines) + "\n"


def anchor(row: Row) -> str:
    """The anchor that GitHub gives to a heading."""
    kept = "".join(c for c in row.system.title.lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


def _legend(rows: Sequence[Row]) -> str:
    text = (
        "*rewrites*: the passes that acted, and how often ([what each pass does](../docs/passes.md)). \\* marks a "
        "rewrite that only timing can judge. It is applied here without timing, so that the table is the same on every "
        "machine. Operators, multiply-adds, parameters and properties are those of the model with all these rewrites. "
        "*refused*: the number of operators that had to stay unchanged, and did. *holds*: the committed file is byte "
        "for byte what its builder writes; onnxruntime finds both models equivalent; exactly these passes acted; every "
        "operator that had to stay is still there; the properties hold before and after; the number of multiply-adds "
        "did not rise."
    )
    if any(r.raced for r in rows):
        text += (
            " *speed-up*: this figure comes from another run, that of `pwopt optimize` with default passes. It raced "
            "each marked rewrite and the result as a whole, and kept only what was faster; the chapters say which "
            "marked rewrites it kept. The figure is the median of interleaved runs of its result against the original, "
            "with its 95 % interval. *1, original kept*: nothing was faster, so the original was returned."
        )
    return textwrap.fill(text, WIDTH, break_on_hyphens=False)


def _how(rows: Sequence[Row]) -> str:
    raced = next((r.raced for r in rows if r.raced is not None), None)
    e = (raced or rows[0].report).environment
    versions = f"pwopt {e['pwopt']}, onnxruntime {e['onnxruntime']}, onnx {e['onnx']}, numpy {e['numpy']}"
    machine = f" on {e['cpu']}, {format_count(e['threads'], 'thread')}" if raced else ""
    return textwrap.fill(f"Made by `python -m models` with {versions}{machine}.", WIDTH)


def _nameless(rewrite: Rewrite) -> str:
    """The reason of a rewrite without node names, so that equal reasons can be counted."""
    reason = rewrite.reason
    for node in (*rewrite.removed, *rewrite.added):
        op, _, name = node.partition(" ")
        reason = reason.replace(node, op) if name else reason
    return reason


def _decided(row: Row) -> list[str]:
    """Whether the races on this machine kept the measured rewrites."""
    if row.raced is None:
        return []
    kept = {r.pass_name for r in row.raced.rewrites}
    return [f"* {name}, raced: {'kept' if name in kept else 'not kept'}" for name in row.system.measured]


def _chapter(row: Row) -> list[str]:
    """The chapter of one system: its builder's text, then the results."""
    system, before, after = row.system, row.report.before, row.report.after
    _, _, text = system.text.partition("\n\n")
    for word in ("Rewritten:", "Left alone:"):
        text = text.replace(word, f"**{word}**")
    sizes = ", ".join(f"`{name}` {format_shape(tuple(shape))}" for name, shape in system.shapes.items())
    done = Counter((r.pass_name, _nameless(r)) for r in row.report.rewrites)
    return [
        f"## {system.title}",
        "",
        text,
        "",
        f"[{system.name}.py]({system.name}.py) writes [{system.name}.onnx]({system.name}.onnx). With input {sizes}:",
        "",
        f"* operators {before.nodes} → {after.nodes}, multiply-adds {before.macs:,} → {after.macs:,}, "
        f"parameters {before.params:,} → {after.params:,}",
        *(f"* {name}: {what}" + (f" ({n} times)" if n > 1 else "") for (name, what), n in done.items()),
        *_decided(row),
        *(f"* refused at `{r.node}`: {r.why}" for r in system.refusals),
        *(f"* {f.claim}: {f.before} before, {f.after} after" for f in row.figures),
    ]
