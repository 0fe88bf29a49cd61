"""Loads `pwopt.passes` from the folder `passes` at the top of a clone.

In a wheel, the files of that folder replace this one (see setup.py and docs/architecture.md).
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from passes import *  # noqa: F403
else:
    __path__ = [str(Path(__file__).parents[2] / "passes")]
    __file__ = str(Path(__path__[0], "__init__.py"))
    exec(compile(Path(__file__).read_text(encoding="utf-8"), __file__, "exec"))
