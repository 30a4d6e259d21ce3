"""`hf:NAME[:CONFIG][:SPLIT]`: a dataset of the Hugging Face hub, or a local folder of its form, as a source of text.

Rows are streamed, not downloaded first. Which rows come, and in which order, is the dataset's revision's; its hash
enters the fingerprint, so that a run that goes on after the dataset has changed is refused. Rows are numbered from 0.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cgpt.errors import InputError

PREFIX = "hf:"
SPLIT = "train"


@dataclass(frozen=True)
class HubCorpus:
    """One split. `name` enters the dataset's metadata, `where` messages."""

    name: str
    where: str
    split: str
    text_field: str
    builder: Any

    def fingerprint(self) -> str:
        """sha256 (hex) over the name, the revision's hash and the column."""
        row = [self.where, self.split, str(self.builder.hash), self.text_field]
        return hashlib.sha256(json.dumps(row).encode()).hexdigest()

    def size(self) -> int:
        """Bytes to read: 0, as nobody says."""
        return 0

    def texts(self, skipped: Counter[str]) -> Iterator[str]:
        """Texts of all rows in order, none of them empty. Raises InputError naming a row without text, and OSError
        where the hub fails, after which a preparation can be gone on with."""
        rows = self._rows()
        number = -1
        while True:
            number += 1
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # whatever the network, a decoder or the package raises
                message = f"row {number}: wanted the next row, got {_line(error)}"
                raise OSError(errno.EIO, message, self.where) from error
            text = row.get(self.text_field)
            if not isinstance(text, str):
                got = f"a {type(text).__name__}" if self.text_field in row else f"the columns {', '.join(row)}"
                wanted = f"wanted text in column {self.text_field!r} (--text-field names another)"
                raise InputError(f"{self.where}: row {number}: {wanted}, got {got}")
            if text:
                yield text
            else:
                skipped["empty documents"] += 1

    def _rows(self) -> Iterator[dict]:
        try:
            return iter(self.builder.as_streaming_dataset(split=self.split))
        except Exception as error:
            raise InputError(f"{self.where}: wanted the split {self.split!r}, got {_line(error)}") from error


def find_on_hub(source: str, text_field: str) -> HubCorpus:
    """The corpus behind `hf:NAME[:CONFIG][:SPLIT]`. Raises InputError without the datasets package, and for what is
    not there or not to be reached."""
    name, *rest = source.removeprefix(PREFIX).split(":")
    if not name or len(rest) > 2 or not all(rest):
        raise InputError(f"{source}: wanted {PREFIX}NAME, {PREFIX}NAME:SPLIT or {PREFIX}NAME:CONFIG:SPLIT")
    try:
        import datasets
    except ImportError as error:
        wanted = "wanted the datasets package to read from the hub"
        raise InputError(f"{source}: {wanted}, got none: pip install datasets") from error
    try:
        builder = datasets.load_dataset_builder(name, rest[0] if len(rest) == 2 else None)
    except Exception as error:  # not found, no network, no access, a config that must be named: each its own kind
        raise InputError(f"{source}: wanted a dataset, got {_line(error)}") from error
    known = list(builder.info.splits or {}) or [str(split) for split in (builder.config.data_files or {})]
    split = rest[-1] if rest else SPLIT
    if known and split.split("[")[0] not in known:
        raise InputError(f"{source}: wanted one of the splits {', '.join(known)}, got {split}")
    short = name.rstrip("/").rpartition("/")[2] or name
    return HubCorpus(f"{short}-{split}", source, split, text_field, builder)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
