"""A trained model opened for reading: the one place where `cgpt eval` gets it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cgpt.checkpoint import CHECKPOINTS, open_newest, open_tokenizer, steps
from cgpt.data.tokenizer import Tokenizer
from cgpt.errors import InputError
from cgpt.model.gpt import GPT
from cgpt.stream.executor import Executor
from cgpt.stream.store import Store

if TYPE_CHECKING:
    from cgpt.placing import Room
    from cgpt.recipe import Recipe

MOST_BATCHES = 64  # a walk, of a model that streams: what crosses to the device serves them all
ATTEMPTS = 3


@dataclass(frozen=True)
class Reader:
    """run: the folder. recipe: its own but for the precision that was asked for. identity: of its data. step: of the
    checkpoint that was read."""

    run: Path
    recipe: Recipe
    identity: dict
    tokenizer: Tokenizer
    model: GPT
    store: Store
    executor: Executor
    step: int


@contextlib.contextmanager
def open_reader(
    run: Path,
    room: Room | None = None,
    batch_size: int = 1,
    precision: str | None = None,
    say: Callable[[str], None] | None = None,
    cache: int = 0,
) -> Iterator[Reader]:
    """The run's newest whole checkpoint, read for forwards of `batch_size` full sequences; closed at the end.

    room, precision, say, cache: as for `open_newest`, which says what it raises too. A run that is being trained may
    remove the checkpoint while it is read: then the newer one is.
    """
    recipe, identity, model, store, manifest = _open(run, room, batch_size, precision, say, cache)
    with contextlib.closing(store):
        tokenizer = open_tokenizer(run, identity)
        yield Reader(run, recipe, identity, tokenizer, model, store, Executor(store), manifest["step"])


def _open(
    run: Path,
    room: Room | None,
    batch_size: int,
    precision: str | None,
    say: Callable[[str], None] | None,
    cache: int,
):
    for attempt in range(ATTEMPTS):
        newest = steps(run / CHECKPOINTS)[:1]
        try:
            return open_newest(run, room, batch_size, MOST_BATCHES, say, precision, cache)
        except (InputError, FileNotFoundError):
            if attempt + 1 == ATTEMPTS or steps(run / CHECKPOINTS)[:1] == newest:
                raise
    raise AssertionError("unreachable")
