"""datatrove's `.ds`: bare little-endian uint16 or uint32 ids, and beside it two files that may be missing.

    NAME.ds.index     uint64[n_documents]: the end of each document, in ids
    NAME.ds.metadata  three lines: TOKENIZER|BYTES_AN_ID, the count of ids, the same for people

Bytes an id come from the metadata, else from the index, whose last end is the count; with neither they are 2, as
datatrove's own default.

Source: `pipeline/tokens/tokenizer.py` of github.com/huggingface/datatrove, which the tests write and read with.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cgpt.data.formats.token_file import CHUNK_TOKENS, Stream, TokenFile, expect, without_empty
from cgpt.errors import InputError

WIDTHS = {2: "<u2", 4: "<u4"}
MOST_METADATA = 1 << 16  # bytes: three lines


def read(path: Path) -> TokenFile:
    """Maps `path`. Raises InputError where it is empty or sizes, index and metadata do not go together."""
    size, index = path.stat().st_size, path.with_name(path.name + ".index")
    if not size:
        raise InputError(f"{path}: wanted tokens, got an empty file")
    ends = _read_ends(index) if index.exists() else None
    last = None if ends is None else int(ends[-1])
    width, count = _read_metadata(path.with_name(path.name + ".metadata"))
    if count is not None:
        expect(path, f"bytes for the {count} ids of its metadata:", count * width, size)
    if width is None:
        width = 4 if last is not None and size == 4 * last else 2
    if size % width:
        raise InputError(f"{path}: wanted ids of {width} bytes, got {size} bytes")
    n_tokens = size // width
    if last is not None and last != n_tokens:
        raise InputError(f"{index}: wanted a last document that ends at the {n_tokens} ids of {path.name}, got {last}")
    ids = np.memmap(path, dtype=WIDTHS[width], mode="r")
    return TokenFile([ids], None if ends is None else without_empty(ends.astype(np.int64)))


def _read_ends(path: Path) -> np.ndarray:
    size = path.stat().st_size
    if size % 8 or not size:
        raise InputError(f"{path}: wanted uint64 ends of documents, a multiple of 8 bytes, got {size}")
    ends = np.memmap(path, dtype="<u8", mode="r")
    for first in range(0, len(ends), CHUNK_TOKENS):
        part = ends[max(first - 1, 0) : first + CHUNK_TOKENS]
        if (part[1:] < part[:-1]).any():
            raise InputError(f"{path}: wanted ends of documents in rising order, got others")
    return ends


def _read_metadata(path: Path) -> tuple[int | None, int | None]:
    """(bytes an id, ids), both None without the file."""
    try:
        with path.open("rb") as file:
            lines = file.read(MOST_METADATA).split(b"\n")
    except FileNotFoundError:
        return None, None
    try:
        width, count = int(lines[0].rpartition(b"|")[2]), int(lines[1])
    except (ValueError, IndexError) as error:
        raise InputError(f"{path}: wanted the lines TOKENIZER|BYTES and a count of ids, got others") from error
    if width not in WIDTHS:
        raise InputError(f"{path}: wanted ids of 2 or 4 bytes, got {width}")
    return width, count


def write(folder: Path, name: str, stream: Stream) -> None:
    """Writes `folder`/`name`.ds, .ds.index and .ds.metadata."""
    width = 2 if stream.vocab_size <= 1 << 16 else 4
    with (folder / f"{name}.ds").open("wb") as file:
        stream.write(file, WIDTHS[width])
    with (folder / f"{name}.ds.index").open("wb") as file:
        for first in range(0, len(stream.document_ends), CHUNK_TOKENS):
            file.write(stream.document_ends[first : first + CHUNK_TOKENS].astype("<u8"))
    count = stream.n_tokens
    lines = f"{stream.vocabulary}|{width}\n{count}\n{count / 1e6:.3g} MT"
    (folder / f"{name}.ds.metadata").write_text(lines)
