"""Huge pages: who asks for them, and what a running program gets."""

from __future__ import annotations

import mmap
import sys

import pytest

from pwopt.running import huge_pages

pytestmark = pytest.mark.huge_pages
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's own")


@LINUX
def test_a_worker_asks_for_them_unless_its_user_decided() -> None:
    asked = huge_pages.requesting({"A": "b", "GLIBC_TUNABLES": "glibc.malloc.check=1"})
    assert asked == {"A": "b", "GLIBC_TUNABLES": "glibc.malloc.check=1:glibc.malloc.hugetlb=1"}
    assert huge_pages.requesting(asked) == asked
    off = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}
    assert huge_pages.requesting(off) == off
    assert huge_pages.refusing(asked)["GLIBC_TUNABLES"] == "glibc.malloc.check=1:glibc.malloc.hugetlb=0"


def test_systems_without_huge_pages_say_so(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(huge_pages, "ENABLED", tmp_path / "enabled")
    assert huge_pages.use_huge_pages().obstacle == "This system has no transparent huge pages."
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    assert huge_pages.use_huge_pages().obstacle.startswith("Huge pages are switched off; write madvise into ")
    assert huge_pages.system_mode() == "never"


@LINUX
def test_memory_of_a_running_program_moves_and_keeps_its_bytes() -> None:
    if huge_pages.system_mode() not in ("always", "madvise"):
        pytest.skip("this system gives no huge pages")
    block = mmap.mmap(-1, 32 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pattern = bytes(range(256)) * 16
    for start in range(0, len(block), len(pattern)):
        block[start : start + len(pattern)] = pattern
    found = huge_pages.use_huge_pages()
    if found.obstacle:
        pytest.skip(found.obstacle)
    assert found.bytes >= 16 << 20
    assert all(block[start : start + len(pattern)] == pattern for start in range(0, len(block), len(pattern)))
