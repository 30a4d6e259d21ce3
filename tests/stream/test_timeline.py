"""Spans in, traces and sums out, in bounded memory."""

import json
import struct
import threading
import tracemalloc

import pytest

from cgpt import plots
from cgpt.plots import plot_timeline
from cgpt.stream import timeline as module
from cgpt.stream.devices import CpuDevice
from cgpt.stream.timeline import ROWS, Span, Timeline


def two_steps():
    timeline = Timeline()
    timeline.record("compute", "h.0 forward", 10.0, 11.5, flops=6.0)
    timeline.record("down", "h.1 weights", 10.5, 12.5, nbytes=64)
    timeline.mark(1, 10.0, 12.0)
    timeline.record("compute", "h.1 forward", 12.25, 13.0)
    timeline.record("write", "h.0 state", 12.5, 15.0, nbytes=128)
    timeline.mark(2, 12.0, 14.0)
    return timeline


def test_busy_is_the_part_within_the_step():
    timeline = two_steps()
    nothing = dict.fromkeys(ROWS, 0.0)
    assert timeline.busy(1) == nothing | {"compute": 1.5, "down": 1.5}
    assert timeline.busy(2) == nothing | {"compute": 0.75, "down": 0.5, "write": 1.5}


def test_spans_are_those_that_overlap_the_step_by_lane_and_begin():
    assert [(span.lane, span.what) for span in two_steps().spans(2)] == [
        ("compute", "h.1 forward"), ("down", "h.1 weights"), ("write", "h.0 state")
    ]  # fmt: skip
    assert two_steps().steps() == {1: (10.0, 12.0), 2: (12.0, 14.0)}


def test_the_trace_has_every_span(tmp_path):
    path = tmp_path / "trace.json"
    timeline = two_steps()
    timeline.write(path)
    trace = json.loads(path.read_bytes())
    assert list(tmp_path.iterdir()) == [path]
    names = {event["tid"]: event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"}
    assert tuple(names[row] for row in sorted(names)) == ROWS
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    found = {(names[span["tid"]], span["name"], span["ts"], span["dur"]) for span in spans}
    assert found == {
        ("compute", "h.0 forward", 0.0, 1.5e6),
        ("down", "h.1 weights", 0.5e6, 2e6),
        ("compute", "h.1 forward", 2.25e6, 0.75e6),
        ("write", "h.0 state", 2.5e6, 2.5e6),
    }
    assert {span["name"]: span["args"] for span in spans}["h.0 state"] == {"bytes": 128}
    assert {span["name"]: span["args"] for span in spans}["h.0 forward"] == {"flops": 6.0}
    assert len(spans) == 4


def test_an_empty_trace_is_a_trace(tmp_path):
    Timeline().write(tmp_path / "trace.json")
    assert not [e for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if e["ph"] == "X"]


def test_only_the_last_steps_are_kept():
    timeline = Timeline(steps=2)
    for step in range(50):
        for i in range(10):
            timeline.record("down", f"{step}", step + i / 10, step + (i + 1) / 10)
        timeline.mark(step, float(step), float(step + 1))
    assert list(timeline.steps()) == [48, 49]
    assert len(timeline.spans(48)) == 10
    assert {span.what for span in timeline.spans()} == {"48", "49"}
    assert timeline.busy(49)["down"] == pytest.approx(1.0)
    with pytest.raises(KeyError):
        timeline.busy(47)


def test_memory_is_bounded_where_no_step_is_marked(monkeypatch):
    monkeypatch.setattr(module, "SPANS", 100)
    timeline = Timeline()
    for i in range(250):
        timeline.record("up", str(i), i, i + 1)
    assert [span.what for span in timeline.spans()] == [str(i) for i in range(150, 250)]
    timeline.mark(1, 0.0, 250.0)
    for i in range(250, 300):
        timeline.record("up", str(i), i, i + 1)
    assert len(timeline.spans()) == 100


def test_spans_come_from_any_thread():
    timeline = Timeline()

    def note(lane):
        for i in range(500):
            timeline.record(lane, str(i), i, i + 1)

    threads = [threading.Thread(target=note, args=(lane,)) for lane in ROWS]
    for thread in threads:
        thread.start()
    for i in range(20):
        timeline.mark(i, 0.0, 500.0)
        timeline.chrome_trace()
    for thread in threads:
        thread.join()
    timeline.mark(20, 0.0, 500.0)
    assert timeline.busy(20) == dict.fromkeys(ROWS, 500.0)


def test_without_a_timeline_nothing_is_kept():
    device = CpuDevice(0, serial=True)

    def work():
        for _ in range(1000):
            device.submit("down", "", int)
            device.compute("", int)

    work()
    tracemalloc.start()
    before = tracemalloc.take_snapshot()
    work()
    after = tracemalloc.take_snapshot()
    tracemalloc.stop()
    ours = [tracemalloc.Filter(True, "*/stream/*.py")]
    grown = after.filter_traces(ours).compare_to(before.filter_traces(ours), "filename")
    assert sum(row.size_diff for row in grown) < 10_000  # a span each would be 300 KB


SPANS = [Span("compute", "h.0 forward", 5.0, 7.0, 0, 1.0), Span("down", "h.1 weights", 5.0, 6.5, 64)]


@pytest.mark.parametrize("spans", [[], SPANS], ids=["none", "some"])
def test_any_step_can_be_drawn(tmp_path, spans):
    path = plot_timeline(tmp_path / "timeline.png", spans)
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (1200, 420)
    assert list(tmp_path.iterdir()) == [path]


def test_spans_and_moments_change_the_picture(tmp_path):
    def drawn(spans):
        return plot_timeline(tmp_path / "timeline.png", spans).read_bytes()

    later = [Span(s.lane, s.what, s.begin + 100, s.end + 100, s.nbytes, s.flops) for s in SPANS]
    assert drawn(SPANS) != drawn([]) != drawn(SPANS[:1]) != drawn(SPANS)
    assert drawn(later) == drawn(SPANS)  # from the first span on


def test_every_lane_has_its_row_in_the_picture():
    assert plots.LANES == ROWS
