"""Freed memory goes back to the operating system."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from pwopt.running import memory


@pytest.mark.skipif(memory._find_trim() is None or not memory.PAGES.exists(), reason="not Linux with glibc")
def test_freed_memory_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MIN_RESIDENT", 0)
    pieces = [np.ones(8 << 10) for _ in range(2 << 10)]  # 128 MiB in pieces that the allocator keeps
    last = np.ones(8 << 10)  # above them
    del pieces
    memory.release_freed()
    before = memory.count_resident()
    pieces = [np.ones(8 << 10) for _ in range(2 << 10)]
    assert memory.count_resident() > before + (100 << 20)
    del pieces
    memory.release_freed()
    assert memory.count_resident() < before + (30 << 20)
    assert last[0] == 1


def test_little_memory_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MIN_RESIDENT", 1 << 60)
    monkeypatch.setattr(memory, "_find_trim", lambda: pytest.fail("trimmed"))
    memory.release_freed()


def test_garbage_collection_waits_longer_inside_the_context_only() -> None:
    before = gc.get_threshold()
    try:
        gc.set_threshold(700, 10, 10)
        with memory.collect_rarely():
            assert gc.get_threshold() == (memory.COLLECT_AFTER, 10, 10)
        assert gc.get_threshold() == (700, 10, 10)
        for chosen in (0, 10 * memory.COLLECT_AFTER):  # off, or even rarer
            gc.set_threshold(chosen, 10, 10)
            with memory.collect_rarely():
                assert gc.get_threshold()[0] == chosen
    finally:
        gc.set_threshold(*before)


def test_a_small_model_is_not_searched_for_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MIN_RESIDENT", 0)
    searches: list[None] = []
    monkeypatch.setattr(gc, "collect", lambda: searches.append(None))
    memory.collect_garbage(memory.MIN_GARBAGE - 1)
    assert not searches
    memory.collect_garbage(memory.MIN_GARBAGE)
    assert len(searches) == 1
