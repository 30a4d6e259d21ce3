"""A pass over ids that nobody has checked: the largest and the smallest, and where documents end.

    ends = places of EOT, plus one

Formats without checksums are read through once. What was found in a large one is kept in the user's cache, keyed by the
file's path and good for as long as its size and times stay, so that later openings read nothing; a cache that cannot be
written to costs the pass again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cgpt.errors import InputError
from cgpt.files import user_cache, write_atomically

SCAN_TOKENS = 1 << 18  # one step of a pass; fits the second-level cache
KEPT_BYTES = 1 << 26  # of ids, from which on the result is kept: 22 ms of reading on one Zen 4 core
VERSION = 1


@dataclass(frozen=True)
class Scanned:
    """largest, smallest: of the ids, (id, position). document_ends: (n,) int64, one past each EOT."""

    largest: tuple[int, int]
    smallest: tuple[int, int]
    document_ends: np.ndarray

    def check(self, path: Path, vocab_size: int) -> None:
        """Raises InputError for ids that are not in [0, vocab_size)."""
        for token, at in (self.smallest, self.largest):
            if not 0 <= token < vocab_size:
                raise InputError(f"{path}: wanted token ids under {vocab_size}, got {token} at position {at}")


def scan(path: Path, arrays: list[np.ndarray], eot: int) -> Scanned:
    """What `arrays`, the ids of `path` one after another, hold."""
    if sum(array.nbytes for array in arrays) < KEPT_BYTES:
        return _scan(arrays, eot)
    state = _state(path, eot)
    kept = user_cache() / "scans" / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]}.scan"
    if (found := _read(kept, state)) is not None:
        return found
    found = _scan(arrays, eot)
    if _state(path, eot) == state:
        head = np.array([*state, *found.largest, *found.smallest], dtype="<i8")
        body = head.tobytes() + found.document_ends.astype("<i8").tobytes()
        with contextlib.suppress(OSError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(kept, hashlib.sha256(body).digest() + body)
    return found


def _state(path: Path, eot: int) -> list[int]:
    # Either file of Megatron's pair decides which ids are read; ctime moves with every write and cannot be set back.
    times = []
    for file in (path, path.with_suffix(".bin"), path.with_suffix(".idx")):
        stat = file.stat() if file.exists() else None
        times += [0, 0, 0] if stat is None else [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    return [VERSION, eot, *times]


def _read(kept: Path, state: list[int]) -> Scanned | None:
    """What was kept for this state; None where nothing was, or it is damaged."""
    try:
        data = kept.read_bytes()
    except OSError:
        return None
    numbers = len(state) + 4
    if len(data) < 32 + 8 * numbers or len(data) % 8 or hashlib.sha256(data[32:]).digest() != data[:32]:
        return None
    values = np.frombuffer(data, dtype="<i8", offset=32)
    if values[: len(state)].tolist() != state:
        return None
    largest, largest_at, smallest, smallest_at = values[len(state) : numbers].tolist()
    return Scanned((largest, largest_at), (smallest, smallest_at), values[numbers:])


def _scan(arrays: list[np.ndarray], eot: int) -> Scanned:
    largest, smallest, ends, base = (-1, 0), (np.iinfo(np.int64).max, 0), [np.empty(0, dtype=np.int64)], 0
    for array in arrays:
        signed = array.dtype.kind == "i"
        for start in range(0, len(array), SCAN_TOKENS):
            part = array[start : start + SCAN_TOKENS]
            if (most := int(part.max())) > largest[0]:
                largest = most, base + start + int(part.argmax())
            if signed and (least := int(part.min())) < smallest[0]:
                smallest = least, base + start + int(part.argmin())
            ends.append(np.flatnonzero(part == eot) + (base + start + 1))
        base += len(array)
    return Scanned(largest, smallest if smallest[0] < 0 else (0, 0), np.concatenate(ends))
