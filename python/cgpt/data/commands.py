"""What `cgpt data` does, and what it prints. progress: whether somebody watches, so that bars are drawn."""

from __future__ import annotations

import json

from cgpt.data.export import export
from cgpt.data.flags import DataInfo, Export, Prepare
from cgpt.data.prepare import open_corpus, prepare
from cgpt.data.shards import TokenDataset, vocabulary_of


def run(command: Prepare | Export | DataInfo, progress: bool) -> None:
    """Runs a parsed command. Raises InputError and OSError as what it calls does."""
    {Prepare: _prepare, Export: _export, DataInfo: _info}[type(command)](command, progress)


def _prepare(command: Prepare, progress: bool) -> None:
    dataset = prepare(
        command.sources,
        command.out,
        workers=command.workers,
        progress=progress,
        vocab_size=command.vocab_size,
        vocabulary=command.vocab_from and vocabulary_of(command.vocab_from),
        text_field=command.text_field,
    )
    _show(dataset, False)


def _export(command: Export, progress: bool) -> None:
    dataset = open_corpus(command.data, progress=progress)
    for path in export(dataset, command.format, command.out, fraction=command.held_out, progress=progress):
        print(f"{path}  {path.stat().st_size:,} bytes")


def _info(command: DataInfo, progress: bool) -> None:
    _show(open_corpus(command.data, progress=progress), command.json)


def _show(dataset: TokenDataset, as_json: bool) -> None:
    rows = {
        "name": dataset.name,
        "tokens": dataset.n_tokens,
        "documents": dataset.n_documents,
        "text_bytes": dataset.text_bytes,
        "vocab_size": dataset.vocab_size,
        "dtype": str(dataset.dtype),
    }
    if as_json:
        print(json.dumps(rows))
        return
    for name, value in rows.items():
        print(f"{name:10} {f'{value:,}' if isinstance(value, int) else value}")
