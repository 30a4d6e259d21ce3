"""Bytes of a whole run by tier and part: the arenas exactly (needs.py), and an estimate of torch's memory beside them.

workspace    flow        activations between layers on their way, and their gradients
             inputs      what waits on the device for recomputation
             kept        activations of layers that are not recomputed
             working     one layer's arithmetic for one micro-batch
             gradients   of the layers in flight, of the device's own layers, and of parameters that several read

cache        keys and values of what has been read, where text is generated

A run that only reads its weights has a flow and a layer's working memory: one forward, which keeps nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cgpt.stream.format import Format
from cgpt.stream.layout import LayerPlan, shard_size
from cgpt.stream.needs import BLOCK, EXCHANGES, SLOTS, STAGING, Needs, needs, sums_size, whole_sizes
from cgpt.stream.placement import Placement

KEPT = 13  # values a token and width that a block keeps for backward: inputs, norms, q k v, attention, MLP
BACKWARD = 9  # and that it takes beside them while it goes backward: gradients of the MLP's inside, of q k v, of x
HEAD_BYTES = 128 << 20  # logits in flight
IN_FLIGHT = 2  # layers whose gradients are on the device at once: one computes, one goes up
ALIGN = 128  # bytes; of everything in an arena


@dataclass(frozen=True)
class Account:
    """What a placement takes. needs: exact; workspace: by part, estimated; beside: the tier that workspace is of, the
    host where the device is but a stretch of its memory. training: whether records hold more than weights."""

    needs: Needs
    workspace: dict[str, int]
    beside: str = "device"
    training: bool = True

    @property
    def device(self) -> int:
        return self.needs.device + sum(self._workspace("device").values())

    @property
    def host(self) -> int:
        return self.needs.host + sum(self._workspace("host").values())

    @property
    def disk(self) -> int:
        return self.needs.disk and BLOCK + self.needs.disk

    @property
    def device_parts(self) -> dict[str, int]:
        need = self.needs
        parts = {"state": need.records_device, "weights": need.kept, "slots": SLOTS * need.slot, "ring": need.ring}
        parts["exchange"] = 2 * EXCHANGES * need.exchange
        return _present(self._named(parts) | self._workspace("device"))

    @property
    def host_parts(self) -> dict[str, int]:
        need = self.needs
        parts = {
            "state": need.records_host,
            "weights": need.near,
            "gradients": need.gradients,
            "staging": STAGING * need.staging + SLOTS * (need.fetching + need.sending),
            "activations": need.boundaries,
            "checkpoint": need.saving + need.aside,
        }
        workspace = self._workspace("host")
        return _present(self._named(parts) | {f"{name} (torch)": size for name, size in workspace.items()})

    def _named(self, parts: dict[str, int]) -> dict[str, int]:
        """The same parts, records called weights where they are nothing else."""
        if self.training:
            return parts
        weights = parts["state"] + parts["weights"]
        return {"weights": weights} | {name: size for name, size in parts.items() if name not in ("state", "weights")}

    def _workspace(self, tier: str) -> dict[str, int]:
        return self.workspace if tier == self.beside else {}


def account(
    plans: Sequence[LayerPlan],
    placement: Placement,
    format: Format,
    micro_batch_tokens: int,
    width: int,
    beside: str = "device",
    cache: int = 0,
) -> Account:
    """Of a run whose micro-batches have so many tokens, with activations `width` wide between layers. cache: bytes of
    keys and values beside them."""
    between = boundary_bytes(format, micro_batch_tokens, width)
    if format.training:
        workspace = _workspace(plans, placement, format.working, between)
    else:
        workspace = _workspace_of_reading(placement, between) | _present({"cache": cache})
    return Account(needs(plans, placement, format), workspace, beside, format.training)


def boundary_bytes(format: Format, micro_batch_tokens: int, width: int) -> int:
    """One micro-batch's activations between two layers, in an arena."""
    return -(-micro_batch_tokens * width * format.working // ALIGN) * ALIGN


def _workspace(plans: Sequence[LayerPlan], placement: Placement, working: int, between: int) -> dict[str, int]:
    rows, blocks, ranks = placement.micro_batches, range(1, len(plans) - 1), placement.ranks
    recomputed = sum(placement.recompute[i] for i in blocks)
    several = rows * placement.visits * ranks > 1
    summed = 4 if several else working
    sizes = [shard_size(plan.owned.size, ranks) for plan in plans]
    sums = [sums_size(plan, sizes) for plan in plans]
    in_flight = IN_FLIGHT * max(sums) * summed
    if several:
        wholes = whole_sizes(plans, ranks)
        in_flight += max(sums_size(plan, wholes) for plan in plans) * working
    held = 4 if placement.visits > 1 else working
    on_device = [home == "device" for home in placement.state]
    own = sum(size for size, here in zip(sums, on_device, strict=True) if here)
    shared = sum(sums[i] - sizes[i] for i in range(len(plans)) if not on_device[i])
    return {
        "flow": 2 * rows * between,
        "inputs": rows * between * recomputed if placement.activations == "device" else 0,
        "kept": KEPT * rows * between * (len(blocks) - recomputed),
        "working": max((KEPT + BACKWARD) * between, HEAD_BYTES + 4 * between),
        "gradients": in_flight + held * own + shared * summed,
    }


def _workspace_of_reading(placement: Placement, between: int) -> dict[str, int]:
    """Of a forward alone. KEPT counts all that a block makes, most of which is gone before its last is made."""
    return {
        "flow": (placement.micro_batches + 1) * between,
        "working": max(KEPT * between, HEAD_BYTES + 2 * between),
    }


def _present(parts: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in parts.items() if size}
