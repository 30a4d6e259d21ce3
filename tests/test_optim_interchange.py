"""A run changes hands between torch.optim.AdamW and ours in the middle, and nothing around an optimizer notices."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from torch.optim import lr_scheduler

from cgpt_ext.optim import AdamW

torch_adamw = torch.optim.AdamW
KINDS = {"torch": torch_adamw, "ours": AdamW}
BOTH_WAYS = [("torch", "ours"), ("ours", "torch")]


def model(dtype=torch.float32):
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.GELU(), torch.nn.Linear(16, 2)).to(dtype)


def groups(net):
    """Weights that decay, biases that do not, at learning rates of their own, and a group that waits to be filled."""
    return [
        {"params": [net[0].weight, net[2].weight], "weight_decay": 0.3, "betas": (0.8, 0.95)},
        {"params": [net[0].bias, net[2].bias], "weight_decay": 0.0, "lr": 0.03, "eps": 1e-6},
        {"params": []},
    ]


def train(net, optimizer, first, last, scheduler=None):
    """Steps `first` to `last`, whose batches are functions of the step; returns every loss."""
    losses = []
    for i in range(first, last):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        loss = net(x.to(net[0].weight.dtype)).float().square().mean()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step(loss.item()) if hasattr(scheduler, "best") else scheduler.step()
        losses.append(loss.item())
    return losses


def close(net, other, rtol=1e-5, atol=1e-6):
    for x, y in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


@pytest.mark.parametrize("flags", [{}, {"fused": True}, {"foreach": True}, {"capturable": True}, {"maximize": True}])
@pytest.mark.parametrize(("first", "then"), BOTH_WAYS)
def test_ten_steps_and_ten_of_the_other_are_twenty(first, then, flags, tmp_path):
    """Must show: 10 steps torch, save, load into ours, 10 more = 20 steps torch, to fp32 rounding; and the reverse."""
    theirs = {} if "capturable" in flags else flags  # torch's capturable wants a GPU
    options = {"torch": theirs, "ours": flags}
    straight, handed = model(), model()
    want = train(straight, torch_adamw(groups(straight), lr=0.01, **theirs), 0, 20)
    before = KINDS[first](groups(handed), lr=0.01, **options[first])
    got = train(handed, before, 0, 10)
    torch.save({"model": handed.state_dict(), "optimizer": before.state_dict()}, tmp_path / "run.pt")

    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    resumed = model()
    resumed.load_state_dict(saved["model"])
    if then == "torch" and "capturable" in flags:
        for group in saved["optimizer"]["param_groups"]:
            group["capturable"] = False
    after = KINDS[then](groups(resumed), lr=0.7, **options[then])  # the loaded groups bring the learning rates
    after.load_state_dict(saved["optimizer"])
    assert [group["lr"] for group in after.param_groups] == [0.01, 0.03, 0.01]
    got += train(resumed, after, 10, 20)
    assert got == pytest.approx(want, rel=1e-5)
    close(resumed, straight)
    for weight in resumed.parameters():
        assert set(after.state[weight]) == {"step", "exp_avg", "exp_avg_sq"}
        assert after.state[weight]["step"].item() == 20
        assert after.state[weight]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize(("first", "then"), BOTH_WAYS)
def test_a_bf16_run_that_torch_takes_over_is_torchs(first, then):
    """Without masters both round bf16 weights every step, so a run that changes hands drifts by roundings alone."""
    straight, handed = model(torch.bfloat16), model(torch.bfloat16)
    want = train(straight, torch_adamw(straight.parameters(), lr=0.01), 0, 20)
    options = {"torch": {}, "ours": {"master": None}}
    before = KINDS[first](handed.parameters(), lr=0.01, **options[first])
    got = train(handed, before, 0, 10)
    after = KINDS[then](handed.parameters(), lr=0.01, **options[then])
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    got += train(handed, after, 10, 20)
    assert got == pytest.approx(want, rel=0.02)
    for weight in handed.parameters():  # torch keeps moments in the weights' dtype, we in fp32
        assert after.state[weight]["exp_avg"].dtype == (torch.float32 if then == "ours" else torch.bfloat16)


@pytest.mark.parametrize("master", ["fp32", "split"])
def test_a_master_gone_stale_in_torchs_hands_is_made_anew(master):
    net = model(torch.bfloat16)
    ours = AdamW(net.parameters(), lr=0.01, master=master)
    train(net, ours, 0, 3)
    torchs = torch_adamw(net.parameters(), lr=0.01)
    torchs.load_state_dict(copy.deepcopy(ours.state_dict()))
    train(net, torchs, 3, 9)
    again = AdamW(net.parameters(), lr=0.01, master=master)
    again.load_state_dict(copy.deepcopy(torchs.state_dict()))
    weights = [weight.detach().clone() for weight in net.parameters()]
    for group in again.param_groups:
        group.update(lr=0.0, weight_decay=0.0)
    train(net, again, 9, 10)  # a step of no length
    for weight, before in zip(net.parameters(), weights, strict=True):
        assert torch.equal(weight, before)
        assert again.state[weight]["step"].item() == 10


SCHEDULERS = {
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.05, total_steps=20),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda i: 1 / (1 + i), lambda i: 0.9**i, lambda i: 1.0]),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=12, eta_min=1e-4),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.3, patience=0, threshold=0.5),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_and_their_resume(name):
    """OneCycleLR moves beta1 too. The run is cut in the middle, optimizer and scheduler loaded from their states."""

    def run(kind, cut):
        net = model()
        optimizer = kind(groups(net), lr=0.02)
        scheduler = SCHEDULERS[name](optimizer)
        losses = train(net, optimizer, 0, cut, scheduler)
        saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
        optimizer = kind(groups(net), lr=0.02)
        scheduler = SCHEDULERS[name](optimizer)
        optimizer.load_state_dict(saved[0])
        scheduler.load_state_dict(saved[1])
        losses += train(net, optimizer, cut, 15, scheduler)
        return net, losses, [(group["lr"], group["betas"]) for group in optimizer.param_groups]

    ours, losses, rates = run(AdamW, 7)
    theirs, want, torch_rates = run(torch_adamw, 15)
    assert losses == pytest.approx(want, rel=1e-5)
    close(ours, theirs)
    assert rates == torch_rates
    assert rates[0][0] != 0.02


def test_a_scheduled_tensor_is_read_at_every_step():
    def run(kind):
        net = model()
        optimizer = kind(net.parameters(), lr=torch.tensor(0.05))
        scheduler = lr_scheduler.ExponentialLR(optimizer, 0.7)
        train(net, optimizer, 0, 8, scheduler)
        return net, optimizer.param_groups[0]["lr"]

    ours, rate = run(AdamW)
    theirs, _ = run(torch_adamw)
    close(ours, theirs)
    assert isinstance(rate, torch.Tensor)
    assert rate.item() == pytest.approx(0.05 * 0.7**8)


@pytest.mark.parametrize("fused", [None, True])
def test_grad_scaler_with_clipping_between(fused):
    """unscale_, clip, step: an overflow skips exactly one step, whoever leaves it out."""

    def run(kind, **options):
        net = model()
        optimizer = kind(net.parameters(), lr=0.02, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)
        norms = []
        for i in range(8):
            optimizer.zero_grad()
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(i))
            scaler.scale(net(x).square().mean()).backward()
            if i == 4:
                net[0].weight.grad[1, 1] = math.inf
            scaler.unscale_(optimizer)
            norms.append(torch.nn.utils.clip_grad_norm_(net.parameters(), 0.05).item())
            scaler.step(optimizer)
            scaler.update()
        return net, norms, optimizer.state[net[0].weight]["step"].item(), scaler.get_scale()

    ours, norms, steps, scale = run(AdamW, fused=fused)
    theirs, torch_norms, torch_steps, torch_scale = run(torch_adamw)
    assert (steps, scale) == (torch_steps, torch_scale) == (7, torch_scale)
    assert norms == pytest.approx(torch_norms, rel=1e-5)
    close(ours, theirs)


def test_who_unscales_survives_pickling():
    for fused, wanted in ((None, False), (True, True), (False, False)):
        optimizer = AdamW(model().parameters(), fused=fused)
        for again in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            assert again._step_supports_amp_scaling is wanted


def test_a_copy_goes_on_by_itself():
    net, straight = model(), model()
    want = train(straight, torch_adamw(straight.parameters(), lr=0.01), 0, 8)
    optimizer = AdamW(net.parameters(), lr=0.01)
    train(net, optimizer, 0, 4)
    for make in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        other, continued = make((net, optimizer))
        assert train(other, continued, 4, 8) == pytest.approx(want[4:], rel=1e-5)
        close(other, straight)
    assert optimizer.state[net[0].weight]["step"].item() == 4


@pytest.mark.parametrize(("first", "then"), BOTH_WAYS)
def test_named_parameters(first, then):
    net = model()
    before = KINDS[first](net.named_parameters(), lr=0.01)
    train(net, before, 0, 2)
    state = before.state_dict()
    assert state["param_groups"][0]["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    after = KINDS[then](net.named_parameters(), lr=0.5)
    after.load_state_dict(state)
    assert after.state_dict()["param_groups"][0]["param_names"] == state["param_groups"][0]["param_names"]
    assert torch.equal(after.state[net[2].bias]["exp_avg"], before.state[net[2].bias]["exp_avg"])
    with pytest.raises(ValueError, match="name"):
        after.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})


def test_hooks_run_around_the_step_and_the_load():
    net = model()
    optimizer = AdamW(net.parameters(), lr=0.01)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(("before", net[2].bias.clone())))
    optimizer.register_step_post_hook(lambda *_: seen.append(("after", net[2].bias.clone())))
    train(net, optimizer, 0, 1)
    assert [name for name, _ in seen] == ["before", "after"]
    assert not torch.equal(seen[0][1], seen[1][1])

    def halve(_, state):
        groups = [{**group, "lr": group["lr"] / 2} for group in state["param_groups"]]
        moments = {k: {**v, "exp_avg": v["exp_avg"] / 2} for k, v in state["state"].items()}
        return {"state": moments, "param_groups": groups}

    again = AdamW(net.parameters(), lr=0.3)
    again.register_load_state_dict_pre_hook(halve)
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["lr"] == 0.005
    assert torch.equal(again.state[net[0].bias]["exp_avg"], optimizer.state[net[0].bias]["exp_avg"] / 2)


def test_a_parameter_without_gradients_has_no_state_and_keeps_torchs_step():
    def run(kind):
        net = model()
        optimizer = kind(net.parameters(), lr=0.05, weight_decay=0.5)
        for i in range(6):
            optimizer.zero_grad()
            if i == 0:
                net[0].requires_grad_(False)
            if i == 3:
                net[0].requires_grad_(True)
            net(torch.ones(2, 6)).square().sum().backward()
            optimizer.step()
        return net, [optimizer.state[p]["step"].item() for p in net.parameters()]

    ours, steps = run(AdamW)
    theirs, torch_steps = run(torch_adamw)
    assert steps == torch_steps == [3, 3, 6, 6]
    close(ours, theirs)


def test_empty_tensors_and_scalars():
    for kind in (AdamW, torch_adamw):
        empty, scalar = torch.nn.Parameter(torch.ones(0, 3)), torch.nn.Parameter(torch.tensor(2.0))
        optimizer = kind([{"params": []}, {"params": [empty, scalar]}], lr=0.5, weight_decay=0.0)
        optimizer.step()  # no gradient yet
        assert len(optimizer.state) == 0
        empty.grad, scalar.grad = torch.ones(0, 3), torch.tensor(1.0)
        optimizer.step()
        assert scalar.item() == pytest.approx(1.5)
        assert optimizer.state[empty]["exp_avg"].shape == (0, 3)
    with pytest.raises(ValueError, match="empty parameter list"):
        AdamW([])


def test_a_refused_group_leaves_nothing_behind():
    optimizer = AdamW(model().parameters())
    for bad in ({"master": "bf16"}, {"amsgrad": True}, {"differentiable": True}, {"stochastic_rounding_seed": 1}):
        with pytest.raises(ValueError, match=r"AdamW: \w+ must be"):
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], **bad})
        assert len(optimizer.param_groups) == 1


def test_set_to_none_or_to_zero():
    def run(kind, none):
        net = model()
        optimizer = kind(net.parameters(), lr=0.05)
        for i in range(4):
            optimizer.zero_grad(set_to_none=none)
            if i != 2:
                net(torch.ones(2, 6)).square().sum().backward()
            optimizer.step()
        return net, optimizer.state[net[0].weight]["step"].item()

    for none, steps in ((True, 3), (False, 4)):
        ours, theirs = run(AdamW, none), run(torch_adamw, none)
        assert ours[1] == theirs[1] == steps
        close(ours[0], theirs[0])


@pytest.mark.parametrize(("first", "then"), [*BOTH_WAYS, ("ours", "ours")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distributed_checkpoints_states(first, then, dtype):
    """torch.distributed.checkpoint takes states by the parameters' names, and makes empty ones by a step of its own."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    straight, net = model(dtype), model(dtype)
    kind = torch_adamw if dtype == torch.float32 else AdamW
    want = train(straight, kind(straight.parameters(), lr=0.01), 0, 8)
    before = KINDS[first](net.parameters(), lr=0.01)
    train(net, before, 0, 4)
    saved = copy.deepcopy(get_optimizer_state_dict(net, before))
    assert torch.equal(saved["state"]["2.weight"]["exp_avg"], before.state[net[2].weight]["exp_avg"])
    after = KINDS[then](net.parameters(), lr=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        set_optimizer_state_dict(net, after, saved)
    assert after.param_groups[0]["lr"] == 0.01
    losses = train(net, after, 4, 8)
    if dtype == torch.float32:
        assert losses == pytest.approx(want[4:], rel=1e-5)
        close(net, straight)
    elif (first, then) == ("ours", "ours"):
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), straight.parameters(), strict=True))
    else:
        assert losses == pytest.approx(want[4:], rel=0.05)


