"""Where a run's layers live on this machine: from flags and what the machine leaves, before anything is allocated.

    resident    everything on the device, as long as it fits
    auto        the most resident placement within --device-memory, --host-memory and the disk's free space; visits as
                large as fit, for they divide what crosses the link

A run that has been trained is read, by `cgpt eval` and `cgpt generate`, under the second rule.
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
from cgpt.stream.needs import SLOTS, needs, streamed
from cgpt.stream.placement import TIERS, Placement
from cgpt.stream.planner import DoesNotFit, Setting, place
from cgpt.stream.store import Store

ASIDE = 2  # typical layers that AdamW may run ahead of a checkpoint that is being written
UNBOUNDED = 1 << 62
DEVICE_RESERVE = 0.05  # of a GPU's free memory, unasked: for torch's allocator, which cannot use every byte


@dataclass(frozen=True)
class Room:
    """What reading a run may take. device: "cpu" or "cuda". device_memory, host_memory: bytes, None for all that is
    free. disk: a folder for layers that memory has no room for, None for no disk."""

    device: str = "cpu"
    device_memory: int | None = None
    host_memory: int | None = None
    disk: str | None = None


@dataclass(frozen=True)
class Placed:
    """placement, what it takes, and what there was to take."""

    placement: Placement
    account: Account
    budgets: Budgets

    @property
    def streams(self) -> bool:
        return self.placement.streams


def place_run(recipe: Recipe) -> Placed:
    """The placement that the recipe asks for. Raises InputError, with both numbers, where it cannot be had."""
    plans = gpt_plans(recipe.shape)
    largest = max(batch for _, batch in recipe.batch_schedule)
    count = -(-largest // recipe.micro_batch_size)
    beside = "host" if recipe.device == "cpu" else "device"
    whole = None
    if recipe.placement == "auto":
        whole = _account(plans, replace(Placement.resident(len(plans)), visits=1), recipe, "host")
    budgets = _budgets(recipe, whole, _least_arena(plans, recipe), "training state")
    if recipe.placement == "resident":
        resident = replace(Placement.resident(len(plans)), aside=ASIDE, visits=count)
        found = _account(plans, resident, recipe, beside)
        _refuse_what_cannot_fit(recipe, found)
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


def _refuse_what_cannot_fit(recipe: Recipe, whole: Account) -> None:
    """Raises InputError, with both numbers, for a resident run whose state and gradients exceed the memory there is."""
    wanted = whole.needs.device + whole.workspace["gradients"]
    left = limits().host if recipe.device == "cpu" else torch.cuda.mem_get_info()[0]
    if left is not None and wanted > left:
        raise InputError(
            f"--model: {recipe.model} wants {bytes_text(wanted, up=True)} for state and gradients, got "
            f"{bytes_text(left)} of free memory; --placement auto or --disk DIR streams what has no room"
        )


def place_reading(recipe: Recipe, room: Room, sequences: int, batches: int = 1, cache: int = 0) -> Placed:
    """Where a trained run's weights live while they are read: all on the device if they fit, else the most resident
    placement in `room`, with as many of `batches` a walk, each of `sequences`, as memory then leaves room for.

    cache: bytes of keys and values beside them. Raises InputError, with both numbers, where there is no placement.
    """
    plans, format = gpt_plans(recipe.shape), replace(recipe.format, training=False)
    tokens, width = sequences * recipe.seq_len, recipe.shape.d_model
    setting = Setting(format, tokens, width, beside="host" if room.device == "cpu" else "device", cache=cache)

    def placed(placement: Placement) -> Placed:
        return Placed(placement, account(plans, placement, format, tokens, width, setting.beside, cache), budgets)

    whole = account(plans, Placement.resident(len(plans)), format, tokens, width, setting.beside, cache)
    if room.device == "cpu" and room.device_memory is not None:  # a stretch no longer than what could lie in it
        room = replace(room, device_memory=min(room.device_memory, whole.needs.device))
    budgets = _budgets(room, whole, SLOTS * format.working * max(plan.reads.size for plan in plans), "layers")
    try:
        found = placed(place(plans, budgets, setting))
    except DoesNotFit as error:
        raise _refusal(error, room, whole, budgets) from error
    for count in range(2, batches + 1 if found.streams else 0):
        more = placed(replace(found.placement, micro_batches=count))
        if more.account.device > budgets.device or more.account.host > budgets.host:
            break
        found = more
    return found


def _refusal(error: DoesNotFit, room: Room, whole: Account, budgets: Budgets) -> InputError:
    """What to tell who reads, in the numbers of the flags: --host-memory is all that a CPU's process takes."""
    if error.limit == "host":
        stretch = budgets.device if room.device == "cpu" else 0
        wanted, parts, given = error.wanted + stretch, {"device": stretch, **error.parts}, budgets.host + stretch
        alone = whole.needs.device + whole.host
        if stretch and room.device_memory is None and alone <= wanted:  # no disk, or none that saves anything
            wanted, parts = alone, whole.device_parts | whole.host_parts
        own = 0 if room.host_memory is None else room.host_memory - given
        parts = {name: size for name, size in {**parts, "the process": own}.items() if size}
        error = DoesNotFit("host", wanted + own, given + own, parts, error.disk)
    instead = f"; or --disk with {bytes_text(error.disk, up=True)} free" if error.disk else ""
    return InputError(f"{error}{instead}")


