"""What every format reads into and writes from.

    file -> TokenFile(arrays, document_ends)          Stream(tokens, document_ends) -> file

Ids are never copied whole: a TokenFile's arrays are memory maps, and a Stream is written chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from cgpt.errors import InputError

CHUNK_TOKENS = 1 << 20


class TokenFile(NamedTuple):
    """arrays: the ids, 1-D and one after another. document_ends: (n_documents,) int64, ascending, the last of them the
    number of ids; None where the format keeps no documents."""

    arrays: list[np.ndarray]
    document_ends: np.ndarray | None


@dataclass(frozen=True)
class Stream:
    """Ids to be written. tokens(start, stop): (stop - start,) of any integer dtype. document_ends: (n_documents,)
    int64, ascending, the last of them n_tokens. vocabulary: its name, for formats that keep one."""

    name: str
    tokens: Callable[[int, int], np.ndarray]
    n_tokens: int
    document_ends: np.ndarray
    vocab_size: int
    vocabulary: str

    def chunks(self, dtype: str, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """ids [start, stop) as `dtype`. Raises InputError for one that does not fit."""
        stop, most = self.n_tokens if stop is None else stop, np.iinfo(dtype).max
        for first in range(start, stop, CHUNK_TOKENS):
            part = self.tokens(first, min(first + CHUNK_TOKENS, stop))
            if int(part.max()) > most:
                at = first + int(part.argmax())
                wanted = f"wanted token ids under {most + 1}, which are all that {np.dtype(dtype).name} holds"
                raise InputError(f"{self.name}: {wanted}, got {part.max()} at position {at}")
            yield part.astype(dtype)

    def write(self, file: BinaryIO, dtype: str, start: int = 0, stop: int | None = None) -> None:
        """Appends ids [start, stop) as `dtype`. Raises InputError for one that does not fit."""
        for chunk in self.chunks(dtype, start, stop):
            file.write(chunk)


def expect(path: Path, what: str, wanted: object, got: object) -> None:
    """Raise InputError unless `wanted` equals `got`."""
    if wanted != got:
        raise InputError(f"{path}: wanted {what} {wanted}, got {got}")


def without_empty(document_ends: np.ndarray) -> np.ndarray:
    """`document_ends` (int64, in order, none below 0) without documents of no tokens."""
    return document_ends[np.diff(document_ends, prepend=0) > 0]
