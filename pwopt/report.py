"""One report object, and how it reads in a terminal and as JSON."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from pwopt.bench import Row
from pwopt.cost import NOTHING, Cost
from pwopt.equivalence import Equivalence, OutputCheck
from pwopt.errors import UsageError
from pwopt.metrics import Agreement
from pwopt.properties import Properties
from pwopt.rewrite import Rewrite, Skip
from pwopt.runtime import provider_name
from pwopt.samples import KINDS
from pwopt.shapes import written
from pwopt.wording import counted

#: Version of the JSON layout; grows when a field changes its meaning.
SCHEMA = 1
#: Columns of a terminal that any table fits.
UNLIMITED = 1 << 16


@dataclass(frozen=True)
class Latency:
    """Time per run of both models, interleaved.

    Attributes
    ----------
    before_ms, after_ms : float
        Medians, milliseconds.
    speedup : float
        before / after, the median over runs side by side.
    interval : tuple of float
        95 % bootstrap confidence interval of the speed-up.
    before_min_ms, after_min_ms : float
    rounds : int
    """

    before_ms: float
    after_ms: float
    speedup: float
    interval: tuple[float, float]
    before_min_ms: float
    after_min_ms: float
    rounds: int


@dataclass(frozen=True)
class Report:
    """Everything one optimisation did, declined, and measured.

    `equivalence`, `latency` and `operators` (where the time goes, "before" and "after") are None if not run. `command`
    is how to repeat it, if it came from the command line.
    """

    model: str
    output: str | None
    provider: str
    environment: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    rewrites: tuple[Rewrite, ...] = ()
    skips: tuple[Skip, ...] = ()
    before: Cost = NOTHING
    after: Cost = NOTHING
    equivalence: Equivalence | None = None
    latency: Latency | None = None
    operators: dict[str, dict[str, float]] | None = None
    command: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def result(self) -> str | None:
        """The file that the model was compared with, or that was written."""
        return self.output

    def to_dict(self) -> dict[str, Any]:
        """The documented JSON layout (README, "The report")."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "output": self.output,
            "provider": self.provider,
            "environment": self.environment,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "rewrites": [
                {
                    "pass": r.pass_name,
                    "site": r.site,
                    "reason": r.reason,
                    "removed": list(r.removed),
                    "added": list(r.added),
                    "macs_before": r.macs_before,
                    "macs_after": r.macs_after,
                    "residual": r.residual,
                    "certificate": None if r.certificate is None else asdict(r.certificate),
                    "became": [list(pair) for pair in r.became],
                }
                for r in self.rewrites
            ],
            "skips": [{"pass": s.pass_name, "site": s.site, "reason": s.reason} for s in self.skips],
            "cost": {"before": asdict(self.before), "after": asdict(self.after)},
            "equivalence": None if self.equivalence is None else asdict(self.equivalence),
            "latency": None if self.latency is None else asdict(self.latency),
            "operators": self.operators,
            "command": self.command,
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        return to_json(self.to_dict())


@dataclass(frozen=True)
class Comparison:
    """Two models side by side, whoever made the second."""

    model: str
    candidate: str
    provider: str
    environment: dict[str, Any]
    equivalence: Equivalence
    command: str | None = None

    @property
    def result(self) -> str:
        return self.candidate

    def to_json(self) -> str:
        """The documented JSON layout (README, "The report")."""
        content = {
            "schema": SCHEMA,
            "model": self.model,
            "candidate": self.candidate,
            "provider": self.provider,
            "tf32": False,
            "shapes": self.equivalence.shapes,
            "environment": self.environment,
            "equivalence": asdict(self.equivalence),
            "command": self.command,
        }
        return to_json(content)


def to_json(value: Any) -> str:
    """Strict JSON: infinities and NaN become strings, since JSON has none."""

    def strict(v: Any) -> Any:
        if isinstance(v, dict):
            return {k: strict(x) for k, x in v.items()}
        if isinstance(v, (list, tuple)):
            return [strict(x) for x in v]
        return str(v) if isinstance(v, float) and not math.isfinite(v) else v

    return json.dumps(strict(value), indent=2, ensure_ascii=True, allow_nan=False) + "\n"


