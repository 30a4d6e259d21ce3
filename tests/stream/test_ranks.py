"""How many ranks share a job changes no bit of it, wherever layers live; each has its share of the state."""

import threading
from dataclasses import replace

import pytest
import torch
from ranks import on_ranks
from toy import DEPTH, Plain, batches, layers

from cgpt.stream.devices import CpuDevice
from cgpt.stream.executor import Executor
from cgpt.stream.format import Format
from cgpt.stream.needs import needs
from cgpt.stream.optimizer import AdamW
from cgpt.stream.placement import Placement
from cgpt.stream.store import Store, plans_of

BUILDING = threading.Lock()  # torch has one generator for all threads
COUNT, WIDTH = DEPTH + 2, 48  # wide enough for shards that end within a parameter
BOUNDARY = 8192


def everywhere(weights, state, recompute=True):
    return Placement((weights,) * COUNT, (state,) * COUNT, (recompute,) * COUNT)


PLACEMENTS = {
    "resident": Placement.resident(COUNT),
    "state on the host": everywhere("device", "host", False),
    "host": everywhere("host", "host"),
    "state on the disk": everywhere("host", "disk"),
    "disk": everywhere("disk", "disk"),
    "mixed": Placement(
        ("host", "device", "host", "disk", "device"),
        ("host", "device", "disk", "disk", "host"),
        (True, False, True, True, False),
    ),
}


def train(world, placement, format=None, sizes=(2, 1, 3, 2, 1), rows=2, steps=20, clip=0.05, disk=None, **options):
    """Losses and norms of `steps` steps, and this rank's masters and moments: by name, its first element of it too."""
    rounds = -(-len(sizes) // world.count)
    placement = replace(placement, ranks=world.count, micro_batches=rows, visits=-(-rounds // rows))
    if placement.activations == "host":
        placement = replace(placement, boundary=BOUNDARY)
    with BUILDING:  # torch's generator is the process's
        torch.manual_seed(0)
        model = Plain(width=WIDTH)
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    chosen = layers(model)
    device = CpuDevice(needs(plans_of(chosen), placement, format or Format()).device, **options)
    store = Store(chosen, format, device, placement=placement, disk=disk and f"{disk}-{world.rank}", world=world)
    store.initialise(lambda name, tensor: tensor.copy_(values[name]))
    executor, optimizer = Executor(store), AdamW(store, clip=clip)
    told = []
    for i in range(steps):
        mine = batches(sizes, seed=i)[world.rank :: world.count]
        mine += [None] * (rounds - len(mine))
        visits = [mine[start : start + rows] for start in range(0, rounds, rows)]
        found = executor.gradients(visits, optimizer.loss_scale, micro_batches=len(sizes), samples=sum(sizes))
        told.append((found.loss, found.norm, optimizer.step(found, 1e-2)))
    store.settle()
    found = {}
    for index in range(COUNT):
        with store.record(index) as record:
            for name, part in record.parts.items():
                found[name, part.first] = record.master(name)
                found |= {(f"{k} {name}", part.first): record.view(k, name).clone() for k in ("exp_avg", "exp_avg_sq")}
    sent = world.sent
    store.close()
    return told, found, sent


def joined(found):
    """All ranks' parts as whole tensors, flat."""
    parts = {}
    for _, tensors, _ in found:
        for (name, first), tensor in tensors.items():
            parts.setdefault(name, {})[first] = tensor.flatten()
    return {name: torch.cat([pieces[first] for first in sorted(pieces)]) for name, pieces in parts.items()}


def assert_same(found, want, where=""):
    assert all(told == want[0][0] for told, _, _ in found), where
    tensors, wanted = joined(found), joined(want)
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(tensors[name], tensor), where + name


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_any_number_of_ranks_gives_the_bits_of_one_over_twenty_steps(ranks, tmp_path):
    disk = str(tmp_path / "state")
    want = on_ranks(1, lambda world: train(world, PLACEMENTS["resident"]))
    assert all(norm > 0.05 for _, norm, _ in want[0][0])  # clipped
    for name, placement in PLACEMENTS.items():
        for activations in ("device", "host"):
            place = replace(placement, activations=activations)
            found = on_ranks(ranks, lambda world, place=place: train(world, place, disk=disk))
            assert_same(found, want, f"{name}, activations on the {activations}: ")
