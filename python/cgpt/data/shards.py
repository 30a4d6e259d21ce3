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

Token files of other trainers (formats/) are opened as they are. They hold no checksum: their ids are read through
once (formats/scan.py), for those past the vocabulary and, where a format has no index, for the places of EOT. A
`tokenizer.json` beside them, as `cgpt data export` leaves one, is their vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cgpt.data.formats.scan import scan
from cgpt.data.formats.table import SUFFIXES, read_token_file, token_files
from cgpt.data.formats.token_file import expect
from cgpt.data.tokenizer import EOT, TOKENIZER, VOCAB_SIZE, Tokenizer, gpt2, read_tokenizer
from cgpt.errors import InputError
from cgpt.files import read_signed_json, sha256_of, write_atomically

VERSION = 1
MANIFEST = "dataset.json"
UNFINISHED = "unfinished.json"
DOCUMENTS = "documents.idx"
STAMP = ".verified"
CONFIG = "config.json"  # of a run


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
        return (path / MANIFEST).exists() or (path / UNFINISHED).exists() or bool(token_files(path))
    return path.suffix in SUFFIXES if path.exists() else _of_prefix(path) is not None


def open_dataset(
    path: str | Path, *, vocab_size: int | None = None, eot: int | None = None, verify: bool = True
) -> TokenDataset:
    """Open a prepared folder, a token file of nanoGPT, llm.c, Megatron or datatrove, or a folder of such files.

    Megatron's pair is named by either file or without a suffix. In a folder of token files, those with the word `val`
    in their name (`val.bin`, `fineweb_val_000000.bin`) are the validation split if there are others. `vocab_size` and
    `eot` are of files that do not describe themselves (default: what `tokenizer.json` beside them says, else GPT-2's).
    `verify=False` leaves out checksums. Raises InputError for what is missing, truncated, altered, of another version
    or vocabulary, or holds an id past the vocabulary.
    """
    path = Path(path)
    if not path.exists() and (index := _of_prefix(path)) is not None:
        path = index
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; wanted a token dataset")
    if path.is_dir() and (path / MANIFEST).exists():
        return _open_prepared(path, verify)
    if path.is_dir() and (path / UNFINISHED).exists():
        raise InputError(f"{path}: wanted a whole dataset, got an unfinished one: prepare it again")
    if not path.is_dir() and not is_token_source(path):
        wanted = f"a token file ({', '.join(SUFFIXES)}) or a folder"
        raise InputError(f"{path}: wanted {wanted}, got the suffix {path.suffix!r}")
    own = vocabulary_beside(path) if vocab_size is None and eot is None else None
    if own is None:
        return _open_token_files(path, vocab_size or VOCAB_SIZE, EOT if eot is None else eot)
    tokenizer = read_tokenizer(own)
    return _open_token_files(path, tokenizer.n_vocab, tokenizer.eot, own, tokenizer.hash)


def vocabulary_beside(path: Path) -> Path | None:
    """The `tokenizer.json` that lies with the token files `path`, a file or a folder; None where there is none."""
    own = (path if path.is_dir() else path.parent) / TOKENIZER
    return own if own.exists() else None


def vocabulary_of(path: str | Path) -> Tokenizer:
    """The vocabulary of a prepared dataset, a folder that `cgpt data export` wrote, a run, or a `tokenizer.json`.

    Raises InputError for a folder of another kind, and as `read_tokenizer` does.
    """
    path = Path(path)
    if path.is_file():
        return read_tokenizer(path)
    if (path / MANIFEST).exists():
        return _open_prepared(path, verify=False).tokenizer
    wanted = None
    if (path / CONFIG).exists():
        try:
            wanted = json.loads((path / CONFIG).read_bytes())["dataset"].get("vocabulary")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path / CONFIG}: wanted a run's configuration, got another file") from error
    elif not (path / TOKENIZER).exists():
        raise InputError(f"{path}: wanted a prepared dataset or a run, to take its vocabulary, got neither")
    return read_tokenizer(path / TOKENIZER, wanted) if wanted or (path / TOKENIZER).exists() else gpt2()


def _of_prefix(path: Path) -> Path | None:
    """The index of Megatron's pair that `path` names without a suffix."""
    index = path.with_name(path.name + ".idx") if path.name else path
    return index if index.is_file() else None


def read_manifest(path: Path) -> dict:
    """The checked content of a `dataset.json` or `unfinished.json`. Raises InputError where it is damaged."""
    manifest = read_signed_json(path)
    expect(path, "version", VERSION, manifest.get("version"))
    return manifest


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


def _open_token_files(
    path: Path, vocab_size: int, eot: int, vocabulary: Path | None = None, vocabulary_hash: str | None = None
) -> TokenDataset:
    files = token_files(path) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path}: wanted a folder with {MANIFEST} or token files ({', '.join(SUFFIXES)}), got neither")
    validation = [file for file in files if "val" in re.split(r"[^a-z]+", file.stem.lower())]
    training = [file for file in files if file not in validation]
    groups = [group for group in (training, validation) if group]
    arrays, ends, n_tokens, validation_start = [], [], 0, None
    for group in groups:
        validation_start = n_tokens or None
        for file in group:
            found = read_token_file(file)
            scanned = scan(file, found.arrays, eot)
            scanned.check(file, vocab_size)
            own = scanned.document_ends if found.document_ends is None else found.document_ends
            ends.append(own + n_tokens)
            arrays += found.arrays
            n_tokens += sum(map(len, found.arrays))
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
        vocabulary=vocabulary,
        info=vocabulary_hash and {"vocabulary_hash": vocabulary_hash},
    )
