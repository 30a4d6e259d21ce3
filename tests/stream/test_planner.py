"""Placements over the whole range of budgets: as resident as fits, never past a budget, refused exactly below."""

import random
from dataclasses import replace

import pytest

from cgpt.model.config import GPTConfig
from cgpt.stream.account import account
from cgpt.stream.format import Format
from cgpt.stream.gpt_plans import gpt_plans
from cgpt.stream.limits import Budgets
from cgpt.stream.placement import TIERS
from cgpt.stream.planner import DoesNotFit, Setting, place

PLANS = gpt_plans(GPTConfig(n_layer=8, n_head=2, d_model=64, d_head=32, d_ff=256, vocab_size=1000, seq_len=32))
N = len(PLANS)
PLENTY = 1 << 40
SETTINGS = [
    Setting(Format(), 64, 64),
    Setting(Format(), 64, 64, micro_batches=3, visits=4),
    Setting(Format("fp16"), 32, 64, micro_batches=2),
    Setting(Format("fp32"), 64, 64, visits=2, beside="host"),
]
READING = [Setting(Format(training=False), 64, 64), Setting(Format("fp32", training=False), 16, 64, beside="host")]


def taken(placement, setting):
    return account(PLANS, placement, setting.format, setting.micro_batch_tokens, setting.width, setting.beside)


def least(kind, setting, **others):
    """The least of one budget that is not refused, as its refusal says."""
    budgets = Budgets(**{"device": PLENTY, "host": PLENTY, "disk": 0} | others | {kind: 0})
    with pytest.raises(DoesNotFit) as refused:
        place(PLANS, budgets, setting)
    assert (refused.value.limit, refused.value.given) == (kind, 0)
    return refused.value.wanted


