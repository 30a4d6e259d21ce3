"""A run changes hands between torch.optim.AdamW and ours in the middle, by state, by file and by torch.distributed."""

import copy
import pickle
import warnings

import pytest
import torch

from cgpt_ext.optim import AdamW
from optim_runs import BOTH_WAYS, KINDS, close, groups, model, torch_adamw, train


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


def test_a_step_that_was_saved_as_a_number():
    """As torch wrote it before 1.12."""
    net = model()
    optimizer = torch_adamw(net.parameters())
    train(net, optimizer, 0, 3)
    state = copy.deepcopy(optimizer.state_dict())
    for moments in state["state"].values():
        moments["step"] = int(moments["step"])
    after = AdamW(net.parameters())
    after.load_state_dict(state)
    train(net, after, 3, 4)
    assert [after.state[p]["step"].item() for p in net.parameters()] == [4] * 4


def test_a_state_of_another_shape_is_refused():
    net, other = model(), torch.nn.Linear(3, 3)
    small = torch_adamw(other.parameters())
    for p in (*net[0].parameters(), *other.parameters()):
        p.grad = torch.ones_like(p)
    small.step()
    after = AdamW(net[0].parameters())
    after.load_state_dict(small.state_dict())
    with pytest.raises(ValueError, match=r"adamw: exp_avgs\[0\] must be \(16, 6\), got \(3, 3\)"):
        after.step()


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
