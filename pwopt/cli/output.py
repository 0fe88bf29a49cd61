"""What the commands say: on the terminal, while they work, and in files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from pwopt.errors import UsageError
from pwopt.graph.storage import replacing
from pwopt.optimizing.subject import same_file
from pwopt.reporting.document import document, kind_of
from pwopt.reporting.report import Comparison, Report
from pwopt.reporting.text import plain
from pwopt.running import progress as telling
from pwopt.running import runtime

__all__ = ["check_report", "console", "plain", "telling_progress", "write", "write_document"]


def console(*, stderr: bool = False, wide: bool = False) -> Console:
    """The terminal, without colours of its own; `wide` leaves the breaking of lines to it."""
    return Console(stderr=stderr, highlight=False, soft_wrap=wide, emoji=False)  # a site may end in :x:


def write(path: Path | None, content: str) -> None:
    """Write a file, whole or not at all."""
    if path is None:
        return
    try:
        with replacing(path) as stream:
            stream.write(content.encode())
    except OSError as error:
        raise UsageError(f"the report {str(path)!r} cannot be written: {error.strerror}") from error


def write_document(path: Path | None, content: Report | Comparison) -> None:
    """Write a report in the format that the file's name asks for."""
    if path is not None:
        write(path, document(content, kind_of(path)))


def check_report(path: Path | None, *others: Path) -> None:
    """Refuse a report that would replace a model, or that cannot be written, before any work is done."""
    if path is None:
        return
    if any(path.absolute() == other.absolute() or same_file(path, other) for other in others):
        raise UsageError(f"the report {str(path)!r} would replace a model; choose another file")
    if not path.resolve().parent.is_dir():
        raise UsageError(f"the report {str(path)!r} cannot be written: there is no such folder")


@contextlib.contextmanager
def telling_progress(*, debug: bool = False) -> Iterator[telling.Progress]:
    """Stages as a bar on a terminal, nowhere else; onnxruntime's own log stays off it, unless it is wanted."""
    if not debug:
        runtime.silence()
    terminal = console(stderr=True)
    if not terminal.is_terminal:
        yield telling.silent
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn())
    with Progress(*columns, console=terminal, transient=True) as bar:
        task = bar.add_task("", total=1.0)

        def update(stage: str, done: float) -> None:
            bar.update(task, description=stage, completed=done)

        yield update
