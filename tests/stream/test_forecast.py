"""Forecasts against sums done by hand, and on both sides of every threshold from which a lane hides."""

from dataclasses import replace

import pytest

from cgpt.stream import forecast as module
from cgpt.stream.forecast import exposed_optimizer, forecast
from cgpt.stream.format import Format
from cgpt.stream.layout import layers_plan
from cgpt.stream.placement import Placement
from cgpt.stream.rates import Forecast, Rates, Work, hides

L, P, TINY = 24, 1 << 20, 1024  # blocks of P elements between an embedding and a head of a chunk
PLANS = layers_plan(
    [("embed", {"e": (32, 32)}), *((f"h.{i}", {f"w{i}": (1024, 1024)}) for i in range(L)), ("head", {"g": (TINY,)})]
)
N = L + 2
ALL = L * P + 2 * TINY
RATES = Rates(flops=1e12, down=1e9, up=1e9, memory=1e12, read=1e12, write=1e12)


def everywhere(weights, state, recompute=True, **more):
    return Placement((weights,) * N, (state,) * N, (recompute,) * N, **more)


HOST, RESIDENT = everywhere("host", "host"), everywhere("device", "device")


def step(placement=HOST, tokens=4000.0, rates=RATES, width=1, **more):
    return forecast(PLANS, placement, rates, Work(Format(), tokens, width, **more))


def exposed(placement, tokens, rates):
    return exposed_optimizer(PLANS, placement, rates, Work(Format(), tokens, 1))


def near(value):
    return pytest.approx(value, rel=1e-9)


def test_every_lane_by_hand():
    found = step(rates=replace(RATES, memory=2e10))
    assert found.lanes["compute"] == near((8 * P * L + 6 * TINY) * 4000 / 1e12)
    assert found.lanes["down"] == near((2 * L * 2 * P + 3 * 2 * TINY) / 1e9)  # the head's weights come once
    assert found.lanes["up"] == near(2 * ALL / 1e9)
    assert found.lanes["optimizer"] == near(26 * ALL / 2e10)
    assert found.lanes["read"] == found.lanes["write"] == 0
    assert found.bound == max(found.lanes.values())
    assert found.seconds >= found.bound


def test_resident_is_arithmetic_alone():
    found = step(replace(RESIDENT, recompute=(False,) * N))
    assert found.seconds == near((6 * P * L + 6 * TINY) * 4000 / 1e12)
    assert {lane for lane, seconds in found.lanes.items() if seconds} == {"compute"}
    assert sum(found.stalls.values()) == 0
    assert found.binding == "compute"


def test_adamw_on_the_device_takes_its_memory():
    plain, found = step(RESIDENT), step(RESIDENT, device_memory=1e12)
    assert found.seconds - plain.seconds == near(26 * ALL / 1e12)


def test_attention_counts_as_often_as_the_forward_runs():
    plain, found = step(RESIDENT), step(RESIDENT, attention=1000.0)
    assert found.seconds - plain.seconds == near(4 * 1000 * L * 4000 / 1e12)


@pytest.mark.parametrize(("format", "working", "traffic"), [
    (Format("bf16"), 2, 26), (Format("fp16"), 2, 30), (Format("fp32"), 4, 28), (Format("bf16", "bf16"), 2, 18),
])  # fmt: skip
def test_widths_of_each_format(format, working, traffic):
    found = forecast(PLANS, HOST, RATES, Work(format, 4000, 1))
    assert found.lanes["up"] == near(working * ALL / 1e9)
    assert found.lanes["optimizer"] == near(traffic * ALL / 1e12)


def test_partial_sums_cross_twice_from_the_second_visit_on():
    found = step(replace(HOST, visits=3))
    assert found.lanes["up"] == near((2 * 4 + 2) * ALL / 1e9)
    weights = 3 * (2 * L * 2 * P + 3 * 2 * TINY)
    assert found.lanes["down"] == near((weights + 2 * 4 * ALL) / 1e9)
    assert found.lanes["optimizer"] == near(26 * ALL / 1e12)  # once a step


