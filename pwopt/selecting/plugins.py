"""Find and check passes from outside pwopt: classes, `module:Class`, and entry points of installed packages."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

from pwopt.errors import UsageError, summarize
from pwopt.rewriting.driver import CONTRACT, PHASES, POLICIES, Pass

#: The entry point group under which packages offer passes; each entry point is a class.
GROUP = "pwopt.passes"
#: The form of a pass name. Sites begin with it, also on the command line.
NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


@functools.cache
def find_installed() -> dict[type[Pass], str]:
    """Find the passes of installed packages, in the order of their entry points' names, each with its package.

    Raises
    ------
    UsageError
        If a pass cannot be imported or breaks the contract.
    """
    found: dict[type[Pass], str] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda e: (e.name, e.value)):
        owner = f"{point.dist.name} {point.dist.version}" if point.dist is not None else point.value
        try:
            offered = point.load()
        except Exception as error:
            raise UsageError(f"the pass {point.value!r} of {owner} cannot be imported ({summarize(error)})") from error
        found[check_contract(offered, f"{point.value!r} of {owner}")] = owner
    return found


def import_plugins(given: Sequence[str | type[Pass] | Pass], path: Path | None) -> list[type[Pass] | Pass]:
    """Import the plugins that are given by name. Files are searched beside the model, then in the current folder.

    Raises
    ------
    UsageError
        If a pass cannot be imported or breaks the contract.
    """
    folders = [Path.cwd()] if path is None else [path.parent, Path.cwd()]
    return [import_pass(p, folders) if isinstance(p, str) else p for p in given]


def import_pass(text: str, folders: Sequence[Path] = ()) -> type[Pass]:
    """Import the pass that `module:Class` or `path/to/module.py:Class` names.

    Parameters
    ----------
    text : str
    folders : sequence of Path
        Folders that are searched for a file `module.py`, before the installed modules.

    Raises
    ------
    UsageError
    """
    module, colon, name = text.rpartition(":")
    if not colon or not module or not name.isidentifier():
        raise UsageError(f"the plugin {text!r} is not of the form module:Class or path/to/module.py:Class")
    beside = [Path(module)] if module.endswith(".py") else [f / f"{module.replace('.', '/')}.py" for f in folders]
    file = next((path for path in beside if path.is_file()), None)
    if file is None and module.endswith(".py"):
        raise UsageError(f"the plugin {text!r} has no file; give the path of a Python file, then :Class")
    try:
        loaded = importlib.import_module(module) if file is None else _load_file(file)
        offered = getattr(loaded, name)
    except AttributeError as error:
        raise UsageError(f"the plugin {text!r} has no class {name!r} ({summarize(error)})") from error
    except Exception as error:
        raise UsageError(f"the plugin {text!r} cannot be imported ({summarize(error)})") from error
    return check_contract(offered, repr(text))


def _load_file(file: Path) -> object:
    """Import a module from its file once, so that a pass that is named twice is one class."""
    name = os.fspath(file.resolve())  # not an identifier, so that it hides no module
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def check_contract(offered: object, where: str) -> type[Pass]:
    """Check that an object is a class that keeps the contract of passes, and return it.

    Raises
    ------
    UsageError
        If it breaks the contract.
    """
    if not (isinstance(offered, type) and issubclass(offered, Pass)):
        raise UsageError(f"the pass {where} is not a subclass of pwopt.rewriting.Pass")
    if offered.contract != CONTRACT:
        kept = f"this pwopt keeps contract {CONTRACT}"
        raise UsageError(f"the pass {where} is written for contract {offered.contract}, and {kept}; install one for it")
    name, policy = getattr(offered, "name", ""), offered.policy
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UsageError(f"the pass {where} is called {name!r}; a name is of small letters, digits and hyphens")
    if policy not in POLICIES:
        raise UsageError(f"the pass {where} has the policy {policy!r}, which is none of: {', '.join(POLICIES)}")
    if offered.phase not in PHASES:
        raise UsageError(f"the pass {where} has the phase {offered.phase!r}, which is none of: {', '.join(PHASES)}")
    if offered.match_and_rewrite is Pass.match_and_rewrite:
        raise UsageError(f"the pass {where} does not write match_and_rewrite")
    return offered


def construct(kind: type[Pass]) -> Pass:
    """Create a pass without arguments.

    Raises
    ------
    UsageError
        If its constructor fails.
    """
    try:
        return kind()
    except Exception as error:
        where = f"{kind.__module__}.{kind.__qualname__}"
        why = f"cannot be made without arguments ({summarize(error)}); correct it or leave it out"
        raise UsageError(f"the pass {kind.name!r} ({where}) {why}") from error


def describe_origin(p: Pass) -> str:
    """Name the origin of a pass: pwopt, an installed package, a module, or a file."""
    if p.builtin:
        return "pwopt"
    module = type(p).__module__
    return find_installed().get(type(p), Path(module).name if os.path.isabs(module) else module)


def fingerprint(p: Pass) -> str:
    """Return a digest of the source and the settings of a pass from outside pwopt; "" for a pass of pwopt.

    Tuning records contain it, because a decision on another version of a pass does not count.
    """
    if p.builtin:
        return ""
    settings = sorted((k, v) for k, v in vars(p).items() if k not in vars(Pass))
    try:
        source = Path(inspect.getfile(type(p))).read_bytes()
    except (OSError, TypeError):
        source = b""
    text = f"{type(p).__qualname__} {settings!r}".encode()
    return hashlib.sha256(source + text).hexdigest()[:8]
