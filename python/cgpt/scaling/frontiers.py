"""Chinchilla's first two approaches: which size is best at which compute, read off training runs.

    envelope    for each of 1500 budgets the size that is lowest there on its way; N ~ C^a through these
    isoflop     for each budget the minimum of a parabola in log N through final losses; N ~ C^a through the minima

A minimum counts only between a smaller and a larger model that were tried at that budget too: at the rim of what was
tried the best that was tried need not be the best. The envelope's is that of the parabola through the winner and its
two neighbours: winners alone climb in stairs, which eight sizes are too few to average out (a of 0.53 in place of
0.57).
Source: Hoffmann et al. 2022 (arXiv 2203.15556), sections 3.1 and 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cgpt.errors import InputError
from cgpt.scaling.points import Points

GRID = 1500  # budgets at which the envelope is looked at
SAME_BUDGET = 1.15  # FLOPs no further apart than this are one budget
WIDEST_BUDGET = 1.5
TRIES = 50  # of drawing a sample that has a frontier


@dataclass(frozen=True)
class Optima:
    """The best (params, tokens, loss) found at each of `flops`; all (k,)."""

    flops: np.ndarray
    params: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray

    def coefficients(self) -> dict[str, float]:
        """a, b and the scales of N = params_scale · C^a and D = tokens_scale · C^b, by least squares on logarithms."""
        x = np.log(self.flops)
        a, params = np.polyfit(x - x.mean(), np.log(self.params), 1)
        b, tokens = np.polyfit(x - x.mean(), np.log(self.tokens), 1)
        return {
            "a": float(a),
            "b": float(b),
            "params_scale": float(np.exp(params - a * x.mean())),
            "tokens_scale": float(np.exp(tokens - b * x.mean())),
        }


class Envelope:
    """Training curves of several sizes. Points with the same run, or else the same params, are one curve.

    Raises InputError unless two sizes between the smallest and the largest are the best somewhere.
    """

    def __init__(self, points: Points):
        self.source = points.source
        keys = points.run or tuple(points.params)
        self.budgets = np.geomspace(points.flops.min(), points.flops.max(), GRID)
        params, loss, tokens = [], [], []
        for key in dict.fromkeys(keys):
            rows = np.array([i for i, other in enumerate(keys) if other == key])
            rows = rows[np.argsort(points.flops[rows], kind="stable")]
            if len(set(points.flops[rows])) < len(rows):
                raise InputError(
                    f"{self.source}: curve {key}: wanted its FLOPs to differ, got some twice; a run column parts curves"
                )
            if len(set(points.params[rows])) > 1:
                raise InputError(f"{self.source}: run {key}: wanted one number of params, got several")
            x, at = np.log(points.flops[rows]), np.log(self.budgets)
            params.append(points.params[rows[0]])
            loss.append(np.interp(at, x, points.loss[rows], left=np.nan, right=np.nan))
            tokens.append(np.exp(np.interp(at, x, np.log(points.tokens[rows]))))
        order = np.argsort(params, kind="stable")
        self.params, self.loss, self.tokens = (np.array(column)[order] for column in (params, loss, tokens))
        if self._optima(np.arange(len(order)), winners=2) is None:
            raise InputError(
                f"{self.source}: wanted curves of at least four sizes, of which two between the smallest and the "
                f"largest are each the best at some FLOPs, got curves of {len(set(params))} without"
            )

    def optima(self, rng: np.random.Generator | None = None) -> Optima | None:
        """The lower envelope; with `rng` of curves drawn with replacement. None where no draw had one."""
        count = len(self.params)
        if rng is None:
            return self._optima(np.arange(count))
        draws = (self._optima(np.unique(rng.integers(count, size=count))) for _ in range(TRIES))
        return next((found for found in draws if found is not None), None)

    def _optima(self, rows: np.ndarray, winners: int = 1) -> Optima | None:
        """Of the curves `rows`. None with fewer winning sizes than `winners`, or at fewer than two budgets."""
        sizes = np.unique(self.params[rows])
        lowest = [np.where(np.isfinite(row), row, np.inf) for row in self.loss[rows]]
        loss, tokens = np.empty((2, len(sizes), GRID))
        for i, size in enumerate(sizes):  # the best of the runs of one size
            same = np.flatnonzero(self.params[rows] == size)
            loss[i] = np.min([lowest[j] for j in same], axis=0)
            tokens[i] = self.tokens[rows[same[0]]]
        there, index = np.isfinite(loss), np.arange(len(sizes))[:, None]
        winner, budget = loss.argmin(0), np.arange(GRID)
        before = np.maximum.accumulate(np.where(there, index, -1), axis=0)
        after = np.minimum.accumulate(np.where(there, index, len(sizes))[::-1], axis=0)[::-1]
        smaller = before[np.maximum(winner - 1, 0), budget]
        larger = after[np.minimum(winner + 1, len(sizes) - 1), budget]
        inside = (winner > 0) & (winner < len(sizes) - 1) & (smaller >= 0) & (larger < len(sizes))
        at, three = budget[inside], np.stack((smaller, winner, larger))[:, inside]
        if len(at) < 2 or len(set(winner[inside])) < winners:
            return None
        x, y = np.log(sizes)[three], loss[three, at]
        left, right = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
        bend = (right - left) / (x[2] - x[0])
        flat = bend <= 0  # three equal losses
        best = np.where(flat, x[1], (x[0] + x[1]) / 2 - left / np.where(flat, 1, 2 * bend))
        lift = np.log(tokens[three, at])
        slope = (lift[2] - lift[0]) / (x[2] - x[0])
        low = y[1] + left * (best - x[1]) + bend * (best - x[1]) * (best - x[0])
        return Optima(self.budgets[at], np.exp(best), np.exp(lift[1] + slope * (best - x[1])), low)


class IsoFlop:
    """Final losses of several sizes at each of a few budgets.

    left_out: a line for each budget without a minimum. Raises InputError where fewer than two budgets have one.
    """

    def __init__(self, points: Points):
        self.source = points.source
        order = np.argsort(points.flops, kind="stable")
        steps = np.diff(np.log(points.flops[order])) > np.log(SAME_BUDGET)
        groups = np.split(order, np.flatnonzero(steps) + 1)
        self.budgets: list[tuple[float, np.ndarray, np.ndarray, np.ndarray]] = []
        self.parabolas: list[np.ndarray] = []
        self.left_out: list[str] = []
        for rows in groups:
            low, high = points.flops[rows].min(), points.flops[rows].max()
            if high > WIDEST_BUDGET * low:
                raise InputError(
                    f"{self.source}: flops: wanted budgets with gaps between them, got {low:.3g} to {high:.3g} without"
                )
            budget = float(np.exp(np.log(points.flops[rows]).mean()))
            columns = np.log(points.params[rows]), np.log(points.tokens[rows]), points.loss[rows]
            if _minimum(budget, *columns) is None:
                sizes = len(set(points.params[rows]))
                self.left_out.append(f"{budget:.3g} FLOPs left out: {sizes} sizes without a minimum among them")
            else:
                self.budgets.append((budget, *columns))
        if len(self.budgets) < 2:
            raise InputError(
                f"{self.source}: wanted at least two budgets of FLOPs, each with a loss that is lowest between its "
                f"smallest and largest size, got {len(groups)} and {len(self.budgets)} such"
            )

    def optima(self, rng: np.random.Generator | None = None) -> Optima | None:
        """The minima; with `rng` of points drawn with replacement within each budget. None where no draw had two."""
        found = []
        for budget, *columns in self.budgets:
            count = len(columns[0])
            for _ in range(1 if rng is None else TRIES):
                rows = np.arange(count) if rng is None else rng.integers(count, size=count)
                minimum = _minimum(budget, *(column[rows] for column in columns))
                if minimum is not None:
                    found.append(minimum)
                    break
        return Optima(*np.array(found).T) if len(found) > 1 else None


def parabola(log_params: np.ndarray, loss: np.ndarray) -> np.poly1d | None:
    """The least-squares parabola of the loss in (log_params - their mean). None under three sizes."""
    if len(set(log_params)) < 3:
        return None
    return np.poly1d(np.polyfit(log_params - log_params.mean(), loss, 2))


def _minimum(budget: float, log_params, log_tokens, loss) -> tuple[float, float, float, float] | None:
    """(flops, params, tokens, loss) at the parabola's lowest point. None unless it lies among the sizes tried."""
    curve = parabola(log_params, loss)
    if curve is None or curve[2] <= 0:
        return None
    at = -curve[1] / (2 * curve[2])
    x = at + log_params.mean()
    if not log_params.min() <= x <= log_params.max():
        return None
    tokens = np.polyval(np.polyfit(log_params, log_tokens, 1), x)
    return budget, float(np.exp(x)), float(np.exp(tokens)), float(curve(at))
