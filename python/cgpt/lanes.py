"""What the lanes were forecast to take and what they took, for the end of a run that streams."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from cgpt.plots import plot_timeline
from cgpt.stream.forecast import forecast
from cgpt.stream.probe import flops_of
from cgpt.stream.rates import Forecast, Rates, Work
from cgpt.stream.store import Store
from cgpt.stream.timeline import ROWS

TRACE, PICTURE = "timeline.json", "timeline.png"


@dataclass
class LaneReport:
    """store: whose lanes. rates: as probed before the run, None for a run that streams nothing. wanted: whether trace
    and picture were asked for. width: of activations between layers. micro_batch_tokens: of a full micro-batch."""

    store: Store
    rates: Rates | None
    wanted: bool
    width: int
    micro_batch_tokens: int
    last: int | None = None
    forecast: Forecast | None = None

    def mark(self, step: int, begin: float, end: float, tokens: int) -> None:
        """Notes that a step of so many tokens, of all ranks, has ended."""
        timeline = self.store.lanes.timeline
        if timeline is None:
            return
        timeline.mark(step, begin, end)
        self.last = step
        if self.rates is not None:
            rates = replace(self.rates, flops=max(1.0, flops_of(timeline, step)))
            work = Work(self.store.format, tokens, self.width, micro_batch_tokens=self.micro_batch_tokens)
            self.forecast = forecast(self.store.plans, self.store.placement, rates, work)

    def lines(self) -> list[str]:
        """Predicted beside measured seconds of the last step's lanes, and what binds."""
        if self.forecast is None or self.last is None:
            return []
        timeline = self.store.lanes.timeline
        busy, (begin, end) = timeline.busy(self.last), timeline.steps()[self.last]
        rows = [f"{lane} {self.forecast.lanes[lane]:.3g} / {busy[lane]:.3g}" for lane in ROWS if busy[lane]]
        told = f"step {self.forecast.seconds:.3g} / {end - begin:.3g}, {', '.join(rows)}"
        return [f"seconds  predicted / measured: {told}; bound by {self.forecast.binding}"]

    def write(self, folder: Path) -> list[Path]:
        """Leaves the trace and the picture of the last step in `folder`."""
        timeline = self.store.lanes.timeline
        timeline.write(folder / TRACE)
        spans = timeline.spans(self.last) if self.last is not None else []
        return [folder / TRACE, plot_timeline(folder / PICTURE, spans)]
