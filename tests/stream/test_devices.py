"""Lanes: order, dependencies across them, errors that reach everyone, exact memory, races that are seen."""

import gc
import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch

from cgpt.errors import InputError
from cgpt.stream.devices import LANES, CpuDevice, open_device
from cgpt.stream.timeline import Timeline

SOON = 20  # seconds until something that should end counts as hanging


@pytest.fixture(params=[{}, {"serial": True}, {"hunt": 3}], ids=["lanes", "serial", "hunting"])
def device(request):
    device = CpuDevice(4096, **request.param)
    yield device
    soon(device.close)


def soon(work):
    """Its result, or what it raises; fails where it hangs."""
    found = []

    def run():
        try:
            found.append((work(), None))
        except BaseException as error:
            found.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(SOON)
    assert found, "hangs"
    result, error = found[0]
    if error is not None:
        raise error
    return result


def test_a_lane_works_in_the_order_of_submission(device):
    done = []
    for i in range(30):
        device.submit("down", str(i), lambda i=i: done.append(i))
    soon(device.settle)
    assert done == list(range(30))


def test_work_stands_behind_its_events_across_lanes(device):
    done = []

    def late(name, seconds=0.02):
        time.sleep(seconds)
        done.append(name)

    read = device.submit("read", "", lambda: late("read"))
    update = device.submit("optimizer", "", lambda: late("optimizer"), [read])
    up = device.submit("up", "", lambda: late("up", 0.05))
    down = device.submit("down", "", lambda: done.append("down"), [update, up])
    result, there = soon(lambda: device.compute("", lambda: tuple(done), [down]))
    there.wait()
    assert there.done
    assert down.done
    assert set(result) == {"read", "optimizer", "up", "down"}
    assert result[-1] == "down"
    assert result.index("read") < result.index("optimizer")


def test_lanes_work_side_by_side():
    device = CpuDevice(0)
    met = threading.Barrier(len(LANES), timeout=SOON)  # passes only when all of them are at it at once
    for lane in LANES:
        device.submit(lane, "", met.wait)
    soon(device.settle)
    device.close()


def test_lanes_and_serial_work_give_the_same_numbers():
    def run(**options):
        device = CpuDevice(1 << 14, **options)
        host = [torch.arange(64, dtype=torch.float32) + i for i in range(8)]
        slots = [device.allocate(256).view(torch.float32) for _ in range(2)]
        sums, free = [], [[], []]
        for i, weights in enumerate(host * 3):
            slot = slots[i % 2]
            ready = device.submit("down", "", lambda s=slot, w=weights: device.copy(s, w), free[i % 2])
            total, used = device.compute("", lambda s=slot: (s * s).sum(), [ready])
            _, used = device.compute("poison", lambda s=slot: device.poison(s), [used])
            free[i % 2] = [used]
            sums.append(total.item())
        device.settle()
        device.close()
        return sums

    wanted = [sum((k + i) ** 2 for k in range(64)) for i in range(8)] * 3
    assert run(serial=True) == wanted
    assert run() == wanted
    assert [run(hunt=seed) for seed in range(4)] == [wanted] * 4


def test_a_lanes_error_reaches_everyone_and_nothing_hangs(device):
    fault, begun = OSError("no room"), []

    def fail():
        raise fault

    def hit(work):
        with pytest.raises(OSError, match="no room") as caught:
            soon(work)
        assert caught.value is fault

    if device.serial:
        hit(lambda: device.submit("write", "", fail))
    else:
        hold = threading.Event()
        held = device.submit("read", "", lambda: hold.wait(SOON))
        failed = device.submit("write", "", fail, [held])
        behind = device.submit("optimizer", "", lambda: begun.append(1), [failed])
        hold.set()
        hit(failed.wait)
        hit(behind.wait)
    hit(lambda: device.submit("down", "", lambda: begun.append(2)))
    hit(lambda: device.compute("", lambda: begun.append(3)))
    hit(device.settle)
    assert not begun


def test_the_first_error_wins():
    device = CpuDevice(0)
    hold = threading.Event()

    def fail(name):
        hold.wait(SOON)
        raise OSError(name)

    first = device.submit("read", "", lambda: fail("first"))
    device.submit("read", "", lambda: fail("second"))
    device.submit("write", "", lambda: fail("third"), [first])
    hold.set()
    for _ in range(2):
        with pytest.raises(OSError, match="first"):
            soon(device.settle)
    device.close()