def sweep(low, high, steps=60):
    return [low + (high - low) * i // steps for i in range(steps + 1)]


def check(placement, setting, budgets):
    found = taken(placement, setting)
    assert found.device <= budgets.device
    assert found.host <= budgets.host
    assert found.disk <= budgets.disk
    ranks = {"device": 0, "host": 1, "disk": 2}
    for weights, state, again in zip(placement.weights, placement.state, placement.recompute, strict=True):
        assert ranks[weights] <= ranks[state]
        assert again or weights == "device"
    return found


@pytest.mark.parametrize("setting", SETTINGS + READING)
def test_with_plenty_everything_is_resident(setting):
    placement = place(PLANS, Budgets(PLENTY, PLENTY), setting)
    assert set(placement.weights) == set(placement.state) == {"device"}
    assert not any(placement.recompute)
    assert taken(placement, setting).needs.host == 0


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_device_from_everything_to_nothing(setting):
    full = taken(place(PLANS, Budgets(PLENTY, PLENTY), setting), setting).device
    low, seen, before = least("device", setting), set(), (0, 0)
    for device in [*sweep(low, full), full]:
        budgets = Budgets(device, PLENTY)
        placement = place(PLANS, budgets, setting)
        need = check(placement, setting, budgets).needs
        now = need.records_device, need.kept  # records come first: a new one may take the room of others' weights
        assert now >= before
        before = now
        seen.add((placement.state.count("device"), placement.weights.count("device")))
    assert set(placement.state) == {"device"}
    assert len(seen) > N  # a range, not a switch
    with pytest.raises(DoesNotFit, match=r"^device memory: wanted at least .*, got "):
        place(PLANS, Budgets(low - 1, PLENTY), setting)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_host_from_everything_to_nothing(setting):
    device = least("device", setting)
    low = least("host", setting, device=device, disk=PLENTY)
    everything = taken(place(PLANS, Budgets(device, PLENTY), setting), setting).host
    before, seen = 0, set()
    for host in sweep(low, everything):
        budgets = Budgets(device, host, PLENTY)
        placement = place(PLANS, budgets, setting)
        check(placement, setting, budgets)
        near = sum(at != "disk" for at in placement.weights)
        resident = placement.state.count("host") + near / (N + 1)  # records before weights alone
        assert resident >= before
        before = resident
        seen.add(resident)
    assert placement.state.count("disk") == 0
    assert len(seen) > N
    with pytest.raises(DoesNotFit) as refused:
        place(PLANS, Budgets(device, low - 1, PLENTY), setting)
    assert refused.value.wanted == low


@pytest.mark.parametrize("setting", SETTINGS)
def test_without_a_disk_the_host_must_hold_the_rest(setting):
    device = least("device", setting)
    low = least("host", setting, device=device)
    placement = place(PLANS, Budgets(device, low), setting)
    assert set(placement.state) == {"host"}
    with pytest.raises(DoesNotFit, match=r"^host memory: wanted at least") as refused:
        place(PLANS, Budgets(device, low - 1), setting)
    assert refused.value.disk
    check(place(PLANS, Budgets(device, low - 1, refused.value.disk), setting), setting, Budgets(device, low, PLENTY))


def test_any_budgets_are_kept_or_refused_with_what_would_do():
    draw, outcomes = random.Random(0), {"placed": 0, "device": 0, "host": 0}
    for _ in range(200):
        setting = draw.choice(SETTINGS + READING)
        low = least("device", setting)
        budgets = Budgets(
            int(low * draw.uniform(0.9, 1.1)), int(draw.uniform(0, 3e7)), draw.choice([0, 0, 10**6, 10**7, PLENTY])
        )
        refused = None
        try:
            placement = place(PLANS, budgets, setting)
        except DoesNotFit as error:
            refused = error
        if refused is None:
            check(placement, setting, budgets)
            outcomes["placed"] += 1
            continue
        outcomes[refused.limit] += 1
        assert refused.wanted > refused.given
        if refused.limit == "host":
            enough = replace(budgets, host=refused.wanted)
            check(place(PLANS, enough, setting), setting, enough)
        if refused.disk:
            enough = replace(budgets, disk=refused.disk)
            check(place(PLANS, enough, setting), setting, enough)
    assert all(count > 10 for count in outcomes.values()), outcomes


def test_layers_may_be_kept_off_the_device_though_there_be_room():
    placement = place(PLANS, Budgets(PLENTY, PLENTY), SETTINGS[0], most_state=2, most_weights=5)
    assert placement.state == ("device",) * 2 + ("host",) * (N - 2)
    assert placement.weights == ("device",) * 5 + ("host",) * (N - 5)


def test_activations_go_to_the_host_when_the_device_has_no_room():
    setting = Setting(Format(), 4096, 64, micro_batches=40)
    device = least("device", setting)
    placement = place(PLANS, Budgets(device, PLENTY), setting)
    assert placement.activations == "host"
    assert placement.boundary == 4096 * 64 * 2
    assert place(PLANS, Budgets(2 * device, PLENTY), setting).activations == "device"


@pytest.mark.parametrize("setting", READING)
def test_what_is_only_read_lives_in_one_place_from_the_device_to_the_disk(setting):
    full = taken(place(PLANS, Budgets(PLENTY, PLENTY), setting), setting)
    on_device = set()
    for device in sweep(least("device", setting), full.device):
        budgets = Budgets(device, PLENTY)
        placement = place(PLANS, budgets, setting)
        check(placement, setting, budgets)
        assert placement.weights == placement.state
        on_device.add(placement.state.count("device"))
    assert on_device == {*range(N - 3), N}  # two slots take what the last two blocks do; the head owns next to nothing

    device, host = least("device", setting), full.needs.device + full.host
    low, disks = least("host", setting, device=device, disk=PLENTY), set()
    for budget in sweep(low, host):
        budgets = Budgets(device, budget, PLENTY)
        placement = place(PLANS, budgets, setting)
        found = check(placement, setting, budgets)
        assert placement.weights == placement.state == tuple(sorted(placement.state, key=TIERS.index))
        further = placement.state.index("disk") if "disk" in placement.state else N
        nearer = replace(placement, state=(*placement.state[:further], "host", *placement.state[further + 1 :]))
        nearer = replace(nearer, weights=nearer.state)
        assert "disk" not in placement.state or taken(nearer, setting).host > budget
        held = sum(p.owned.size for p, at in zip(PLANS, placement.state, strict=True) if at == "host")
        assert found.needs.host == held * setting.format.working + 2 * found.needs.fetching
        disks.add(placement.state.count("disk"))
    assert disks == {0, *range(4, N + 1)}  # the head and two blocks take no more than two buffers


@pytest.mark.parametrize("setting", READING)
def test_a_disk_too_small_for_all_of_it_is_used_as_far_as_it_goes(setting):
    device = least("device", setting)
    everything = taken(place(PLANS, Budgets(device, PLENTY), setting), setting)
    whole = taken(
        place(PLANS, Budgets(device, least("host", setting, device=device, disk=PLENTY), PLENTY), setting), setting
    )
    budgets = Budgets(device, everything.host - 1, whole.disk // 2)
    placement = place(PLANS, budgets, setting)
    check(placement, setting, budgets)
    assert 0 < placement.state.count("disk") < N // 2 + 1
