"""Where a run's layers live on this machine: from its flags and what the machine leaves, before anything is allocated.

    resident    everything on the device, as long as it fits
    auto        the most resident placement within --device-memory, --host-memory and the disk's free space; visits as
                large as fit, for they divide what crosses the link

On a CPU the device is a stretch of the host's memory, and --host-memory is all that the process may take.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cgpt.errors import InputError
from cgpt.recipe import Recipe
from cgpt.stream.account import Account, account, boundary_bytes
from cgpt.stream.gpt_plans import gpt_plans
from cgpt.stream.layout import LayerPlan
from cgpt.stream.limits import Budgets, bytes_text, limits
from cgpt.stream.needs import SLOTS
from cgpt.stream.placement import Placement
from cgpt.stream.planner import DoesNotFit, Setting, place

ASIDE = 2  # typical layers that AdamW may run ahead of a checkpoint that is being written
UNBOUNDED = 1 << 62
DEVICE_RESERVE = 0.05  # of a GPU's free memory, unasked: for torch's allocator, which cannot use every byte


@dataclass(frozen=True)
class Placed:
    """placement, what it takes, and what there was to take."""

    placement: Placement
    account: Account
    budgets: Budgets

    @property
    def streams(self) -> bool:
        return any(home != "device" for home in self.placement.state)


def place_run(recipe: Recipe) -> Placed:
    """The placement that the recipe asks for. Raises InputError, with both numbers, where it cannot be had."""
    plans = gpt_plans(recipe.shape)
    largest = max(batch for _, batch in recipe.batch_schedule)
    count = -(-largest // recipe.micro_batch_size)
    beside = "host" if recipe.device == "cpu" else "device"
    budgets = _budgets(recipe, plans)
    if recipe.placement == "resident":
        resident = replace(Placement.resident(len(plans)), aside=ASIDE, visits=count)
        found = _account(plans, resident, recipe, beside)
        return Placed(resident, found, budgets)
    refused: DoesNotFit | None = None
    for rows in (1, *sorted({-(-count // visits) for visits in range(1, count + 1)}, reverse=True)):
        setting = Setting(
            recipe.format,
            min(recipe.micro_batch_size, largest) * recipe.seq_len,
            recipe.shape.d_model,
            rows,
            -(-count // rows),
            beside=beside,
        )
        try:
            found = place(plans, budgets, setting)
        except DoesNotFit as error:
            refused = refused or error
            continue
        if all(home == "device" for home in found.state) or rows > 1 or count == 1:
            placed = Placed(found, _account(plans, found, recipe, beside), budgets)
            aside = replace(found, aside=ASIDE)
            roomy = Placed(aside, _account(plans, aside, recipe, beside), budgets)
            return roomy if roomy.account.host <= budgets.host else placed
    raise InputError(f"--placement: {refused}") from refused


def _account(plans: list[LayerPlan], placement: Placement, recipe: Recipe, beside: str) -> Account:
    largest = max(batch for _, batch in recipe.batch_schedule)
    tokens = min(recipe.micro_batch_size, largest) * recipe.seq_len
    return account(plans, placement, recipe.format, tokens, recipe.shape.d_model, beside)


def _budgets(recipe: Recipe, plans: list[LayerPlan]) -> Budgets:
    left = limits().host
    host = left if recipe.host_memory is None else recipe.host_memory - own_memory()
    if host is None:
        host = UNBOUNDED
    if left is not None and host > left:
        raise InputError(f"--host-memory: wanted at most the {bytes_text(left)} that are free, got {bytes_text(host)}")
    disk = 0
    if recipe.disk is not None:
        folder = Path(recipe.disk)
        if not folder.is_dir():
            raise InputError(f"--disk: wanted a folder for training state, got {recipe.disk}")
        disk = shutil.disk_usage(folder).free
    if recipe.device == "cpu":
        device = recipe.device_memory or _least_arena(plans, recipe)
        if recipe.placement == "auto" and recipe.device_memory is None:
            whole = _account(plans, replace(Placement.resident(len(plans)), visits=1), recipe, "host")
            device = whole.needs.device if whole.needs.device + whole.host <= host else device
        return Budgets(device, host - device, disk, recipe.disk and Path(recipe.disk))
    free = torch.cuda.mem_get_info()[0]
    spare = int(free * (1 - DEVICE_RESERVE))
    return Budgets(min(free, recipe.device_memory or spare), host, disk, recipe.disk and Path(recipe.disk))


def _least_arena(plans: list[LayerPlan], recipe: Recipe) -> int:
    """Bytes of a stand-in for a device that streaming needs."""
    tokens = recipe.micro_batch_size * recipe.seq_len
    ring = 2 * max(1, 8192 // tokens) * boundary_bytes(recipe.format, tokens, recipe.shape.d_model)
    return SLOTS * recipe.format.working * max(plan.reads.size for plan in plans) + ring


def own_memory() -> int:
    """Bytes of this process that are in memory: interpreter and libraries, before a run allocates."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def describe(placed: Placed) -> str:
    """Which layers live where, in one line."""
    place, parts = placed.placement, []
    for tier in ("device", "host", "disk"):
        states, weights = place.state.count(tier), place.weights.count(tier)
        if states or weights:
            parts.append(f"{tier}: weights of {weights} layers, state of {states}")
    found, disk = placed.account, f", disk {bytes_text(placed.account.disk)}" if placed.account.disk else ""
    return (
        f"{'; '.join(parts)}; {place.micro_batches} micro-batches a visit, {place.visits} visits a step; activations on"
        f" the {place.activations}; device {bytes_text(found.device)}, host {bytes_text(found.host)}{disk}"
    )