@pytest.mark.parametrize("hunt", [None, 0])
def test_work_that_cannot_even_begin_stops_the_device(hunt):
    """An asynchronous CUDA error shows itself where a lane waits for an event."""
    device = CpuDevice(0, hunt=hunt)
    event = device.submit("read", "", lambda: None)
    soon(event.wait)

    def broken():
        raise RuntimeError("illegal memory access")

    event.settle = broken
    behind = device.submit("up", "", lambda: None, [event])
    with pytest.raises(RuntimeError, match="illegal memory access"):
        soon(behind.wait)
    soon(device.close)


def test_an_error_of_arithmetic_is_the_callers_own(device):
    with pytest.raises(ZeroDivisionError):
        device.compute("", lambda: 1 // 0)
    assert device.compute("", lambda: 7)[0] == 7


def test_an_unknown_lane_is_refused(device):
    with pytest.raises(ValueError, match="lane must be one of down, up, wire, optimizer, read, write, got sideways"):
        device.submit("sideways", "", lambda: None)


def test_the_arena_is_exact_and_aligned():
    device = CpuDevice(1000)
    first = device.allocate(100)
    second = device.allocate(1000 - 128)
    assert (first.numel(), second.numel(), device.taken) == (100, 872, 1000)
    assert first.dtype == torch.uint8
    assert not first.any()
    assert not second.any()
    assert first.data_ptr() % 128 == second.data_ptr() % 128 == 0
    first.fill_(1)
    assert not second.any()
    with pytest.raises(InputError, match=r"wanted 1 bytes more, got 0 of 1,000"):
        device.allocate(1)
    assert device.allocate(0).numel() == 0
    assert device.taken == 1000


def test_what_is_left_is_counted_from_the_next_aligned_byte():
    device = CpuDevice(256)
    device.allocate(1)
    with pytest.raises(InputError, match=r"wanted 129 bytes more, got 128 of 256"):
        device.allocate(129)
    assert device.allocate(128).numel() == 128


def test_parts_of_the_arena_count_their_own_versions():
    """Autograd refuses a saved tensor that has changed: what is saved lies beside what lanes write."""
    device = CpuDevice(256)
    saved, other = device.allocate(128).view(torch.float32), device.allocate(128)
    leaf = torch.ones(32, requires_grad=True)
    product = (leaf * saved).sum()
    other.fill_(1)
    product.backward()
    assert torch.equal(leaf.grad, torch.zeros(32))


def race(device, patient):
    """A slot is given to a copy; the planted fault does not wait until it is there."""
    slot, weights = device.allocate(4096).view(torch.float32), torch.ones(1024)
    device.poison(slot)
    ready = device.submit("down", "", lambda: device.copy(slot, weights))
    return device.compute("", lambda: slot.sum().item(), [ready] if patient else [])[0]


def test_a_reader_that_does_not_wait_is_caught():
    patient = [soon(lambda s=seed: race(CpuDevice(4096, hunt=s), True)) for seed in range(12)]
    hasty = [soon(lambda s=seed: race(CpuDevice(4096, hunt=s), False)) for seed in range(12)]
    assert patient == [1024.0] * 12
    assert any(found != 1024.0 for found in hasty)  # NaN


def release(device, patient):
    """A lane brings gradients up from memory that is released behind the copy, or, the planted fault, too early."""
    gradient, home = device.allocate(4096).view(torch.float32), torch.zeros(1024)
    _, made = device.compute("", lambda: gradient.fill_(2))
    up = device.submit("up", "", lambda: device.copy(home, gradient), [made])
    device.compute("poison", lambda: device.poison(gradient), [up] if patient else [])
    soon(device.settle)
    return home.sum().item()


def test_memory_that_is_released_too_early_is_caught():
    assert [release(CpuDevice(4096, hunt=seed), True) for seed in range(12)] == [2048.0] * 12
    assert any(release(CpuDevice(4096, hunt=seed), False) != 2048.0 for seed in range(12))
    assert release(CpuDevice(4096, serial=True), False) == 2048.0  # which is why one hunts


def test_delays_are_those_of_the_seed(monkeypatch):
    def delays(seed):
        slept = []
        device = CpuDevice(0, hunt=seed, serial=True)
        with monkeypatch.context() as patch:
            patch.setattr(time, "sleep", slept.append)
            for lane in (*LANES, *LANES):
                device.submit(lane, "", lambda: None)
                device.compute("", lambda: None)
        return slept

    assert delays(1) == delays(1) != delays(2)
    assert 0 < len(delays(1)) < 20
    assert all(0 <= seconds <= 0.002 for seconds in delays(1))


def test_only_hunting_poisons():
    memory = torch.zeros(8)
    CpuDevice(0).poison(memory)
    assert torch.equal(memory, torch.zeros(8))
    CpuDevice(0, hunt=0).poison(memory)
    assert memory.isnan().all()
    assert (memory.view(torch.bfloat16).isnan()).all()


def test_closing_settles_and_may_be_repeated(device):
    before, done = set(threading.enumerate()), []
    device.submit("write", "", lambda: (time.sleep(0.02), done.append(1)))
    soon(device.close)
    soon(device.close)
    assert done == [1]
    assert set(threading.enumerate()) <= before


def test_a_device_that_nobody_closes_is_freed_with_its_threads():
    before = set(threading.enumerate())
    device = CpuDevice(1 << 20)
    arena = weakref.ref(device)
    event = device.submit("down", "", lambda: None)
    soon(event.wait)
    threads = set(threading.enumerate()) - before
    assert len(threads) == 1
    del device, event
    deadline = time.monotonic() + SOON
    while arena() is not None and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.001)  # the lane's thread lets go of its last work
    assert arena() is None
    for thread in threads:
        thread.join(SOON)
        assert not thread.is_alive()


