"""Print reports on the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Column, Table

from pwopt.evidence.equivalence import Equivalence
from pwopt.graph.reasons import generalize
from pwopt.graph.shapes import format_shape
from pwopt.maps.cost import Cost
from pwopt.reporting.report import ConditionLatency, Latency, Report, explain_contradiction
from pwopt.reporting.text import (
    ELEMENTWISE_FIGURES,
    FIGURE_LABELS,
    LEGEND,
    escape_text,
    format_figures,
    format_growth,
    format_huge_pages,
    format_speedup,
    list_start_rows,
    shorten_name,
)
from pwopt.rewriting.ratios import format_ratio, is_vague
from pwopt.rewriting.wording import drop_name, format_count, join_clauses
from pwopt.running.providers import NVIDIA, Provider

if TYPE_CHECKING:
    from pwopt.running.bench import Row
    from pwopt.running.doctor import Finding
    from pwopt.selecting.inspection import Inspection
    from pwopt.selecting.tuning_cache import TuningRecord
    from pwopt.selecting.weight_properties import Properties

#: Colours of decisions.
VERDICTS = {"kept": "green", "dropped": "yellow", "in doubt": "dim"}
#: An upper bound from which on an interval carries no information.
VAGUE = 100.0
#: A terminal width that every table fits in.
UNLIMITED = 1 << 16
#: Columns before the figures of a block.
INDENT = 4
#: The fewest characters that a name is shortened to.
SHORTEST_NAME = 12


def _table(*columns: str, title: str = "") -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(
            column, justify="left" if i == 0 else "right", overflow="fold", no_wrap=0 < i < len(columns) - 1
        )
    return table


def _show(table: Table, console: Console) -> None:
    """Print a table. If the terminal is too narrow, print a block for each row, so that no figure is cut off."""
    if _fit(table, console):
        console.print(table)
        return
    for name, *values in zip(*(column.cells for column in table.columns), strict=True):
        labels = (str(column.header).replace("\n", " ") for column in table.columns[1:])
        pairs = [f"{label} {value}" for label, value in zip(labels, values, strict=True) if value]
        console.print(f"[bold]{name}[/bold]", soft_wrap=True)
        for line in _join_pairs(pairs, console):
            console.print(Padding(line, (0, 0, 0, INDENT)))


def _excess(table: Table, console: Console) -> int:
    """By how many columns a table is wider than the terminal if no line of it is broken."""
    return console.measure(table, options=console.options.update(max_width=UNLIMITED)).maximum - console.width


def _fit(table: Table, console: Console) -> bool:
    """Let columns break lines between words until a table fits the terminal; return whether that is possible."""
    excess, unlimited = _excess(table, console), console.options.update(max_width=UNLIMITED)
    widths: list[tuple[int, int, Column]] = []
    for column in table.columns:
        if not column.no_wrap:
            cells = [Measurement.get(console, unlimited, cell) for cell in (column.header, *column.cells)]
            natural, least = max(c.maximum for c in cells), max(c.minimum for c in cells)
            widths.append((natural - least, natural, column))
    if excess > sum(slack for slack, _, _ in widths):
        return False
    for slack, natural, column in sorted(widths, key=lambda w: -w[0]):
        cut = max(0, min(excess, slack))
        if cut:
            column.width = natural - cut
        excess -= cut
    return True


def _join_pairs(pairs: Sequence[str], console: Console) -> Iterator[str]:
    """Join pairs of label and value with semicolons, in lines that end between pairs."""
    line, room = "", console.width - INDENT - len(";")
    for pair in pairs:
        longer = f"{line}; {pair}" if line else pair
        if line and console.render_str(longer).cell_len > room:
            yield f"{line};"
            line = pair
        else:
            line = longer
    yield line


def print_line(text: str, console: Console, style: str = "") -> None:
    """Print a line. A terminal gets line breaks between words, and a file or a pipe gets one long line."""
    console.print(text, style=style, soft_wrap=not console.is_terminal)


def render(report: Report, console: Console, details: bool = False) -> None:
    """Print the summary; with `details`, also every rewrite and every skipped site."""
    _show(_cost_table(report), console)
    if any(t.apart for t in report.list_latencies()):
        print_line("[dim]times: medians; change: mean over pairs of sessions, with its 99 % interval[/dim]", console)
    render_sizes(report.shapes, console)
    if report.huge_pages is not None:
        noise = 1.0 if report.latency is None else report.latency.noise
        print_line(escape(format_huge_pages(report.huge_pages, noise)), console)
    if report.equivalence is not None:
        render_equivalence(report.equivalence, console)
    _render_rewrites(report, console)
    _render_skips(report, console)
    if details:
        for r in report.rewrites:
            print_line(f"[green]done[/green] {escape_text(str(r.site))}: {escape_text(r.reason)}", console)
        for s in report.skips:
            print_line(f"[yellow]left[/yellow] {escape_text(str(s.site))}: {escape_text(s.reason)}", console)
    for note in report.notes:
        print_line(f"[bold]{escape_text(note)}[/bold]", console)


def _cost_table(report: Report) -> Table:
    table = _table("", "before", "after", "change")
    table.columns[-1].no_wrap = True  # an interval stays whole
    threads = format_count(report.environment["threads"], "thread")
    pages = ", huge pages" if report.has_huge_pages else ""
    where = f"latency ({escape_text(report.provider)}, {threads}{pages})"
    _cost_rows(table, report.before, report.after, report.latency, report.conditions, "", where)
    if report.candidate is not None:
        of = ", candidate (not returned)"
        tried = report.candidate
        _cost_rows(table, report.before, tried.cost, tried.latency, tried.conditions, of, "latency")
    return table


def _cost_rows(
    table: Table,
    before: Cost,
    after: Cost,
    latency: Latency | None,
    conditions: Sequence[ConditionLatency],
    of: str,
    where: str,
) -> None:
    """Add rows that compare the original with another model."""

    def relative(a: int, b: int) -> float | None:
        return (b - a) / a if a else None

    for label, a, b, change in (
        ("operators", before.nodes, after.nodes, relative(before.nodes, after.nodes)),
        ("parameters", before.params, after.params, relative(before.params, after.params)),
        ("multiply-adds", before.macs, after.macs, before.change(after)),
    ):
        table.add_row(f"{label}{of}", f"{a:,}", f"{b:,}", "" if change is None else f"{change:+.1%}")
    times = [] if latency is None else [(where, latency)]
    for label, t in (*times, *((f"… {escape_text(c.label)}", c.latency) for c in conditions)):
        table.add_row(f"{label}{of}", f"{t.before_ms:.2f} ms", f"{t.after_ms:.2f} ms", format_speedup(t))
    for label, *figures in list_start_rows(latency):
        table.add_row(f"{label}{of}", *figures)


def render_sizes(shapes: Mapping[str, tuple[int, ...]], console: Console) -> None:
    """Print the input sizes of all figures, measured or not."""
    if shapes:
        sizes = ", ".join(f"{escape_text(name)} {format_shape(shape)}" for name, shape in shapes.items())
        print_line(f"[dim]input sizes: {sizes}[/dim]", console)


def render_comparison(equivalence: Equivalence, provider: Provider, console: Console, details: bool = False) -> None:
    """Print the result of `verify`."""
    render_samples(equivalence, provider, console)
    render_equivalence(equivalence, console)
    render_figures(equivalence, console, details)
    render_laws(equivalence, console)
    render_difference(equivalence, console)
    render_elsewhere(equivalence, console)


def render_samples(equivalence: Equivalence, provider: Provider, console: Console) -> None:
    """Print the inputs of the comparison, grouped by size."""
    precise = ", with TF32 off" if provider.name in NVIDIA else ""
    rounds = [(sizes, [s.source for s in group]) for sizes, group in groupby(equivalence.inputs, lambda s: s.sizes)]
    samples = "; ".join(f"{sizes} ({', '.join(names)})" if sizes else "; ".join(names) for sizes, names in rounds)
    print_line(f"[dim]compared on {escape_text(provider.text)}{precise}: {escape_text(samples)}[/dim]", console)


def render_figures(equivalence: Equivalence, console: Console, details: bool = False, most: int = 4) -> None:
    """Print the figures of the worst outputs next to their noise floor.

    With `details`, print all figures of all outputs, including those that elements close to zero dominate.
    """
    console.print(f"[dim]{LEGEND}[/dim]")
    ranked = sorted(equivalence.outputs, key=lambda o: (o.passed, -o.max_abs))
    most = len(ranked) if details else most
    for o in ranked[:most]:
        table = _table(escape_text(o.name), "candidate", "noise floor")
        for label, mine, own in zip(FIGURE_LABELS, format_figures(o), format_figures(o.noise), strict=True):
            if mine is not None and (details or label not in ELEMENTWISE_FIGURES):
                table.add_row(label, mine, own or "–")
        _show(table, console)
    if ranked[most:]:
        console.print(f"[dim]and {len(ranked) - most} more outputs; --details shows the figures of each[/dim]")


def render_laws(equivalence: Equivalence, console: Console) -> None:
    """Print the residual of every invariant for both models."""
    if not equivalence.laws:
        return
    table = _table("invariant", "original", "candidate")
    for law in equivalence.laws:
        table.add_row(
            f"{escape_text(law.law)}: {escape_text(law.formula)}", f"{law.original:.2g}", f"{law.candidate:.2g}"
        )
    _show(table, console)


def render_difference(equivalence: Equivalence | None, console: Console, most: int = 8) -> None:
    """Print the first tensor that differs."""
    if equivalence is None or equivalence.difference is None:
        return
    d = equivalence.difference
    print_line(f"[bold]{escape_text(d.explain())}[/bold]", console)
    region = ", ".join(map(escape_text, d.region[:most])) + (
        f" and {len(d.region) - most} more" if d.region[most:] else ""
    )
    agree = "agree" if len(d.agreeing) > 1 else "agrees"
    agreeing = f"{escape_text(', '.join(d.agreeing[:most]))} still {agree}; " if d.agreeing else ""
    compared = format_count(d.compared, "tensor")
    print_line(f"[dim]{agreeing}the cause is in {region}; {compared} compared[/dim]", console)


def render_elsewhere(equivalence: Equivalence, console: Console) -> None:
    """Print the operators that ran on another provider than the selected one."""
    for model, places in equivalence.elsewhere.items():
        for provider, nodes in places.items():
            listed = escape_text(", ".join(nodes))
            console.print(
                f"[yellow]{format_count(len(nodes), 'operator')} of the {model} ran on {provider}: {listed}[/yellow]"
            )


def render_equivalence(equivalence: Equivalence, console: Console) -> None:
    """Print the verdict for each output."""
    table = _table("output", "max deviation", "noise floor", "sensitivity", "verdict")
    for o in equivalence.outputs:
        colour = "green" if o.passed else "red" if o.comparable else "yellow"
        table.add_row(
            escape_text(o.name),
            f"{o.max_abs:.2g}",
            f"{o.floor:.2g}",
            f"{o.sensitivity:.2g}",
            f"[{colour}]{'identical' if o.identical else escape_text(o.reason)}[/{colour}]",
        )
    _show(table, console)
    for remark in equivalence.remarks():
        print_line(escape_text(remark), console)


def _render_rewrites(report: Report, console: Console) -> None:
    if not report.rewrites:
        console.print("No rewrite was applied: the output is a copy of the input.")
        return
    grown: Counter[str] = Counter()
    for r in report.rewrites:
        grown[r.pass_name] += r.growth
    weights = ["weights\nadded"] if any(format_growth(g) for g in grown.values() if g > 0) else []
    columns = "rewrites", "count", "multiply-adds\nsaved", *weights, "rounding", "certified", "tested", "none"
    table = _table(*columns)
    for name, count in Counter(r.pass_name for r in report.rewrites).items():
        mine = [r for r in report.rewrites if r.pass_name == name]
        saved = sum(r.macs_before - r.macs_after for r in mine)
        held = Counter("none" if r.certificate is None else r.certificate.status for r in mine)
        worst = f"{max(r.residual for r in mine):.1g}"
        added = [format_growth(grown[name])] if weights else []
        certificates = (str(held[s]) for s in ("certified", "tested", "none"))
        table.add_row(name, str(count), f"{saved:,}", *added, worst, *certificates)
    _show(table, console)


def _render_skips(report: Report, console: Console, most: int = 8) -> None:
    if not report.skips:
        return
    groups = Counter((s.pass_name, generalize(s.reason)) for s in report.skips)
    table = _table("skipped because", "count")
    for (name, reason), count in groups.most_common(most):
        table.add_row(f"{name}: {escape_text(reason)}", str(count))
    _show(table, console)
    if len(groups) > most:
        console.print(
            f"[dim]and {len(groups) - most} more reasons; --details or --report FILE.json lists every place[/dim]"
        )


def render_maps(maps: Inspection, console: Console) -> None:
    """Print every map: its size, its chain, and the rewrites that apply."""
    for m in maps:
        kernel = "×".join(map(str, m.kernel)) or "pointwise"
        space = format_shape(m.space) if m.space is not None else "?"
        work = f"{m.macs:,} multiply-adds" if m.macs is not None else "size not known"
        chain = f"  [cyan]chain {m.chain}[/cyan]" if m.chain is not None else ""
        console.print(f"[bold]{escape_text(m.tensor)}[/bold]  {m.op} {m.channels}  {kernel}  at {space}  {work}{chain}")
        alone = "no rewrite: no linear map is directly before or after it"
        for line in m.decisions or (alone if m.chain is None else "first of its chain",):
            console.print(f"    {escape_text(line)}", style="dim")
    render_sizes(maps.shapes, console)
    console.print(format_count(len(maps), "map"))


def render_properties(found: Properties, console: Console) -> None:
    """Print the properties of the weights of every pointwise map."""
    table = _table("map", "size", "kind", "rank", "effective", "condition", "WᵀW − I", "Σ columns", "dead", "flop/byte")
    for m in found:
        sums = m.column_sums
        table.add_row(
            escape_text(m.tensor),
            f"{m.columns}→{m.rows}" + (f" /{m.groups}" if m.groups > 1 else ""),
            m.kind,
            "–" if m.rank is None else str(m.rank),
            "–" if m.effective_rank is None else f"{m.effective_rank:.1f}",
            "–" if m.condition is None else f"{m.condition:.2g}",
            "–" if m.orthogonality_defect is None else f"{m.orthogonality_defect:.2g}",
            f"{min(sums):.2g} … {max(sums):.2g}",
            f"{len(m.dead_inputs)} in, {len(m.constant_outputs)} out",
            "–" if m.intensity is None else f"{m.intensity:.1f}",
        )
    _show(table, console)
    render_sizes(found.shapes, console)
    console.print(format_count(len(found), "pointwise map"))


def render_findings(findings: Sequence[Finding], console: Console) -> None:
    """Print the findings of `doctor`, each with a remedy."""
    marks = {True: "[green]ok[/green]  ", False: "[red]no[/red]  ", None: "    "}
    for f in findings:
        print_line(f"{marks[f.ok]}[bold]{escape_text(f.subject)}[/bold]: {escape_text(f.detail)}", console)
        if f.remedy:
            print_line(f"      {escape_text(f.remedy)}", console)


def render_decisions(found: Sequence[TuningRecord], console: Console) -> None:
    """Print the decisions of races on this machine, with one table for each environment."""
    for where, entries in groupby(found, lambda e: e.place):
        table = _table("rewrite", "decision", "speed-up", "interval", "model", "date", title=escape_text(where))
        for e in entries:
            verdict = f"[{VERDICTS[e.verdict]}]{e.verdict}[/{VERDICTS[e.verdict]}]"
            name = join_clauses(e.pass_name, escape_text(drop_name(e.pass_name, e.signature)))
            low, high = e.interval
            interval = escape(f"[{low:.3f}, {high:.3f}]" if high < VAGUE else "no result yet")
            table.add_row(name, verdict, f"{e.speedup:.3f}×", interval, escape_text(e.name) or "–", e.date[:10] or "–")
        _show(table, console)


def summarize_decisions(found: Sequence[TuningRecord], console: Console) -> None:
    """Print how many decisions there are of each kind of rewrite, with one table for each environment."""
    for where, entries in groupby(found, lambda e: e.place):
        table = _table("rewrite", *VERDICTS, "latest", title=escape_text(where))
        for name, group in groupby(entries, lambda e: e.pass_name):
            listed = list(group)
            counts = Counter(e.verdict for e in listed)
            table.add_row(name, *(str(counts[v] or "") for v in VERDICTS), max(e.date for e in listed)[:10] or "–")
        _show(table, console)


def _format_memory(row: Row) -> str:
    device = "" if row.device_mb is None else f" + {row.device_mb:.0f} MB on the card"
    return f"{row.memory_mb:.0f} MB{device}" if row.memory_mb else f"–{device}"  # some systems hide it


def _show_models(columns: Sequence[str], names: Sequence[str], rows: Sequence[Sequence[str]], console: Console) -> None:
    """Print a table with a row for each model. If the terminal is too narrow, shorten the names of the models."""

    def fill(shown: Sequence[str]) -> Table:
        table = _table(*columns)
        table.columns[-1].no_wrap = True
        for name, cells in zip(shown, rows, strict=True):
            table.add_row(escape_text(name), *cells)
        return table

    table = fill(names)
    excess = _excess(table, console)
    room = max(map(len, names)) - excess
    if excess > 0 and room >= SHORTEST_NAME:
        short = [shorten_name(name, room) for name in names]
        if len(set(short)) == len(set(names)):
            table = fill(short)
    _show(table, console)


def render_benchmark(rows: Sequence[Row], console: Console) -> None:
    """Print one row per model with its times, one with its costs to start, and its slowest operators."""
    times: list[Sequence[str]] = []
    costs: list[Sequence[str]] = []
    for row in rows:
        shapes = " ".join(f"{escape_text(x)} {format_shape(shape)}" for x, shape in row.shapes.items())
        ratio = escape(format_ratio(row.ratio, *row.interval, digits=3))
        times.append((shapes, f"{row.median_ms:.2f} ms", f"{row.minimum_ms:.2f} ms", ratio))
        load, first = f"{row.session_ms:.0f} ms", f"{row.first_run_ms:.1f} ms"
        start = escape(format_ratio(*row.start))
        costs.append((shapes, load, start, first, _format_memory(row), f"{row.layout_share:.1%}"))
    names = [Path(row.model).name for row in rows]
    _show_models(("model", "input", "median", "minimum", "ratio [99 %]"), names, times, console)
    columns = "model", "input", "load", "session creation [99 %]", "first run", "memory", "layout changes"
    _show_models(columns, names, costs, console)
    for row in rows:
        slowest = ", ".join(f"{escape_text(op)} {ms:.2f} ms" for op, ms in list(row.operators.items())[:6])
        shapes = " ".join(f"{escape_text(x)} {format_shape(shape)}" for x, shape in row.shapes.items())
        print_line(f"{escape_text(Path(row.model).name)}, {shapes}: {slowest}", console, style="dim")
        base = next(r for r in rows if r.shapes == row.shapes)
        explanation = explain_contradiction(base.median_ms, row.median_ms, row.ratio)
        if explanation and not row.interval[0] <= 1 <= row.interval[1]:
            print_line(f"{escape_text(Path(row.model).name)}: {explanation}", console)
        if row is base:
            print_line(_control_line(row), console, style="dim")
        if row.huge_pages is not None:
            noise = max(row.control[0], 1 / row.control[0])
            print_line(escape(format_huge_pages(row.huge_pages, noise)), console)
        if row.elsewhere:
            console.print(f"[yellow]{escape_text(row.model)}: {row.elsewhere} nodes ran on another provider[/yellow]")


def _control_line(row: Row) -> str:
    """Format the ratio of a copy of the first model, which shows the error of the clock."""
    copy = f"A copy of {Path(row.model).name} in the same race: {format_ratio(*row.control, digits=3)}"
    vague = is_vague(*row.control[1:])
    return escape(f"{copy}, so the ratios say little." if vague else f"{copy}. A ratio closer to 1 than that is noise.")
