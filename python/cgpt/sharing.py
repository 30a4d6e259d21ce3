"""What several ranks do as one: whole tensors on rank 0, a part of each on every rank, and one outcome for all.

    rank 0        part 0 |  gather  | part 0, part 1, ... = the parameter -> file
    rank r        part r |  ------> |
    every rank    part r |  deal    | the parameter on rank 0 <- file

Before a tensor moves the ranks meet, and each says whether anything has gone wrong since they met last. So a disk that
is full, a file that is damaged or a read that fails on one rank ends the work on all of them, at the same tensor and
with the same error. Of one rank the whole is the part, and nothing is copied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from cgpt.errors import InputError
from cgpt.stream.record import Record, part_of
from cgpt.world import World


class Source(Protocol):
    """layers: of the walk, by `name`. What is shared are the records: their layout, format, masters and moments, of
    which each rank of `world` has its part."""

    layers: Sequence
    world: World

    def record(self, index: int) -> contextlib.AbstractContextManager[Record]: ...


class Meeting:
    """A block of work that all ranks of `world` go through alike, on the threads that a checkpoint is for.

    An error of one rank is raised on all: there as it is, elsewhere, where they meet next, as an equal OSError or
    InputError, or as a RuntimeError that names the rank.
    """

    def __init__(self, world: World):
        self.world = world
        self._listening = True  # whether the others still wait for a word of this rank

    def meet(self, value: Any = None) -> Any:
        """Rank 0's `value`, JSON, once every rank has come here. Raises the error of one that has not."""
        said = self._say(None if value is None else {"value": value})
        for rank, word in enumerate(said):
            if word and "value" not in word:
                self._listening = False
                raise _error(rank, word)
        return said[0] and said[0]["value"]

    def gather(self, record: Record, name: str, part: Tensor) -> Tensor:
        """The whole of a parameter, or of a moment, from this rank's `part` (fp32, on the CPU) and the others', in its
        shape on rank 0; empty elsewhere."""
        self.meet()
        whole = self._moved(self.world.gather_parts, part, _sizes(record, name))
        return whole.view(_shape(record, name)) if self.world.first else whole

    def deal(self, record: Record, name: str, key: str, read: Callable[[str], Tensor] | None) -> Tensor:
        """This rank's part of what rank 0 reads as `key`, of parameter `name`'s shape, fp32; empty where it has none.
        Raises InputError for another shape."""
        whole = record.checked(name, read(key)).reshape(-1) if self.world.first else torch.empty(0)
        self.meet()
        return self._moved(self.world.deal_parts, whole, _sizes(record, name))

    def __enter__(self) -> Meeting:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if error is not None and self._listening:
            with contextlib.suppress(ConnectionError):  # what has gone wrong here is the reason all the same
                self._say(_told(error))

    def _say(self, word: dict | None) -> list[dict | None]:
        return self._moved(self.world.meet, word)

    def _moved(self, move: Callable, *what: Any) -> Any:
        self._listening = False  # should it fail, there is nobody to tell
        found = move(*what)
        self._listening = True
        return found


class Whole:
    """A source whose records are whole on rank 0, gathered tensor by tensor as they are asked for. On the other ranks,
    which must ask for the same, they are empty."""

    def __init__(self, source: Source, ranks: Meeting):
        self._source, self._ranks = source, ranks
        self.layers = source.layers

    @contextlib.contextmanager
    def record(self, index: int) -> Iterator[WholeRecord]:
        with self._source.record(index) as record:
            yield WholeRecord(record, self._ranks)


class WholeRecord:
    """A layer's record as far as saving asks."""

    def __init__(self, record: Record, ranks: Meeting):
        self.layout, self.format = record.layout, record.format
        self._record, self._ranks = record, ranks

    def master(self, name: str) -> Tensor:
        """fp32, on the CPU."""
        return self._ranks.gather(self._record, name, self._record.master(name))

    def moment(self, kind: str, name: str) -> Tensor:
        """fp32, on the CPU; to be looked at only."""
        return self._ranks.gather(self._record, name, self._record.view(kind, name).to("cpu", torch.float32))


def _sizes(record: Record, name: str) -> list[int]:
    """Elements of a parameter that each rank has."""
    return [part_of(record.layout, name, rank, record.ranks).size for rank in range(record.ranks)]


def _shape(record: Record, name: str) -> tuple[int, ...]:
    return record.layout.shapes[record.layout.names.index(name)]


def _told(error: BaseException) -> dict:
    if isinstance(error, OSError):
        return {"os": [error.errno, error.strerror or str(error), error.filename and str(error.filename)]}
    return {"input" if isinstance(error, InputError) else "error": str(error) or type(error).__name__}


def _error(rank: int, told: dict) -> Exception:
    if "os" in told:
        return OSError(*told["os"])
    return InputError(told["input"]) if "input" in told else RuntimeError(f"rank {rank}: {told['error']}")
