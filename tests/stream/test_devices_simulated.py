"""Schedules that can be computed by hand, on a clock without time."""

import threading

import pytest
import torch

from cgpt.stream.devices_simulated import SimulatedDevice, together
from cgpt.stream.rates import Rates
from cgpt.stream.timeline import Timeline

RATES = {"flops": 100.0, "down": 10.0, "up": 5.0, "memory": 20.0, "read": 4.0, "write": 2.0}
EXACT = 1e-12
RANKS = [2, 3, 4]


def simulated(arena_bytes=0, timeline=None, **rates):
    return SimulatedDevice(Rates(**RATES | rates), arena_bytes, timeline=timeline)


def nothing():
    pass


def at(expected):
    return pytest.approx(expected, abs=EXACT, rel=0)


@pytest.mark.parametrize(
    ("lane", "seconds"), [("down", 4.0), ("up", 8.0), ("optimizer", 2.0), ("read", 10.0), ("write", 20.0)]
)
def test_each_lane_has_its_rate(lane, seconds):
    device = simulated()
    assert device.submit(lane, "", nothing, nbytes=40).at == at(seconds)
    assert device.submit(lane, "", nothing, nbytes=40).at == at(2 * seconds)
    assert device.now == 0.0


def test_compute_overlaps_the_next_layers_weights():
    """Weights of 3 s, arithmetic of 2 s: after the fill, the link binds; the last layer's arithmetic hangs over."""
    device = simulated()
    weights = [device.submit("down", "", nothing, nbytes=30) for _ in range(4)]
    ends = [device.compute("", nothing, [ready], flops=200.0)[1].at for ready in weights]
    assert [ready.at for ready in weights] == at([3.0, 6.0, 9.0, 12.0])
    assert ends == at([5.0, 8.0, 11.0, 14.0])
    assert device.now == at(14.0)


def test_arithmetic_that_takes_longer_hides_the_link():
    device, free, ends = simulated(), [[], []], []
    for i in range(4):
        ready = device.submit("down", "", nothing, free[i % 2], nbytes=30)
        _, used = device.compute("", nothing, [ready], flops=500.0)
        free[i % 2] = [used]
        ends.append((ready.at, used.at))
    # The caller waits for the weights (3, 8, 13, 18), so a slot that is free at 8 is filled from 8.
    assert ends == [at((3.0, 8.0)), at((6.0, 13.0)), at((11.0, 18.0)), at((16.0, 23.0))]


def test_events_hold_across_lanes():
    device = simulated()
    read = device.submit("read", "", nothing, nbytes=10)  # 0 to 2.5
    _, made = device.compute("", nothing, flops=300.0)  # 0 to 3
    up = device.submit("up", "", nothing, [made], nbytes=20)  # 3 to 7
    update = device.submit("optimizer", "", nothing, [read, up], nbytes=10)  # 7 to 7.5
    write = device.submit("write", "", nothing, [update], nbytes=1)  # 7.5 to 8
    down = device.submit("down", "", nothing, nbytes=10)  # 0 to 1: stands behind nothing
    assert [event.at for event in (read, made, up, update, write, down)] == at([2.5, 3.0, 7.0, 7.5, 8.0, 1.0])
    assert device.caller == 0.0
    device.settle()
    assert device.caller == at(8.0)


def test_latency_is_of_every_transfer_and_of_nothing_else():
    device = simulated(latency=0.25)
    ends = [
        device.submit(lane, "", nothing, nbytes=20).at for lane in ("down", "down", "up", "read", "write", "optimizer")
    ]
    assert ends == at([2.25, 4.5, 4.25, 5.25, 10.25, 1.0])
    assert device.submit("down", "", nothing).at == at(4.5)  # moves nothing
    assert device.compute("", nothing, flops=50.0)[1].at == at(0.5)


@pytest.mark.parametrize(("half_duplex", "ends"), [(False, [2.0, 4.0, 4.0, 8.0]), (True, [2.0, 6.0, 8.0, 12.0])])
def test_down_and_up_share_a_half_duplex_link(half_duplex, ends):
    device = simulated(half_duplex=half_duplex)
    assert [device.submit(lane, "", nothing, nbytes=20).at for lane in ("down", "up", "down", "up")] == at(ends)
    assert device.submit("read", "", nothing, nbytes=4).at == at(1.0)


def test_the_caller_cannot_enqueue_in_the_past():
    device = simulated()
    read = device.submit("read", "", nothing, nbytes=20)
    assert not read.done
    read.wait()
    assert read.done
    assert device.caller == at(5.0)
    assert device.compute("", nothing, flops=100.0)[1].at == at(6.0)
    assert device.submit("down", "", nothing, nbytes=10).at == at(6.0)
    assert device.number(torch.tensor(2.5)) == 2.5
    assert device.caller == at(6.0)


def test_the_caller_runs_ahead_of_arithmetic():
    device = simulated()
    _, first = device.compute("", nothing, flops=500.0)
    _, second = device.compute("", nothing, [first], flops=100.0)
    assert device.caller == 0.0
    assert (first.at, second.at) == at((5.0, 6.0))
    assert device.submit("down", "", nothing, nbytes=10).at == at(1.0)


