"""The forecast of several ranks against the executor itself: a thread and a simulated device each, one schedule.

Steps take what was forecast, and the bytes on the wire are the formula's, of the forecast and of both worlds' books.
"""

from dataclasses import replace

import pytest
import torch
from test_predicted import HOST, LINK, MIXED, PLANS, RATES, SHAPE, TOKENS, N, everywhere

from cgpt.model.gpt import GPT
from cgpt.stream.account import boundary_bytes
from cgpt.stream.build import layers_of
from cgpt.stream.devices_simulated import SimulatedDevice, together
from cgpt.stream.executor import Executor
from cgpt.stream.forecast import forecast
from cgpt.stream.format import Format
from cgpt.stream.layout import CHUNK, shard_size
from cgpt.stream.needs import needs
from cgpt.stream.optimizer import AdamW
from cgpt.stream.rates import Work
from cgpt.stream.store import Store
from cgpt.stream.timeline import Timeline

RESIDENT = everywhere("device", "device", False)
PLACEMENTS = {
    "resident": RESIDENT,
    "recomputed": replace(RESIDENT, recompute=(True,) * N),
    "kept": everywhere("device", "host", False),
    "host": HOST,
    "activations too": replace(HOST, activations="host"),
    "state on the disk": everywhere("host", "disk"),
    "disk": everywhere("disk", "disk"),
    "mixed": MIXED,
}
WIRES = {  # bytes/s, in the links' own; seconds a collective
    "fast": (10.0, 0.0),
    "even": (1.0, 0.0),
    "slow": (0.2, 0.0),
    "late": (10.0, 2e-4),
}


def problem(name, ranks, wire, rows, visits):
    placement = replace(
        PLACEMENTS[name],
        ranks=ranks,
        micro_batches=rows,
        visits=visits,
        boundary=boundary_bytes(Format(), TOKENS, SHAPE.d_model),
    )
    rate, latency = WIRES[wire]
    rates = replace(RATES, flops=TOKENS * rows * LINK, wire=rate * LINK, wire_latency=latency)
    return placement, rates, Work(Format(), TOKENS * rows * visits * ranks, SHAPE.d_model)


def walked(placement, rates, disk, micro_batches=None, steps=4):
    """Of each rank: seconds of the last step, bytes that came by the wire in it, and bytes sent in all of them."""
    rows, visits, ranks = placement.micro_batches, placement.visits, placement.ranks
    micro_batches = micro_batches or rows * visits * ranks
    ids = torch.randint(SHAPE.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))

    def work(world):
        with torch.device("meta"):
            layers = layers_of(GPT(SHAPE))
        timeline = Timeline(steps)
        wanted = needs(PLANS, placement, Format()).device
        device = SimulatedDevice(rates, wanted, world=world, timeline=timeline)
        store = Store(layers, Format(), device, placement=placement, disk=f"{disk}{world.rank}", world=world)
        store.initialise(lambda name, value: value.fill_(0.01 * (len(name) % 7)))
        executor, optimizer, ends = Executor(store), AdamW(store), []
        mine = len(range(world.rank, micro_batches, ranks))
        batches = [(ids, ids) if row < mine else None for row in range(-(-micro_batches // ranks))]
        cut = [batches[i : i + rows] for i in range(0, len(batches), rows)]
        for step in range(steps):
            found = executor.gradients(cut, micro_batches=micro_batches, samples=2 * micro_batches)
            timeline.mark(step, ends[-1] if ends else 0.0, device.caller)
            ends.append(device.caller)
            optimizer.step(found, 1e-3)
        store.close()
        received = sum(span.nbytes for span in timeline.spans() if span.lane == "wire") / steps
        return ends[-1] - ends[-2], received, world.sent

    return together(ranks, work)


def by_hand(placement, micro_batches):
    """Bytes that the first rank receives in a step: the module's formulas, with every shard in whole chunks."""
    others, rounds = placement.ranks - 1, -(-micro_batches // placement.ranks)
    shards = [shard_size(plan.owned.size, placement.ranks) for plan in PLANS]
    weights = 0
    for index, plan in enumerate(PLANS):
        turns = placement.visits * (1 if index == N - 1 else 2)
        weights += sum(turns * shards[i] for i in plan.owners if placement.weights[i] != "device")
    weights += sum(shard for shard, at in zip(shards, placement.weights, strict=True) if at == "device")
    gradients = 0
    for plan in PLANS:
        for owner in plan.owners:
            owned = PLANS[owner].owned
            end = max(
                start + torch.Size(shape).numel()
                for name, start, shape in zip(owned.names, owned.starts, owned.shapes, strict=True)
                if name in plan.reads.names
            )
            gradients += min(end, shards[owner])  # what is read of another layer lies in front
    numbers = rounds + sum(shards) / CHUNK
    return others * (2 * weights + 8 * numbers) + 2 * gradients * (micro_batches - rounds)


@pytest.mark.parametrize(
    ("name", "ranks", "wire", "rows", "visits"),
    [
        ("resident", 3, "even", 1, 2),
        ("resident", 4, "slow", 3, 1),
        ("resident", 2, "late", 2, 2),
        ("recomputed", 2, "even", 2, 1),
        ("kept", 3, "slow", 2, 1),
        ("host", 2, "fast", 1, 1),
        ("host", 3, "even", 4, 1),
        ("host", 4, "slow", 2, 2),
        ("host", 2, "late", 6, 1),
        ("host", 2, "even", 1, 5),
        ("activations too", 2, "even", 3, 1),
        ("state on the disk", 2, "even", 1, 1),
        ("disk", 3, "even", 1, 2),
        ("mixed", 4, "even", 1, 2),
    ],
)
def test_a_step_of_several_ranks_takes_what_was_forecast(name, ranks, wire, rows, visits, tmp_path):
    placement, rates, work = problem(name, ranks, wire, rows, visits)
    found = forecast(PLANS, placement, rates, work)
    got = walked(placement, rates, tmp_path / "state")
    assert [seconds for seconds, *_ in got] == pytest.approx([found.seconds] * ranks, rel=0.01)
    assert found.seconds >= found.bound
    assert got[0][1] == by_hand(placement, rows * visits * ranks) == pytest.approx(found.received, rel=1e-12)
    # what one receives another has sent, but for the numbers of the step, which all receive padded
    assert sum(sent for *_, sent in got) == pytest.approx(4 * sum(received for _, received, _ in got), rel=1e-9)


def test_where_micro_batches_do_not_divide_evenly_the_first_rank_is_forecast(tmp_path):
    """Seven among three ranks: the first has three, the others two and a turn without."""
    placement, rates, work = problem("host", 3, "even", 3, 1)
    found = forecast(PLANS, placement, rates, replace(work, tokens=7 * TOKENS, micro_batch_tokens=TOKENS))
    got = walked(placement, rates, tmp_path / "state", 7)
    assert [seconds for seconds, *_ in got] == pytest.approx([found.seconds] * 3, rel=0.03)
    assert got[0][1] == by_hand(placement, 7)