def harmless(text: str) -> str:
    """Text from a model without control or direction characters."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def plain(text: str) -> str:
    """Text from a model, harmless in a terminal: no markup besides."""
    return escape(harmless(text))


def _table(*columns: str, title: str = "") -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(
            column, justify="left" if i == 0 else "right", overflow="fold", no_wrap=0 < i < len(columns) - 1
        )
    return table


def _show(table: Table, console: Console) -> None:
    """Print a table, or a block for each of its rows where the terminal is too narrow: no figure is ever cut."""
    unlimited = console.options.update(max_width=UNLIMITED)
    if console.measure(table, options=unlimited).minimum <= console.width:
        console.print(table)
        return
    for name, *values in zip(*(column.cells for column in table.columns), strict=True):
        labels = (str(column.header) for column in table.columns[1:])
        said = "; ".join(f"{label} {value}" for label, value in zip(labels, values, strict=True) if value)
        console.print(f"[bold]{name}[/bold]", soft_wrap=True)
        console.print(Padding(said, (0, 0, 0, 4)))


def render(report: Report, console: Console, details: bool = False) -> None:
    """Print the summary; with `details`, also every rewrite and refusal."""
    _show(_cost_table(report), console)
    render_sizes(report.shapes, console)
    if report.equivalence is not None:
        render_equivalence(report.equivalence, console)
    _render_rewrites(report, console)
    _render_skips(report, console)
    if details:
        for r in report.rewrites:
            console.print(f"[green]done[/green] {plain(r.site)}: {plain(r.reason)}", soft_wrap=True)
        for s in report.skips:
            console.print(f"[yellow]left[/yellow] {plain(s.site)}: {plain(s.reason)}", soft_wrap=True)
    for note in report.notes:
        console.print(f"[bold]{plain(note)}[/bold]", soft_wrap=True)


def _cost_table(report: Report) -> Table:
    table = _table("", "before", "after", "change")
    for label, before, after in (
        ("operators", report.before.nodes, report.after.nodes),
        ("parameters", report.before.params, report.after.params),
        ("multiply-adds", report.before.macs, report.after.macs),
    ):
        change = f"{(after - before) / before:+.1%}" if before else ""
        table.add_row(label, f"{before:,}", f"{after:,}", change)
    if report.latency is not None:
        t = report.latency
        low, high = t.interval
        threads = counted(report.environment["threads"], "thread")
        table.add_row(
            f"latency ({plain(report.provider)}, {threads})",
            f"{t.before_ms:.2f} ms", f"{t.after_ms:.2f} ms", f"{t.speedup:.2f}× [{low:.2f}, {high:.2f}]",
        )  # fmt: skip
    return table


def render_sizes(shapes: Mapping[str, tuple[int, ...]], console: Console) -> None:
    """Print the input sizes that all figures are for."""
    if shapes:
        sizes = ", ".join(f"{plain(name)} {written(shape)}" for name, shape in shapes.items())
        console.print(f"[dim]figures are for {sizes}[/dim]", soft_wrap=True)


def rewrites_from(path: Path) -> tuple[Rewrite, ...]:
    """Records of the rewrites in a report that `optimize` wrote.

    Raises
    ------
    UsageError
        If the file is no such report.
    """
    try:
        return tuple(
            Rewrite(
                r["reason"], tuple(r["removed"]), tuple(r["added"]), r["macs_before"], r["macs_after"],
                float(r["residual"]), tuple((old, new) for old, new in r["became"]), "", r["pass"], r["site"],
            )
            for r in json.loads(path.read_text())["rewrites"]
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{str(path)!r} is not a report of pwopt optimize ({error!r})") from error


def render_samples(equivalence: Equivalence, provider: str, console: Console) -> None:
    """Print what the models were compared on, distributions of one size together."""
    precise = ", with TF32 off" if provider_name(provider) == "CUDAExecutionProvider" else ""
    parts = (label.partition(", ") for label in equivalence.inputs)
    drawn = [
        (kind, sizes) if sizes and kind.split()[0] in KINDS else (kind + comma + sizes, "")
        for kind, comma, sizes in parts
    ]
    rounds = [(sizes, [kind for kind, _ in group]) for sizes, group in groupby(drawn, lambda sample: sample[1])]
    samples = "; ".join(f"{sizes} ({', '.join(kinds)})" if sizes else "; ".join(kinds) for sizes, kinds in rounds)
    console.print(f"[dim]compared on {plain(provider)}{precise}: {plain(samples)}[/dim]", soft_wrap=True)


def render_figures(equivalence: Equivalence, console: Console, details: bool = False, most: int = 4) -> None:
    """Print figures of the worst outputs, and beside them the same of the original against itself.

    With `details`, every figure of every output, those too that elements close to zero dominate.
    """
    console.print(f"[dim]{LEGEND}[/dim]")
    ranked = sorted(equivalence.outputs, key=lambda o: (o.passed, -o.max_abs))
    most = len(ranked) if details else most
    for o in ranked[:most]:
        table = _table(plain(o.name), "candidate", "noise floor")
        for label, mine, own in zip(FIGURES, figures(o), figures(o.noise), strict=True):
            if mine is not None and (details or label not in ELEMENTWISE):
                table.add_row(label, mine, own or "–")
        _show(table, console)
    if ranked[most:]:
        console.print(f"[dim]and {len(ranked) - most} more outputs; --details shows the figures of each[/dim]")


#: What the columns of the outputs are, once.
LEGEND = (
    "noise floor: how far the original is from itself without graph optimisation; sensitivity: from itself with inputs "
    "moved by one unit in the last place. README, “How equivalence is decided”, has the rule."
)
FIGURES = (
    "largest error / largest value", "mean error", "relative error", "units in the last place", "… of 99 % of elements",
    "1 − cosine", "signal to noise", "same largest entry", "same five largest", "unequal elements",
)  # fmt: skip
#: Figures that are large wherever a single element is close to zero, and say little of the whole.
ELEMENTWISE = ("relative error", "units in the last place", "… of 99 % of elements")


def figures(of: OutputCheck | Agreement) -> list[str | None]:
    """What `FIGURES` are, None where they are meaningless."""
    cosine = None if of.cosine is None else 1 - of.cosine
    relative = of.max_abs / of.scale if of.scale else None
    patterns = ("{:.2g}", "{:.2g}", "{:.2g}", "{:,.0f}", "{:,.0f}", "{:.1g}", "{:.0f} dB", "{:.2%}", "{:.2%}", "{:.2%}")
    values = (relative, of.mean_abs, of.max_rel, of.ulp, of.ulp_p99, cosine, of.snr_db, of.top1, of.top5, of.mismatch)
    return [None if v is None else p.format(v) for p, v in zip(patterns, values, strict=True)]


def render_laws(equivalence: Equivalence, console: Console) -> None:
    """Print the residual of every invariant in both models."""
    if not equivalence.laws:
        return
    table = _table("invariant", "original", "candidate")
    for law in equivalence.laws:
        table.add_row(f"{plain(law.law)}: {plain(law.formula)}", f"{law.original:.2g}", f"{law.candidate:.2g}")
    _show(table, console)


def render_difference(equivalence: Equivalence | None, console: Console, most: int = 8) -> None:
    """Print where a candidate that did not pass begins to differ."""
    if equivalence is None or equivalence.difference is None:
        return
    d = equivalence.difference
    console.print(f"[bold]{plain(d.explain())}[/bold]", soft_wrap=True)
    region = ", ".join(map(plain, d.region[:most])) + (f" and {len(d.region) - most} more" if d.region[most:] else "")
    agree = "agree" if len(d.agreeing) > 1 else "agrees"
    agreeing = f"{plain(', '.join(d.agreeing[:most]))} still {agree}; " if d.agreeing else ""
    compared = counted(d.compared, "tensor")
    console.print(f"[dim]{agreeing}the fault lies in {region}; {compared} compared[/dim]", soft_wrap=True)


def render_elsewhere(equivalence: Equivalence, console: Console) -> None:
    """Print the operators that ran on another provider than the one asked for."""
    for model, places in equivalence.elsewhere.items():
        for provider, nodes in places.items():
            listed = plain(", ".join(nodes))
            console.print(
                f"[yellow]{counted(len(nodes), 'operator')} of the {model} ran on {provider}: {listed}[/yellow]"
            )


def render_equivalence(equivalence: Equivalence, console: Console) -> None:
    """Print the verdict per output."""
    table = _table("output", "max deviation", "noise floor", "sensitivity", "verdict")
    for o in equivalence.outputs:
        colour = "green" if o.passed else "red"
        table.add_row(
            plain(o.name),
            f"{o.max_abs:.2g}",
            f"{o.floor:.2g}",
            f"{o.sensitivity:.2g}",
            f"[{colour}]{plain(o.reason)}[/{colour}]",
        )
    _show(table, console)


def _render_rewrites(report: Report, console: Console) -> None:
    if not report.rewrites:
        console.print("No rewrite was made: the output is a copy of the input.")
        return
    table = _table("rewrites", "count", "multiply-adds saved", "worst rounding", "certified")
    for name, count in Counter(r.pass_name for r in report.rewrites).items():
        mine = [r for r in report.rewrites if r.pass_name == name]
        saved = sum(r.macs_before - r.macs_after for r in mine)
        certified = sum(r.certificate is not None and r.certificate.status == "certified" for r in mine)
        worst = f"{max(r.residual for r in mine):.1g}"
        table.add_row(name, str(count), f"{saved:,}", worst, f"{certified} of {count}")
    _show(table, console)


def _render_skips(report: Report, console: Console, most: int = 8) -> None:
    if not report.skips:
        return
    groups = Counter((s.pass_name, general(s)) for s in report.skips)
    table = _table("left alone, because", "count")
    for (name, reason), count in groups.most_common(most):
        table.add_row(f"{name}: {plain(reason)}", str(count))
    _show(table, console)
    if len(groups) > most:
        console.print(
            f"[dim]and {len(groups) - most} more reasons; --details or --report FILE.json lists every place[/dim]"
        )


def general(skip: Skip) -> str:
    """A refusal without the names that differ from place to place, for counting."""
    words = skip.reason.split("'")
    return "…".join(words[::2]) if len(words) % 2 else skip.reason


def render_properties(found: Properties, console: Console) -> None:
    """Print what the weights of every pointwise map are."""
    table = _table("map", "size", "kind", "rank", "effective", "condition", "WᵀW − I", "Σ columns", "dead", "flop/byte")
    for m in found:
        sums = m.column_sums
        table.add_row(
            plain(m.tensor),
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
    console.print(counted(len(found), "pointwise map"))


def render_benchmark(rows: Sequence[Row], console: Console) -> None:
    """Models side by side, one row each, then what loading costs, and where each one's time goes."""
    times = _table("model", "input", "median", "minimum", "ratio [95 %]")
    costs = _table("model", "input", "load", "first run", "memory", "layout changes")
    for row in rows:
        low, high = row.interval
        name = plain(Path(row.model).name)
        shapes = " ".join(f"{plain(x)} {written(shape)}" for x, shape in row.shapes.items())
        ratio = escape(f"{row.ratio:.3f} [{low:.3f}, {high:.3f}]")
        times.add_row(name, shapes, f"{row.median_ms:.2f} ms", f"{row.minimum_ms:.2f} ms", ratio)
        load, first = f"{row.session_ms:.0f} ms", f"{row.first_run_ms:.1f} ms"
        costs.add_row(name, shapes, load, first, f"{row.memory_mb:.0f} MB", f"{row.layout_share:.1%}")
    _show(times, console)
    _show(costs, console)
    for row in rows:
        slowest = ", ".join(f"{plain(op)} {ms:.2f} ms" for op, ms in list(row.operators.items())[:6])
        shapes = " ".join(f"{plain(x)} {written(shape)}" for x, shape in row.shapes.items())
        console.print(f"{plain(Path(row.model).name)}, {shapes}: {slowest}", style="dim", soft_wrap=True)
        if row.elsewhere:
            console.print(f"[yellow]{plain(row.model)}: {row.elsewhere} nodes ran on another provider[/yellow]")
