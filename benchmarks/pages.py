"""Write recorded tables into the pages that show them."""

from __future__ import annotations

from pathlib import Path


def split_page(page: Path, name: str) -> tuple[str, str, str]:
    """The text of a page before, in and after the place of a table: between ``<!-- NAME: start -->`` and its end."""
    start, end = f"<!-- {name}: start -->\n", f"<!-- {name}: end -->"
    before, opened, rest = page.read_text(encoding="utf-8").partition(start)
    table, closed, after = rest.partition(end)
    if not opened or not closed:
        raise SystemExit(f"{page.name} has no place for the table: {start.strip()} and {end}")
    return before + start, table, end + after


def fill_page(page: Path, name: str, table: str) -> None:
    """Write a table into its place in a page."""
    before, _, after = split_page(page, name)
    page.write_text(before + table + after, encoding="utf-8")
