"""Token datasets: one read-only stream of token ids with document boundaries, whatever file it lies in.

A prepared dataset is a folder. `shard-00000.bin`, `shard-00001.bin`, ... hold the stream as little-endian
uint16 or uint32, `documents.idx` holds the end of each document as a little-endian int64 offset into the
stream, `tokenizer.json` the vocabulary where it is not GPT-2's, and `dataset.json`, written last, holds counts, the
vocabulary's size and hash, and size and sha256 of every file and of itself.

Opening always compares sizes. Checksums are compared once: a pass over the files leaves a stamp,
`.verified`, of their sizes and times, and later openings trust files that still match it. A folder that
cannot be written to keeps no stamp and is verified at every opening. sha256 (1.7 GB/s on one EPYC core)
rather than CRC-32 (4.1 GB/s) because the cost falls once, anyone can redo it with `sha256sum`, and it names
the content.

Token files of other trainers are opened as they are: nanoGPT's `.bin` (bare uint16) and llm.c's (a header of
256 int32: magic 20240520 version 1 for uint16, magic 20240801 version 7 for uint32; the third is the count).
Read as two uint16, either magic holds an id past GPT-2's vocabulary, so no nanoGPT file can look like
llm.c's. They hold neither index nor checksum: each opening streams through them once, for the largest id and
the places of EOT.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cgpt.data.tokenizer import EOT, TOKENIZER, VOCAB_SIZE, Tokenizer, gpt2, read_tokenizer
from cgpt.errors import InputError
from cgpt.files import read_signed_json, sha256_of, write_atomically

VERSION = 1
MANIFEST = "dataset.json"
UNFINISHED = "unfinished.json"
DOCUMENTS = "documents.idx"
STAMP = ".verified"

LLMC_HEADER_BYTES = 1024
LLMC_FORMATS = {20240520: (1, "<u2"), 20240801: (7, "<u4")}  # magic: version, tokens

SCAN_TOKENS = 1 << 18  # one step of a pass over tokens; fits the second-level cache


class TokenDataset:
    """A stream of `n_tokens` ids in `n_documents` documents, each ending with EOT where the source wrote one.

    document_ends: (n_documents,) int64, ascending; document i is [document_ends[i - 1], document_ends[i]).
    text_bytes: UTF-8 bytes of the documents' text, None where the source does not say.
    validation_start: where the source's own validation tokens begin, None where it has no split.
    vocabulary: the `tokenizer.json` of its tokens, None where they are GPT-2's or not ours to know.
    """

    def __init__(
        self,
        name: str,
        arrays: Sequence[np.ndarray],
        document_ends: np.ndarray,
        *,
        vocab_size: int = VOCAB_SIZE,
        eot: int = EOT,
        text_bytes: int | None = None,
        validation_start: int | None = None,
        vocabulary: Path | None = None,
        info: dict | None = None,
    ):
        self.name = name
        self.document_ends = document_ends
        self.vocab_size = vocab_size
        self.eot = eot
        self.text_bytes = text_bytes
        self.validation_start = validation_start
        self.vocabulary = vocabulary
        self.info = info or {}
        self._arrays = list(arrays)
        self._starts = np.cumsum([0] + [len(array) for array in arrays])

    @property
    def n_tokens(self) -> int:
        return int(self._starts[-1])

    @property
    def n_documents(self) -> int:
        return len(self.document_ends)

    @property
    def dtype(self) -> np.dtype:
        return self._arrays[0].dtype

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        """What the ids mean; None for foreign token files that are not GPT-2's. Raises InputError where the file
        that says it is gone or altered."""
        if self.vocabulary is not None:
            return read_tokenizer(self.vocabulary, self.info.get("vocabulary_hash"))
        return gpt2() if (self.vocab_size, self.eot) == (VOCAB_SIZE, EOT) else None

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """ids [start, stop), (stop - start,) of `dtype`; a view where one file holds them all.

        Raises IndexError unless 0 <= start <= stop <= n_tokens.
        """
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"{self.name}: wanted tokens within [0, {self.n_tokens}), got [{start}, {stop})")
        if start == stop:
            return np.empty(0, dtype=self.dtype)
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        last = int(np.searchsorted(self._starts, stop, side="left"))
        bases = self._starts[first:last].tolist()
        parts = [self._arrays[first + i][max(start - base, 0) : stop - base] for i, base in enumerate(bases)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def __repr__(self) -> str:
        return f"TokenDataset({self.name!r}, {self.n_tokens} tokens, {self.n_documents} documents)"


def is_token_source(path: Path) -> bool:
    """Whether `open_dataset` is the door for `path`: token files rather than text."""
    if path.is_dir():
        return (path / MANIFEST).exists() or (path / UNFINISHED).exists() or any(path.glob("*.bin"))
    return path.suffix == ".bin"


def open_dataset(
    path: str | Path, *, vocab_size: int = VOCAB_SIZE, eot: int = EOT, verify: bool = True
) -> TokenDataset:
    """Open a prepared folder, a token file of nanoGPT or llm.c, or a folder of such files.

    In a folder of token files, those with the word `val` in their name (`val.bin`, `fineweb_val_000000.bin`)
    are the validation split if there are others. `vocab_size` and `eot` describe files that do not describe
    themselves. `verify=False` leaves out checksums. Raises InputError for what is missing, truncated,
    altered, of another version or vocabulary, or holds an id past the vocabulary.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; wanted a token dataset")
    if path.is_dir() and (path / MANIFEST).exists():
        return _open_prepared(path, verify)
    if path.is_dir() and (path / UNFINISHED).exists():
        raise InputError(f"{path}: wanted a whole dataset, got an unfinished one: prepare it again")
    if path.is_dir():
        return _open_token_files(path, sorted(path.glob("*.bin")), vocab_size, eot)
    if not is_token_source(path):
        raise InputError(f"{path}: wanted a .bin token file or a folder, got the suffix {path.suffix!r}")
    return _open_token_files(path, [path], vocab_size, eot)


