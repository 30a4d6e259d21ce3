import copy
import math

import pytest
import torch
from toy import Plain, batches, layers

from cgpt.errors import InputError
from cgpt.stream import optimizer as room
from cgpt.stream.executor import Executor
from cgpt.stream.format import Format
from cgpt.stream.gradients import Gradients
from cgpt.stream.optimizer import FIRST_LOSS_SCALE, AdamW
from cgpt.stream.record import Record
from cgpt.stream.store import Store
from cgpt_ext.ops.adamw import adamw_ref


def toy(precision, moments="fp32", **options):
    model = Plain()
    whole = copy.deepcopy(model).double()
    store = Store(layers(model), Format(precision, moments))
    for name, parameter in whole.named_parameters():
        store.write(name, parameter.detach().float())
    return store, AdamW(store, **options), whole


def state_bytes(store):
    return [record.memory.clone() for record in store.records]


@pytest.mark.parametrize("clip", [0.05, 1e6, 0.0])
def test_steps_equal_torchs_adamw_and_clip_in_fp64(clip):
    store, ours, whole = toy("fp32", clip=clip)
    decayed = [parameter for parameter in whole.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in whole.parameters() if parameter.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    for i in range(5):
        step = batches((3,), seed=i)
        found = Executor(store).gradients([step])
        assert ours.step(found, 1e-3)
        whole.zero_grad()
        whole(*step[0]).backward()
        norm = torch.nn.utils.clip_grad_norm_(whole.parameters(), clip or math.inf)
        assert found.norm == pytest.approx(norm.item(), rel=1e-5)
        theirs.step()
    for name, parameter in whole.named_parameters():
        error = (store.read(name).double() - parameter).norm() / parameter.norm()
        # a step of Adam is lr whatever the gradient's size, so a coordinate near zero may turn its rounding into one
        assert error <= 1e-5, name


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_bf16_moments_are_rounded_as_the_reference_rounds_them(precision):
    store, ours, _ = toy(precision, "bf16", seed=5)
    for i in range(3):
        found = Executor(store).gradients([batches((3,), seed=i)])
        clip = torch.tensor(1.0 / found.norm if found.norm > 1.0 else 1.0)
        wanted = []
        for index, layer in enumerate(store.layers):
            copy_of = Record(store.plans[index].owned, store.format, store.records[index].memory.clone())
            wanted.append(copy_of.memory)
            for group in copy_of.groups():
                gradients = [found.by_name[name] for name in group.names]
                lists = group.working, gradients, group.exp_avg, group.exp_avg_sq, i + 1
                options = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
                places = [(store.names().index(name), 0) for name in group.names]
                adamw_ref(
                    *lists, **options, weight_decay=0.1 * group.decayed, masters=group.masters, lows=group.lows,
                    grad_scale=clip, stochastic_rounding_seed=5, rounding_places=places,
                )  # fmt: skip
            assert copy_of.flat["exp_avg_sq"].dtype == torch.bfloat16, layer.name
        ours.loss_scale = 1.0
        assert ours.step(found, 1e-2)
        for record, bytes_wanted in zip(store.records, wanted, strict=True):
            assert torch.equal(record.memory, bytes_wanted)


def test_another_seed_rounds_bf16_moments_otherwise():
    memories = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        store, ours, _ = toy("bf16", "bf16", seed=seed)
        ours.step(Executor(store).gradients([batches((3,))]), 1e-2)
        memories.append(torch.cat(state_bytes(store)))
    assert torch.equal(memories[0], memories[1])
    assert not torch.equal(memories[0], memories[2])


class Halves:
    """Scales of a power of two, by what a name ends with."""

    def lr_scale(self, name):
        return 0.5 if name.endswith("1.weight") else 1.0

    def decay_scale(self, name):
        return 4.0 if name.endswith("1.weight") else 1.0

    def eps_scale(self, name):
        return 2.0 if name.startswith("h.") else 1.0


def test_scales_of_lr_decay_and_eps_are_each_parameters_own():
    store, ours, _ = toy("fp32", scales=Halves(), clip=0.0)
    before = {name: store.read(name) for name in store.names()}
    found = Executor(store).gradients([batches((3,))])
    ours.step(found, 1e-3)
    seen = set()
    for name, start in before.items():
        matrix, block = name.endswith("1.weight"), name.startswith("h.")
        want, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
        decay = 0.0 if start.dim() < 2 else 0.4 if matrix else 0.1
        adamw_ref(
            [want], [found.by_name[name]], [m], [v], 1, lr=5e-4 if matrix else 1e-3, beta1=0.9, beta2=0.95,
            eps=2e-8 if block else 1e-8, weight_decay=decay,
        )  # fmt: skip
        assert torch.equal(store.read(name), want), name
        seen.add((matrix, block, decay))
    assert len(seen) == 4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_gradient_that_is_not_finite_skips_the_step_and_leaves_every_bit(precision, bad):
    store, ours, _ = toy(precision)
    found = Executor(store).gradients([batches((2,))])
    ours.step(found, 1e-3)
    before = state_bytes(store)
    found.by_name["ln_f.bias"][0] = bad
    assert not ours.step(Gradients(found.loss, found.by_name, {}, bad), 1e-3)
    assert all(torch.equal(a, b) for a, b in zip(before, state_bytes(store), strict=True))
    assert (ours.updates, ours.skipped) == (1, 1)


def test_a_bf16_weight_at_one_moves_at_a_small_rate():
    store, ours, _ = toy("bf16", weight_decay=0.0)
    before = store.read("ln_f.weight")
    for i in range(3):
        ours.step(Executor(store).gradients([batches((2,), seed=i)]), 1e-5)
    moved = (store.read("ln_f.weight") - before).abs()
    assert moved.max() > 1e-5  # a bf16 weight alone cannot leave 1.0 by less than 2^-8
    assert (moved > 0).float().mean() > 0.9


def test_the_loss_scale_halves_on_overflow_and_doubles_after_good_steps(monkeypatch):
    monkeypatch.setattr(room, "GOOD_STEPS", 3)
    store, ours, _ = toy("fp16")
    step = batches((2,))
    assert ours.loss_scale == FIRST_LOSS_SCALE == 2**16
    good = [ours.step(Executor(store).gradients([step], ours.loss_scale), 1e-4) for _ in range(3)]
    scale = 2.0 ** (16 - good.count(False))
    while good.count(True) < 3:
        good.append(ours.step(Executor(store).gradients([step], ours.loss_scale), 1e-4))
    assert good.count(True) == ours.updates == 3
    assert ours.loss_scale == scale * 2
    ours.step(Gradients(1.0, {}, {}, math.inf), 1e-4)
    assert ours.loss_scale == scale


def test_loss_scale_does_not_change_the_update():
    stores = [toy("fp16") for _ in range(2)]
    for (store, ours, _), scale in zip(stores, (256.0, 4096.0), strict=True):
        ours.loss_scale = scale
        assert ours.step(Executor(store).gradients([batches((2,))], scale), 1e-3)
    (one, *_), (other, *_) = stores
    for name in one.names():
        assert (one.read(name) - other.read(name)).norm() <= 1e-3 * one.read(name).norm()


def test_a_run_that_only_skips_is_ended():
    _, ours, _ = toy("bf16")
    bad = Gradients(1.0, {}, {}, math.nan)
    assert not any(ours.step(bad, 1e-3) for _ in range(49))
    with pytest.raises(InputError, match="gradients: wanted a finite norm, got nan in 50 steps in a row"):
        ours.step(bad, 1e-3)


def test_numbers_of_the_state_come_back():
    _, ours, _ = toy("fp16")
    ours.updates, ours.skipped, ours.loss_scale, ours.good_steps = 7, 2, 1024.0, 5
    _, other, _ = toy("fp16")
    other.load_state(ours.state())
    assert other.state() == ours.state()
