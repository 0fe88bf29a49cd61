"""How figures are written in every kind of report."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from pwopt.reporting.notes import within
from pwopt.reporting.report import Latency, Report, Start
from pwopt.reporting.terminal import print_line, render, render_benchmark
from pwopt.reporting.text import format_growth, format_huge_pages, format_speedup, list_start_rows
from pwopt.reporting.verdicts import list_claims
from pwopt.rewriting.ratios import format_ratio, name_ratio
from pwopt.rewriting.records import Rewrite, Site
from pwopt.running.bench import Row


def latency(low: float, high: float, start: Start | None = None) -> Latency:
    return Latency(2.0, 1.0, 2.0, (low, high), 2.0, 1.0, 30, start=start)


def test_a_speed_up_that_says_little_is_called_unclear() -> None:
    assert format_speedup(latency(1.9, 2.1)) == "2.00× [1.90, 2.10]"
    assert format_speedup(latency(1.31, 10.4)) == "unclear [1.31, 10.40]"
    assert format_speedup(latency(0.0, 86871117.97)) == "unclear"
    assert format_speedup(latency(2.0, 2.0)) == "2.00×"
    assert format_ratio(30.0, 1.4, 120.0) == "unclear [1.40, over 100]"


def test_what_is_sure_of_a_speed_up_is_said() -> None:
    """The first command on a busy machine: nobody knows how much faster, but 8 times it surely is."""
    assert format_ratio(23.8, 8.84, 39.46) == "over 8.84× [8.84, 39.46]"
    assert format_ratio(30.0, 1.5, 120.0) == "over 1.50× [1.50, over 100]"
    assert format_ratio(0.2, 0.1, 0.5) == "under 0.50× [0.10, 0.50]"
    assert format_ratio(30.0, 5.0, 501.0) == "unclear"
    assert name_ratio(0.4, 0.2, 0.7) == "unclear"


@pytest.mark.parametrize(
    ("low", "high", "copy", "claim"),
    [
        (1.9, 2.1, 1.01, ("2.00×", "as fast, 99 % interval 1.90 to 2.10")),
        (1.31, 10.4, 1.01, ("unclear", "how fast, because measurements varied too much: 99 % interval 1.31 to 10.40")),
        (8.84, 39.46, 1.01, ("over 8.84×", "as fast, but measurements varied: 99 % interval 8.84 to 39.46")),
        (
            1.9, 2.1, 1.95,
            ("2.00×", "as fast, 99 % interval 1.90 to 2.10: not clear, since a copy of the original reached 1.95×"),
        ),
        (
            1.9, 2.1, 1 / 1.95,
            ("2.00×", "as fast, 99 % interval 1.90 to 2.10: not clear, since a copy of the original reached 0.51×"),
        ),
    ],
)  # fmt: skip
def test_the_head_of_a_report_claims_no_more_than_was_measured(
    low: float, high: float, copy: float, claim: tuple[str, str]
) -> None:
    measured = replace(latency(low, high), control=copy)
    report = Report("m.onnx", None, "cpu", {}, {}, latency=measured)
    assert list_claims(None, report)[0] == claim
    assert measured.faster is ("not clear" not in claim[1])


def test_a_difference_within_that_of_a_copy_says_so() -> None:
    assert within(replace(latency(1.9, 2.1), control=1.01)) == " (2.000× [1.900, 2.100])"
    assert within(replace(latency(1.9, 2.1), control=1.95)) == (
        " (2.000× [1.900, 2.100]; a copy of the original 1.950×)"
    )
    slow = replace(latency(0.4, 0.6), speedup=0.5)
    assert within(replace(slow, control=1.01)) == " (0.500× [0.400, 0.600])"
    assert "a copy of the original 1.700×" in within(replace(slow, control=1.7))
    assert within(latency(0.8, 1.5)) == " (99 % interval 0.80 to 1.50)"
    assert within(latency(0.01, 50.0)) == ""


@pytest.mark.parametrize(("low", "shown"), [(1.9, False), (2.05, True)])
def test_times_that_lie_outside_the_interval_are_called_medians(low: float, shown: bool) -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    report = Report("m.onnx", None, "cpu", {"threads": 1}, {"x": (1, 3)}, latency=latency(low, 2.1))
    render(report, console)
    text = console.export_text()
    assert ("times: medians; change: mean over pairs of sessions, with its 99 % interval" in text) == shown
    assert "input sizes: x 1×3" in text


@pytest.mark.parametrize(
    ("control", "said"),
    [
        ((1.01, 0.99, 1.03), "1.010× [0.990, 1.030]. A ratio closer to 1 than that is noise."),
        ((0.911, 0.018, 44.948), "unclear, so the ratios say little."),
    ],
)
def test_a_copy_that_says_nothing_is_called_unclear(control: tuple[float, float, float], said: str) -> None:
    row = replace(Row("a.onnx", {}, 20.0, 1.0, 1.0, (1.01, 1.05), 1.0, 1.0, 1.0, None, {}, 0.0, 0), control=control)
    console = Console(width=200, record=True, file=io.StringIO())
    render_benchmark([row], console)
    assert f"A copy of a.onnx in the same race: {said}" in console.export_text()


def test_huge_pages_bring_only_what_exceeds_a_copy() -> None:
    assert "1.05× as fast [1.03, 1.07]. GLIBC_TUNABLES" in format_huge_pages((1.05, 1.03, 1.07))
    assert "no clear gain [1.03, 1.07]." in format_huge_pages((1.05, 1.03, 1.07), noise=1.04)


def test_what_a_session_takes_to_start_has_a_row_each() -> None:
    start = Start((262.0, 133.0), (12.3, 9.8), 1.97, (1.9, 2.05), (100.0, 80.0))
    assert list_start_rows(latency(1.9, 2.1, start)) == [
        ("session creation", "262 ms", "133 ms", "1.97× [1.90, 2.05]"),
        ("first run", "12.3 ms", "9.8 ms", ""),
        ("peak memory", "100 MB", "80 MB", "-20.0%"),
    ]
    assert list_start_rows(None) == list_start_rows(latency(1.9, 2.1)) == []


def test_weights_that_a_rewrite_adds_are_shown() -> None:
    assert [format_growth(g) for g in (0, 999, 1_500, -2_340_000, 12_000_000)] == [
        "", "", "+1.5 kB", "−2.34 MB", "+12 MB"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("terminal", "lines"), [(True, ["one sentence of", "many words"]), (False, ["one sentence of many words"])]
)
def test_a_terminal_breaks_sentences_between_words(terminal: bool, lines: list[str]) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal, color_system=None, width=15)
    print_line("one sentence of many words", console)
    assert [line.rstrip() for line in console.file.getvalue().splitlines()] == lines  # type: ignore[attr-defined]


def shown(console: Console) -> list[str]:
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_a_narrow_terminal_breaks_lines_between_figures() -> None:
    rewrite = Rewrite("r", macs_before=10, macs_after=4, growth=2_000_000, site=Site("fold-chains", "y"))
    report = Report("m", None, "cpu", {"threads": 1}, {}, (rewrite,))
    console = Console(file=io.StringIO(), color_system=None, width=60)
    render(report, console)
    lines = shown(console)
    assert lines[lines.index("fold-chains") :] == [
        "fold-chains",
        "    count 1; multiply-adds saved 6; weights added +2 MB;",
        "    rounding 0; certified 0; tested 0; none 1",
    ]


def test_bench_shortens_names_and_keeps_intervals_whole() -> None:
    long = "a_rather_long_name_of_a_model"
    first = Row(f"{long}.onnx", {}, 20.0, 1.0, 1.0, (1.01, 1.05), 1.0, 1.0, 1.0, None, {}, 0.0, 0)
    console = Console(file=io.StringIO(), color_system=None, width=80)
    render_benchmark([first, replace(first, model=f"{long}.pwopt.onnx")], console)
    text = "\n".join(shown(console))
    for name in ("a_rather_lon…a_model.onnx", "a_rather_lon…l.pwopt.onnx"):
        assert re.search(rf"^ {name} +20.00 ms +1.00 ms +1.000× \[1.010, 1.050\]$", text, re.M), text
    assert text.count("session creation [99 %] 1.00× [1.00, 1.00]") == 2


def test_names_that_would_look_alike_are_not_shortened() -> None:
    models = [f"the_same_beginning_{middle}_and_the_same_end_of_a_name.onnx" for middle in "ab"]
    first = Row(models[0], {}, 20.0, 1.0, 1.0, (1.01, 1.05), 1.0, 1.0, 1.0, None, {}, 0.0, 0)
    console = Console(file=io.StringIO(), color_system=None, width=80)
    render_benchmark([first, replace(first, model=models[1])], console)
    assert [line for line in shown(console) if line in models] == [*models, *models]
