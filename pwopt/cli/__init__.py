"""The command line: a file for each command, what they share in `options` (asked for) and `output` (said).

Nothing here is imported before a command needs it, so that `pwopt --help` answers at once.
"""

from __future__ import annotations

import contextlib
import errno
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

import pwopt
from pwopt.cli.bench import bench
from pwopt.cli.cache import cache
from pwopt.cli.doctor import doctor
from pwopt.cli.inspect import inspect
from pwopt.cli.optimize import optimize
from pwopt.cli.passes import passes
from pwopt.cli.profile import profile
from pwopt.cli.verify import verify
from pwopt.errors import PwoptError

#: Exit code for a defect of pwopt itself.
INTERNAL_ERROR = 5
#: As shells count signals: SIGINT, SIGPIPE.
INTERRUPTED, CLOSED_PIPE = 130, 141


class _Flags:
    """Commands in whose help a flag, which takes no value, shows none."""

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
    help="Make exported ONNX models faster, exactly: fold what is linear across channels, verify, measure.",
    epilog="Exit codes: 0 done; 1 not equivalent, nothing written; 2 usage; 3 model unreadable or invalid; "
    "4 execution provider unavailable; 5 internal error; 130 interrupted.",
)
for command in (optimize, verify, inspect, passes, bench, profile, cache, doctor):
    app.command(command.__name__, cls=_Command)(command)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"pwopt {pwopt.__version__}")
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: errors become one sentence on stderr and an exit code; with --debug, a traceback as well."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    for stream in (sys.stdout, sys.stderr):  # a character that has no code there is no reason to stop
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        _run(arguments)
    except BrokenPipeError:
        _leave_pipe()
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED, debug)
    except PwoptError as error:
        _fail(str(error), error.exit_code, debug)
    except Exception as error:
        text = f"internal error ({type(error).__name__}: {error}); please report it with the output of --debug"
        _fail(text, INTERNAL_ERROR, debug)


def _run(arguments: Sequence[str]) -> None:
    """The command; what typer and rich make of an interrupt or a closed pipe is what it was again."""
    try:
        quoted = subprocess.list2cmdline if sys.platform == "win32" else shlex.join
        app(arguments, obj=quoted(["pwopt", *arguments]))
    except OSError as error:
        if sys.platform == "win32" and error.errno == errno.EINVAL and error.filename is None:
            raise BrokenPipeError from error  # as Windows says it
        raise
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):
            raise BrokenPipeError from end
        if end.code == INTERRUPTED or isinstance(end.__context__, typer.Abort):
            raise KeyboardInterrupt from end
        sys.stdout.flush()
        raise


def _leave_pipe() -> NoReturn:
    """Whoever read the output has left: say nothing, and let nothing be said when Python flushes it at the end."""
    with contextlib.suppress(OSError):  # where stdout is no file, nothing will be flushed either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(CLOSED_PIPE)


def _fail(sentence: str, code: int, debug: bool) -> NoReturn:
    from pwopt.cli.output import console, plain

    if debug:
        traceback.print_exc()
    console(stderr=True).print(f"[red]pwopt:[/red] {plain(sentence)}", soft_wrap=True)
    raise SystemExit(code)