def test_activations_on_the_host_cross_the_link_once_each_way():
    here, there = step(width=8), step(replace(HOST, activations="host"), width=8)
    moved = L * 4000 * 8 * 2 / 1e9
    assert there.lanes["up"] - here.lanes["up"] == near(moved)
    assert there.lanes["down"] - here.lanes["down"] == near(moved)


def test_weights_kept_on_the_device_are_renewed_once_a_step():
    found = step(everywhere("device", "host", visits=3))
    assert found.lanes["down"] == near((2 * ALL + 2 * 4 * ALL) / 1e9)


def test_the_disk_reads_and_writes_every_record_once_a_step():
    found = step(everywhere("host", "disk", visits=2))
    records = 12 * ALL  # whole blocks
    assert found.disk_read == found.disk_written == near(records)
    found = step(everywhere("disk", "disk", visits=2))
    assert found.disk_written == near(records)
    assert found.disk_read == near(records + 2 * (2 * L * 2 * P + 3 * 4096))


def test_gradients_of_a_single_visit_wait_on_the_disk_too():
    found = step(everywhere("host", "disk"))
    assert found.disk_read == found.disk_written == near(14 * L * P + 2 * 4 * 4096)


def test_a_slow_disk_binds():
    found = step(everywhere("host", "disk"), rates=replace(RATES, down=1e12, up=1e12, write=1e9))
    assert found.binding == "write"
    assert found.seconds >= found.lanes["write"] == near((14 * L * P + 2 * 4 * 4096) / 1e9)


def block(passes, tokens):
    return passes * 2 * P * tokens / RATES.flops


def test_forward_hides_the_weights_from_its_threshold_on():
    threshold = hides(RATES)["down in forward"]
    assert threshold == near(1e12 / 1e9)
    fetch = 2 * P / 1e9
    rates = replace(RATES, up=1e12)
    above, below = step(tokens=1.1 * threshold, rates=rates), step(tokens=0.5 * threshold, rates=rates)
    assert above.binding == "compute"
    assert sum(above.stalls.values()) < 2.1 * fetch  # the first layer's, and the last's behind the head's short turn
    assert below.binding == "down"
    # forward at the link's speed; the fetch before the first and the turn at the top overlap nothing but themselves
    assert below.seconds == pytest.approx(L * fetch + L * block(3, 0.5 * threshold), abs=2 * fetch)


def test_backward_hides_the_gradients_from_its_threshold_on():
    rates = replace(RATES, down=1e12, up=1e8)
    threshold = hides(rates)["up in backward"]
    assert threshold == near(2 * 1e12 / (6 * 1e8))
    send = 2 * P / 1e8
    above, below = step(tokens=1.1 * threshold, rates=rates), step(tokens=0.5 * threshold, rates=rates)
    assert sum(above.stalls.values()) < 1.1 * send  # the first layer's update waits for the last gradients
    assert below.binding == "up"
    assert below.seconds == pytest.approx(L * send + L * block(1, 0.5 * threshold), abs=2 * send)


def test_partial_sums_triple_what_backward_has_to_hide():
    rates = replace(RATES, up=1e12)
    one, several = hides(rates), hides(rates, visits=8)
    assert several["down in backward"] == near(3 * one["down in backward"]) == near(1000)
    assert several["up in backward"] == near(2 * one["up in backward"])
    place = replace(HOST, visits=8)
    above, below = step(place, 8 * 1100, rates), step(place, 8 * 500, rates)
    top = 6 * P / 1e9 + 2 * P / 1e9  # nothing hides a visit's first weights, nor weights and sums of its last block
    assert sum(above.stalls.values()) < 8 * 1.1 * top
    assert below.binding == "down"
    assert below.seconds == pytest.approx(8 * L * (2 + 6) * P / 1e9, abs=8 * top)
    assert sum(below.stalls.values()) > 4 * sum(above.stalls.values())