def read_manifest(path: Path) -> dict:
    """The checked content of a `dataset.json` or `unfinished.json`. Raises InputError where it is damaged."""
    manifest = read_signed_json(path)
    expect(path, "version", VERSION, manifest.get("version"))
    return manifest


def expect(path: Path, what: str, wanted: object, got: object) -> None:
    """Raise InputError unless `wanted` equals `got`."""
    if wanted != got:
        raise InputError(f"{path}: wanted {what} {wanted}, got {got}")


def _open_prepared(folder: Path, verify: bool) -> TokenDataset:
    manifest = read_manifest(folder / MANIFEST)
    own = folder / TOKENIZER if TOKENIZER in manifest["files"] else None
    if own is None:
        expect(folder / MANIFEST, "vocabulary", gpt2().hash, manifest["vocabulary_hash"])
    for name, wanted in manifest["files"].items():
        path = folder / name
        expect(path, "size in bytes", wanted["bytes"], path.stat().st_size if path.is_file() else "no file")
    if verify:
        _verify(folder, manifest["files"])
    dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
    shards = [folder / name for name in manifest["files"] if name not in (DOCUMENTS, TOKENIZER)]
    return TokenDataset(
        "+".join(manifest["corpora"]),
        [np.memmap(path, dtype=dtype, mode="r") for path in shards],
        np.memmap(folder / DOCUMENTS, dtype="<i8", mode="r"),
        vocab_size=manifest["vocab_size"],
        eot=manifest["eot"],
        text_bytes=manifest["text_bytes"],
        vocabulary=own,
        info=manifest,
    )


def _verify(folder: Path, files: dict[str, dict]) -> None:
    """Compare checksums, unless the stamp says that these very files passed before."""

    def state() -> dict[str, list[int]]:
        stats = {name: (folder / name).stat() for name in files}
        # ctime moves with every write and, unlike mtime, cannot be set back.
        return {name: [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in stats.items()}

    before = state()
    with contextlib.suppress(OSError, ValueError):
        if json.loads((folder / STAMP).read_bytes()) == before:
            return
    for name, wanted in files.items():
        expect(folder / name, "sha256", wanted["sha256"], sha256_of(folder / name))
    if state() == before:
        with contextlib.suppress(OSError):  # read-only folder: the next opening verifies again
            write_atomically(folder / STAMP, json.dumps(before).encode())


def _open_token_files(path: Path, files: list[Path], vocab_size: int, eot: int) -> TokenDataset:
    if not files:
        raise InputError(f"{path}: wanted a folder with {MANIFEST} or .bin token files, got neither")
    validation = [file for file in files if "val" in re.split(r"[^a-z]+", file.stem.lower())]
    training = [file for file in files if file not in validation]
    groups = [group for group in (training, validation) if group]
    arrays, ends, n_tokens, validation_start = [], [], 0, None
    for group in groups:
        validation_start = n_tokens or None
        for file in group:
            array = _map_token_file(file)
            ends.append(_scan(file, array, vocab_size, eot) + n_tokens)
            arrays.append(array)
            n_tokens += len(array)
        # A document may run over from file to file, never from training to validation.
        if not len(ends[-1]) or ends[-1][-1] != n_tokens:
            ends.append(np.array([n_tokens]))
    return TokenDataset(
        path.name,
        arrays,
        np.concatenate(ends),
        vocab_size=vocab_size,
        eot=eot,
        validation_start=validation_start,
    )


def _map_token_file(path: Path) -> np.ndarray:
    size = path.stat().st_size
    header = np.fromfile(path, dtype="<i4", count=3)
    if len(header) == 3 and int(header[0]) in LLMC_FORMATS:
        version, dtype = LLMC_FORMATS[int(header[0])]
        expect(path, f"llm.c format {header[0]} version", version, int(header[1]))
        offset = LLMC_HEADER_BYTES
        wanted = offset + int(header[2]) * np.dtype(dtype).itemsize
        expect(path, f"bytes for the {header[2]} tokens of its header:", wanted, size)
    else:
        offset, dtype = 0, "<u2"
        if size % 2:
            raise InputError(f"{path}: wanted uint16 tokens, an even number of bytes, got {size}")
    if size <= offset:
        raise InputError(f"{path}: wanted tokens, got an empty file")
    return np.memmap(path, dtype=dtype, mode="r", offset=offset)


def _scan(path: Path, array: np.ndarray, vocab_size: int, eot: int) -> np.ndarray:
    """Ends of documents, int64, one past each EOT. Raises InputError for ids past the vocabulary."""
    ends = [np.empty(0, dtype=np.int64)]
    for start in range(0, len(array), SCAN_TOKENS):
        part = array[start : start + SCAN_TOKENS]
        if (largest := int(part.max())) >= vocab_size:
            at = start + int(part.argmax())
            raise InputError(f"{path}: wanted token ids under {vocab_size}, got {largest} at position {at}")
        ends.append(np.flatnonzero(part == eot) + (start + 1))
    return np.concatenate(ends)
