"""Where the rows of a run's metrics go: metrics.jsonl, the trackers, and the live line.

Of several ranks, all of which have the same rows, the first keeps the book.
"""

from __future__ import annotations

import contextlib
from contextlib import closing

from cgpt import console
from cgpt.metrics import Metrics
from cgpt.opening import Run
from cgpt.scaling.flops import matmul_flops_per_token
from cgpt.tracking import Tracking


class Logbook:
    """Open from the run's step on. Raises OSError."""

    def __init__(self, run: Run):
        recipe = run.recipe
        flops = matmul_flops_per_token(recipe.shape, recipe.seq_len)
        with contextlib.ExitStack() as opened:
            self.metrics = opened.enter_context(closing(Metrics(run.folder, run.step)))
            asked = run.tracked, run.folder, recipe.to_dict(), run.step, self.metrics.furthest, run.say
            self._tracking = opened.enter_context(closing(Tracking(*asked)))
            self._live = opened.enter_context(closing(console.Live(recipe.steps, run.step, flops)))
            self._opened = opened.pop_all()

    def note(self, row: dict) -> None:
        self.metrics.append(row)
        self._tracking.log(row)
        self._live.step(row)

    def close(self) -> None:
        self._opened.close()


class NoLogbook:
    """In its place on the other ranks."""

    def note(self, row: dict) -> None: ...

    def close(self) -> None: ...


def open_logbook(run: Run) -> Logbook | NoLogbook:
    return Logbook(run) if run.store.world.first else NoLogbook()