def test_ctrl_c_leaves_lanes_that_can_be_closed():
    device = CpuDevice(0)
    hold, done = threading.Event(), []
    first = device.submit("down", "", lambda: hold.wait(SOON))
    device.submit("up", "", lambda: done.append(1), [first])

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        device.compute("", interrupted)
    hold.set()
    soon(device.close)
    assert done == [1]


EXIT = """
import threading, time, torch
from cgpt.stream.devices import CpuDevice
device = CpuDevice(1 << 24)
part = device.allocate(1 << 24)
{work}
print("end", flush=True)
"""

BUSY = """
for i in range(2000):
    device.submit("down", "", lambda: part.fill_(1))
    device.submit("up", "", lambda: part.view(torch.float32).sum())
"""
DEAD = """
def fail():
    raise OSError("gone")
device.submit("read", "", fail)
time.sleep(0.1)
"""


@pytest.mark.parametrize("work", ["device.submit('down', '', lambda: None)", BUSY, DEAD], ids=["idle", "busy", "dead"])
def test_the_interpreter_ends_with_a_device_left_open(work):
    """Nor does a thread that is in native code abort it."""
    found = subprocess.run(
        [sys.executable, "-c", EXIT.format(work=work)], capture_output=True, text=True, timeout=120, check=False
    )
    assert (found.returncode, found.stdout, found.stderr) == (0, "end\n", "")


def test_spans_are_noted():
    timeline = Timeline()
    device = CpuDevice(0, timeline=timeline)
    begin = time.perf_counter()
    event = device.submit("down", "h.0 weights", lambda: time.sleep(0.01), nbytes=64)
    device.compute("h.0 forward", lambda: None, [event], flops=8.0)
    end = time.perf_counter()
    device.close()
    compute, down = timeline.spans()
    assert (down.lane, down.what, down.nbytes) == ("down", "h.0 weights", 64)
    assert (compute.lane, compute.what, compute.flops) == ("compute", "h.0 forward", 8.0)
    assert begin <= down.begin <= down.end - 0.01
    assert down.end <= compute.begin <= compute.end <= end


def test_a_device_by_torchs_name():
    assert isinstance(open_device("cpu", 128), CpuDevice)
    assert open_device("cpu", 128, serial=True).serial


def test_the_optimizers_threads_are_checked_before_any_lane_opens():
    with pytest.raises(InputError, match="optimizer_threads: wanted 1 or more, got -1"):
        CpuDevice(0, optimizer_threads=-1)
    assert CpuDevice(0, optimizer_threads=3).optimizer_threads == 3
