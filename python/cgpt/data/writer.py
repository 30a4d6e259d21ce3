"""Writing the shard format (shards.py) so that a crash at any moment loses at most the shard in hand.

A shard is written under a temporary name, synced and renamed; the document index is synced; then
`unfinished.json`, replaced atomically, says what counts. What it does not name is thrown away by the next
run. `dataset.json` is written when everything else is in place, so a folder that has one is whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from cgpt.data.formats.token_file import expect
from cgpt.data.shards import (
    DOCUMENTS,
    MANIFEST,
    STAMP,
    UNFINISHED,
    VERSION,
    read_manifest,
)
from cgpt.data.tokenizer import TOKENIZER, Tokenizer, read_tokenizer
from cgpt.errors import InputError
from cgpt.files import naming, sha256_of, sync_folder, write_atomically, write_signed_json

DTYPE = np.dtype("<u2")  # every id of GPT-2's fits, and of vocabulary.py's
LOCK = "prepare.lock"


class Encoded(NamedTuple):
    """One batch: tokens (n,) uint16, document ends (d,) int64 counted from its start, and bytes of text."""

    tokens: np.ndarray
    document_ends: np.ndarray
    text_bytes: int


class ShardWriter:
    """Appends batches to the dataset folder `out`, from where an earlier writer for these sources stopped.

    tokens, documents, text_bytes, batches: what has been added so far; a caller goes on with batch `batches`.
    finished: `out` holds the whole dataset already.
    Raises InputError where `out` holds something else; every OSError names its file.
    """

    def __init__(self, out: Path, fingerprint: str, shard_tokens: int):
        self.shard_tokens = shard_tokens
        self._out = out
        self._fingerprint = fingerprint
        self._files: dict[str, dict] = {}
        self.batches = self.tokens = self.documents = self.text_bytes = 0
        self._shard: BinaryIO | None = None
        self._index: BinaryIO | None = None
        self.finished = (out / MANIFEST).exists()
        if self.finished:
            manifest = read_manifest(out / MANIFEST)
            if manifest["source_fingerprint"] != fingerprint:
                held = f"{'+'.join(manifest['corpora'])}, {manifest['tokens']} tokens"
                got = f"got the dataset of other sources ({held}) or another vocabulary ({manifest['vocab_size']})"
                raise InputError(f"{out}: wanted a new or empty folder, {got}")
            (out / UNFINISHED).unlink(missing_ok=True)
        elif (out / UNFINISHED).exists():
            self._go_on()
        else:
            others = sorted(path.name for path in out.iterdir() if path.name not in (LOCK, UNFINISHED + ".tmp"))
            if others:
                raise InputError(f"{out}: wanted a new or empty folder, got {len(others)} entries, {others[0]!r} first")
            try:
                self._record()
            except BaseException:
                self.remove()
                raise

    def _go_on(self) -> None:
        state = read_manifest(self._out / UNFINISHED)
        if state["source_fingerprint"] != self._fingerprint:
            wanted = "wanted the sources of the unfinished dataset there"
            raise InputError(f"{self._out}: {wanted}, got others, changed ones, or another vocabulary: delete it")
        self._files = state["files"]
        for name, file in self._files.items():
            path = self._out / name
            expect(path, "size in bytes", file["bytes"], path.stat().st_size if path.is_file() else "no file")
        self.batches, self.tokens = state["batches"], state["tokens"]
        self.documents, self.text_bytes = state["documents"], state["text_bytes"]
        self._drop_shard()

    def vocabulary(self) -> Tokenizer | None:
        """What an earlier writer, or `keep`, wrote. None where nobody has."""
        if TOKENIZER not in self._files:
            return None
        path = self._out / TOKENIZER
        expect(path, "sha256", self._files[TOKENIZER]["sha256"], sha256_of(path))
        return read_tokenizer(path)

    def keep(self, vocabulary: Tokenizer) -> None:
        """Write `tokenizer.json`, before the first batch: from here on a run that goes on finds it."""
        path = self._out / TOKENIZER
        write_atomically(path, vocabulary.file)
        self._files[TOKENIZER] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        self._record()

    def add(self, batch: Encoded) -> None:
        """Append one batch; closes the shard where it has reached `shard_tokens`."""
        if self._shard is None:
            self._open_shard()
        with naming(self._shard_path):
            self._shard.write(batch.tokens)
        with naming(self._out / DOCUMENTS):
            self._index.write((batch.document_ends + self.tokens).astype("<i8"))
        self._digest.update(batch.tokens)
        self._shard_length += len(batch.tokens)
        self.tokens += len(batch.tokens)
        self.documents += len(batch.document_ends)
        self.text_bytes += batch.text_bytes
        self.batches += 1
        if self._shard_length >= self.shard_tokens:
            self._close_shard()

    def finish(self, corpora: list[str], skipped: dict[str, int], tokenizer: Tokenizer) -> None:
        """Close the last shard and write `dataset.json`: from here on the folder is a dataset."""
        if self._shard is not None:
            self._close_shard()
        index = self._out / DOCUMENTS
        manifest = {
            "version": VERSION,
            "corpora": corpora,
            "tokens": self.tokens,
            "documents": self.documents,
            "text_bytes": self.text_bytes,
            "skipped": skipped,
            "dtype": DTYPE.name,
            "eot": tokenizer.eot,
            "vocab_size": tokenizer.n_vocab,
            "vocabulary_hash": tokenizer.hash,
            "source_fingerprint": self._fingerprint,
            "files": {
                **self._files,
                DOCUMENTS: {"bytes": index.stat().st_size, "sha256": sha256_of(index)},
            },
        }
        self._close_index()
        write_signed_json(self._out / MANIFEST, manifest)
        (self._out / UNFINISHED).unlink()

    def abandon(self) -> None:
        """Throw away the shard in hand. Whole shards and a vocabulary stay for the next run; without any, nothing."""
        # What counts is what reached the disk: the fault may lie on either side of the last record's rename.
        record = self._out / UNFINISHED
        self._files = read_manifest(record)["files"] if record.exists() else {}
        if self._files:
            self._drop_shard()
        else:
            self.remove()

    def remove(self) -> None:
        """Throw away all that this writer and those before it left in `out`."""
        self._drop_shard()
        for name in [*self._files, TOKENIZER, DOCUMENTS, UNFINISHED, MANIFEST, STAMP]:
            (self._out / name).unlink(missing_ok=True)

    def _open_shard(self) -> None:
        self._shard_name = f"shard-{len(self._files.keys() - {TOKENIZER}):05d}.bin"
        self._shard_path = self._out / (self._shard_name + ".tmp")
        self._shard_length = 0
        self._digest = hashlib.sha256()
        self._shard = self._shard_path.open("wb")
        if self._index is None:
            path = self._out / DOCUMENTS
            path.touch()
            self._index = path.open("r+b")
            # A crash between the index and the record leaves entries that do not count.
            self._index.truncate(8 * self.documents)
            self._index.seek(0, os.SEEK_END)

    def _close_shard(self) -> None:
        with naming(self._shard_path):
            _sync(self._shard)
            self._shard.close()
            self._shard = None
            self._shard_path.rename(self._out / self._shard_name)
        with naming(self._out / DOCUMENTS):
            _sync(self._index)
        sync_folder(self._out)
        size = self._shard_length * DTYPE.itemsize
        self._files[self._shard_name] = {"bytes": size, "sha256": self._digest.hexdigest()}
        self._record()

    def _record(self) -> None:
        state = {
            "version": VERSION,
            "source_fingerprint": self._fingerprint,
            "batches": self.batches,
            "tokens": self.tokens,
            "documents": self.documents,
            "text_bytes": self.text_bytes,
            "files": self._files,
        }
        write_signed_json(self._out / UNFINISHED, state)

    def _drop_shard(self) -> None:
        self._close_index()
        if self._shard is not None:
            with contextlib.suppress(OSError):  # a full disk fails once more while the buffer empties
                self._shard.close()
            self._shard = None
        for path in [*self._out.glob("shard-*.bin"), *self._out.glob("*.tmp")]:
            if path.name not in self._files:
                path.unlink()

    def _close_index(self) -> None:
        if self._index is not None:
            with contextlib.suppress(OSError):
                self._index.close()
            self._index = None


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def folder_for_one(out: Path, *, wait: bool) -> Iterator[None]:
    """Make `out` and hold it against other processes; on the way out a new one goes again if empty.

    Raises InputError where another process holds it and `wait` is false, OSError where it cannot be made.
    """
    path = out / LOCK
    new = not out.exists()
    while True:
        try:
            out.mkdir(parents=True, exist_ok=True)
            file = path.open("a")
        except (FileExistsError, FileNotFoundError):
            if out.exists() and not out.is_dir():
                raise
            continue  # the last holder removed the folder between two of these steps
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError as error:
                raise InputError(f"{out}: wanted a folder of our own, got one that is being prepared now") from error
            try:
                named = os.path.samestat(os.fstat(file.fileno()), path.stat())
            except FileNotFoundError:
                named = False
            if not named:
                continue  # this lock is on a file that the last holder has unlinked
            try:
                yield
            finally:
                path.unlink()
                if new:
                    with contextlib.suppress(OSError):  # not empty, or the next holder's already
                        out.rmdir()
            return
