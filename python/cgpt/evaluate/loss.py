"""Held-out loss: mean cross-entropy in nats per token over the first windows of a split, and as bits per byte."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cgpt.checkpoint import open_tokenizer, open_trained
from cgpt.data.loader import Loader, Split, train_val_split
from cgpt.data.prepare import open_corpus
from cgpt.data.shards import TokenDataset
from cgpt.errors import InputError
from cgpt.metrics import bits_per_byte
from cgpt.stream.executor import Batch, Executor

if TYPE_CHECKING:
    from cgpt.placing import Room

MOST_BATCHES = 64  # a walk, of a model that streams: what crosses to the device serves them all


@dataclass(frozen=True)
class HeldOut:
    """loss: nats per token over `tokens` targets. bits_per_byte: None where the text's bytes are not known."""

    loss: float
    tokens: int
    bits_per_byte: float | None


def windows_within(loader: Loader, tokens: int | None) -> int:
    """How many of the loader's windows hold at most `tokens` targets: at least one, all for None."""
    return loader.n_windows if tokens is None else max(1, min(loader.n_windows, tokens // loader.seq_len))


def held_out_loss(executor: Executor, loader: Loader, batch_size: int, max_tokens: int | None = None) -> HeldOut:
    """Evaluates the first windows of `loader`, `batch_size` at a time; the same windows at every call.

    A walk takes as many batches through a layer as the store's placement has micro-batches a visit, which changes no
    bit of the loss and divides what crosses to the device.
    """
    n_windows = windows_within(loader, max_tokens)
    batches = [(start, min(batch_size, n_windows - start)) for start in range(0, n_windows, batch_size)]
    at_once = executor.store.placement.micro_batches
    total = 0.0
    for first in range(0, len(batches), at_once):
        visit = batches[first : first + at_once]
        losses = executor.losses([to_device(loader.batch(*span), executor.store.device) for span in visit])
        for (_, n), loss in zip(visit, losses, strict=True):
            total += n * loss
    loss, tokens = total / n_windows, n_windows * loader.seq_len
    return HeldOut(loss, tokens, bits_per_byte(loss, tokens, loader.text_bytes(n_windows)))


def to_device(arrays, device: torch.device) -> Batch:
    """(ids, targets), int64 arrays, as tensors on `device`. A GPU fetches them itself, from pinned memory."""
    ids, targets = map(torch.from_numpy, arrays)
    if device.type == "cuda":
        ids, targets = ids.pin_memory(), targets.pin_memory()
    return ids.to(device, non_blocking=True), targets.to(device, non_blocking=True)


def evaluate_run(
    run: Path,
    data: str | None,
    tokens: int | None,
    batch_size: int,
    room: Room | None = None,
    *,
    progress: bool = False,
    say: Callable[[str], None] | None = None,
) -> dict:
    """A trained run's loss: on the held-out split of its own data, on the whole of any other.

    room, say: as for open_trained. Text is read in the run's vocabulary. Raises InputError for a run without a whole
    checkpoint, for a model that has no place in `room`, for bad data, tokens of another vocabulary among it, and for
    counts below 1.
    """
    for flag, value in (("--tokens", tokens), ("--batch-size", batch_size)):
        if value is not None and value < 1:
            raise InputError(f"{flag}: wanted at least 1, got {value}")
    recipe, identity, _, store = open_trained(run, room, batch_size, MOST_BATCHES, say)
    tokenizer = open_tokenizer(run, identity)
    if data is None and not recipe.data:
        raise InputError(f"--data: wanted text or tokens, as {run} was imported and has none of its own, got none")
    dataset = open_corpus(data or recipe.data, progress=progress, tokenizer=tokenizer)
    if identity_of(dataset) == identity:
        split, told = train_val_split(dataset, recipe.seq_len)[1], "held-out split"
    elif data is None:
        raise InputError(f"{recipe.data}: wanted the run's data, {identity}, got {identity_of(dataset)}")
    elif dataset.tokenizer is not None and dataset.tokenizer.hash != tokenizer.hash:
        wanted = f"wanted text, or tokens of the run's vocabulary of {tokenizer.n_vocab}"
        raise InputError(f"{data}: {wanted}, got tokens of another, of {dataset.vocab_size}")
    else:
        split, told = Split(dataset, "all", "whole", [0], [dataset.n_tokens]), "all of it"
    with contextlib.closing(store):
        found = held_out_loss(Executor(store), Loader(split, recipe.seq_len), batch_size, tokens)
    return {"data": dataset.name, "split": told, **asdict(found)}


def identity_of(dataset: TokenDataset) -> dict:
    """What tells one corpus from another when a run is resumed or evaluated.

    vocabulary: its hash, where it is not GPT-2's.
    """
    identity = {"name": dataset.name, "tokens": dataset.n_tokens, "documents": dataset.n_documents}
    return identity if dataset.vocabulary is None else {**identity, "vocabulary": dataset.tokenizer.hash}
