"""Several ranks in one process, a thread each, which exchange through shared memory: the World of tests."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from cgpt.world import World

Result = TypeVar("Result")


class ThreadWorld(World):
    """Rank `rank` of those that meet at `tables`; wire, checkpoint's and caller's thread meet each at its own. pause:
    called before every collective."""

    def __init__(self, rank: int, tables: dict[str, _Table], pause: Callable[[], None] = lambda: None):
        self.rank = self.local_rank = rank
        self.count = self.local_count = tables["wire"].barrier.parties
        self.sent = 0
        self._tables, self._pause = tables, pause

    def all_gather(self, whole, part):
        self.sent += part.nbytes * (self.count - 1)
        for rank, piece in enumerate(self._meet("wire", part.clone())):
            whole[rank * part.numel() : (rank + 1) * part.numel()] = piece

    def exchange(self, received, sent, received_sizes: Sequence[int], sent_sizes: Sequence[int]):
        self.sent += (sum(sent_sizes) - sent_sizes[self.rank]) * sent.itemsize
        pieces = [piece.clone() for piece in sent.split(list(sent_sizes))]
        end = 0
        for gave, size in zip(self._meet("wire", pieces), received_sizes, strict=True):
            assert gave[self.rank].numel() == size
            received[end : end + size] = gave[self.rank]
            end += size

    def gather_parts(self, part, sizes):
        assert part.numel() == sizes[self.rank]
        pieces = self._meet("files", part.flatten().clone())
        return torch.cat(pieces) if self.first else part.new_empty(0)

    def deal_parts(self, whole, sizes):
        return self._meet("files", whole)[0].split(list(sizes))[self.rank].clone()

    def meet(self, value: Any) -> list[Any]:
        return self._meet("files", json.loads(json.dumps(value)))

    def tell(self, value: Any) -> list[Any]:
        return self._meet("talk", json.loads(json.dumps(value)))

    def _meet(self, table: str, value: Any) -> list[Any]:
        self._pause()
        return self._tables[table].meet(self.rank, value)


class _Table:
    """Where ranks lay something down and take what all have laid."""

    def __init__(self, count: int):
        self.barrier = threading.Barrier(count, timeout=60)
        self.laid: list[Any] = [None] * count

    def meet(self, rank: int, value: Any) -> list[Any]:
        self.laid[rank] = value
        self.barrier.wait()
        found = list(self.laid)
        self.barrier.wait()
        return found


def on_ranks(count: int, work: Callable[[World], Result], pause: Callable[[], None] = lambda: None) -> list[Result]:
    """What `work` returns on each of `count` ranks. Raises the first error of any, and lets the others go."""
    if count == 1:
        return [work(World())]
    tables = {name: _Table(count) for name in ("wire", "talk", "files")}
    results: list[Any] = [None] * count
    errors: list[BaseException] = []
    cores = torch.get_num_threads()  # of this thread: each has a number of its own

    def run(rank: int) -> None:
        torch.set_num_threads(cores)
        try:
            results[rank] = work(ThreadWorld(rank, tables, pause))
        except BaseException as error:
            if not isinstance(error, threading.BrokenBarrierError):
                errors.append(error)
            for table in tables.values():
                table.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}") for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
