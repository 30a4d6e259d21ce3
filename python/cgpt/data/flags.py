"""Flags of `cgpt data`. Imports no torch, so that --help is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cgpt.train_flags import Folder, Int, Switch

Named = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]


@dataclass(frozen=True)
class Prepare:
    """Turn text into token shards that train and eval open at once."""

    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE...")]
    """Text files (.txt, .jsonl, packed or not, .parquet, .arrow), folders of them, a folder that Hugging Face's
    save_to_disk wrote, hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT of its hub, moby-dick or python-stdlib."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Dataset folder to write; one left by an interrupted run is finished."""
    vocab_size: Int = None
    """Learn a byte-pair vocabulary of so many ids from the text, which a model trained on DIR then has; 257 to 65535
    (default: GPT-2's vocabulary of 50257)."""
    vocab_from: Folder = None
    """A prepared dataset, run or tokenizer.json whose vocabulary to use, so that runs and data go together."""
    text_field: Annotated[str, tyro.conf.arg(metavar="NAME")] = "text"
    """The field of JSON lines, or the column of tables, that holds the text."""
    workers: Int = None
    """Threads that encode (default: one a core)."""


@dataclass(frozen=True)
class Export:
    """Write tokens as another trainer's files: the same ids and documents, into a folder that train opens too.

    nanogpt: train.bin, val.bin. llmc: train_000000.bin, ..., val_000000.bin. megatron: train.bin and .idx, val.bin and
    .idx. datatrove: train.ds, val.ds, with .index and .metadata. A vocabulary of the data's own goes along.
    """

    data: Named
    """As for train; text is prepared first."""
    format: Annotated[Literal["nanogpt", "llmc", "megatron", "datatrove"], tyro.conf.arg(metavar="FORMAT")]
    """nanogpt, llmc, megatron or datatrove."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """New or empty folder to write; it is whole or absent."""
    held_out: Annotated[float, tyro.conf.arg(metavar="SHARE")] = 0.05
    """Of the documents that go into val, chosen as train chooses them; 0 for one part, named all."""


@dataclass(frozen=True)
class DataInfo:
    """What a dataset holds."""

    data: Named
    """As for train."""
    json: Switch = False
    """Print JSON."""


@dataclass(frozen=True)
class Data:
    """Prepare token shards, write them as other trainers', or look into them."""

    command: (
        Annotated[Prepare, tyro.conf.subcommand("prepare")]
        | Annotated[Export, tyro.conf.subcommand("export")]
        | Annotated[DataInfo, tyro.conf.subcommand("info")]
    )
