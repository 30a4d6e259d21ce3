"""Where each layer's weights, optimizer state and boundary activations live."""

from __future__ import annotations

from dataclasses import dataclass

TIERS = ("device", "host", "disk")


@dataclass(frozen=True)
class Placement:
    """One word a layer for each kind of memory.

    state: where low halves, moments and gradients live, and the working weights with them: their home. On "device"
        the optimizer runs there; on "host" and "disk" the CPU updates them.
    weights: where the working weights wait for the layer's turn: "device" keeps a copy beside the arithmetic
        for good, "host" brings it down for each turn, "disk" through a host buffer. Never further out than state.
    recompute: whether a layer's forward is run again in backward instead of keeping its activations. A layer whose
        weights are not on the device must.
    activations: where what flows between layers waits for backward, "device" or "host".
    micro_batches: how many a visit takes through a layer before the next layer's turn.
    visits: the most that a step has. With several, what is not on the device gets partial sums of gradients in fp32.
    boundary: bytes of the activations of one micro-batch between two layers, where they wait on the host; a multiple
        of 128.
    aside: how many typical layers' records the host can hold beside, for a checkpoint that is written while training
        goes on; AdamW waits for the checkpoint's disk where they do not suffice, with 0 always. None: training
        stands still while a checkpoint is written.
    ranks: processes that share the job. Homes hold a rank's shard (layout.py) of every layer; what is on the device
        beside, kept or for a turn, is whole. visits and micro_batches are a rank's own.
    """

    weights: tuple[str, ...]
    state: tuple[str, ...]
    recompute: tuple[bool, ...]
    activations: str = "device"
    micro_batches: int = 1
    visits: int = 1
    boundary: int = 0
    aside: int | None = None
    ranks: int = 1

    @property
    def streams(self) -> bool:
        """Whether any layer's home is not the device."""
        return any(home != "device" for home in self.state)

    @classmethod
    def resident(cls, n_layers: int, ranks: int = 1) -> Placement:
        """Everything on the device: gather and release have nothing to do, but between ranks."""
        device = ("device",) * n_layers
        return cls(weights=device, state=device, recompute=(False,) * n_layers, ranks=ranks)
