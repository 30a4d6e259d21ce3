"""Where layers live changes no bit: resident, streamed from the host, from the disk, and mixed."""

import itertools
from dataclasses import replace

import pytest
import torch
from toy import DEPTH, Plain, batches, layers

from cgpt.stream.executor import Executor
from cgpt.stream.format import Format
from cgpt.stream.optimizer import AdamW
from cgpt.stream.placement import Placement
from cgpt.stream.store import Store

COUNT = DEPTH + 2
BOUNDARY = 2048  # bytes for a micro-batch of three samples, in fp32 too

MIXED = Placement(
    weights=("host", "device", "host", "disk", "device"),
    state=("host", "device", "disk", "disk", "host"),
    recompute=(True, False, True, True, False),
)


def everywhere(weights, state, recompute=True):
    return Placement((weights,) * COUNT, (state,) * COUNT, (recompute,) * COUNT)


PLACEMENTS = {
    "resident": Placement.resident(COUNT),
    "resident, recomputed": replace(Placement.resident(COUNT), recompute=(True,) * COUNT),
    "state on the host": everywhere("device", "host", False),
    "host": everywhere("host", "host"),
    "state on the disk": everywhere("host", "disk"),
    "disk": everywhere("disk", "disk"),
    "kept before the disk": everywhere("device", "disk", False),
    "mixed": MIXED,
}


def train(placement, format=None, sizes=(3,), clip=0.05, steps=20, disk=None, together=True, device="cpu"):
    """Losses, norms and final masters and moments of `steps` steps."""
    placement = replace(placement, micro_batches=len(sizes) if together else 1, visits=1 if together else len(sizes))
    if placement.activations == "host":
        placement = replace(placement, boundary=BOUNDARY)
    torch.manual_seed(0)
    model = Plain()
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    store = Store(layers(model), format, device, placement=placement, disk=disk)
    store.initialise(lambda name, tensor: tensor.copy_(values[name]))
    executor, optimizer = Executor(store), AdamW(store, clip=clip)
    rows = []
    for i in range(steps):
        step = batches(sizes, seed=i)
        found = executor.gradients([step] if together else [[batch] for batch in step], optimizer.loss_scale)
        rows.append((found.loss, found.norm, optimizer.step(found, 1e-2)))
    return rows, final(store)


def final(store):
    found = {}
    for index, names in enumerate(store.owned):
        with store.record(index) as record:
            for name in names:
                found[name] = record.master(name)
                found |= {f"{kind} {name}": record.view(kind, name).clone() for kind in ("exp_avg", "exp_avg_sq")}
    store.lanes.close()
    return found


def assert_same(got, want, where=""):
    (rows, tensors), (wanted_rows, wanted) = got, want
    assert rows == wanted_rows, where
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(tensors[name], tensor), where + name


@pytest.mark.parametrize("clip", [0.05, 1e6])
@pytest.mark.parametrize("sizes", [(3,), (2, 1), (3, 3, 3), (1, 2, 3, 2, 1)])
def test_every_placement_gives_the_same_bits_over_twenty_steps(sizes, clip, tmp_path):
    want = train(PLACEMENTS["resident"], sizes=sizes, clip=clip)
    assert len({loss for loss, _, _ in want[0]}) == 20
    clipped = [norm > clip for _, norm, _ in want[0]]
    assert all(clipped) if clip < 1 else not any(clipped)
    for (name, placement), activations in itertools.product(PLACEMENTS.items(), ("device", "host")):
        placement = replace(placement, activations=activations)
        got = train(placement, sizes=sizes, clip=clip, disk=str(tmp_path / "state"))
        assert_same(got, want, f"{name}, activations on the {activations}: ")


OTHERS = [Format("fp16"), Format("fp32"), Format("bf16", "bf16"), Format("fp16", "bf16"), Format("fp32", "bf16")]


@pytest.mark.parametrize("format", OTHERS, ids=lambda format: f"{format.precision}, moments {format.moments}")
@pytest.mark.parametrize("name", ["host", "disk", "mixed"])
def test_other_formats(name, format, tmp_path):
    want = train(PLACEMENTS["resident"], format, (2, 3))
    assert_same(train(PLACEMENTS[name], format, (2, 3), disk=str(tmp_path / "state")), want)


def test_rounded_moments_learn_as_fp32_ones_do():
    exact, rounded = (train(PLACEMENTS["host"], Format(moments=moments), steps=40) for moments in ("fp32", "bf16"))
    assert exact[0] != rounded[0]
    losses = [[loss for loss, _, _ in rows] for rows, _ in (exact, rounded)]
    fallen = [rows[0] - sum(rows[-5:]) / 5 for rows in losses]
    assert fallen[1] == pytest.approx(fallen[0], rel=0.05)


@pytest.mark.parametrize("name", PLACEMENTS)
def test_several_visits_give_the_bits_of_one(name, tmp_path):
    want = train(PLACEMENTS["resident"], sizes=(2, 1, 3), steps=5)
    got = train(PLACEMENTS[name], sizes=(2, 1, 3), steps=5, disk=str(tmp_path / "state"), together=False)
    assert_same(got, want)
