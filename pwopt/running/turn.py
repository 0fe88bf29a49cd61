"""Whose turn it is to measure, among processes that share a machine."""

from __future__ import annotations

import contextlib
from typing import Any

_turn: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()


def share_turn(turn: contextlib.AbstractContextManager[Any]) -> None:
    """Let what several processes share, such as a lock, decide which of them may measure."""
    global _turn
    _turn = turn


def exclusive() -> contextlib.AbstractContextManager[Any]:
    """A context in which no other process that shares this machine's turn measures."""
    return _turn
