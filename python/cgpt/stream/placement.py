"""Where each layer's weights and optimizer state live; so far, all on the device."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """One word a layer for each kind of memory: "device" keeps it beside the arithmetic."""

    weights: tuple[str, ...]
    state: tuple[str, ...]

    @classmethod
    def resident(cls, n_layers: int) -> Placement:
        """Everything on the device: gather and release have nothing to do."""
        return cls(weights=("device",) * n_layers, state=("device",) * n_layers)
