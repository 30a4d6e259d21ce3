"""What CudaDevice asks of CUDA, against stand-ins that note it: no GPU is needed, and none is tested."""

import contextlib
import threading
import weakref
from dataclasses import replace

import pytest
import torch
from test_streaming import COUNT, PLACEMENTS, assert_same, train

from cgpt.stream import devices_cuda
from cgpt.stream.devices_cuda import CudaDevice, StreamEvent
from cgpt.stream.placement import Placement
from cgpt.stream.timeline import Timeline


class Cuda:
    """Notes every call in `calls`; the device's clock stands at `clock` milliseconds; `broken`: synchronizing fails."""

    def __init__(self, monkeypatch):
        self.calls, self.clock, self.broken = [], 0.0, False
        self.current = threading.local()
        self.when_synchronized = lambda: None
        cuda = self

        class Stream:
            made = 0

            def __init__(self, device=None):
                Stream.made += 1
                self.name = f"lane {Stream.made}"

            def synchronize(self):
                cuda.when_synchronized()
                cuda.calls.append(("synchronize", self.name))

            def wait_event(self, event):
                cuda.calls.append(("wait", self.name, event))

        class Event:
            def __init__(self, enable_timing=False):
                self.timed, self.ready = enable_timing, False

            def record(self, stream):
                self.stream, self.at = stream.name, cuda.clock

            def query(self):
                return self.ready

            def synchronize(self):
                cuda.calls.append(("synchronize", self))
                if cuda.broken:
                    raise RuntimeError("CUDA error: an illegal memory access was encountered")
                self.ready = True

            def elapsed_time(self, end):
                assert self.timed
                assert end.timed
                return end.at - self.at

        self.main = Stream()
        self.main.name = "main"
        Stream.made = 0

        @contextlib.contextmanager
        def stream(chosen):
            self.current.stream = chosen
            yield
            del self.current.stream

        @contextlib.contextmanager
        def device(chosen):
            self.current.device = chosen
            yield
            del self.current.device

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "stream", stream)
        monkeypatch.setattr(torch.cuda, "device", device)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.here())
        monkeypatch.setattr(CudaDevice, "_make_arena", lambda self, nbytes: torch.zeros(nbytes, dtype=torch.uint8))

    def here(self):
        return getattr(self.current, "stream", self.main)


@pytest.fixture
def cuda(monkeypatch):
    return Cuda(monkeypatch)


def test_the_arena_is_zero_before_any_lane_may_copy_into_it(cuda):
    CudaDevice(0, 128)
    assert cuda.calls == [("synchronize", "main")]


def test_a_lanes_event_is_done_once_its_stream_is(cuda):
    device = CudaDevice(0, 128)
    event = device.submit("down", "", lambda: cuda.calls.append(("work", cuda.here().name)))
    event.wait()
    again = device.submit("down", "", lambda: cuda.calls.append(("work", cuda.here().name)))
    other = device.submit("up", "", lambda: cuda.calls.append(("work", cuda.here().name)), [again])
    other.wait()
    one = [("work", "lane 1"), ("synchronize", "lane 1")]
    assert cuda.calls[1:] == [*one, *one, ("work", "lane 2"), ("synchronize", "lane 2")]
    device.close()


def test_a_lane_works_on_its_own_device(cuda):
    device, found = CudaDevice(1, 128), []
    device.submit("down", "", lambda: found.append(cuda.current.device)).wait()
    assert found == [torch.device("cuda", 1)]
    device.close()


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_lane_copies_lives_until_its_stream_is_done(cuda, fails):
    """The gradients' way up: the lane's work gives each up as soon as its copy is enqueued."""
    device, there = CudaDevice(0, 128), torch.zeros(2, 8)
    gradients = {"a": torch.ones(8), "b": torch.ones(8)}
    there_still = [weakref.ref(gradient) for gradient in gradients.values()]
    counts = []
    cuda.when_synchronized = lambda: counts.append(sum(ref() is not None for ref in there_still))

    def work():
        for row, name in enumerate(("a", "b")):
            device.copy(there[row], gradients.pop(name))
        if fails:
            raise ZeroDivisionError

    up = device.submit("up", "", work)
    with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
        up.wait()
    assert counts == [2]
    assert torch.equal(there, torch.ones(2, 8))
    device.close()
    if not fails:  # an error holds the frames that it came through
        assert [ref() for ref in there_still] == [None, None]


@pytest.mark.parametrize("up", [False, True])
def test_no_copy_crosses_the_border_of_two_registered_pieces(cuda, monkeypatch, up):
    device, piece = CudaDevice(0, 128), 256
    monkeypatch.setattr(devices_cuda, "PIECE", piece)
    host, apart = torch.zeros(1024, dtype=torch.uint8), torch.zeros(1024, dtype=torch.uint8)
    values, starts = torch.arange(150, dtype=torch.float32), []
    begin = 128
    near = host[begin : begin + values.nbytes].data.view(torch.float32).view(10, 15)
    far = apart[: values.nbytes].view(torch.float32).view(10, 15)
    (far if up else near).copy_(values.view(10, 15))
    plain = torch.Tensor.copy_

    def copy_(there, here, non_blocking=False):
        assert non_blocking
        part = there if up else here
        first = part.data_ptr() - host.data_ptr()
        starts.append(first)
        assert first // piece == (first + part.nbytes - 1) // piece
        return plain(there, here)

    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    monkeypatch.setattr(devices_cuda, "_on_host", lambda tensor: tensor.untyped_storage().data_ptr() == host.data_ptr())
    device.submit("up", "", lambda: device.copy(*((near, far) if up else (far, near)))).wait()
    assert starts == [128, 256, 512]
    assert torch.equal((near if up else far).flatten(), values)
    device.close()


