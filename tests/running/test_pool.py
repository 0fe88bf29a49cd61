"""Several children side by side, and the lock that they share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pwopt.running import child_process
from pwopt.running.child_process import Channel, Child, EndedError, StartError
from pwopt.running.pool import FileLock, ask_all


def count(path: str) -> None:
    """In a child: answer with twice the question; add a line to a file under a lock; die at 3, and once at 5."""
    channel, file = Channel(), Path(path)
    while (question := channel.receive()) is not None:
        died = file.with_name("died")
        if question == 3 or (question == 5 and not died.exists()):
            died.touch()
            os._exit(9)
        with FileLock(file.with_name("lock")):
            before = file.read_text(encoding="utf-8") if file.exists() else ""
            file.write_text(before + f"{question}\n", encoding="utf-8")
        channel.send(2 * question)


def test_each_question_has_its_answer_and_a_child_that_dies_costs_its_own(tmp_path: Path) -> None:
    path = tmp_path / "numbers"
    found: dict[int, Any] = dict(ask_all(lambda: Child(count, str(path)), range(8), 3))
    error = found.pop(3)
    assert isinstance(error, EndedError)
    assert str(error) == "exit code 9"
    assert found == {n: 2 * n for n in range(8) if n != 3}
    assert sorted(map(int, path.read_text().split())) == [0, 1, 2, 4, 5, 6, 7]


def test_children_that_do_not_start_are_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(child_process, "child_command", lambda *_: ["/no/such/python"])
    found = dict(ask_all(lambda: Child(count, str(tmp_path / "n")), ["a", "b"], 2))
    assert {type(e) for e in found.values()} == {StartError}
    assert list(ask_all(lambda: Child(count, ""), [], 2)) == []
