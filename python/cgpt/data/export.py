"""Token datasets to other trainers' files: the same ids, the same documents, the same split.

    OUT/train.*  what `cgpt train` trains on        OUT/val.*  what it holds out
    OUT/tokenizer.json  where the vocabulary is not GPT-2's

The folder is written under another name, synced and renamed: it is whole or absent. `cgpt train --data OUT` opens it
and holds out the same documents.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cgpt.data.formats.table import WRITERS
from cgpt.data.formats.token_file import Stream
from cgpt.data.loader import Split, train_val_split
from cgpt.data.shards import TokenDataset
from cgpt.data.tokenizer import TOKENIZER
from cgpt.errors import InputError
from cgpt.files import sync_folder


def export(
    dataset: TokenDataset, kind: str, out: str | Path, *, fraction: float = 0.05, seed: int = 0, progress: bool = False
) -> list[Path]:
    """Writes `dataset` into the new or empty folder `out` as `kind`, a key of WRITERS, and returns the files.

    fraction: of the documents to hold out by `train_val_split` with this seed, whose defaults are those of training; 0
    writes one part named `all`. A dataset with validation files of its own keeps them whatever the fraction above 0.

    Raises InputError for an unknown kind, an `out` in use, ids that the format cannot hold, and as `train_val_split`
    does; nothing is left then. Raises OSError naming what could not be written.
    """
    out = Path(out)
    if kind not in WRITERS:
        raise InputError(f"--format: wanted one of {', '.join(WRITERS)}, got {kind}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: wanted a new or empty folder, got {'one in use' if out.is_dir() else 'a file'}")
    if fraction == 0:
        parts = [Split(dataset, "all", "none", [0], [dataset.n_tokens])]
    else:
        parts = list(train_val_split(dataset, 1, fraction=fraction, seed=seed))
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.absolute().with_name(f"{out.absolute().name}.{os.getpid()}.tmp")
    folder.mkdir()
    try:
        with tqdm(total=dataset.n_tokens, unit=" tokens", unit_scale=True, desc="writing", disable=not progress) as bar:
            for part in parts:
                WRITERS[kind](folder, part.name, stream_of(part, bar.update))
        if dataset.vocabulary is not None:
            (folder / TOKENIZER).write_bytes(dataset.tokenizer.file)
        for path in folder.iterdir():
            _sync(path)
        sync_folder(folder)
        folder.rename(out)
        sync_folder(out.parent)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError) and error.filename is None:  # errors of writing do not carry the name
            raise OSError(error.errno, error.strerror, str(out)) from error
        raise
    return sorted(out.iterdir())


def stream_of(split: Split, read: Callable[[int], object] = lambda n: None) -> Stream:
    """`split` as a format writes it. A document that the split cuts ends, or begins, at the cut. read: told of every
    so many tokens that are on their way."""

    def tokens(start: int, stop: int) -> np.ndarray:
        read(stop - start)
        return split.tokens(start, stop)

    dataset, ends = split.dataset, np.asarray(split.dataset.document_ends)
    offsets = np.concatenate([[0], np.cumsum(split.stops - split.starts)])
    span = np.minimum(np.searchsorted(split.stops, ends), len(split.stops) - 1)
    inside = (ends > split.starts[span]) & (ends <= split.stops[span])
    own = ends[inside] - split.starts[span[inside]] + offsets[span[inside]]
    return Stream(
        name=dataset.name,
        tokens=tokens,
        n_tokens=split.n_tokens,
        document_ends=np.union1d(own, offsets[1:]),
        vocab_size=dataset.vocab_size,
        vocabulary="unknown" if dataset.tokenizer is None else dataset.tokenizer.encoding.name,
    )


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
