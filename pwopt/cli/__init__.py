"""The command line, with one module per command.

`options` defines the arguments and options that commands share; `output` prints and writes results. Commands import
what they need when they run, so `pwopt --help` stays fast.
"""

from __future__ import annotations

import errno
import gc
import io
import os
import shlex
import subprocess
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from pwopt.cli.bench import bench
from pwopt.cli.cache import cache
from pwopt.cli.doctor import doctor
from pwopt.cli.inspect import inspect
from pwopt.cli.optimize import optimize
from pwopt.cli.passes import passes
from pwopt.cli.profile import profile
from pwopt.cli.verify import verify
from pwopt.errors import PwoptError, UsageError
from pwopt.running.memory import COLLECT_AFTER
from pwopt.running.signals import received_signal, signals_interrupt
from pwopt.version import __version__

#: Exit code for a defect of pwopt itself.
INTERNAL_ERROR = 5
#: What the system says when a disk is full.
NO_SPACE = tuple(getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG") if hasattr(errno, name))
#: Exit codes for the signals SIGINT and SIGPIPE, as shells number them.
INTERRUPTED, CLOSED_PIPE = 130, 141


class _Flags:
    """Hides the value placeholder of flags in help texts."""

    def get_params(self, ctx: Any) -> list[Any]:
        found: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for p in found:
            if getattr(p, "is_flag", False) and p.metavar is None:
                p.metavar = ""
        return found


class _Command(_Flags, TyperCommand):
    pass


class _Group(_Flags, TyperGroup):
    pass


app = typer.Typer(
    name="pwopt",
    cls=_Group,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help="Optimise exported ONNX models: fold linear operators exactly, verify the result, measure the speed-up.",
    epilog="Exit codes: 0 success; 1 not equivalent, no model written; 2 usage error; 3 model unreadable or invalid; "
    "4 execution provider unavailable; 5 internal error; 130 interrupted; 143 terminated.",
)
for command in (optimize, verify, inspect, passes, bench, profile, cache, doctor):
    app.command(command.__name__, cls=_Command)(command)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"pwopt {__version__}")
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Errors print one sentence on stderr and set the exit code; --debug adds a traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    gc.set_threshold(COLLECT_AFTER)
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):  # replace characters that the encoding cannot represent
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        with signals_interrupt():
            _run(arguments)
    except BrokenPipeError:
        _leave_pipe()
    except KeyboardInterrupt:
        number = received_signal()
        _fail(*(("interrupted", INTERRUPTED) if number is None else ("terminated", 128 + number)), debug)
    except PwoptError as error:
        _fail(str(error), error.exit_code, debug)
    except OSError as error:
        if error.errno not in NO_SPACE:
            _report_defect(error, debug)
        _fail_to_write(error, debug)
    except Exception as error:
        _report_defect(error, debug)


def _report_defect(error: Exception, debug: bool) -> NoReturn:
    text = f"internal error ({type(error).__name__}: {error}); please report it with the output of --debug"
    _fail(text, INTERNAL_ERROR, debug)


def _fail_to_write(error: OSError, debug: bool) -> NoReturn:
    from pwopt.cli.output import discard

    discard(sys.stdout)
    _fail(f"the output cannot be written: {error.strerror}; free some space", UsageError.exit_code, debug)


def _open_closed_streams() -> None:
    """Connect standard streams that are closed to the null device, so that no file gets their numbers."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def _run(arguments: Sequence[str]) -> None:
    """Run the command, and turn what typer and rich raise on an interrupt or a closed pipe back into those errors."""
    try:
        quoted = subprocess.list2cmdline if sys.platform == "win32" else shlex.join
        app(arguments, obj=quoted(["pwopt", *arguments]))
    except OSError as error:
        if sys.platform == "win32" and error.errno == errno.EINVAL and error.filename is None:
            raise BrokenPipeError from error  # how Windows reports a closed pipe
        raise
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):
            raise BrokenPipeError from end
        if end.code == INTERRUPTED or isinstance(end.__context__, typer.Abort):
            raise KeyboardInterrupt from end
        sys.stdout.flush()
        raise


def _leave_pipe() -> NoReturn:
    """Exit silently because the reader of stdout has closed it."""
    from pwopt.cli.output import discard

    discard(sys.stdout)
    raise SystemExit(CLOSED_PIPE)


def _fail(sentence: str, code: int, debug: bool) -> NoReturn:
    from pwopt.cli.output import escape_text, open_console, print_status

    if debug:
        traceback.print_exc()
    print_status(open_console(stderr=True), f"[red]pwopt:[/red] {escape_text(sentence)}")
    raise SystemExit(code)