def test_the_next_forward_hides_adamw_from_its_threshold_on():
    """With the first two layers at home on the device, nothing of AdamW is seen; the formula's other side is."""
    rates = replace(RATES, down=1e12, up=1e12, memory=1e10)
    threshold = hides(rates)["optimizer in forward"]
    assert threshold == near(26 * 1e12 / (2 * 1e10))
    words = ("device",) * 2 + ("host",) * (N - 2)
    place = Placement(words, words, (True,) * N)
    assert exposed(place, 1.1 * threshold, rates) == pytest.approx(0, abs=1e-9)
    update = 26 * P / 1e10
    left = (L - 1) * (update - block(1, 0.5 * threshold)) - block(1, 0.5 * threshold)
    assert exposed(place, 0.5 * threshold, rates) == pytest.approx(left + block(1, 0.5 * threshold), abs=update)
    assert left > 2 * update
    # all on the host: the first block's update, and no more
    assert exposed(HOST, 1.1 * threshold, rates) == pytest.approx(update, rel=0.05)


def test_what_is_kept_lowers_the_threshold():
    assert hides(RATES, away=0.25)["down in forward"] == near(250)
    assert hides(RATES, away=0.0)["down in forward"] == 0


def test_hidden_streaming_costs_less_than_three_percent():
    threshold = max(hides(RATES).values())
    streamed, resident = step(tokens=3 * threshold), step(RESIDENT, tokens=3 * threshold)
    assert resident.seconds < streamed.seconds < 1.03 * resident.seconds


def test_half_duplex_takes_turns():
    rates = replace(RATES, flops=1e15)
    full, half = step(rates=rates), step(rates=replace(rates, half_duplex=True))
    moved = full.lanes["down"] + full.lanes["up"]
    assert half.lanes == full.lanes
    assert full.seconds < 0.9 * moved < moved <= half.seconds


def test_latency_is_paid_by_the_transfer():
    plain, slow = step(), step(rates=replace(RATES, latency=1e-3))
    assert slow.lanes["down"] - plain.lanes["down"] == near((2 * (N - 1) + 1) * 1e-3)
    assert slow.lanes["up"] - plain.lanes["up"] == near(N * 1e-3)


@pytest.mark.parametrize("place", [HOST, everywhere("host", "disk"), replace(HOST, activations="host")])
@pytest.mark.parametrize("tokens", [3000, 30000])
def test_visits_in_the_middle_are_alike(place, tokens, monkeypatch):
    place, rates = replace(place, visits=9), replace(RATES, memory=1e10, write=5e9, read=5e9)
    short = step(place, tokens, rates, width=64)
    monkeypatch.setattr(module, "VISITS", 9)
    whole = step(place, tokens, rates, width=64)
    assert short.seconds == pytest.approx(whole.seconds, rel=0.02)
    assert short.lanes == pytest.approx(whole.lanes, rel=1e-9)
    assert short.disk_written == near(whole.disk_written)


def test_binding_names_what_the_arithmetic_waits_for():
    stalls = {"down": 0.5, "up": 0.1}
    assert Forecast(10.0, 1, {}, stalls, 0, 0, 0).binding == "down"
    assert Forecast(100.0, 1, {}, stalls, 0, 0, 0).binding == "compute"


RANKS, WIRE = 4, replace(RATES, down=1e12, up=1e12, wire=1e9)


def shared(place=RESIDENT, rows=1, tokens=4000.0, rates=WIRE, **more):
    """A step of so many tokens on each of RANKS."""
    place = replace(place, ranks=RANKS, micro_batches=rows, **more)
    return step(place, RANKS * tokens, rates)


def crossing(elements):
    """Seconds of weights or gradients, a rank's own part being there already."""
    return (RANKS - 1) / RANKS * 2 * elements / WIRE.wire


@pytest.mark.parametrize(("place", "times"), [(HOST, 2), (everywhere("device", "host"), 1), (RESIDENT, 1)])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_the_wire_by_hand(place, times, rows):
    found = shared(place, rows)
    small = RANKS * TINY  # a chunk of the embedding, and of the head, is one rank's; the others' are padding
    weights = times * L * P + (3 if times == 2 else 2) * small
    numbers = (RANKS - 1) * 8 * (rows + (L * P / RANKS + 2 * TINY) / 1024)
    assert found.received == near(crossing(weights + rows * (L * P + 2 * small)) * WIRE.wire + numbers)
    assert found.lanes["wire"] == near(found.received / WIRE.wire)


