"""How many ranks share a job changes no bit of it, wherever layers live; each has its share of the state."""

import random
import threading
import time
from dataclasses import replace
from math import prod

import pytest
import torch
from ranks import on_ranks
from toy import DEPTH, Plain, batches, layers

from cgpt.errors import InputError
from cgpt.model.presets import PRESETS
from cgpt.stream.devices import CpuDevice
from cgpt.stream.executor import Executor
from cgpt.stream.format import Format
from cgpt.stream.gpt_plans import gpt_plans
from cgpt.stream.layout import CHUNK, shard
from cgpt.stream.needs import needs, whole_sizes
from cgpt.stream.optimizer import AdamW
from cgpt.stream.placement import Placement
from cgpt.stream.record import parts_of
from cgpt.stream.store import Store, plans_of
from cgpt.world import World

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


@pytest.fixture(scope="module")
def want():
    """What one rank does."""
    found = on_ranks(1, lambda world: train(world, PLACEMENTS["resident"]))
    assert all(norm > 0.05 for _, norm, _ in found[0][0])  # clipped
    return found


@pytest.mark.parametrize("name", PLACEMENTS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks_gives_the_bits_of_one_over_twenty_steps(ranks, name, want, tmp_path):
    disk = str(tmp_path / "state")
    assert_same(on_ranks(ranks, lambda world: train(world, PLACEMENTS[name], disk=disk)), want)


@pytest.mark.parametrize("name", PLACEMENTS)
@pytest.mark.parametrize("rows", [1, 3])
def test_visits_and_activations_on_the_host(rows, name, want, tmp_path):
    place = replace(PLACEMENTS[name], activations="host")
    found = on_ranks(3, lambda world: train(world, place, rows=rows, steps=4, disk=str(tmp_path / "state")))
    assert_same(found, on_ranks(1, lambda world: train(world, PLACEMENTS["resident"], steps=4)))


FORMATS = [Format("fp16"), Format("fp32"), Format("bf16", "bf16"), Format("fp16", "bf16")]


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: f"{format.precision}, moments {format.moments}")
@pytest.mark.parametrize("name", ["resident", "mixed"])
def test_other_formats(name, format, tmp_path):
    want = on_ranks(1, lambda world: train(world, PLACEMENTS["resident"], format, steps=5))
    found = on_ranks(3, lambda world: train(world, PLACEMENTS[name], format, steps=5, disk=str(tmp_path / "state")))
    assert_same(found, want)


def test_ranks_without_a_micro_batch_take_part():
    for sizes in ((2, 1), (3,)):
        want = on_ranks(1, lambda world, sizes=sizes: train(world, PLACEMENTS["resident"], sizes=sizes, steps=5))
        for name in ("resident", "host"):
            place = PLACEMENTS[name]
            assert_same(on_ranks(4, lambda world, s=sizes, p=place: train(world, p, sizes=s, steps=5)), want, name)


@pytest.mark.parametrize("name", ["resident", "mixed"])
@pytest.mark.parametrize("seed", [1, 2])
def test_pauses_of_some_ranks_change_no_bit(seed, name, tmp_path):
    """Lanes wait at random, ranks before every collective, and what is released is filled with NaN."""
    want = on_ranks(1, lambda world: train(world, PLACEMENTS["resident"], steps=4))
    draws = random.Random(seed)

    def pause() -> None:
        time.sleep(draws.choice((0, 0, 0.001, 0.004)))

    def work(world):
        return train(world, PLACEMENTS[name], steps=4, disk=str(tmp_path / "state"), hunt=seed + 10 * world.rank)

    assert_same(on_ranks(3, work, pause), want)


