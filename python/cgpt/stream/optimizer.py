"""AdamW over the store, with the exact global-norm clip and the loss scale fused into its one pass over memory.

    grad_scale = min(1, clip / norm) / loss_scale        Pascanu et al. 2013 (arXiv 1211.5063)

One step integer serves bias correction everywhere and counts the updates made. A step whose gradient norm is not
finite is skipped whole: state stays as it was, bit for bit, and `skipped` counts it.

fp16 scales the loss dynamically (Micikevicius et al. 2018, arXiv 1710.03740, section 3.2; GradScaler's constants):
from 2^16, doubled after 2000 good steps in a row, halved by each step that overflows.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch

from cgpt.errors import Diverged
from cgpt.stream.gradients import Gradients
from cgpt.stream.record import Group, Record
from cgpt.stream.store import Store, Update
from cgpt_ext import adamw_

FIRST_LOSS_SCALE = 2.0**16
GOOD_STEPS = 2000
MOST_SKIPS = 50  # in a row; from 2^16 the loss scale is then far below any that helps


class Scales(Protocol):
    """What lr, weight decay and eps are multiplied by for each parameter, by its name; GPTConfig has them."""

    def lr_scale(self, name: str) -> float: ...
    def decay_scale(self, name: str) -> float: ...
    def eps_scale(self, name: str) -> float: ...


class AdamW:
    """Decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101) on the store's decayed groups.

    seed: of the rounding of bf16 moments, whose random bits are a function of it, of the update's number and of the
    parameter alone (csrc/adamw.h): wherever a layer lives, it gets the same. scales: of lr, weight decay and eps, where
    parameters differ in them (default: none do).
    """

    def __init__(
        self,
        store: Store,
        *,
        beta1: float = 0.9,
        beta2: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        clip: float = 1.0,
        seed: int = 0,
        scales: Scales | None = None,
    ):
        self.store = store
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.weight_decay = weight_decay
        self.clip = clip
        self.seed = seed
        self._scales = {name: _scales_of(scales, name) for name in store.names()}
        self._number = {name: i for i, name in enumerate(store.names())}
        self.updates = 0
        self.skipped = 0
        self.dynamic = store.format.precision == "fp16"
        self.loss_scale = FIRST_LOSS_SCALE if self.dynamic else 1.0
        self.good_steps = 0
        self.skipped_in_a_row = 0

    def step(self, gradients: Gradients, lr: float) -> bool:
        """Updates every parameter that has a gradient; False where the whole step was skipped.

        The clip is exact and known here, so nothing waits for it: records on the device are updated now, the others
        on the optimizer's lane, layer by layer just ahead of the next walk that gathers them.

        Raises Diverged after MOST_SKIPS skipped in a row: that run learns nothing.
        """
        if not math.isfinite(gradients.norm):
            self.skipped += 1
            self.skipped_in_a_row += 1
            self.good_steps = 0
            if self.dynamic:
                self.loss_scale /= 2
            if self.skipped_in_a_row == MOST_SKIPS:
                raise Diverged(f"gradients: wanted a finite norm, got {gradients.norm} in {MOST_SKIPS} steps in a row")
            return False
        self.skipped_in_a_row = 0
        norm = gradients.norm / self.loss_scale
        clip = self.clip / norm if self.clip and norm > self.clip else 1.0
        self.updates += 1
        scales = self._on_each_device(clip / self.loss_scale)
        for index, layer in enumerate(self.store.layers):  # in forward order: the next step's walk asks in that order
            work = self._update_of(gradients, index, scales, lr)
            if work is not None:
                ready = [gradients.ready[index]] if index in gradients.ready else []
                self.store.update(index, f"{layer.name} AdamW", work, ready)
        self.good_steps += 1
        if self.dynamic and self.good_steps == GOOD_STEPS:
            self.loss_scale *= 2
            self.good_steps = 0
        return True

    def _on_each_device(self, number: float) -> dict[bool, torch.Tensor]:
        """As fp32 where records are updated, by whether that is the device: made once a step, for that waits for it."""
        tiers = {home == "device" for home in self.store.placement.state}
        devices = {tier: self.store.device if tier else torch.device("cpu") for tier in tiers}
        return {tier: torch.tensor(number, dtype=torch.float32, device=device) for tier, device in devices.items()}

    def _update_of(
        self, gradients: Gradients, index: int, scales: dict[bool, torch.Tensor], lr: float
    ) -> Update | None:
        """What updates a record of layer `index` when called; None where nothing of it has a gradient."""
        found = {name: gradients.by_name[name] for name in self.store.owned[index] if name in gradients.by_name}
        if not found and self.store.world.count == 1:  # of several ranks each counts a new version, though it has none
            return None
        updates, scale = self.updates, scales[self.store.placement.state[index] == "device"]

        def work(record: Record, beside: torch.Tensor | None) -> None:
            mine = found
            if beside is not None:
                mine = {name: record.parts[name].of(beside) for name in found}
            for group in record.groups():
                for alike in self._alike(group, mine):
                    self._update(group, alike, mine, updates, lr, scale)

        return work

    def _alike(self, group: Group, found: dict[str, torch.Tensor]) -> list[list[int]]:
        """The places in `group` of parameters that have gradients, those of the same scales together."""
        places: dict[tuple[float, float, float], list[int]] = {}
        for i, name in enumerate(group.names):
            if name in found:
                places.setdefault(self._scales[name], []).append(i)
        return list(places.values())

    def _update(
        self, group: Group, there: list[int], found: dict[str, torch.Tensor], updates: int, lr: float, scale
    ) -> None:
        lr_scale, decay_scale, eps_scale = self._scales[group.names[there[0]]]
        rounded = self.store.format.moments == "bf16"
        adamw_(
            [group.working[i] for i in there],
            [found[group.names[i]] for i in there],
            [group.exp_avg[i] for i in there],
            [group.exp_avg_sq[i] for i in there],
            updates,
            lr=lr * lr_scale,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps * eps_scale,
            weight_decay=self.weight_decay * decay_scale if group.decayed else 0.0,
            masters=group.masters and [group.masters[i] for i in there],
            lows=group.lows and [group.lows[i] for i in there],
            grad_scale=scale,
            stochastic_rounding_seed=self.seed & (1 << 63) - 1 if rounded else None,  # an int64
            rounding_places=[(self._number[group.names[i]], group.firsts[i]) for i in there],
        )

    def state(self) -> dict:
        """What a checkpoint must keep beside the store: a handful of numbers."""
        return {
            "updates": self.updates,
            "skipped": self.skipped,
            "loss_scale": self.loss_scale,
            "good_steps": self.good_steps,
        }

    def load_state(self, state: dict) -> None:
        self.updates, self.skipped = int(state["updates"]), int(state["skipped"])
        self.loss_scale, self.good_steps = float(state["loss_scale"]), int(state["good_steps"])


def _scales_of(scales: Scales | None, name: str) -> tuple[float, float, float]:
    if scales is None:
        return 1.0, 1.0, 1.0
    return scales.lr_scale(name), scales.decay_scale(name), scales.eps_scale(name)
