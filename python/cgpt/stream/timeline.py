"""What each lane did when: for a trace, a picture, and the measured side of predicted and measured.

Times are seconds of one clock, time.perf_counter's or a simulated device's. Only the last few steps are kept, and of a
run that marks none, or has enormous ones, the last spans. Chrome's trace format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import json
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from cgpt.files import write_atomically

SPANS = 1 << 17  # kept at most, some 50 MB; a step of 100 layers and 16 micro-batches has a twentieth
ROWS = ("compute", "down", "up", "wire", "optimizer", "read", "write")


@dataclass(frozen=True)
class Span:
    """One piece of work. begin, end: seconds. nbytes: moved. flops: done."""

    lane: str
    what: str
    begin: float
    end: float
    nbytes: int = 0
    flops: float = 0.0


class Timeline:
    """Spans of the last `steps` steps and of what has come since."""

    def __init__(self, steps: int = 2):
        self._lock = threading.Lock()
        self._spans: deque[Span] = deque(maxlen=SPANS)
        self._steps: deque[tuple[int, float, float]] = deque(maxlen=steps)

    def record(self, lane: str, what: str, begin: float, end: float, nbytes: int = 0, flops: float = 0.0) -> None:
        """Notes a span; from any thread."""
        with self._lock:
            self._spans.append(Span(lane, what, begin, end, nbytes, flops))

    def mark(self, step: int, begin: float, end: float) -> None:
        """Notes that step number `step` lasted from begin to end, and forgets what came before the steps kept."""
        with self._lock:
            self._steps.append((step, begin, end))
            oldest = self._steps[0][1]
            self._spans = deque((span for span in self._spans if span.end > oldest), maxlen=SPANS)

    def spans(self, step: int | None = None) -> list[Span]:
        """All that is kept, or what overlaps a step that was marked; by lane and begin."""
        with self._lock:
            spans, steps = list(self._spans), {number: (begin, end) for number, begin, end in self._steps}
        if step is not None:
            begin, end = steps[step]
            spans = [span for span in spans if span.end > begin and span.begin < end]
        return sorted(spans, key=lambda span: (ROWS.index(span.lane), span.begin))

    def steps(self) -> dict[int, tuple[float, float]]:
        """Number -> (begin, end) of the steps kept."""
        with self._lock:
            return {number: (begin, end) for number, begin, end in self._steps}

    def busy(self, step: int) -> dict[str, float]:
        """Lane -> seconds of the step in which it worked."""
        begin, end = self.steps()[step]
        found = dict.fromkeys(ROWS, 0.0)
        for span in self.spans(step):
            found[span.lane] += max(0.0, min(end, span.end) - max(begin, span.begin))
        return found

    def chrome_trace(self) -> dict:
        """For chrome://tracing or Perfetto: a row a lane, microseconds from the first span."""
        spans = self.spans()
        origin = min((span.begin for span in spans), default=0.0)
        events = [
            {"ph": "M", "pid": 0, "tid": row, "name": "thread_name", "args": {"name": lane}}
            for row, lane in enumerate(ROWS)
        ]
        for span in spans:
            amounts = {"bytes": span.nbytes, "flops": span.flops}
            events.append(
                {
                    "ph": "X",
                    "pid": 0,
                    "tid": ROWS.index(span.lane),
                    "name": span.what,
                    "ts": (span.begin - origin) * 1e6,
                    "dur": (span.end - span.begin) * 1e6,
                    "args": {name: amount for name, amount in amounts.items() if amount},
                }
            )
        return {"traceEvents": events, "displayTimeUnit": "ms"}

    def write(self, path: Path) -> None:
        """The trace as JSON; whole or absent."""
        write_atomically(path, json.dumps(self.chrome_trace()).encode())
