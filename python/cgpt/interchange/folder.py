"""Folders that are whole or absent: written under another name beside their place, renamed into it.

.OUT.unfinished/...  ->  OUT/...
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from cgpt.errors import InputError
from cgpt.files import sync_folder


@contextlib.contextmanager
def whole_folder(out: Path, what: str) -> Iterator[Path]:
    """A new folder that becomes `out` once the block ends well, and is gone where it does not; what a killed process
    left of one is removed first.

    what: it will be, for the message. Raises InputError where `out` is neither new nor empty or another process is at
    it, and OSError.
    """
    final = out.resolve()
    if final.exists() and not final.is_dir():
        raise InputError(f"{out}: wanted a new or empty folder for {what}, got a file")
    if final.is_dir() and any(final.iterdir()):
        raise InputError(f"{out}: wanted a new or empty folder for {what}, got one in use")
    partial = final.with_name(f".{final.name}.unfinished")
    partial.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        _lock(descriptor, out)
        for left in partial.iterdir():
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        try:
            yield partial
            sync_folder(partial)
            partial.rename(final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync_folder(final.parent)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, out: Path) -> None:
    """Until the descriptor is closed, or the process ends in any way."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"{out}: wanted a folder that nobody is writing, got one that another process has") from error
    except OSError:  # a file system that knows no locks
        return
