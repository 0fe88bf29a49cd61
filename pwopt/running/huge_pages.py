"""Transparent huge pages, which make sessions of one model equally fast.

Linux gives a program memory in pages of 4 KiB, scattered over the machine. The more load the machine has, the more two
sessions of one model then differ, and all run slower. With pages of 2 MiB they agree to about 1 %. A program gets those
in two ways: glibc requests them (`GLIBC_TUNABLES=glibc.malloc.hugetlb=1`, glibc 2.35), or it calls `use_huge_pages`.

Sources: madvise(2), MADV_HUGEPAGE and MADV_COLLAPSE (Linux 6.1); Linux, "Transparent Hugepage Support"; glibc manual,
"Memory Allocation Tunables".
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

#: The variable that glibc reads its tunables from, and the tunable.
VARIABLE, TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
#: What Linux says of the system and of this process (proc(5)).
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ROLLUP, MAPS = Path("/proc/self/smaps_rollup"), Path("/proc/self/maps")
#: Bytes of a huge page on x86-64 and on arm64 with pages of 4 KiB.
HUGE = 2 << 20
#: Linux's numbers of the two requests.
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25
#: An anonymous, writable region in /proc/self/maps: its first byte, and the first byte behind it.
REGION = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p 00000000 00:00 0\s*(\[heap\])?$")


@dataclass(frozen=True)
class HugePages:
    """What `use_huge_pages` achieved.

    Attributes
    ----------
    bytes : int
        How much of the process's memory lies in huge pages now.
    seconds : float
        Wall time that it took.
    obstacle : str
        Why nothing was done, as a sentence; "" if something was.
    """

    bytes: int
    seconds: float
    obstacle: str = ""


def system_mode() -> str:
    """When Linux gives huge pages: "always", "madvise" (when a program asks) or "never"; "" on other systems."""
    with contextlib.suppress(OSError):
        found = re.search(r"\[(\w+)\]", ENABLED.read_text(encoding="utf-8"))
        return found[1] if found else ""
    return ""


def held_bytes() -> int:
    """Read how many bytes of this process's memory lie in huge pages; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        for line in ROLLUP.read_text(encoding="utf-8").splitlines():
            if line.startswith("AnonHugePages:"):
                return int(line.split()[1]) * 1024
    return 0


def requesting(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables for a process that requests huge pages, unless `environ` already decides that."""
    given = environ.get(VARIABLE, "")
    if TUNABLE in given or not sys.platform.startswith("linux"):
        return dict(environ)
    return {**environ, VARIABLE: ":".join(filter(None, [given, f"{TUNABLE}=1"]))}


def refusing(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables for a process with pages of 4 KiB, which programs have by default."""
    kept = [t for t in environ.get(VARIABLE, "").split(":") if t and not t.startswith(f"{TUNABLE}=")]
    return {**environ, VARIABLE: ":".join([*kept, f"{TUNABLE}=0"])}


def use_huge_pages() -> HugePages:
    """Move the large memory regions of this process into huge pages, where Linux can.

    Call it after the first run of a session, when its memory has been allocated. Answers stay the same bits. It does
    nothing where Linux is older than 6.1, where huge pages are switched off, and on other systems.

    Returns
    -------
    HugePages
        What was achieved, or why nothing was done.

    Examples
    --------
    >>> import pwopt
    >>> pages = pwopt.use_huge_pages()
    >>> pages.bytes > 0 or bool(pages.obstacle)
    True
    """
    start = time.perf_counter()
    mode = system_mode()
    if not mode:
        return HugePages(0, 0.0, "This system has no transparent huge pages.")
    if mode == "never":
        return HugePages(0, 0.0, f"Huge pages are switched off; write madvise into {ENABLED} to switch them on.")
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for first, size in _regions():
        libc.madvise(first, size, MADV_HUGEPAGE)
        libc.madvise(first, size, MADV_COLLAPSE)  # fails for a region of which a part cannot be moved
    held = held_bytes()
    obstacle = "" if held else "Linux gave none: it is older than 6.1, or the process has no large memory region yet."
    return HugePages(held, time.perf_counter() - start, obstacle)


def _regions() -> Iterator[tuple[int, int]]:
    """Address and bytes of the huge pages that fit into each anonymous region."""
    for line in MAPS.read_text(encoding="utf-8").splitlines():
        region = REGION.match(line)
        if region is None:
            continue
        first = -(-int(region[1], 16) // HUGE) * HUGE
        last = int(region[2], 16) // HUGE * HUGE
        if last > first:
            yield first, last - first
