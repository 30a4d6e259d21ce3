"""The executor's real schedule on a clock of throttled links, against the planner's forecast of it.

The model is small and its arithmetic is done; time is counted from its bytes and FLOPs, so rates are chosen small too.
"""

from dataclasses import replace

import pytest
import torch

from cgpt.model.config import GPTConfig
from cgpt.model.init import init_parameter
from cgpt.stream.account import boundary_bytes
from cgpt.stream.build import build
from cgpt.stream.devices_simulated import SimulatedDevice
from cgpt.stream.executor import Executor
from cgpt.stream.forecast import exposed_optimizer, forecast
from cgpt.stream.format import Format
from cgpt.stream.gpt_plans import gpt_plans
from cgpt.stream.needs import needs
from cgpt.stream.optimizer import AdamW
from cgpt.stream.placement import Placement
from cgpt.stream.rates import Rates, Work

SHAPE = GPTConfig(n_layer=12, n_head=2, d_model=32, d_head=16, d_ff=128, vocab_size=64, seq_len=128)
PLANS, COUNT, TIME = gpt_plans(SHAPE), SHAPE.n_layer + 2, 128
EVEN = Rates(flops=1e9, down=1e6, up=1e6, memory=2e7, read=1e12, write=1e12)
PADDED = sum(plan.owned.size for plan in PLANS) / sum(plan.owned.parameters for plan in PLANS)


def for_padded(rates):
    """As fast for what moves chunks as `rates` for what chunks hold: layers so small are half padding."""
    return replace(rates, **{lane: PADDED * getattr(rates, lane) for lane in ("down", "memory", "read", "write")})


def everywhere(weights="host", state="host", rows=1, **more):
    boundary = boundary_bytes(Format(), TIME, SHAPE.d_model)
    return Placement(
        (weights,) * COUNT,
        (state,) * COUNT,
        (weights != "device",) * COUNT,
        micro_batches=rows,
        boundary=boundary,
        **more,
    )


HALF = replace(everywhere(rows=8), weights=("device",) * 7 + ("host",) * 7, state=("device",) * 4 + ("host",) * 10)
# (placement, rates, whether the arithmetic is what binds)
CONFIGURATIONS = {
    "compute": (everywhere(rows=16), replace(EVEN, down=4e6, up=4e6), True),
    "compute, activations away": (everywhere(rows=16, activations="host"), replace(EVEN, down=4e6, up=4e6), True),
    "down": (everywhere(rows=1), replace(EVEN, up=1e8), False),
    "up": (everywhere(rows=1), replace(EVEN, down=1e8), False),
    "optimizer": (everywhere(rows=2), replace(EVEN, down=1e8, up=1e8, memory=1e6), False),
    "latency": (everywhere(rows=1), replace(EVEN, down=1e9, up=1e9, latency=3e-3), False),
    "half duplex": (everywhere(rows=2), replace(EVEN, half_duplex=True), False),
    "several visits": (everywhere(rows=4, visits=3), EVEN, False),
    "half resident": (HALF, replace(EVEN, down=2e6, up=2e6), True),
    "state on the disk": (everywhere("host", "disk", rows=4), replace(EVEN, read=2e6, write=2e6), False),
    "all on the disk": (everywhere("disk", "disk", rows=4), replace(EVEN, read=4e6, write=4e6), False),
    "activations up a slow link": (everywhere(rows=3, activations="host"), replace(EVEN, up=2e5, down=1e7), False),
}


def simulated(placement, rates, clip=0.1, disk=None, steps=4):
    """Seconds of the last of `steps` steps, and the lanes' spans in it."""
    lanes = SimulatedDevice(rates, needs(PLANS, placement, Format()).device)
    _, store = build(SHAPE, Format(), lanes, placement=placement, disk=disk)
    store.initialise(lambda name, tensor: init_parameter(name, tensor, SHAPE, 0))
    executor, optimizer = Executor(store), AdamW(store, clip=clip)
    generator = torch.Generator().manual_seed(0)
    ends = [0.0]
    for _ in range(steps):
        batches = [
            tuple(torch.randint(SHAPE.vocab_size, (2, 1, TIME), generator=generator))
            for _ in range(placement.micro_batches * placement.visits)
        ]
        rows = placement.micro_batches
        found = executor.gradients([batches[i : i + rows] for i in range(0, len(batches), rows)])
        assert found.norm > clip or not clip
        assert optimizer.step(found, 1e-3)
        ends.append(lanes.now)
    return ends[-1] - ends[-2]


def forecasted(placement, rates):
    tokens = placement.micro_batches * placement.visits * TIME
    return forecast(PLANS, placement, rates, Work(Format(), tokens, SHAPE.d_model))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_step_takes_what_the_planner_says(name, tmp_path):
    placement, rates, computing = CONFIGURATIONS[name]
    rates = for_padded(rates)
    wanted = forecasted(placement, rates)
    got = simulated(placement, rates, disk=str(tmp_path))
    assert got == pytest.approx(wanted.seconds, rel=0.05)
    assert (wanted.binding == "compute") == computing
    assert got >= 0.999 * wanted.bound
    if computing:
        tokens = placement.micro_batches * placement.visits * TIME
        resident = replace(
            Placement.resident(COUNT), recompute=placement.recompute, micro_batches=placement.micro_batches
        )
        assert got <= 1.03 * simulated(resident, rates), tokens


@pytest.mark.parametrize("clip", [0.1, 0.0])
def test_the_optimizer_is_hidden_where_the_formula_says_so_and_clipping_costs_nothing(clip):
    # The first layers' updates can hide behind nothing, so their state is at home on the device, as the planner has it.
    placement = replace(everywhere(rows=12), weights=("device",) * 2 + ("host",) * (COUNT - 2))
    placement = replace(placement, state=placement.weights)
    rates = replace(EVEN, down=1e9, up=1e9)
    tokens = placement.micro_batches * TIME
    hidden = replace(rates, memory=2 * 26 * rates.flops / (2 * tokens))  # twice what hides behind the next forward
    work = Work(Format(), tokens, SHAPE.d_model)
    assert exposed_optimizer(PLANS, placement, hidden, work) <= 0.005 * forecasted(placement, hidden).seconds
    free = simulated(placement, replace(rates, memory=1e15), clip)
    assert simulated(placement, hidden, clip) <= 1.005 * free
    assert simulated(placement, replace(hidden, memory=hidden.memory / 8), clip) >= 1.2 * free  # and shows where not
