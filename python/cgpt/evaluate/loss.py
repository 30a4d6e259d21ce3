"""Held-out loss: mean cross-entropy over the first windows of a split.

loss = mean of -ln p(token | those before it in its window)         nats a token
perplexity = exp(loss)
bits per byte = loss x tokens / (ln 2 x bytes of their text)        the same scale for every vocabulary
"""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from cgpt.data.loader import Loader, Split, train_val_split
from cgpt.data.prepare import open_corpus
from cgpt.data.shards import TokenDataset
from cgpt.errors import InputError
from cgpt.metrics import bits_per_byte
from cgpt.stream.executor import Batch, Executor

if TYPE_CHECKING:
    from cgpt.evaluate.reader import Reader


@dataclass(frozen=True)
class HeldOut:
    """loss: nats per token over `tokens` targets. bits_per_byte: None where the text's bytes are not known."""

    loss: float
    tokens: int
    bits_per_byte: float | None

    @property
    def perplexity(self) -> float | None:
        """None where it is past the largest double."""
        return math.exp(self.loss) if self.loss < math.log(sys.float_info.max) else None


def windows_within(loader: Loader, tokens: int | None) -> int:
    """How many of the loader's windows hold at most `tokens` targets: at least one, all for None."""
    return loader.n_windows if tokens is None else max(1, min(loader.n_windows, tokens // loader.seq_len))


def held_out_loss(
    executor: Executor, loader: Loader, batch_size: int, max_tokens: int | None = None, *, progress: bool = False
) -> HeldOut:
    """Evaluates the first windows of `loader`, `batch_size` at a time; the same windows at every call.

    A walk takes as many batches through a layer as the store's placement has micro-batches a visit, which divides what
    crosses to the device. Ranks deal the batches out in turn, and each gets the loss of all. Neither changes a bit of
    it.
    """
    n_windows = windows_within(loader, max_tokens)
    batches = [(start, min(batch_size, n_windows - start)) for start in range(0, n_windows, batch_size)]
    world, at_once, device = executor.store.world, executor.store.placement.micro_batches, executor.store.device
    rounds = -(-len(batches) // world.count)
    mine = batches[world.rank :: world.count]
    mine += [None] * (rounds - len(mine))
    found: list[float | None] = []
    name, tokens = loader.split.dataset.name, n_windows * loader.seq_len
    with tqdm(total=tokens, unit=" tokens", unit_scale=True, desc=name, disable=not progress) as bar:
        for first in range(0, rounds, at_once):
            visit = mine[first : first + at_once]
            found += executor.losses([span and to_device(loader.batch(*span), device) for span in visit])
            done = batches[first * world.count : (first + at_once) * world.count]
            bar.update(sum(n for _, n in done) * loader.seq_len)
    told = world.tell(found)
    loss = sum(n * told[i % world.count][i // world.count] for i, (_, n) in enumerate(batches)) / n_windows
    return HeldOut(loss, tokens, bits_per_byte(loss, tokens, loader.text_bytes(n_windows)))


def to_device(arrays, device: torch.device) -> Batch:
    """(ids, targets), int64 arrays, as tensors on `device`. A GPU fetches them itself, from pinned memory."""
    ids, targets = map(torch.from_numpy, arrays)
    if device.type == "cuda":
        ids, targets = ids.pin_memory(), targets.pin_memory()
    return ids.to(device, non_blocking=True), targets.to(device, non_blocking=True)


def open_text(reader: Reader, data: str | None, *, progress: bool = False) -> Loader:
    """The windows to measure a trained model on: the held-out split of its own data, the whole of any other.

    data: as for open_corpus, None for the run's own. Text is read in the run's vocabulary; one shorter than the run's
    sequences is one window. Raises InputError for bad data, tokens of another vocabulary among it.
    """
    recipe, identity, tokenizer = reader.recipe, reader.identity, reader.tokenizer
    if data is None and not recipe.data:
        raise InputError(
            f"--data: wanted text or tokens, as {reader.run} was imported and has none of its own, got none"
        )
    dataset = open_corpus(data or recipe.data, progress=progress, tokenizer=tokenizer)
    if identity_of(dataset) == identity:
        return Loader(train_val_split(dataset, recipe.seq_len)[1], recipe.seq_len)
    if data is None:
        raise InputError(f"{recipe.data}: wanted the run's data, {identity}, got {identity_of(dataset)}")
    if dataset.tokenizer is not None and dataset.tokenizer.hash != tokenizer.hash:
        wanted = f"wanted text, or tokens of the run's vocabulary of {tokenizer.n_vocab}"
        raise InputError(f"{data}: {wanted}, got tokens of another, of {dataset.vocab_size}")
    if dataset.n_tokens < 2:
        raise InputError(f"{data}: wanted at least 2 tokens, got {dataset.n_tokens}")
    whole = Split(dataset, "all", "whole", [0], [dataset.n_tokens])
    return Loader(whole, min(recipe.seq_len, dataset.n_tokens - 1))


def evaluate_text(reader: Reader, loader: Loader, tokens: int | None, batch_size: int, *, progress: bool) -> dict:
    """JSON values: the model's loss on what `open_text` gave, `tokens` of it at most, and the same in other units.

    Raises InputError for a loss that is not finite.
    """
    found = held_out_loss(reader.executor, loader, batch_size, tokens, progress=progress)
    name = loader.split.dataset.name
    if not math.isfinite(found.loss):
        raise InputError(f"{reader.run}: wanted a model with a finite loss, got {found.loss} on {name}")
    told = "all of it" if loader.split.rule == "whole" else "held-out split"
    return {"data": name, "split": told, **asdict(found), "perplexity": found.perplexity}


def identity_of(dataset: TokenDataset) -> dict:
    """What tells one corpus from another when a run is resumed or evaluated.

    vocabulary: its hash, where it is not GPT-2's.
    """
    identity = {"name": dataset.name, "tokens": dataset.n_tokens, "documents": dataset.n_documents}
    return identity if dataset.vocabulary is None else {**identity, "vocabulary": dataset.tokenizer.hash}