def test_numbers_are_right():
    device = simulated(1024)
    slot, home = device.allocate(256).view(torch.float32), torch.arange(64.0)
    down = device.submit("down", "", lambda: device.copy(slot, home), nbytes=256)
    total, made = device.compute("", slot.sum, [down], flops=64)
    device.submit("up", "", lambda: device.copy(home, slot * 2), [made], nbytes=256)
    assert device.number(total) == 2016.0
    assert torch.equal(home, 2 * torch.arange(64.0))


def test_an_error_stops_the_device():
    device = simulated()
    before = device.submit("down", "", nothing, nbytes=10)
    with pytest.raises(ZeroDivisionError):
        device.submit("read", "", lambda: 1 // 0)
    works = [
        before.wait, device.settle, lambda: device.submit("up", "", nothing), lambda: device.compute("", nothing)
    ]  # fmt: skip
    for work in works:
        with pytest.raises(ZeroDivisionError):
            work()
    device.close()


def test_the_timeline_is_the_clocks():
    timeline = Timeline()
    device = simulated(timeline=timeline)
    ready = device.submit("down", "weights", nothing, nbytes=30)
    device.compute("forward", nothing, [ready], flops=200.0)
    timeline.mark(1, 0.0, device.now)
    found = [(span.lane, span.begin, span.end, span.nbytes, span.flops) for span in timeline.spans(1)]
    assert found == [("compute", 3.0, 5.0, 0, 200.0), ("down", 0.0, 3.0, 30, 0.0)]
    assert {lane: busy for lane, busy in timeline.busy(1).items() if busy} == {"compute": 2.0, "down": 3.0}


def test_a_collective_begins_when_the_last_rank_comes_and_ends_for_all_at_once():
    def work(world):
        device = SimulatedDevice(Rates(**RATES, wire=10.0, wire_latency=0.5), 0, world=world)
        _, made = device.compute("", nothing, flops=100.0 * (world.rank + 1))
        first = device.submit("wire", "", nothing, [made], nbytes=20 - 10 * world.rank)
        second = device.submit("wire", "", nothing, nbytes=10)
        return made.at, first.at, second.at

    assert together(2, work) == [at((1.0, 4.5, 6.0)), at((2.0, 4.5, 6.0))]  # 2 + 0.5 + 20 / 10, and 0.5 + 10 / 10


def test_a_wire_without_others_has_its_rate():
    device = simulated(wire=4.0, wire_latency=0.25)
    assert device.submit("wire", "", nothing, nbytes=10).at == at(2.75)
    assert simulated().submit("wire", "", nothing, nbytes=10).at == 0.0


@pytest.mark.parametrize("count", RANKS)
def test_ranks_get_one_anothers_numbers(count):
    def work(world):
        whole = torch.full((3 * count,), -1.0)
        mine = whole[3 * world.rank : 3 * world.rank + 3]
        mine.copy_(torch.arange(3.0) + 10 * world.rank)
        world.all_gather(whole, mine)
        mine.fill_(-1)  # at once: the others have copied it
        sizes = [rank + 1 for rank in range(count)]  # rank r gets r + 1 of everyone's
        sent = torch.cat([torch.full((n,), 100.0 * world.rank + n) for n in sizes])
        received = torch.empty(count * sizes[world.rank])
        world.exchange(received, sent, [sizes[world.rank]] * count, sizes)
        return whole.tolist(), received.tolist(), world.sent, world.tell(world.rank), world.from_first(world.rank)

    for rank, (whole, received, sent, told, first) in enumerate(together(count, work)):
        want = [10.0 * other + i if other != rank else -1.0 for other in range(count) for i in range(3)]
        assert whole == want
        assert received == [100.0 * other + rank + 1 for other in range(count) for _ in range(rank + 1)]
        assert sent == 4 * (3 * (count - 1) + sum(range(1, count + 1)) - (rank + 1))
        assert told == list(range(count))
        assert first == 0


def test_who_is_told_something_has_waited_for_the_last():
    def work(world):
        device = SimulatedDevice(Rates(**RATES), 0, world=world)
        device.submit("read", "", nothing, nbytes=20 * world.rank).wait()
        world.tell(None)
        return device.caller

    assert together(3, work) == at([10.0, 10.0, 10.0])


@pytest.mark.parametrize("leaves", [True, False])
def test_a_rank_that_fails_or_leaves_hangs_nobody(leaves):
    said = []

    def work(world):
        world.tell(0)
        if world.rank == 1:
            if leaves:
                return
            raise ZeroDivisionError
        try:
            world.tell(1)
        except threading.BrokenBarrierError as error:
            said.append(str(error))
            raise

    with pytest.raises(threading.BrokenBarrierError if leaves else ZeroDivisionError):
        together(3, work)
    assert sorted(said) == [f"rank {rank} waits for rank 1, which has left" for rank in (0, 2)]


def test_ranks_that_disagree_about_sizes_are_told():
    with pytest.raises(ValueError, match=r"all_gather: wanted equal parts of 4, got \[2, 3\]"):
        together(2, lambda world: world.all_gather(torch.empty(4), torch.empty(2 + world.rank)))
    with pytest.raises(ValueError, match=r"exchange: wanted \[1, 2\] elements, got \[1, 1\]"):
        together(2, lambda world: world.exchange(torch.empty(3), torch.empty(2), [1, 2], [1, 1]))
