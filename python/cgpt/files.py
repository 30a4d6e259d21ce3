"""Files that are whole or absent at every moment: write to a temporary name, fsync, rename, fsync the folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from cgpt.errors import InputError


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces `path` by `data`; a crash leaves the old file or the new. Raises OSError naming the file."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with naming(path):
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        sync_folder(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives an OSError the file's name, which errors of writing do not carry."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


LOCK = "pid.lock"


def lock_folder(folder: Path) -> TextIO:
    """Takes `folder` for this process until the file that is returned is closed, or the process ends in any way.

    The file holds the process's number. Raises InputError naming the process that has the folder. Where the file
    system knows no locks, there is none to take.
    """
    file = (folder / LOCK).open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise InputError(
            f"{folder}: wanted a run that nobody is training, got one that process {holder} has"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            file.close()
            raise
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def user_cache() -> Path:
    """The folder for what can be made again: `cgpt` in the user's cache folder. It need not be there yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cgpt"


def sync_folder(path: Path) -> None:
    """Makes renames in `path` survive a power cut. Raises OSError naming the folder."""
    with naming(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256_of(path: Path) -> str:
    """sha256 of a file in hexadecimal, as `sha256sum` prints it; streamed."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_signed_json(path: Path, content: dict) -> None:
    """Writes `content` and the sha256 of its canonical form, atomically."""
    signed = {**content, "sha256": hashlib.sha256(_canonical(content)).hexdigest()}
    write_atomically(path, json.dumps(signed, indent=1).encode() + b"\n")


def read_signed_json(path: Path) -> dict:
    """What `write_signed_json` wrote. Raises InputError where the file is missing or damaged."""
    try:
        content = json.loads(path.read_bytes())
        claimed = content.pop("sha256")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: wanted signed JSON, got a damaged file") from error
    found = hashlib.sha256(_canonical(content)).hexdigest()
    if found != claimed:
        raise InputError(f"{path}: wanted content of sha256 {claimed}, got {found}")
    return content


def _canonical(content: dict) -> bytes:
    return json.dumps(content, sort_keys=True).encode()
