"""The formats of a report: which one a file name asks for, and whether it can be written here."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from pwopt.errors import UsageError

#: Report format by file name suffix.
FORMATS = {".html": "html", ".htm": "html", ".md": "markdown", ".markdown": "markdown", ".json": "json"}
#: The packages that documents and plots need.
DOCUMENT_PACKAGES = ("jinja2", "matplotlib")


def can_render() -> bool:
    """Whether the packages for documents and plots are installed."""
    return all(find_spec(name) is not None for name in DOCUMENT_PACKAGES)


def check_available(path: Path | None) -> None:
    """Check before any work is done that the packages for a document or plot are installed.

    Raises
    ------
    UsageError
        If jinja2 or matplotlib cannot be imported.
    """
    if path is None or path.suffix.lower() == ".json":
        return
    try:
        import_module("jinja2")
        if find_spec("matplotlib") is None:
            raise ModuleNotFoundError(name="matplotlib")
    except ImportError as error:
        what = path.suffix.lstrip(".").upper()
        wanted = " ".join(DOCUMENT_PACKAGES)
        raise UsageError(f"{what} needs {error.name}; pip install {wanted}, or write a .json") from error


def parse_format(path: Path) -> str:
    """Return the report format for a file name: html, markdown or json.

    Raises
    ------
    UsageError
        If the suffix is not one of a report.
    """
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise UsageError(f"{str(path)!r} is not a name for a report; use the suffix .html, .md or .json")
    return kind
