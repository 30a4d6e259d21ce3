"""Bytes of every arena that a placement needs, exactly: what the store allocates, and what the planner promises.

device   records at home there, working weights kept there, two slots for the rest, a ring of boundary activations
host     records at home there, weights before a disk, gradients, buffers of the disk, boundary activations, and for a
         checkpoint beside training room for records, and one that is read from the disk
disk     records, and gradients of a step of one visit, each from a multiple of its blocks

Of weights that are only read a record holds nothing else, so it comes and goes through the buffers that fetch weights.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from cgpt.stream.format import Format
from cgpt.stream.layout import LayerPlan, Layout
from cgpt.stream.placement import Placement

SLOTS = 2  # layers whose weights are on the device at once: one computes, one comes
STAGING = 3  # records of the disk on the host at once: one is read, one updated, one written
AHEAD = STAGING  # layers of the disk whose updates are submitted before the walk comes to them
BLOCK = 4096  # of a disk: offsets, lengths and addresses of direct access are multiples of it


@dataclass(frozen=True)
class Needs:
    """Bytes of each arena and of its parts; slot, staging, fetching and saving are one buffer of each kind."""

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

    @property
    def device(self) -> int:
        return self.records_device + self.kept + SLOTS * self.slot + self.ring

    @property
    def host(self) -> int:
        held = self.records_host + self.near + self.gradients + self.boundaries
        buffers = STAGING * self.staging + SLOTS * (self.fetching + self.sending)
        return held + buffers + self.saving + self.aside


def needs(plans: Sequence[LayerPlan], placement: Placement, format: Format) -> Needs:
    """What `placement` takes for layers kept in `format`."""
    working, record, training = format.working, format.record, format.training
    layers = list(zip(plans, placement.state, placement.weights, strict=True))
    owner = {name: i for i, plan in enumerate(plans) for name in plan.owned.names}
    on_disk = [(plan, weights) for plan, home, weights in layers if home == "disk"]
    several = placement.visits > 1
    with_gradients = working if training and not several else 0  # beside the record on the disk
    background = placement.aside is not None and training
    staged = on_disk if training else []
    fetched = [plan for plan, at in on_disk if at == "disk" or not training]
    passes = 2 * placement.micro_batches if placement.activations == "host" and training else 0
    return Needs(
        records_device=sum(plan.owned.size * record for plan, home, _ in layers if home == "device"),
        kept=sum(plan.owned.size * working for plan, home, at in layers if home != "device" and at == "device"),
        slot=max(streamed(plan, placement, owner).size for plan in plans) * working,
        ring=passes * placement.boundary,
        records_host=sum(plan.owned.size * record for plan, home, _ in layers if home == "host"),
        near=sum(plan.owned.size * working for plan, at in on_disk if at != "disk"),
        gradients=sum(
            plan.reads.size * 4 if several else plan.owned.size * working
            for plan, home, _ in layers
            if training and (home == "host" or (home == "disk" and several))
        ),
        sending=max((disk_bytes(plan.owned.size * with_gradients) for plan, _ in on_disk), default=0),
        staging=max((on_disk_bytes(plan.owned.size, record, with_gradients) for plan, _ in staged), default=0),
        fetching=max((disk_bytes(plan.owned.size * working) for plan in fetched), default=0),
        boundaries=passes // 2 * max(0, len(plans) - 2) * placement.boundary,
        saving=max((disk_bytes(plan.owned.size * record) for plan, _ in on_disk), default=0) if background else 0,
        aside=placement.aside * typical_record(plans, record) if background else 0,
        disk=sum(on_disk_bytes(plan.owned.size, record, with_gradients) for plan, _ in on_disk),
    )


def typical_record(plans: Sequence[LayerPlan], record: int) -> int:
    """Bytes of the median layer's record; of two medians, the larger's."""
    return statistics.median_high(plan.owned.size for plan in plans) * record


def disk_bytes(nbytes: int) -> int:
    """Rounded up to the disk's blocks."""
    return -(-nbytes // BLOCK) * BLOCK


def on_disk_bytes(size: int, record: int, gradients: int) -> int:
    """A record of `size` elements, and behind it the step's gradients where they wait there too."""
    return disk_bytes(size * record) + disk_bytes(size * gradients)


def streamed(plan: LayerPlan, placement: Placement, owner: dict[str, int]) -> Layout:
    """What of a layer's reads is not kept on the device."""
    away = [placement.weights[owner[name]] != "device" for name in plan.reads.names]
    if all(away):
        return plan.reads
    reads = zip(plan.reads.names, plan.reads.shapes, away, strict=True)
    return Layout.of({name: shape for name, shape, gone in reads if gone})