def test_groups_have_torchs_keys_until_told_otherwise():
    mine, torchs = AdamW(groups(model())), torch_adamw(groups(model()))
    for group, other in zip(mine.param_groups, torchs.param_groups, strict=True):
        assert group.keys() == other.keys()
    for options in ({"master": "split"}, {"master": None}):
        other = AdamW(groups(model()), **options)
        assert [group["master"] for group in other.param_groups] == [options["master"]] * 3
    mixed = AdamW([{"params": [torch.nn.Parameter(torch.ones(2))], "master": "fp32"}], master="split")
    mixed = pickle.loads(pickle.dumps(mixed))
    assert mixed.param_groups[0]["master"] == "fp32"


@pytest.mark.parametrize(("first", "then"), BOTH_WAYS)
def test_distributed_checkpoints_files(first, then, tmp_path):
    """dcp.load wants every key of the optimizer that is loaded into in the file, so ours has torch's and no more."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    straight, net = model(), model()
    want = train(straight, torch_adamw(groups(straight)[:2], lr=0.01), 0, 8)
    before = KINDS[first](groups(net)[:2], lr=0.01)
    train(net, before, 0, 4)
    after = KINDS[then](groups(net)[:2], lr=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weights, state = get_state_dict(net, before)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path)
        net.zero_grad()  # else it makes no empty states to load into
        weights, state = get_state_dict(net, after)
        assert state["param_groups"][0].keys() == before.state_dict()["param_groups"][0].keys()
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=tmp_path)
        set_state_dict(net, after, model_state_dict=weights, optim_state_dict=state)
    assert train(net, after, 4, 8) == pytest.approx(want[4:], rel=1e-5)
    close(net, straight)
