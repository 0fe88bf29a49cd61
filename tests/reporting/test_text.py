"""How figures are written in every kind of report."""

from __future__ import annotations

from pwopt.reporting.report import Latency, Start
from pwopt.reporting.text import format_speedup, list_start_rows


def latency(low: float, high: float, start: Start | None = None) -> Latency:
    return Latency(2.0, 1.0, 2.0, (low, high), 2.0, 1.0, 30, start=start)


def test_a_speed_up_that_says_little_is_called_unclear() -> None:
    assert format_speedup(latency(1.9, 2.1)) == "2.00× [1.90, 2.10]"
    assert format_speedup(latency(1.31, 10.4)) == "unclear [1.31, 10.40]"
    assert format_speedup(latency(0.0, 86871117.97)) == "unclear"
    assert format_speedup(latency(2.0, 2.0)) == "2.00×"


def test_what_a_session_takes_to_start_has_a_row_each() -> None:
    start = Start((262.0, 133.0), (12.3, 9.8), 1.97, (1.9, 2.05), (100.0, 80.0))
    assert list_start_rows(latency(1.9, 2.1, start)) == [
        ("session creation", "262 ms", "133 ms", "1.97× [1.90, 2.05]"),
        ("first run", "12.3 ms", "9.8 ms", ""),
        ("peak memory", "100 MB", "80 MB", "-20.0%"),
    ]
    assert list_start_rows(None) == list_start_rows(latency(1.9, 2.1)) == []
