"""Where a run's layers live on this machine: from flags and what the machine leaves, before anything is allocated.

    resident    everything on the device, as long as it fits
    auto        the most resident placement within --device-memory, --host-memory and the disk's free space; visits as
                large as fit, for they divide what crosses the link

A run that has been trained is read, by `cgpt eval` and `cgpt generate`, under the second rule.
On a CPU the device is a stretch of the host's memory, and --host-memory is all that the process may take.

Of several ranks each has its own device; those of a machine share its host and its disk alike, and a GPU that they have
to share. All are placed by the least that any of them has, for they walk the same layers at the same time.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cgpt.agreement import together
from cgpt.errors import InputError
from cgpt.recipe import Recipe
from cgpt.schedule import most_micro_batches
from cgpt.stream.account import Account, account, boundary_bytes
from cgpt.stream.format import Format
from cgpt.stream.gpt_plans import gpt_plans
from cgpt.stream.layout import LayerPlan
from cgpt.stream.limits import Budgets, bytes_text, limits
from cgpt.stream.needs import EXCHANGES, SLOTS, needs, streamed, whole_sizes
from cgpt.stream.placement import TIERS, Placement
from cgpt.stream.planner import DoesNotFit, Setting, place
from cgpt.stream.store import Store
from cgpt.world import World

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


def place_run(recipe: Recipe, world: World | None = None) -> Placed:
    """The placement that the recipe asks for, of each rank; all of them call it. Raises InputError, with both numbers,
    where it cannot be had."""
    world, plans = world or World(), gpt_plans(recipe.shape)
    largest = recipe.largest_batch
    count = most_micro_batches(largest, recipe.micro_batch_size, world.count)
    everything = replace(Placement.resident(len(plans), world.count), visits=count)
    beside = "host" if recipe.device == "cpu" else "device"
    whole = None
    if recipe.placement == "auto":
        whole = _account(plans, replace(everything, visits=1), recipe, "host")
    budgets = _budgets(recipe, whole, _least_arena(plans, recipe, world.count), "training state", world)
    if recipe.placement == "resident":
        resident = replace(everything, aside=ASIDE)
        found = _account(plans, resident, recipe, beside)
        _refuse_what_cannot_fit(recipe, found, world)
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
            ranks=world.count,
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
    raise InputError(f"--placement: {refused}{_each(world)}") from refused


def _each(world: World) -> str:
    """Whose numbers a refusal tells."""
    return f", for each of a machine's {world.local_count} ranks" if world.local_count > 1 else ""


def _refuse_what_cannot_fit(recipe: Recipe, whole: Account, world: World) -> None:
    """Raises InputError, with both numbers, for a resident run whose state and gradients exceed the memory there is."""
    wanted = whole.needs.device + whole.workspace["gradients"]
    left = min(world.tell(_free_host(world) if recipe.device == "cpu" else _free_device(world)))
    if wanted > left:
        raise InputError(
            f"--model: {recipe.model} wants {bytes_text(wanted, up=True)} for state and gradients, got "
            f"{bytes_text(left)} of free memory{_each(world)}; --placement auto or --disk DIR streams what has no room"
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
    budgets = _budgets(room, whole, SLOTS * _largest(plans, format), "layers")
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
    tokens = min(recipe.micro_batch_size, recipe.largest_batch) * recipe.seq_len
    return account(plans, placement, recipe.format, tokens, recipe.shape.d_model, beside)


def _budgets(asked: Recipe | Room, whole: Account | None, least: int, kept: str, world: World | None = None) -> Budgets:
    """Of each rank. whole: what everything resident takes, None where that is not sought. least: bytes of a CPU's
    stand-in for a device if that does not fit. kept: what a disk would be for."""
    world = world or World()
    mine = together(world, lambda: _room(asked, kept, world))
    host, disk, free = map(min, zip(*world.tell(mine), strict=True))
    if asked.device == "cpu":
        device = asked.device_memory or least
        if whole is not None and asked.device_memory is None:
            device = whole.needs.device if whole.needs.device + whole.host <= host else device
        return Budgets(device, host - device, disk, asked.disk and Path(asked.disk))
    spare = int(free * (1 - DEVICE_RESERVE))
    most = asked.device_memory and asked.device_memory // _sharing(world)
    return Budgets(min(free, most or spare), host, disk, asked.disk and Path(asked.disk))


def _room(asked: Recipe | Room, kept: str, world: World) -> tuple[int, int, int]:
    """Bytes of the host and the disk that this rank may take, and that are free on its GPU."""
    left = host = _free_host(world)
    if asked.host_memory is not None:
        host = asked.host_memory // world.local_count - own_memory()
    if host > left:
        free, got = (bytes_text(size * world.local_count) for size in (left, host))
        raise InputError(f"--host-memory: wanted at most the {free} that are free, got {got}")
    disk = 0
    if asked.disk is not None:
        folder = Path(asked.disk)
        if not folder.is_dir():
            raise InputError(f"--disk: wanted a folder for {kept}, got {asked.disk}")
        disk = shutil.disk_usage(folder).free // world.local_count
    return host, disk, 0 if asked.device == "cpu" else _free_device(world)


def _free_host(world: World) -> int:
    """Bytes of the host that a rank of this machine may still take."""
    left = limits().host
    return UNBOUNDED if left is None else left // world.local_count


def _free_device(world: World) -> int:
    """The same of its GPU."""
    return torch.cuda.mem_get_info()[0] // _sharing(world)


def _sharing(world: World) -> int:
    """Ranks of this machine on one GPU."""
    return -(-world.local_count // max(1, torch.cuda.device_count()))


def _least_arena(plans: list[LayerPlan], recipe: Recipe, ranks: int) -> int:
    """Bytes of a stand-in for a device that streaming needs."""
    tokens = recipe.micro_batch_size * recipe.seq_len
    ring = 2 * max(1, 8192 // tokens) * boundary_bytes(recipe.format, tokens, recipe.shape.d_model)
    buffers = SLOTS + (2 * EXCHANGES if ranks > 1 else 0)
    return buffers * _largest(plans, recipe.format, ranks) + ring


def _largest(plans: list[LayerPlan], format: Format, ranks: int = 1) -> int:
    """Bytes of the weights that a layer has on the device for its turn, of the layer that has most."""
    wholes = whole_sizes(plans, ranks)
    return max(sum(wholes[i] for i in plan.owners) for plan in plans) * format.working


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
