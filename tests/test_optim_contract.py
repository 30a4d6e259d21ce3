"""What stands around an optimizer (schedulers, scalers, hooks, copies) does not notice that it is ours."""

import copy
import math
import pickle

import pytest
import torch
from torch.optim import lr_scheduler

from cgpt_ext.optim import AdamW
from optim_runs import close, groups, model, torch_adamw, train

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


def test_an_optimizer_a_parameter_stepping_in_the_backward_pass():
    """As whoever keeps no gradient longer than it takes does it."""

    def run(kind):
        net = model()
        each = {p: kind([p], lr=0.05) for p in net.parameters()}

        def step(p):
            each[p].step()
            each[p].zero_grad()

        for p in net.parameters():
            p.register_post_accumulate_grad_hook(step)
        for i in range(5):
            net(torch.randn(8, 6, generator=torch.Generator().manual_seed(i))).square().mean().backward()
        return net

    close(run(AdamW), run(torch_adamw))
