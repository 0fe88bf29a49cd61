"""Output of the commands: terminal, progress, JSON on stdout, and files."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from rich.console import Console

from pwopt.errors import UsageError
from pwopt.graph.storage import replacing
from pwopt.optimizing.preparation import same_file
from pwopt.reporting.formats import parse_format
from pwopt.reporting.report import Comparison, Report
from pwopt.reporting.text import escape_text
from pwopt.running import installation
from pwopt.running.progress import Progress as ReportProgress
from pwopt.running.progress import TimeLeft

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

__all__ = [
    "check_report",
    "discard",
    "escape_text",
    "open_console",
    "print_json",
    "print_status",
    "quote_path",
    "show_progress",
    "write_document",
    "write_text",
]


def open_console(*, stderr: bool = False, wide: bool = False, quiet: bool = False) -> Console:
    """Open the terminal for output, without automatic highlighting.

    With `wide`, long lines are not broken in a file or a pipe. With `quiet`, nothing is printed.
    """
    # emoji=False: a site may end in text such as ":x:", which rich would replace
    console = Console(stderr=stderr, highlight=False, emoji=False, quiet=quiet)
    console.soft_wrap = wide and not console.is_terminal
    return console


def print_json(content: str) -> None:
    """Print JSON on stdout."""
    sys.stdout.write(content)
    sys.stdout.flush()


def quote_path(path: Path) -> str:
    """Quote a path for a shell, if it needs quotes."""
    text = os.fspath(path)
    return subprocess.list2cmdline([text]) if sys.platform == "win32" else shlex.quote(text)


def print_status(terminal: Console, text: str) -> None:
    """Print a line on stderr. If stderr cannot be written, such as on a full disk, nothing more is printed there."""
    try:
        terminal.print(text, soft_wrap=not terminal.is_terminal)
    except BrokenPipeError:
        raise
    except OSError:
        discard(sys.stderr)


def discard(stream: TextIO) -> None:
    """Redirect a stream that cannot be written to the null device, so that the final flush succeeds."""
    with contextlib.suppress(OSError):  # a stream that is not a file needs no flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def write_text(path: Path | None, content: str) -> None:
    """Write a file atomically; without a path, do nothing."""
    if path is None:
        return
    try:
        with replacing(path) as stream:
            stream.write(content.encode())
    except OSError as error:
        raise UsageError(f"the report {str(path)!r} cannot be written: {error.strerror}") from error


def write_document(path: Path | None, content: Report | Comparison) -> None:
    """Write a report in the format given by the file name's suffix."""
    if path is not None:
        from pwopt.reporting.document import render_document

        write_text(path, render_document(content, parse_format(path)))


def check_report(path: Path | None, *others: Path, suffix: str = "") -> None:
    """Check before any work is done that a report can be written and does not replace a model.

    Parameters
    ----------
    path : Path or None
    *others : Path
        Models that must not be replaced.
    suffix : str
        A suffix to accept besides those of reports.

    Raises
    ------
    UsageError
    """
    if path is None:
        return
    if any(path.absolute() == other.absolute() or same_file(path, other) for other in others):
        raise UsageError(f"the report {str(path)!r} would replace a model; choose another file")
    if not path.resolve().parent.is_dir():
        raise UsageError(f"the report {str(path)!r} cannot be written: there is no such folder")
    if not suffix or path.suffix.lower() != suffix:
        parse_format(path)


#: Characters of a stage's name on a line of its own. With the seconds before it, the line has 80 columns.
STAGE_WIDTH = 70


class _LogHandler(logging.Handler):
    """Prints log records on a terminal, one line each."""

    def __init__(self, terminal: Console) -> None:
        super().__init__(logging.DEBUG)
        self.terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        print_status(self.terminal, f"[dim]          {escape_text(record.getMessage())}[/dim]")


@contextlib.contextmanager
def show_progress(
    *, debug: bool = False, quiet: bool = False, verbose: bool = False, left: TimeLeft | None = None
) -> Iterator[ReportProgress]:
    """Show stages on stderr: a progress bar on a terminal, otherwise one line per stage.

    With `verbose`, log records are printed as well. Without `debug`, onnxruntime's own log is silenced. `left`
    estimates the time that is left; without it, the bar shows none.
    """
    if not debug:
        installation.silence_onnxruntime()
    terminal = open_console(stderr=True, quiet=quiet)
    log, handler = logging.getLogger("pwopt"), _LogHandler(terminal)
    if verbose:
        log.addHandler(handler)
        log.setLevel(logging.DEBUG)
    try:
        if terminal.is_terminal and not quiet:
            with _make_bar(terminal, left) as bar:
                task = bar.add_task("", total=1.0)

                def update(stage: str, done: float) -> None:
                    if left is not None:
                        left.update(stage, done)
                    bar.update(task, description=escape_text(stage), completed=done)

                yield update
        else:
            yield _ProgressLines(terminal)
    finally:
        log.removeHandler(handler)


def _make_bar(terminal: Console, left: TimeLeft | None) -> Bar:
    """Make a progress bar with the stage, the time that has passed, and the time that is left if it is known."""
    from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
    from rich.table import Column
    from rich.text import Text

    class TimeLeftColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text("" if left is None else left.describe(), style="dim")

    text = TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))
    columns = SpinnerColumn(), text, BarColumn(20), TimeElapsedColumn(), TimeLeftColumn()
    return Progress(*columns, console=terminal, transient=True, expand=True)


class _ProgressLines:
    """Prints one line per stage, with the seconds since the start."""

    def __init__(self, terminal: Console) -> None:
        self.terminal, self.stage, self.start = terminal, "", time.perf_counter()

    def __call__(self, stage: str, _done: float) -> None:
        if stage != self.stage:
            self.stage = stage
            shown = textwrap.shorten(stage, STAGE_WIDTH, placeholder="…")
            print_status(self.terminal, f"{time.perf_counter() - self.start:7.1f} s {escape_text(shown)}")
