"""Temporary folders and files, which the next run removes if this one is killed.

Each holds a lock for as long as its process lives (flock(2)). The system releases the lock when the process ends, for
any reason. So a folder or file whose lock is free belongs to nobody.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows, where nothing is removed later
    fcntl = None

#: How names of temporary folders and files begin.
PREFIX = ".pwopt-"
#: The file in a folder that holds the lock.
LOCK = "lock"
#: Seconds before an unlocked file counts as left behind: its owner creates it a moment before it takes the lock.
AGE = 60.0


@contextlib.contextmanager
def temporary_folder(where: Path | None = None) -> Iterator[Path]:
    """Create a folder that is removed at the end; first remove those that killed processes left beside it.

    Parameters
    ----------
    where : Path, optional
        Its parent; the system's folder for temporary files by default.

    Raises
    ------
    OSError
        If it cannot be created.
    """
    parent = Path(tempfile.gettempdir()) if where is None else where
    remove_stale(parent)
    # Windows cannot delete a file that a session still maps, which is no reason to fail
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=parent, ignore_cleanup_errors=True) as name:
        held = _lock_folder(Path(name))
        try:
            yield Path(name)
        finally:
            if held is not None:
                os.close(held)


def create_file(folder: Path) -> tuple[int, Path]:
    """Create a file for writing, with the permissions of a new file; returns its descriptor and its path."""
    while True:
        path = folder / f"{PREFIX}{secrets.token_hex(8)}.tmp"
        with contextlib.suppress(FileExistsError):
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
            _try_lock(handle)
            return handle, path


def remove_stale(parent: Path) -> None:
    """Remove the user's temporary folders and files in a folder whose processes have ended."""
    if fcntl is None:
        return
    with contextlib.suppress(OSError):
        for path in [p for p in parent.iterdir() if p.name.startswith(PREFIX)]:
            with contextlib.suppress(OSError):
                _remove_if_stale(path)


def _remove_if_stale(path: Path) -> None:
    about = path.lstat()
    if about.st_uid != os.getuid():
        return
    if stat.S_ISDIR(about.st_mode):
        if _is_free(path / LOCK):
            shutil.rmtree(path, ignore_errors=True)
    elif stat.S_ISREG(about.st_mode) and time.time() - about.st_mtime > AGE and _is_free(path):
        path.unlink()


def _lock_folder(folder: Path) -> int | None:
    """Lock a folder; the lock file appears under its name when it is locked already. None where there are no locks."""
    if fcntl is None:
        return None
    new = folder / f"{LOCK}.new"
    handle = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    if _try_lock(handle):
        new.rename(folder / LOCK)
        return handle
    os.close(handle)
    new.unlink()
    return None


def _is_free(path: Path) -> bool:
    """Whether nobody holds the lock of a file."""
    handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        return _try_lock(handle)
    finally:
        os.close(handle)


def _try_lock(handle: int) -> bool:
    """Lock an open file. False if another process holds the lock, or the file system has none."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            return False
        raise
    return True
