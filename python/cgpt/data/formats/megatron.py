"""Megatron-LM's pair of files: `NAME.bin` holds bare ids, `NAME.idx` says where its sequences and documents lie.

    MMIDIDX\\0\\0 | version 1: u64 | dtype: u8 | sequences n: u64 | entries of documents m: u64
    lengths: int32[n], in ids | pointers: int64[n], in bytes | documents: int64[m], in sequences

All little-endian. Document i is the sequences [documents[i], documents[i + 1]): the first entry is 0 and the last n, so
there are m - 1 documents. Sequences may lie anywhere in the `.bin`, though all tools write them one after another.

Source: `megatron/core/datasets/indexed_dataset.py` of github.com/NVIDIA/Megatron-LM.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from cgpt.data.formats.token_file import CHUNK_TOKENS, Stream, TokenFile, expect, without_empty
from cgpt.errors import InputError

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
VERSION = 1
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats: no ids
UINT16_VOCABULARY = 65500  # from here on Megatron takes int32
MOST_PIECES = 1 << 16  # stretches of the .bin that an index may jump between
MOST_LENGTH = 2**31 - 1  # of a sequence


def read(path: Path) -> TokenFile:
    """Maps the `.bin` of `path`, which names either file of the pair.

    Raises InputError where one is missing, the index is of another kind, truncated or points outside the `.bin`, or a
    sequence has a negative length.
    """
    index, data = path.with_suffix(".idx"), path.with_suffix(".bin")
    for file in (index, data):
        if not file.is_file():
            raise InputError(f"{file}: no such file; wanted both of Megatron's {data.name} and {index.name}")
    dtype, lengths, pointers, documents = _read_index(index)
    if not len(lengths):
        raise InputError(f"{index}: wanted sequences, got none")
    ids = np.memmap(data, dtype="u1", mode="r") if data.stat().st_size else np.empty(0, dtype="u1")
    pieces, ends = _walk(index, data, dtype, lengths, pointers, documents)
    arrays = [ids[start:stop].view(dtype) for start, stop in pieces if stop > start]
    if not arrays:
        raise InputError(f"{data}: wanted tokens, got an empty file")
    return TokenFile(arrays, without_empty(ends))


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """(dtype of the ids, lengths, pointers, documents), the last three mapped."""
    with path.open("rb") as file:
        head = file.read(HEADER.size)
    expect(path, "Megatron's index to begin with", MAGIC, head[: len(MAGIC)])
    if len(head) < HEADER.size:
        raise InputError(f"{path}: wanted a header of {HEADER.size} bytes, got {len(head)}")
    _, version, code, n, m = HEADER.unpack(head)
    expect(path, "index version", VERSION, version)
    if code not in DTYPES:
        raise InputError(f"{path}: wanted a dtype of ids, one of the codes {', '.join(map(str, DTYPES))}, got {code}")
    wanted = HEADER.size + 12 * n + 8 * m
    expect(path, f"bytes for the {n} sequences and {m} document entries of its header:", wanted, path.stat().st_size)
    parts, offset = [], HEADER.size
    for kind, count in (("<i4", n), ("<i8", n), ("<i8", m)):
        shape = (count,)
        parts.append(np.memmap(path, dtype=kind, mode="r", offset=offset, shape=shape) if count else np.empty(0, kind))
        offset += count * np.dtype(kind).itemsize
    return np.dtype(DTYPES[code]), *parts


def _walk(
    index: Path, data: Path, dtype: np.dtype, lengths: np.ndarray, pointers: np.ndarray, documents: np.ndarray
) -> tuple[list[tuple[int, int]], np.ndarray]:
    """(pieces, ends): the stretches of bytes that the sequences make, in order, and the documents' ends in ids."""
    n, size, width = len(lengths), data.stat().st_size, dtype.itemsize
    entries = np.array(documents)
    if not len(entries) or entries[0] != 0 or entries[-1] != n or (np.diff(entries) < 0).any():
        raise InputError(f"{index}: wanted document entries that rise from 0 to the {n} sequences, got others")
    ends, tokens = np.zeros(len(entries), dtype=np.int64), 0
    begun, stopped, last = [], [], -1  # no sequence begins at -1, so the first begins a piece
    for first in range(0, n, CHUNK_TOKENS):
        length = lengths[first : first + CHUNK_TOKENS].astype(np.int64)
        start = np.array(pointers[first : first + CHUNK_TOKENS])
        # size - start cannot overflow where 0 <= start <= size, and start + length * width can.
        inside = (length >= 0) & (start >= 0) & (start <= size) & (start % width == 0)
        inside &= length * width <= size - np.where(inside, start, 0)
        if not inside.all():
            at = int(np.argmin(inside))
            wanted = f"wanted sequences of whole {dtype.name} ids within the {size} bytes of {data.name}"
            raise InputError(
                f"{index}: {wanted}, got sequence {first + at} of {length[at]} ids from byte {start[at]} on"
            )
        stop = start + length * width
        before = np.concatenate([[last], stop[:-1]])
        jumps = np.flatnonzero(start != before)
        if len(begun) + len(jumps) > MOST_PIECES:
            raise InputError(f"{index}: wanted sequences that lie in order, got more than {MOST_PIECES} jumps")
        begun += start[jumps].tolist()
        stopped += before[jumps].tolist()
        last = int(stop[-1])
        total = tokens + np.cumsum(length)
        low, high = np.searchsorted(entries, [first + 1, first + len(length) + 1])
        ends[low:high] = total[entries[low:high] - 1 - first]
        tokens = int(total[-1])
    stopped = [*stopped[1:], last]
    if len(begun) == 1:
        expect(data, f"bytes for the {tokens} ids of its index:", tokens * width, size)
    return list(zip(begun, stopped, strict=True)), ends


def write(folder: Path, name: str, stream: Stream) -> None:
    """Writes `folder`/`name`.bin and .idx: a document is one sequence. dtype as Megatron chooses, by the vocabulary.

    Raises InputError for a document of more ids than an int32 counts.
    """
    code = 8 if stream.vocab_size < UINT16_VOCABULARY else 4
    ends, n, width = stream.document_ends, len(stream.document_ends), np.dtype(DTYPES[code]).itemsize
    with (folder / f"{name}.bin").open("wb") as file:
        stream.write(file, DTYPES[code])
    with (folder / f"{name}.idx").open("wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, code, n, n + 1))
        for starts, stops in _documents(ends):
            if (longest := int((stops - starts).max())) > MOST_LENGTH:
                raise InputError(f"{stream.name}: wanted documents of at most {MOST_LENGTH} ids, got one of {longest}")
            file.write((stops - starts).astype("<i4"))
        for starts, _ in _documents(ends):
            file.write((starts * width).astype("<i8"))
        for first in range(0, n + 1, CHUNK_TOKENS):
            file.write(np.arange(first, min(first + CHUNK_TOKENS, n + 1), dtype="<i8"))


def _documents(ends: np.ndarray):
    """(starts, stops) in ids, chunk by chunk."""
    for first in range(0, len(ends), CHUNK_TOKENS):
        stops = np.array(ends[first : first + CHUNK_TOKENS], dtype=np.int64)
        yield np.concatenate([[ends[first - 1] if first else 0], stops[:-1]]), stops
