"""How much faster a model trains on more devices, and for want of what it stops: `cgpt plan --count 1..4096`.

The step stays as large (strong scaling), so a device's share of it shrinks as devices are added, and so does its share
of the state: more of that becomes resident. Each count is placed anew, as `cgpt plan` does for one.

    speed-up      tokens/s over those of the first count that fits
    efficiency    tokens/s a device over the most that any count up to this one reaches

What binds is what costs most of a step: a lane that arithmetic waits for, and of the wire whether it is its rate or
its "latency"; "memory" where activations are computed again; "batch" where micro-batches do not divide evenly among
devices, so that some are idle; "compute" where none of it matters. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cgpt.errors import InputError
from cgpt.planning.memory import Found, Problem, problem, solve
from cgpt.stream.forecast import arithmetic_seconds, forecast
from cgpt.stream.gpt_plans import gpt_plans
from cgpt.stream.rates import BOUND

LINEAR = 0.9  # efficiency from which on speed is called linear


@dataclass(frozen=True)
class Row:
    """One count. found: the fastest setting, None where nothing fits and `why`. speed_up, efficiency: section head."""

    count: int
    found: Found | None
    why: str = ""
    speed_up: float = 0.0
    efficiency: float = 0.0

    @property
    def binding(self) -> str:
        """What would make it faster (file head)."""
        costs = self.costs
        most = max(costs, key=costs.get)
        if costs[most] <= BOUND:
            return "compute"
        if most == "wire" and self._latency() > costs["wire"] / 2:
            return "latency"
        return most

    @property
    def costs(self) -> dict[str, float]:
        """Shares of a step, by what costs them."""
        found, walk = self.found, self.found.forecast
        kept = replace(found.placement, recompute=(False,) * len(found.placement.recompute))
        plans, speed = gpt_plans(found.problem.shape), (found.problem.rates, found.work)
        again, once = (arithmetic_seconds(plans, place, *speed) for place in (found.placement, kept))
        stalls = {lane: stall / walk.seconds for lane, stall in walk.stalls.items()}
        return stalls | {"memory": (again - once) / walk.seconds, "batch": self.idle}

    @property
    def idle(self) -> float:
        """Share of what the devices could do beside the first, for whose micro-batches they wait at a step's end."""
        step, each = self.found.problem.tokens_per_step, self.found.setting.micro_batch_tokens
        first = min(step, -(-step // (each * self.count)) * each)
        return 1 - step / (first * self.count)

    def _latency(self) -> float:
        """Share of the step that collectives' latency costs."""
        found = self.found
        rates = replace(found.problem.rates, wire_latency=0.0)
        plans = gpt_plans(found.problem.shape)
        return 1 - forecast(plans, found.placement, rates, found.work).seconds / found.forecast.seconds


@dataclass(frozen=True)
class Curve:
    """rows: by count, ascending."""

    rows: tuple[Row, ...]

    @property
    def fitting(self) -> list[Row]:
        return [row for row in self.rows if row.found is not None]

    @property
    def problem(self) -> Problem:
        """The largest that fits."""
        return self.fitting[-1].found.problem

    @property
    def linear_until(self) -> Row:
        """The last count whose efficiency is not below LINEAR."""
        return max((row for row in self.fitting if row.efficiency >= LINEAR), key=lambda row: row.count)

    @property
    def bent(self) -> Row | None:
        """The count from which on it is; None where it never is."""
        return next((row for row in self.fitting if row.count > self.linear_until.count), None)


def curve(model: str, device: str, counts: Sequence[int], machine: Mapping[str, Any]) -> Curve:
    """Of a model on each of `counts` devices, ascending. machine: arguments of `problem`. Raises InputError where what
    is asked is wrong, or no count fits."""
    asked = problem(model, device, **machine)
    rows: list[Row] = []
    for count in counts:
        if count > asked.sequences:
            rows.append(Row(count, None, f"more devices than the {asked.sequences:,} sequences of a step"))
            continue
        try:
            rows.append(Row(count, solve(problem(model, device, count=count, **machine))))
        except InputError as refusal:
            rows.append(Row(count, None, str(refusal)))
    if all(row.found is None for row in rows):
        raise InputError(rows[-1].why if len(rows) == 1 else f"--count: wanted one that fits, got {rows[-1].why}")
    return Curve(tuple(_compared(rows)))


def _compared(rows: list[Row]) -> list[Row]:
    first = next(row.found.speed for row in rows if row.found is not None)
    best, compared = 0.0, []
    for row in rows:
        if row.found is not None:
            each = row.found.speed / row.count
            best = max(best, each)
            row = replace(row, speed_up=row.found.speed / first, efficiency=each / best)
        compared.append(row)
    return compared