def test_bytes_on_the_wire_are_what_the_formula_says():
    """Per visit two gathers of every layer's weights, but one of the head's; a gradient for every micro-batch; the
    losses and squares at the end."""
    ranks, sizes, rows, steps = 3, (2, 1, 3, 2, 1, 1, 1), 2, 3
    plans = plans_of(layers(Plain(width=WIDTH)))
    head, whole = COUNT - 1, whole_sizes(plans, ranks)
    gathered = [sum(whole[owner] for owner in plan.owners) for plan in plans]
    visits = 2  # of the three rounds, two at once
    weights = visits * (2 * sum(gathered) - gathered[head]) * 2 * (ranks - 1) // ranks
    chunks = [sum(-(-part.size // CHUNK) for plan in plans for part in parts_of(plan.owned, r, ranks).values())
              for r in range(ranks)]  # fmt: skip
    numbers = (3 + max(chunks)) * 8 * (ranks - 1)
    for name, moved in (("host", weights), ("resident", sum(whole) * 2 * (ranks - 1) // ranks)):
        found = on_ranks(ranks, lambda world, name=name: train(world, PLACEMENTS[name], None, sizes, rows, steps))
        for rank, (_, _, sent) in enumerate(found):
            mine = sum(share for index in range(COUNT) for share in others_share(plans, index, rank, ranks))
            assert sent == steps * (moved + len(sizes[rank::ranks]) * mine * 2 + numbers)


def others_share(plans, index, rank, ranks):
    """Elements of a micro-batch's gradients of one layer that go to each of the others."""
    for other in set(range(ranks)) - {rank}:
        for owner in plans[index].owners:
            layout = plans[owner].owned
            ends = [layout.starts[layout.names.index(n)] + prod(s) for n, s in zip(*names_of(plans[index]), strict=True)
                    if n in layout.names]  # fmt: skip
            starts = [layout.starts[layout.names.index(n)] for n in plans[index].reads.names if n in layout.names]
            begin, end = shard(layout.size, other, ranks)
            yield max(0, min(end, max(ends)) - max(begin, min(starts)))


def names_of(plan):
    return plan.reads.names, plan.reads.shapes


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 64])
def test_a_rank_holds_its_share_of_twelve_bytes_a_parameter(ranks):
    for model in ("111M", "13B"):
        shape = PRESETS[model].config
        plans = gpt_plans(shape)
        there = ("host",) * len(plans)
        found = needs(plans, Placement(there, there, (True,) * len(plans), ranks=ranks), Format())
        assert found.records_host == pytest.approx(12 / ranks * shape.n_params, rel=0.01)
        found = needs(plans, Placement.resident(len(plans), ranks), Format())
        assert found.records_device == pytest.approx(12 / ranks * shape.n_params, rel=0.01)


def test_shards_cover_every_element_once():
    for plan in plans_of(layers(Plain(width=WIDTH))):
        for ranks in (1, 2, 3, 5, 16):
            seen = {name: [] for name in plan.owned.names}
            for rank in range(ranks):
                for name, part in parts_of(plan.owned, rank, ranks).items():
                    seen[name] += range(part.first, part.first + part.size)
            wanted = dict(zip(plan.owned.names, map(prod, plan.owned.shapes), strict=True))
            assert {name: len(places) for name, places in seen.items()} == wanted
            assert all(places == list(range(len(places))) for places in seen.values())


def test_losses_of_batches_that_only_some_ranks_have():
    def work(world):
        with BUILDING:
            torch.manual_seed(0)
            model = Plain(width=WIDTH)
        values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        store = Store(layers(model), placement=replace(PLACEMENTS["host"], ranks=world.count), world=world)
        store.initialise(lambda name, tensor: tensor.copy_(values[name]))
        mine = batches((2, 1, 3), seed=3)[world.rank :: world.count]
        found = Executor(store).losses(mine + [None] * (-(-3 // world.count) - len(mine)))
        store.close()
        return found

    want = on_ranks(1, work)[0]
    assert on_ranks(2, work) == [[want[0], want[2]], [want[1], None]]
    assert on_ranks(4, work) == [[loss] for loss in (*want, None)]


def test_an_error_of_one_rank_ends_all():
    def work(world):
        if world.rank == 1:
            raise ArithmeticError("on rank 1")
        return train(world, PLACEMENTS["host"], steps=1)

    with pytest.raises(ArithmeticError, match="on rank 1"):
        on_ranks(3, work)


def test_a_parameter_without_a_gradient_is_refused():
    def work(world):
        with BUILDING:
            model = Plain(width=WIDTH)
        chosen = layers(model)
        chosen[1].parameters["h.0.unused"] = torch.nn.Parameter(torch.ones(3))
        store = Store(chosen, world=world)
        Executor(store).gradients([batches((1,))], micro_batches=2, samples=2)

    with pytest.raises(RuntimeError, match=r"h\.0\.unused: wanted a gradient of every micro-batch on several ranks"):
        on_ranks(2, work)


def test_a_placement_of_other_ranks_is_refused():
    with pytest.raises(InputError, match="placement: wanted one of 1 ranks, got one of 2"):
        Store(layers(Plain()), placement=Placement.resident(COUNT, 2), world=World())
