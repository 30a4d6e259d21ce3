"""safetensors files, tensor by tensor: a length, a JSON header, and the bytes.

    u64 n | n bytes of JSON: {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {...}} | data

By hand, because safetensors' own writer first copies every tensor of a file (an embedding and its moments are 3 GB at
13B), and because its reader maps the file, which counts all that has been read as this process' memory. A header is
believed only once it accounts for every byte of the file. Source: huggingface/safetensors, README, "Format".
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import BinaryIO

import torch
from torch import Tensor

from cgpt.errors import InputError

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BYTES = {  # of an element, of what is passed over as well as of what is read
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
LONGEST_HEADER = 100_000_000  # bytes, safetensors' own bound
PIECE = 1 << 22  # elements converted at once: 32 MB at most

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """dtype: a name of the format. start: of its bytes in the file."""

    dtype: str
    shape: Shape
    start: int


class TensorFile:
    """A safetensors file whose header has been checked; the file is open only while a tensor is read.

    entries: by name. Raises InputError, naming the file, for what is no such file or not a whole one, and OSError.
    """

    def __init__(self, path: Path):
        self.path = path
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            self.entries = self._entries(file, size)

    def read(self, name: str) -> Tensor:
        """A tensor as fp32, in memory of its own. Raises InputError where its type is no float's or the file has been
        cut meanwhile, KeyError where there is none of this name."""
        value = torch.empty(self.entries[name].shape, dtype=torch.float32)
        for _ in self.pieces(name, value.view(-1)):
            pass
        return value

    def pieces(self, name: str, into: Tensor | None = None) -> Iterator[Tensor]:
        """The same as flat stretches of PIECE elements, the last shorter; each is good until the next is asked for.

        into: fp32, flat, of its size, which then is what they are stretches of.
        """
        entry = self.entries[name]
        if entry.dtype not in FLOATS:
            raise InputError(f"{self.path}: wanted {name} in one of {', '.join(FLOATS)}, got {entry.dtype}")
        dtype, size = FLOATS[entry.dtype], math.prod(entry.shape)
        there = torch.empty(min(PIECE, size)) if into is None else into
        stored = None if dtype == torch.float32 else torch.empty(min(PIECE, size), dtype=dtype)
        with open_regular(self.path) as file:
            file.seek(entry.start)
            for start in range(0, size, PIECE):
                count = min(PIECE, size - start)
                piece = there[:count] if into is None else there[start : start + count]
                raw = piece if stored is None else stored[:count]
                got = file.readinto(_bytes(raw))
                if got != raw.nbytes:
                    raise InputError(f"{self.path}: wanted {raw.nbytes} more bytes of {name}, got {got}")
                if stored is not None:
                    piece.copy_(raw)
                yield piece

    def _entries(self, file: BinaryIO, size: int) -> dict[str, Entry]:
        if size < 8:
            raise InputError(f"{self.path}: wanted a safetensors file, got one of {size} bytes")
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, LONGEST_HEADER):
            wanted = f"wanted a header of at most {min(size - 8, LONGEST_HEADER)} bytes"
            raise InputError(f"{self.path}: {wanted}, got one that claims {length}")
        try:
            header = json.loads(file.read(length).decode(), object_pairs_hook=_without_doubles)
            if not isinstance(header, dict):
                raise ValueError("no names")
            header.pop("__metadata__", None)
            found = {name: _entry(name, value, 8 + length) for name, value in header.items()}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{self.path}: wanted a safetensors header, got a damaged one ({error})") from error
        spans = sorted(span for _, span in found.values())
        ends = [0, *(end for _, end in spans)]
        if any(start != end for (start, _), end in zip(spans, ends, strict=False)) or ends[-1] != size - 8 - length:
            raise InputError(f"{self.path}: wanted {ends[-1]} bytes of tensors side by side, got {size - 8 - length}")
        return {name: entry for name, (entry, _) in found.items()}


def write_tensors(
    path: Path,
    shapes: Mapping[str, Shape],
    tensors: Iterable[tuple[str, Tensor]],
    dtype: str = "F32",
    metadata: Mapping[str, str] | None = None,
) -> dict:
    """Writes a safetensors file as a stream and syncs it; returns its size and sha256.

    shapes: of all tensors, in the order in which `tensors` brings them, each converted to `dtype`. Raises OSError, and
    what `tensors` raises.
    """
    header: dict[str, dict] = {"__metadata__": dict(metadata)} if metadata else {}
    width, offset = BYTES[dtype], 0
    for name, shape in shapes.items():
        size = math.prod(shape) * width
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def put(data) -> None:
            digest.update(data)
            file.write(data)

        put(len(head).to_bytes(8, "little") + head)
        places = iter(shapes.items())
        for given, tensor in tensors:
            name, shape = next(places, (None, ()))
            if given != name or tuple(tensor.shape) != tuple(shape):
                raise ValueError(f"{path}: wanted {name} {tuple(shape)}, got {given} {tuple(tensor.shape)}")
            put(_bytes(tensor.to(FLOATS[dtype]).contiguous()))
            del tensor  # before the next one is made
        if (left := next(places, None)) is not None:
            raise ValueError(f"{path}: wanted {left[0]}, got no more tensors")
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": 8 + len(head) + offset, "sha256": digest.hexdigest()}


def open_regular(path: Path) -> BinaryIO:
    """`path` for reading in bytes. Raises InputError where it is no file with an end: a pipe would be waited for, a
    device read for ever."""
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if not S_ISREG(path.stat().st_mode):
        raise InputError(f"{path}: wanted a file, got {'a folder' if path.is_dir() else 'something else'}")
    return path.open("rb")


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def _entry(name: str, value: dict, base: int) -> tuple[Entry, tuple[int, int]]:
    dtype, shape, (start, end) = value["dtype"], value["shape"], value["data_offsets"]
    numbers = [*shape, start, end]
    if any(type(number) is not int or number < 0 for number in numbers) or end < start:
        raise ValueError(f"{name} has {shape} at {start} to {end}")
    if dtype in BYTES and end - start != math.prod(shape) * BYTES[dtype]:
        raise ValueError(f"{name}, {shape} of {dtype}, has {end - start} bytes")
    return Entry(dtype, tuple(shape), base + start), (start, end)


def _without_doubles(pairs: list[tuple]) -> dict:
    for (name, _), (again, _) in itertools.pairwise(sorted(pairs, key=lambda pair: pair[0])):
        if name == again:
            raise ValueError(f"{name} stands there twice")
    return dict(pairs)