def _account(plans: list[LayerPlan], placement: Placement, recipe: Recipe, beside: str) -> Account:
    largest = max(batch for _, batch in recipe.batch_schedule)
    tokens = min(recipe.micro_batch_size, largest) * recipe.seq_len
    return account(plans, placement, recipe.format, tokens, recipe.shape.d_model, beside)


def _budgets(asked: Recipe | Room, whole: Account | None, least: int, kept: str) -> Budgets:
    """whole: what everything resident takes, None where that is not sought. least: bytes of a CPU's stand-in for a
    device if that does not fit. kept: what a disk would be for."""
    left = limits().host
    host = left if asked.host_memory is None else asked.host_memory - own_memory()
    if host is None:
        host = UNBOUNDED
    if left is not None and host > left:
        raise InputError(f"--host-memory: wanted at most the {bytes_text(left)} that are free, got {bytes_text(host)}")
    disk = 0
    if asked.disk is not None:
        folder = Path(asked.disk)
        if not folder.is_dir():
            raise InputError(f"--disk: wanted a folder for {kept}, got {asked.disk}")
        disk = shutil.disk_usage(folder).free
    if asked.device == "cpu":
        device = asked.device_memory or least
        if whole is not None and asked.device_memory is None:
            device = whole.needs.device if whole.needs.device + whole.host <= host else device
        return Budgets(device, host - device, disk, asked.disk and Path(asked.disk))
    free = torch.cuda.mem_get_info()[0]
    spare = int(free * (1 - DEVICE_RESERVE))
    return Budgets(min(free, asked.device_memory or spare), host, disk, asked.disk and Path(asked.disk))


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


def describe_reading(store: Store) -> str:
    """Where the layers of a store that is only read live, in one line; exact bytes."""
    place, need = store.placement, needs(store.plans, store.placement, store.format)
    homes = [f"{place.state.count(tier)} on the {tier}" for tier in TIERS if tier in place.state]
    elements = sum(store.plans[i].owned.size for plan in store.plans for i in streamed(plan, place))
    tiers = {"device": need.device, "host": need.host, "disk": need.disk}
    taken = ", ".join(f"{tier} {bytes_text(size)}" for tier, size in tiers.items() if size)
    return (
        f"{len(place.state)} layers: {', '.join(homes)}; they take {taken}; "
        f"each walk brings {bytes_text(elements * store.format.working)} to the device"
    )
