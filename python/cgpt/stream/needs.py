"""Bytes of every arena that a placement needs, exactly: what the store allocates, and what the planner promises.

device   records at home there, working weights kept there, two slots for the rest, a ring of boundary activations, and
         two buffers a direction for the gradients that ranks exchange
host     records at home there, weights before a disk, gradients, buffers of the disk, boundary activations, and for a
         checkpoint beside training room for records, and one that is read from the disk
disk     records, and gradients of a step of one visit, each from a multiple of its blocks

Of several ranks each has a shard of every record, and whole weights on the device (layout.py, placement.py).

Of weights that are only read a record holds nothing else, so it comes and goes through the buffers that fetch weights.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from cgpt.stream.format import Format
from cgpt.stream.layout import LayerPlan, shard_size
from cgpt.stream.placement import Placement

SLOTS = 2  # layers whose weights are on the device at once: one computes, one comes
EXCHANGES = 2  # micro-batches whose gradients are between ranks at once: one crosses, one is added up
STAGING = 3  # records of the disk on the host at once: one is read, one updated, one written
AHEAD = STAGING  # layers of the disk whose updates are submitted before the walk comes to them
BLOCK = 4096  # of a disk: offsets, lengths and addresses of direct access are multiples of it


@dataclass(frozen=True)
class Needs:
    """Bytes of each arena and of its parts; slot, exchange, staging, fetching, saving: of one buffer of each kind."""

    records_device: int
    kept: int
    slot: int
    ring: int
    records_host: int
    near: int
    gradients: int
    sending: int
    staging: int
    fetching: int
    boundaries: int
    saving: int
    aside: int
    disk: int
    exchange: int = 0

    @property
    def device(self) -> int:
        return self.records_device + self.kept + SLOTS * self.slot + self.ring + 2 * EXCHANGES * self.exchange

    @property
    def host(self) -> int:
        held = self.records_host + self.near + self.gradients + self.boundaries
        buffers = STAGING * self.staging + SLOTS * (self.fetching + self.sending)
        return held + buffers + self.saving + self.aside


def needs(plans: Sequence[LayerPlan], placement: Placement, format: Format) -> Needs:
    """What `placement` takes on each rank for layers kept in `format`."""
    working, record, training, ranks = format.working, format.record, format.training, placement.ranks
    sizes, wholes = [shard_size(plan.owned.size, ranks) for plan in plans], whole_sizes(plans, ranks)
    layers = list(zip(sizes, placement.state, placement.weights, strict=True))
    on_disk = [(size, weights) for size, home, weights in layers if home == "disk"]
    several = placement.visits > 1
    with_gradients = working if training and not several else 0  # beside the record on the disk
    background = placement.aside is not None and training
    staged = on_disk if training else []
    fetched = [size for size, at in on_disk if at == "disk" or not training]
    passes = 2 * placement.micro_batches if placement.activations == "host" and training else 0
    return Needs(
        records_device=sum(size * record for size, home, _ in layers if home == "device"),
        kept=sum(
            whole * working
            for whole, home, at in zip(wholes, placement.state, placement.weights, strict=True)
            if at == "device" and (home != "device" or ranks > 1)
        ),
        slot=max(sum(wholes[i] for i in streamed(plan, placement)) for plan in plans) * working,
        ring=passes * placement.boundary,
        records_host=sum(size * record for size, home, _ in layers if home == "host"),
        near=sum(size * working for size, at in on_disk if at != "disk"),
        gradients=sum(
            sums_size(plan, sizes) * 4 if several else size * working
            for plan, size, home in zip(plans, sizes, placement.state, strict=True)
            if training and (home == "host" or (home == "disk" and several))
        ),
        sending=max((disk_bytes(size * with_gradients) for size, _ in on_disk), default=0),
        staging=max((on_disk_bytes(size, record, with_gradients) for size, _ in staged), default=0),
        fetching=max((disk_bytes(size * working) for size in fetched), default=0),
        boundaries=passes // 2 * max(0, len(plans) - 2) * placement.boundary,
        saving=max((disk_bytes(size * record) for size, _ in on_disk), default=0) if background else 0,
        aside=placement.aside * typical_record(sizes, record) if background else 0,
        disk=sum(on_disk_bytes(size, record, with_gradients) for size, _ in on_disk),
        exchange=max(sum(wholes[i] for i in plan.owners) for plan in plans) * working if training and ranks > 1 else 0,
    )


def whole_sizes(plans: Sequence[LayerPlan], ranks: int) -> list[int]:
    """Elements of each layer's buffer on a device: all ranks' shards, side by side."""
    return [ranks * shard_size(plan.owned.size, ranks) for plan in plans]


def sums_size(plan: LayerPlan, sizes: Sequence[int]) -> int:
    """Elements of a rank's sums of the gradients of one layer; sizes: of its shards of all."""
    return sum(sizes[i] for i in plan.owners)


def typical_record(sizes: Sequence[int], record: int) -> int:
    """Bytes of the record of the layer of median size; of two medians, the larger's."""
    return statistics.median_high(sizes) * record


def disk_bytes(nbytes: int) -> int:
    """Rounded up to the disk's blocks."""
    return -(-nbytes // BLOCK) * BLOCK


def on_disk_bytes(size: int, record: int, gradients: int) -> int:
    """A record of `size` elements, and behind it the step's gradients where they wait there too."""
    return disk_bytes(size * record) + disk_bytes(size * gradients)


def streamed(plan: LayerPlan, placement: Placement) -> list[int]:
    """The owners of what a layer reads whose weights are not kept on the device: a slot holds all that is theirs."""
    return [i for i in plan.owners if placement.weights[i] != "device"]
