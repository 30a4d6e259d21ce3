import copy
import math

import pytest
import torch

from cgpt_ext import join_master
from cgpt_ext.optim import AdamW

torch_adamw = torch.optim.AdamW


def model(dtype=torch.float32):
    torch.manual_seed(3)
    net = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.GELU(), torch.nn.Linear(16, 2)).to(dtype)
    net[0].weight = torch.nn.Parameter(net[0].weight.detach().t().contiguous().t())  # dense, not contiguous
    return net


def train(net, optimizer, steps, start=0):
    for i in range(start, start + steps):
        torch.manual_seed(100 + i)
        x = torch.randn(8, 6)
        optimizer.zero_grad()
        net(x.to(net[0].weight.dtype)).float().square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()]


def close(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)


OPTIONS = [{}, {"weight_decay": 0.3, "betas": (0.8, 0.95), "eps": 1e-6}, {"maximize": True}, {"lr": torch.tensor(0.01)}]


@pytest.mark.parametrize("options", OPTIONS)
def test_it_is_torchs(options):
    ours, theirs = model(), model()
    options = {"lr": 0.01, **options}
    close(
        train(ours, AdamW(ours.parameters(), **options), 20),
        train(theirs, torch_adamw(theirs.parameters(), **options), 20),
    )


@pytest.mark.parametrize("flags", [{"foreach": True}, {"fused": True}, {"capturable": True}])
def test_flags_that_change_nothing(flags):
    plain, flagged = model(), model()
    a = train(plain, AdamW(plain.parameters(), lr=0.01), 3)
    b = train(flagged, AdamW(flagged.parameters(), lr=0.01, **flags), 3)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("first", "then"), [(AdamW, torch_adamw), (torch_adamw, AdamW), (AdamW, AdamW)])
@pytest.mark.parametrize("fused", [None, True])
def test_a_run_continues_under_the_other(first, then, fused):
    straight, handed = model(), model()
    want = train(straight, torch_adamw(straight.parameters(), lr=0.01), 12)
    before = first(handed.parameters(), lr=0.01, fused=fused)
    train(handed, before, 6)
    after = then(handed.parameters(), lr=0.5)  # the loaded groups bring the learning rate
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    close(train(handed, after, 6, start=6), want)
    state = after.state[next(handed.parameters())]
    assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
    assert state["step"].item() == 12
    assert state["step"].dtype == torch.float32


def test_a_saved_run_continues_to_the_bit(tmp_path):
    for master in ("fp32", "split", None):
        straight, resumed = model(torch.bfloat16), model(torch.bfloat16)
        want = train(straight, AdamW(straight.parameters(), lr=0.01, master=master), 8)
        optimizer = AdamW(resumed.parameters(), lr=0.01, master=master)
        train(resumed, optimizer, 4)
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        again = AdamW(resumed.parameters(), lr=0.01)
        again.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
        got = train(resumed, again, 4, start=4)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_bf16_masters_keep_small_steps():
    def run(master):
        weight = torch.nn.Parameter(torch.ones(32, dtype=torch.bfloat16))
        optimizer = AdamW([weight], lr=1e-4, weight_decay=0.0, master=master)
        for _ in range(100):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        return weight, optimizer.state[weight]

    weight, state = run("fp32")
    assert set(state) == {"step", "exp_avg", "exp_avg_sq", "master"}
    torch.testing.assert_close(state["master"], torch.full((32,), 0.99), rtol=1e-5, atol=0)
    assert torch.equal(weight.detach(), state["master"].bfloat16())
    split_weight, split_state = run("split")
    assert set(split_state) == {"step", "exp_avg", "exp_avg_sq", "low"}
    assert torch.equal(join_master(split_weight, split_state["low"]), state["master"])
    assert torch.equal(run(None)[0].detach(), torch.ones(32, dtype=torch.bfloat16))


def test_stochastic_rounding_adds_small_steps_up():
    def moved(**options):
        weights = [torch.nn.Parameter(torch.ones(5000, dtype=torch.bfloat16)) for _ in range(2)]
        groups = [{"params": [w]} for w in weights]
        optimizer = AdamW(groups, lr=1e-4, weight_decay=0.0, master=None, **options)
        for _ in range(10):
            for w in weights:
                w.grad = torch.ones_like(w)
            optimizer.step()
        assert set(optimizer.state[weights[0]]) == {"step", "exp_avg", "exp_avg_sq"}
        return weights, optimizer

    still, _ = moved()
    assert all(torch.equal(w, torch.ones_like(w)) for w in still)
    weights, optimizer = moved(stochastic_rounding_seed=11)
    for w in weights:
        assert w.float().mean().item() == pytest.approx(1 - 1e-3, abs=1e-4)
    assert not torch.equal(*weights)  # groups do not share their bits
    again, _ = moved(stochastic_rounding_seed=11)
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))
    assert optimizer.state_dict()["param_groups"][0]["stochastic_rounding_seed"] == 11
    mixed = AdamW([torch.nn.Parameter(torch.ones(3))], master=None, stochastic_rounding_seed=1)
    mixed.param_groups[0]["params"][0].grad = torch.ones(3)
    mixed.step()  # fp32 has no use for it
    with pytest.raises(ValueError, match="stochastic_rounding_seed must be None with master 'fp32', got 3"):
        AdamW([torch.nn.Parameter(torch.ones(2))], stochastic_rounding_seed=3)


