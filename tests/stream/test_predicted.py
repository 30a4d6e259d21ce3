"""The forecast against the executor itself, walking on a simulated device: two programs, one schedule."""

from dataclasses import replace

import pytest
import torch

from cgpt.model.config import GPTConfig
from cgpt.model.gpt import GPT
from cgpt.stream.account import account, boundary_bytes
from cgpt.stream.build import layers_of
from cgpt.stream.devices_simulated import SimulatedDevice
from cgpt.stream.executor import Executor
from cgpt.stream.forecast import exposed_optimizer, forecast
from cgpt.stream.format import Format
from cgpt.stream.gpt_plans import gpt_plans
from cgpt.stream.optimizer import AdamW
from cgpt.stream.placement import Placement
from cgpt.stream.rates import Rates, Work
from cgpt.stream.store import Store

SHAPE = GPTConfig(n_layer=6, n_head=2, d_model=64, d_head=32, d_ff=256, vocab_size=256, seq_len=32)
PLANS, TOKENS = gpt_plans(SHAPE), 64  # of a micro-batch
N = len(PLANS)
LINK = 1e9
RATES = Rates(flops=0, down=LINK, up=LINK, memory=2e10, read=7e9, write=5e9)


def everywhere(weights, state, recompute=True, **more):
    return Placement((weights,) * N, (state,) * N, (recompute,) * N, **more)


MIXED = Placement(
    ("device",) * 3 + ("host",) * 2 + ("disk",) * (N - 5),
    ("device", "host", "disk", "host") + ("disk",) * (N - 4),
    (False,) * 3 + (True,) * (N - 3),
)
HOST = everywhere("host", "host")
PLACEMENTS = {
    "resident": everywhere("device", "device", False),
    "kept": everywhere("device", "host", False),
    "host": HOST,
    "activations too": replace(HOST, activations="host"),
    "state on the disk": everywhere("host", "disk"),
    "disk": everywhere("disk", "disk"),
    "mixed": MIXED,
}
PACE = {  # FLOP/s a token of a visit, as a share of what hides the weights in forward: F = T B
    "balanced": {"share": 1.2},
    "link-bound": {"share": 5.0},
    "compute-bound": {"share": 0.2},
    "memory-bound": {"share": 0.5, "memory": 3e9},
    "half duplex": {"share": 1.0, "half_duplex": True, "latency": 1e-6},
}


def problem(placement, pace, rows, visits):
    placement = replace(
        placement, micro_batches=rows, visits=visits, boundary=boundary_bytes(Format(), TOKENS, SHAPE.d_model)
    )
    more = dict(PACE[pace])
    rates = replace(RATES, flops=more.pop("share") * TOKENS * rows * LINK, **more)
    return placement, rates, Work(Format(), TOKENS * rows * visits, SHAPE.d_model)


def walked(placement, rates, disk):
    """Seconds of the fourth step by the simulated clock."""
    with torch.device("meta"):
        layers = layers_of(GPT(SHAPE))
    wanted = account(PLANS, placement, Format(), TOKENS, SHAPE.d_model)
    device = SimulatedDevice(rates, wanted.needs.device)
    store = Store(layers, Format(), device, placement=placement, disk=str(disk))
    store.initialise(lambda name, value: value.normal_(0, 0.02))
    executor, optimizer, ends = Executor(store), AdamW(store), []
    ids = torch.randint(SHAPE.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    for _ in range(4):
        found = executor.gradients([[(ids, ids)] * placement.micro_batches] * placement.visits)
        ends.append(device.now)
        optimizer.step(found, 1e-3)
    device.close()
    assert device.taken == wanted.needs.device
    assert store.host.taken == wanted.host
    assert (store.disk.nbytes if store.disk else 0) == wanted.needs.disk
    return ends[-1] - ends[-2]


@pytest.mark.parametrize(
    ("name", "pace", "rows", "visits"),
    [
        ("resident", "balanced", 2, 2),
        ("kept", "balanced", 1, 4),
        ("kept", "link-bound", 2, 1),
        ("host", "balanced", 4, 1),
        ("host", "link-bound", 2, 3),
        ("host", "compute-bound", 1, 2),
        ("host", "memory-bound", 1, 5),
        ("host", "half duplex", 2, 2),
        ("activations too", "balanced", 4, 1),
        ("activations too", "half duplex", 2, 2),
        ("state on the disk", "memory-bound", 1, 1),
        ("disk", "balanced", 1, 2),
        ("mixed", "balanced", 1, 5),
        ("mixed", "link-bound", 3, 1),
    ],
)
def test_a_step_takes_what_was_forecast(name, pace, rows, visits, tmp_path):
    placement, rates, work = problem(PLACEMENTS[name], pace, rows, visits)
    found = forecast(PLANS, placement, rates, work).seconds
    assert walked(placement, rates, tmp_path / "state") == pytest.approx(found, rel=0.01)


def test_bound_by_arithmetic_streaming_costs_less_than_three_percent(tmp_path):
    placement, rates, _ = problem(HOST, "compute-bound", 4, 1)
    rates = replace(rates, flops=rates.flops / 2)
    resident = replace(placement, weights=("device",) * N, state=("device",) * N)  # recomputing as much
    alone = walked(resident, rates, tmp_path / "state")
    assert alone < walked(placement, rates, tmp_path / "state") < 1.03 * alone


def test_where_the_formula_says_so_nothing_of_adamw_is_exposed(tmp_path):
    """T >= 26 F / 2W, the first layers at home on the device: twice the tokens hide all of it, half of them do not."""
    words = ("device",) * 3 + ("host",) * (N - 3)
    placement, rates, work = problem(Placement(words, words, (True,) * N), "balanced", 2, 1)
    rates = replace(rates, flops=TOKENS * 2 * LINK * 0.3)  # of the link nothing is seen
    threshold = 26 * rates.flops / (2 * work.tokens)  # the DRAM that just hides it
    for memory, hidden in ((2 * threshold, True), (0.5 * threshold, False)):
        real, free = replace(rates, memory=memory), replace(rates, memory=float("inf"))
        late = walked(placement, real, tmp_path / "state") - walked(placement, free, tmp_path / "state")
        predicted = exposed_optimizer(PLANS, placement, real, work)
        assert late == pytest.approx(predicted, abs=1e-9)
        assert (late < 1e-9) is hidden