def test_what_a_failing_lane_has_enqueued_is_waited_for(cuda):
    device = CudaDevice(0, 128)
    with pytest.raises(ZeroDivisionError):
        device.submit("down", "", lambda: 1 // 0).wait()
    assert cuda.calls[1:] == [("synchronize", "lane 1")]
    device.close()


@pytest.mark.parametrize("serial", [False, True])
def test_lanes_wait_for_arithmetic_that_is_only_enqueued(cuda, serial):
    device = CudaDevice(0, 128, serial=serial)
    _, made = device.compute("", lambda: None)
    assert isinstance(made, StreamEvent)
    assert not made.done
    device.submit("up", "", lambda: cuda.calls.append("copy"), [made]).wait()
    assert cuda.calls[1:] == [("synchronize", made.recorded), "copy", ("synchronize", "lane 1")]
    device.close()


def test_arithmetic_stands_behind_arithmetic_without_stopping_the_caller(cuda):
    device = CudaDevice(0, 128)
    _, first = device.compute("", lambda: None)
    device.compute("", lambda: cuda.calls.append("work"), [first])
    assert cuda.calls[1:] == [("wait", "main", first.recorded), "work"]


def test_arithmetic_waits_for_lanes(cuda):
    device, hold = CudaDevice(0, 128), threading.Event()
    down = device.submit("down", "", hold.wait)
    threading.Timer(0.02, hold.set).start()
    device.compute("", lambda: cuda.calls.append("work"), [down])
    assert cuda.calls[1:] == [("synchronize", "lane 1"), "work"]
    device.close()


def test_an_asynchronous_error_stops_the_device(cuda):
    device = CudaDevice(0, 128)
    _, made = device.compute("", lambda: None)
    cuda.broken = True
    up = device.submit("up", "", lambda: cuda.calls.append("copy"), [made])
    for wait in (up.wait, lambda: device.submit("down", "", lambda: None), device.settle):
        with pytest.raises(RuntimeError, match="illegal memory access"):
            wait()
    assert "copy" not in cuda.calls
    device.close()


def test_spans_of_arithmetic_are_the_devices_times(cuda):
    timeline = Timeline()
    device = CudaDevice(0, 128, timeline=timeline)
    cuda.clock = 1000.0

    def kernel(milliseconds):
        cuda.clock += milliseconds

    _, first = device.compute("a forward", lambda: kernel(2.0), flops=8.0)
    kernel(5.0)  # idle
    device.compute("b forward", lambda: kernel(3.0))
    assert not timeline.spans()
    first.settle()
    _, third = device.compute("c forward", lambda: kernel(0.5))
    assert [span.what for span in timeline.spans()] == ["a forward"]
    for _, _, end, _ in device._unnoted:
        end.settle()
    device.settle()
    assert third.done
    a, b, c = timeline.spans()
    origin = a.begin
    found = [(span.what, span.begin - origin, span.end - origin, span.flops) for span in (a, b, c)]
    expected = [("a forward", 0.0, 0.002, 8.0), ("b forward", 0.007, 0.01, 0.0), ("c forward", 0.01, 0.0105, 0.0)]
    for got, wanted in zip(found, expected, strict=True):
        assert got[0] == wanted[0]
        assert got[1:] == pytest.approx(wanted[1:], abs=1e-9)


def test_without_a_timeline_events_keep_no_time(cuda):
    _, made = CudaDevice(0, 128).compute("", lambda: None)
    assert not made.recorded.timed


def test_a_number_that_is_read_notes_what_it_waited_for(cuda):
    timeline = Timeline()
    device = CudaDevice(0, 128, timeline=timeline)
    value, made = device.compute("head norm", lambda: torch.tensor(2.5))
    made.settle()
    assert device.number(value) == 2.5
    assert [span.what for span in timeline.spans()] == ["head norm"]


class Late:
    """CUDA as far as the lanes see it, on the CPU: a copy is done when its stream is waited for, and takes NaN from a
    tensor that is gone by then."""

    def __init__(self, monkeypatch):
        cuda, plain, start = Cuda(monkeypatch), torch.Tensor.copy_, CudaDevice._start
        self.copies = 0
        pending = {}

        def copy_(there, here, non_blocking=False):
            if not non_blocking:
                return plain(there, here)
            whole = here if here._base is None else here._base
            stretch = here.storage_offset(), here.shape
            pending.setdefault(threading.get_ident(), []).append((there, weakref.ref(whole), stretch))
            return there

        def finish():
            for there, whole, (start, shape) in pending.pop(threading.get_ident(), ()):
                self.copies += 1
                if whole() is None:
                    there.fill_(float("nan"))
                else:
                    plain(there, whole().as_strided(shape, there.stride(), start))

        def on_the_cpu(device, _, *rest):
            start(device, torch.device("cpu"), *rest)

        cuda.when_synchronized = finish
        monkeypatch.setattr(torch.Tensor, "copy_", copy_)
        monkeypatch.setattr(torch.cuda.Event, "query", lambda self: True)
        monkeypatch.setattr(CudaDevice, "_start", on_the_cpu)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("name", ["host", "mixed", "disk"])
@pytest.mark.parametrize("activations", ["device", "host"])
def test_copies_that_end_late_change_no_bit(monkeypatch, tmp_path, name, activations, together):
    setting = {"sizes": (2, 1), "steps": 3, "together": together}
    wanted = train(Placement.resident(COUNT), **setting)
    late = Late(monkeypatch)
    monkeypatch.setattr(devices_cuda, "PIECE", 1 << 10)
    placement = replace(PLACEMENTS[name], activations=activations)
    got = train(placement, disk=str(tmp_path), device=CudaDevice(0, 1 << 20, optimizer_threads=1), **setting)
    assert late.copies > 20
    assert_same(got, wanted)