def test_each_rank_does_its_share():
    alone, found = step(HOST, 4000), shared(HOST, tokens=1000)
    for lane in ("down", "up", "optimizer"):
        assert found.lanes[lane] == pytest.approx(
            alone.lanes[lane] * (1 if lane == "optimizer" else 1e-3) / 4, rel=0.01
        )
    assert found.lanes["compute"] == near(alone.lanes["compute"] / 4)
    assert found.tokens == alone.tokens


def test_nobody_else_changes_nothing():
    for place in (HOST, RESIDENT, everywhere("host", "disk"), replace(HOST, visits=3, micro_batches=2)):
        assert step(place, rates=replace(RATES, wire=1.0, wire_latency=1.0)) == step(place)


def test_forward_hides_the_wire_from_its_threshold_on():
    rates = replace(WIRE, flops=1e12)
    threshold = hides(rates, away=0.0, ranks=RANKS)["wire in forward"]
    assert threshold == near(3 / 4 * 2 * 1e12 / (2 * 1e9))
    several = {"rows": 1, "visits": 4}  # of which the first alone has weights to wait for
    once = shared(tokens=4 * 0.5 * threshold, rates=rates, **several)
    late = L * (crossing(P) - block(1, 0.5 * threshold))
    backward = 4 * L * (crossing(P) - block(2, 0.5 * threshold))  # whose threshold is the same, with nothing streamed
    assert once.stalls["wire"] == pytest.approx(late + max(0, backward), abs=4 * 2 * crossing(P))
    above = shared(tokens=4 * 1.1 * threshold, rates=rates, **several)
    ends = 4 * (crossing(P) + crossing(RANKS * TINY))  # each visit's last gradients, and the first weights
    assert above.stalls["wire"] < 1.2 * (ends + crossing(P))


@pytest.mark.parametrize(("place", "away"), [(RESIDENT, 0.0), (HOST, 1.0)])
@pytest.mark.parametrize("rows", [1, 4])
def test_backward_hides_the_wire_from_its_threshold_on(place, away, rows):
    place = replace(place, recompute=(bool(away),) * N)
    threshold = hides(WIRE, away=away, ranks=RANKS, rows=rows)["wire in backward"]
    assert threshold == near(3 / 4 * 2 * max(away + rows, rows * (1 + away / 2)) * 1e12 / ((6 if away else 4) * 1e9))
    above, below = (shared(place, rows, tokens=share * threshold) for share in (1.1, 0.5))
    forward = max(0, crossing(P) - block(1, 0.5 * threshold))
    backward = (away + rows) * crossing(P) - block(3 if away else 2, 0.5 * threshold)
    assert below.binding == "wire"
    assert below.stalls["wire"] == pytest.approx(L * (forward + backward), rel=0.1)
    hidden = L * max(0, crossing(P) - block(1, 1.1 * threshold))  # forward has a threshold of its own
    assert above.stalls["wire"] < hidden + 3.5 * crossing(P)  # the ends


def test_latency_is_paid_by_the_collective():
    plain, slow = (shared(HOST, 3, rates=replace(WIRE, wire_latency=late)) for late in (0.0, 1e-3))
    calls = 2 * (N - 1) + 1 + 3 * N + 1  # weights, gradients, and the step's numbers
    assert slow.lanes["wire"] - plain.lanes["wire"] == near(calls * 1e-3)


def test_micro_batches_that_do_not_divide_evenly():
    """Of seven, the first of four ranks has two."""
    work = Work(Format(), 7 * 100.0, 1, micro_batch_tokens=100.0)
    place = replace(RESIDENT, ranks=RANKS, micro_batches=2, recompute=(False,) * N)
    found = forecast(PLANS, place, replace(WIRE, wire=1e15), work)
    assert found.lanes["compute"] == near((6 * P * L + 6 * TINY) * 200 / 1e12)
    assert found.tokens == 700