def test_masters_convert():
    net = model(torch.bfloat16)
    optimizer = AdamW(net.parameters(), lr=0.01)
    train(net, optimizer, 2)
    weight = net[2].weight
    master = optimizer.state[weight]["master"].clone()
    optimizer.param_groups[0].update(master="split", lr=0.0, weight_decay=0.0)
    train(net, optimizer, 1)
    assert torch.equal(join_master(weight, optimizer.state[weight]["low"]), master)
    optimizer.param_groups[0].update(master="fp32")
    train(net, optimizer, 1)
    assert torch.equal(optimizer.state[weight]["master"], master)


def test_closure_and_missing_gradients():
    used, unused = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW([used, unused], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = used.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert (used < 1).all()
    assert torch.equal(unused.detach(), torch.ones(3))
    assert unused not in optimizer.state


def test_groups_and_scheduler():
    ours, theirs = model(), model()

    def make(kind, net):
        groups = [{"params": [net[0].weight, net[2].weight], "weight_decay": 0.5}, {"params": [net[0].bias]}]
        optimizer = kind(groups, lr=0.02, weight_decay=0.0)
        optimizer.add_param_group({"params": [net[2].bias], "lr": 0.1})
        return optimizer

    results = []
    for kind, net in ((AdamW, ours), (torch_adamw, theirs)):
        optimizer = make(kind, net)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 / (1 + i))
        for i in range(5):
            results.append(train(net, optimizer, 1, start=i))
            scheduler.step()
    close(results[4], results[9])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_grad_scaler(dtype):
    def run(kind, overflow):
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 12, dtype=dtype))
        optimizer = kind([weight], lr=0.01, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        for i in range(5):
            optimizer.zero_grad()
            scaler.scale((weight.float() * torch.arange(12.0)).square().sum() * 0.01).backward()
            if i == overflow:
                weight.grad[3] = math.inf
            scaler.step(optimizer)
            scaler.update()
        return weight.detach(), optimizer.state[weight]["step"].item(), scaler.get_scale()

    for overflow in (None, 2):
        weight, step, scale = run(AdamW, overflow)
        torchs, torch_step, torch_scale = run(torch_adamw, overflow)
        assert (step, scale) == (torch_step, torch_scale)
        if dtype == torch.float32:
            close([weight], [torchs])
        assert weight.isfinite().all()


def test_an_overflow_leaves_no_trace():
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = AdamW([weight])
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(1.0)
    weight.grad = torch.full((4,), math.inf)
    optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(4))
    state = optimizer.state[weight]
    assert [state[key].abs().sum().item() for key in ("step", "exp_avg", "exp_avg_sq")] == [0, 0, 0]


def test_parameters_and_gradients_of_any_layout():
    base = torch.randn(6, 10)
    sliced = torch.nn.Parameter(base.clone()[:, 2:7])  # gaps between its rows
    turned = torch.nn.Parameter(base.t())
    plain = [torch.nn.Parameter(base[:, 2:7].clone()), torch.nn.Parameter(base.t().contiguous())]
    assert not sliced.is_contiguous()
    for params in ([sliced, turned], plain):
        optimizer = AdamW(params, lr=0.1)
        for _ in range(2):
            torch.manual_seed(5)
            for p in params:
                p.grad = torch.randn(p.shape)  # contiguous, whatever the parameter is
            optimizer.step()
    assert torch.equal(sliced, plain[0])
    assert torch.equal(turned, plain[1])


def test_pickle_and_repr():
    import pickle

    net = model()
    optimizer = AdamW(net.parameters(), lr=0.25, master="split")
    train(net, optimizer, 1)
    again = pickle.loads(pickle.dumps(optimizer))
    assert again.param_groups[0]["master"] == "split"
    assert "lr: 0.25" in repr(again)
    assert isinstance(optimizer, torch.optim.AdamW)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amsgrad": True}, "AdamW: amsgrad must be False, got True"),
        ({"differentiable": True}, "AdamW: differentiable must be False, got True"),
        ({"master": "bf16"}, "AdamW: master must be 'fp32', 'split' or None, got 'bf16'"),
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        AdamW([torch.nn.Parameter(torch.ones(2))], **options)


def test_bad_parameters():
    half = torch.nn.Parameter(torch.ones(2, dtype=torch.float16))
    half.grad = torch.ones_like(half)
    with pytest.raises(ValueError, match="master must be 'fp32' or None for float16 parameters, got 'split'"):
        AdamW([half], master="split").step()
    double = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    double.grad = torch.ones_like(double)
    with pytest.raises(TypeError, match=r"adamw: params\[0\] must be float32"):
        AdamW([double]).step()
    amsgrad = torch_adamw([half], amsgrad=True)
    amsgrad.step()
    with pytest.raises(ValueError, match="amsgrad must be False"):
        AdamW([half]).load_state_dict(amsgrad.state_dict())
