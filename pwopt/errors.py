"""What can go wrong, each with the exit code that the command line ends with.

Every message is one sentence: what was wrong and what to do.
"""

from __future__ import annotations

from typing import Any


class PwoptError(Exception):
    """Base of all errors that pwopt raises on purpose."""

    exit_code = 1


def summarize(error: BaseException) -> str:
    """The type and the message of an error, in one line of at most 200 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


class NotEquivalentError(PwoptError):
    """The rewritten model does not give the original's answers; nothing was written.

    `report` is the `pwopt.reporting.report.Report` of the attempt.
    """

    exit_code = 1

    def __init__(self, message: str, report: Any = None) -> None:
        super().__init__(message)
        self.report = report


class UsageError(PwoptError):
    """An argument does not fit the model."""

    exit_code = 2


class ModelError(PwoptError):
    """The model cannot be read, or is not valid."""

    exit_code = 3


class ProviderError(PwoptError):
    """The execution provider asked for is not available."""

    exit_code = 4
