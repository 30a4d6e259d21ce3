"""The World of a process that torchrun has started; all that imports torch.distributed, but for its agent in launch.py.

    wire      default group, nccl on GPUs and gloo on CPUs: weights and gradients, by the lane of that name alone
    talk      gloo: JSON, on the caller's thread
    files     gloo: parts of a checkpoint, on the thread that saves

A group sees its collectives in one order on every rank, which several threads could not promise to one another: hence
a group a thread. Ranks that share one GPU exchange through host memory, for nccl wants a GPU for each.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cgpt.errors import InputError
from cgpt.world import World

PATIENCE = timedelta(hours=24)  # of a group; the watchdog, which can say more, ends a job that hangs long before

ANSWER = timedelta(seconds=1)  # of rank 0, until its name is looked at again


def open_world(device: str = "cpu") -> World:
    """The job that this process belongs to: torchrun's, or one of its own. Raises InputError where torchrun's
    environment is not whole."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return World()
    return TorchWorld(device)


class TorchWorld(World):
    """device: "cpu", or "cuda" with one GPU a rank of a machine, in their order; more ranks than GPUs share them."""

    def __init__(self, device: str):
        missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise InputError(f"{missing[0]}: wanted torchrun's environment, got WORLD_SIZE without it")
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self.local_count = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.sent = 0
        alone = device == "cuda" and self.local_count <= torch.cuda.device_count()
        if device == "cuda":
            torch.cuda.set_device(self.local_rank % torch.cuda.device_count())
        self._staged = device == "cuda" and not alone
        store, self.rank, self.count = next(dist.rendezvous("env://", timeout=PATIENCE))
        where = {"store": own_store(store, self.rank, self.count), "rank": self.rank, "world_size": self.count}
        dist.init_process_group("cpu:gloo,cuda:nccl" if alone else "gloo", timeout=PATIENCE, **where)
        self._talk = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._files = dist.new_group(backend="gloo", timeout=PATIENCE)

    def all_gather(self, whole, part):
        self.sent += part.nbytes * (self.count - 1)
        whole, part = _bytes(whole), _bytes(part)
        if self._staged:
            there = torch.empty(whole.shape, dtype=torch.uint8)
            _all_gather(there, part.cpu())
            whole.copy_(there)
            return
        _all_gather(whole, part)

    def exchange(
        self, received: Tensor, sent: Tensor, received_sizes: Sequence[int], sent_sizes: Sequence[int]
    ) -> None:
        width = sent.dtype.itemsize
        self.sent += (sum(sent_sizes) - sent_sizes[self.rank]) * width
        sizes = [n * width for n in received_sizes], [n * width for n in sent_sizes]
        received, sent = _bytes(received), _bytes(sent)
        if self._staged:
            there = torch.empty(received.shape, dtype=torch.uint8)
            _all_to_all(there, sent.cpu(), *sizes)
            received.copy_(there)
            return
        _all_to_all(received, sent, *sizes)

    def gather_parts(self, part: Tensor, sizes: Sequence[int]) -> Tensor:
        whole = part.new_empty(sum(sizes) if self.first else 0)
        here = self._at_first(part.numel())
        _all_to_all(whole, part.reshape(-1), self._of_first(sizes), here, group=self._files)
        return whole

    def deal_parts(self, whole: Tensor, sizes: Sequence[int]) -> Tensor:
        part = torch.empty(sizes[self.rank])
        here = self._at_first(part.numel())
        _all_to_all(part, whole if self.first else part[:0], here, self._of_first(sizes), group=self._files)
        return part

    def meet(self, value: Any) -> list[Any]:
        return self._tell(value, self._files)

    def tell(self, value: Any) -> list[Any]:
        return self._tell(value, self._talk)

    def _at_first(self, size: int) -> list[int]:
        """`size` elements to or from rank 0 alone."""
        return [size] + [0] * (self.count - 1)

    def _of_first(self, sizes: Sequence[int]) -> list[int]:
        """`sizes` elements to or from every rank, on rank 0 alone."""
        return list(sizes) if self.first else [0] * self.count

    def _tell(self, value: Any, group: dist.ProcessGroup) -> list[Any]:
        said = b"" if value is None else json.dumps(value).encode()
        told = torch.tensor(list(said), dtype=torch.uint8)
        sizes = torch.zeros(self.count, dtype=torch.int64)
        _all_gather(sizes, torch.tensor([told.numel()]), group)
        longest = int(sizes.max())
        if not longest:  # as most often
            return [None] * self.count
        rows = torch.zeros(self.count, longest, dtype=torch.uint8)
        _all_gather(rows.view(-1), torch.nn.functional.pad(told, (0, longest - told.numel())), group)
        said = [bytes(row[:size].numpy()) for row, size in zip(rows, sizes.tolist(), strict=True)]
        return [json.loads(word) if word else None for word in said]

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def own_store(store: dist.Store, rank: int, count: int) -> dist.Store:
    """`store` under a name that is of this start of the ranks alone.

    torchrun keeps a job's store when it starts ranks again: one that is quicker than another would find the address of
    that one's predecessor, and fail. Its count of restarts cannot tell them apart, for on several machines it differs
    (pytorch/pytorch issue 135712). So rank 0 makes up a name, and each other rank asks under the name that it finds
    until it is answered: nobody answers under that of a dead rank 0.
    """
    if rank == 0:
        name = uuid.uuid4().hex
        store.set("cgpt/name", name)
        for other in range(1, count):
            question = store.get(f"cgpt/{name}/{other}").decode()
            store.set(f"cgpt/{name}/{question}", "")
        return dist.PrefixStore(name, store)
    question = uuid.uuid4().hex
    while True:
        name = store.get("cgpt/name").decode()
        store.set(f"cgpt/{name}/{rank}", question)
        with contextlib.suppress(RuntimeError):  # of time
            store.wait([f"cgpt/{name}/{question}"], ANSWER)
            return dist.PrefixStore(name, store)


def _bytes(x: Tensor) -> Tensor:
    """The same memory as a dtype that every back end moves."""
    return x.view(torch.uint8)


def _all_gather(whole: Tensor, part: Tensor, group: dist.ProcessGroup | None = None) -> None:
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # torch 2.13 gave it the first name
    _ask(gather, whole, part, group=group)


def _all_to_all(received: Tensor, sent: Tensor, *sizes: Sequence[int], group: dist.ProcessGroup | None = None) -> None:
    _ask(dist.all_to_all_single, received, sent, *sizes, group=group)


def _ask(collective: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """Raises ConnectionError, one line, where a rank has died or its link has."""
    try:
        collective(*arguments, **options)
    except RuntimeError as error:  # of no kind of its own
        why = " ".join(str(error).split()).split(". ")[0]
        raise ConnectionError(f"rank {dist.get_rank()}: wanted an answer of every rank, got none: {why}") from error
