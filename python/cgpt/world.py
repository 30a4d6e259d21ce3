"""One process of a job that trains one model on several devices: who it is, and what it exchanges with the others.

Every rank does the same things in the same order on a shard of the state and every count-th micro-batch of the data
(stream/layout.py, stream/gradients.py say which). This is the job of one process, to which all of it comes down to
nothing; distributed.py has the one on torch.distributed. There, what waits for the others raises ConnectionError, one
line, where one of them has died.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


class World:
    """rank of `count` processes, of which local_rank of local_count are on this machine. sent: bytes that have left
    this rank in `all_gather` and `exchange`."""

    rank, count = 0, 1
    local_rank, local_count = 0, 1
    sent = 0

    @property
    def first(self) -> bool:
        """Whether this rank speaks, and writes files, for all."""
        return self.rank == 0

    # On the lane `wire` alone, in the same order on every rank -----------------------------------------------------

    def all_gather(self, whole: Tensor, part: Tensor) -> None:
        """Puts every rank's `part` into `whole`, side by side in rank order; flat, contiguous, of one dtype on one
        device. `part` may be its own place in `whole`."""
        if whole.data_ptr() != part.data_ptr():
            whole.copy_(part)

    def exchange(
        self, received: Tensor, sent: Tensor, received_sizes: Sequence[int], sent_sizes: Sequence[int]
    ) -> None:
        """Sends the first sent_sizes[0] elements of `sent` to rank 0, the next to rank 1 and so on; `received` gets
        received_sizes[0] from rank 0, and so on. Flat, contiguous, of one dtype on one device."""
        received.copy_(sent)

    # On the thread that saves a checkpoint, or where there is none; in the same order on every rank ----------------

    def gather_parts(self, part: Tensor, sizes: Sequence[int]) -> Tensor:
        """Every rank's `part`, flat on the CPU, side by side in rank order: flat on rank 0, empty elsewhere. sizes: of
        each rank's, in elements; of some it may be 0."""
        return part

    def deal_parts(self, whole: Tensor, sizes: Sequence[int]) -> Tensor:
        """The reverse: this rank's part of rank 0's `whole`, fp32; what the others give is not looked at."""
        return whole

    def meet(self, value: Any) -> list[Any]:
        """As `tell`."""
        return [value]

    # On the caller's thread, in the same order on every rank -------------------------------------------------------

    def tell(self, value: Any) -> list[Any]:
        """Every rank's `value`, JSON, in rank order, on every rank."""
        return [value]

    def from_first(self, value: Any = None) -> Any:
        """Rank 0's `value`, JSON, on every rank."""
        return self.tell(value)[0]

    def close(self) -> None:
        """Leaves the job."""
