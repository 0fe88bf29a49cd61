"""What the commands say: on the terminal, while they work, and in files."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from pwopt.errors import UsageError
from pwopt.graph.storage import replacing
from pwopt.optimizing.preparation import same_file
from pwopt.reporting.document import document, kind_of
from pwopt.reporting.report import Comparison, Report
from pwopt.reporting.text import plain
from pwopt.running import progress as telling
from pwopt.running import runtime

__all__ = ["as_json", "check_report", "console", "plain", "telling_progress", "write", "write_document"]


def console(*, stderr: bool = False, wide: bool = False, quiet: bool = False) -> Console:
    """The terminal, without colours of its own; `wide` leaves the breaking of lines to it, `quiet` says nothing."""
    return Console(stderr=stderr, highlight=False, soft_wrap=wide, emoji=False, quiet=quiet)  # a site may end in :x:


def as_json(content: str) -> None:
    """JSON on stdout."""
    sys.stdout.write(content)
    sys.stdout.flush()


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


def check_report(path: Path | None, *others: Path, suffix: str = "") -> None:
    """Refuse a report that would replace a model, or that cannot be written, before any work is done.

    `suffix` is that of a file which is no report.
    """
    if path is None:
        return
    if any(path.absolute() == other.absolute() or same_file(path, other) for other in others):
        raise UsageError(f"the report {str(path)!r} would replace a model; choose another file")
    if not path.resolve().parent.is_dir():
        raise UsageError(f"the report {str(path)!r} cannot be written: there is no such folder")
    if not suffix or path.suffix.lower() != suffix:
        kind_of(path)


class _Told(logging.Handler):
    """What modules log, as lines of a terminal."""

    def __init__(self, terminal: Console) -> None:
        super().__init__(logging.DEBUG)
        self.terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        self.terminal.print(f"[dim]          {plain(record.getMessage())}[/dim]", soft_wrap=True)


@contextlib.contextmanager
def telling_progress(*, debug: bool = False, quiet: bool = False, verbose: bool = False) -> Iterator[telling.Progress]:
    """Stages on stderr, as a bar on a terminal and as lines elsewhere, with reasons and figures if `verbose`.

    onnxruntime's own log stays off the terminal, unless it is wanted.
    """
    if not debug:
        runtime.silence()
    terminal = console(stderr=True, quiet=quiet)
    log, handler = logging.getLogger("pwopt"), _Told(terminal)
    if verbose:
        log.addHandler(handler)
        log.setLevel(logging.DEBUG)
    try:
        if terminal.is_terminal and not quiet:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn())
            with Progress(*columns, console=terminal, transient=True) as bar:
                task = bar.add_task("", total=1.0)
                yield lambda stage, done: bar.update(task, description=plain(stage), completed=done)
        else:
            yield _Lines(terminal)
    finally:
        log.removeHandler(handler)


class _Lines:
    """A line for each stage, with the seconds since the beginning."""

    def __init__(self, terminal: Console) -> None:
        self.terminal, self.stage, self.start = terminal, "", time.perf_counter()

    def __call__(self, stage: str, _done: float) -> None:
        if stage != self.stage:
            self.stage = stage
            self.terminal.print(f"{time.perf_counter() - self.start:7.1f} s {plain(stage)}", soft_wrap=True)
