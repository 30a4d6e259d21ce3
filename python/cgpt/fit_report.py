"""What `cgpt fit` shows of a fit: a table for people, JSON for programs, a picture."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from cgpt.pictures import blank, check_plot, plain, write
from cgpt.scaling.fit import COEFFICIENTS, Fitted
from cgpt.scaling.frontiers import IsoFlop, parabola

FORMULAS = {
    "power": "loss = (flops / scale)^-exponent + constant",
    "envelope": "best params = params_scale flops^a, best tokens = tokens_scale flops^b, from training curves",
    "isoflop": "best params = params_scale flops^a, best tokens = tokens_scale flops^b, from sizes at equal FLOPs",
    "parametric": "loss = E + A / params^alpha + B / tokens^beta",
}
DECADES = 3  # beyond the points that are foretold
FITTED, FAINT = "tab:red", "0.55"


def to_dict(fitted: Fitted) -> dict:
    """JSON values: the coefficients by name, `intervals` (low, high) of the same names, `exponents`, `predictions`."""
    names, intervals = COEFFICIENTS[fitted.method], fitted.intervals
    row = {
        "method": fitted.method,
        "formula": FORMULAS[fitted.method],
        "source": fitted.points.source,
        "points": len(fitted.points),
        "bootstraps": fitted.bootstraps,
        **{name: fitted.coefficients[name] for name in names},
        "intervals": {name: list(intervals[name]) for name in names if name in intervals},
    }
    for key, group in (("exponents", ("a", "b")), ("loss_at_optimum", COEFFICIENTS["power"])):
        if group[0] in fitted.coefficients and group != names:
            bounds = {name: list(intervals[name]) for name in group if name in intervals}
            row[key] = {**{name: fitted.coefficients[name] for name in group}, "intervals": bounds}
    row["residual"] = fitted.residual
    row["predictions"] = _predictions(fitted)
    row["notes"] = list(fitted.notes)
    return row


def show(fitted: Fitted) -> str:
    """For people: what was found, how sure it is, what it foretells."""
    count = fitted.bootstraps
    lines = [
        f"{fitted.method:12} {FORMULAS[fitted.method]}",
        f"{'points':12} {len(fitted.points)} of {fitted.points.source}",
        "",
        f"{'':12} {'value':>11}" + (f"   95 % interval of {count} bootstraps" if count else ""),
    ]
    intervals, names = fitted.intervals, COEFFICIENTS[fitted.method]
    for name in dict.fromkeys((*names, *fitted.coefficients)):
        told = {"a": "best params grow with flops^a", "b": "best tokens grow with flops^b"}.get(name, "")
        if name == "scale" and "scale" not in names:
            lines.append(f"{'':12} and at the best sizes {FORMULAS['power']}")
        bounds = " to ".join(f"{_figure(value):>11}" for value in intervals.get(name, ()))
        lines.append(f"{name:12} {_figure(fitted.coefficients[name]):>11}   {bounds:26}   {told}".rstrip())
    if fitted.residual is not None:
        lines.append(f"{'residual':12} {100 * fitted.residual:9.3f} %   r.m.s. of the loss")
    rows = _predictions(fitted)
    kinds = [name for name in ("params", "tokens", "loss") if name in rows[0]]
    heads = {"params": "best params", "tokens": "best tokens", "loss": "loss"}
    lines += ["", f"{'flops':12} " + "".join(f"{heads[name]:32}" for name in kinds)]
    for row in rows:
        cells = [f"{row['flops']:<12.0e} "]
        for name in kinds:
            digits = ".4f" if name == "loss" else ".2e"
            band = " to ".join(f"{value:{digits}}" for value in row["intervals"].get(name, ()))
            cells.append(f"{f'{row[name]:{digits}}' + (f' ({band})' if band else ''):32}")
        lines.append("".join(cells))
    return "\n".join([*(line.rstrip() for line in lines), *(f"note: {note}" for note in fitted.notes)])


def plot(fitted: Fitted, path: Path) -> Path:
    """Draws points, fit and what it foretells into `path` (.png, .svg or .pdf) and returns it.

    Raises InputError for another ending, OSError naming the file.
    """
    check_plot(path)
    panels = 1 if fitted.method == "power" else 2
    figure = blank(2.5 + 4.5 * panels, 4.5)
    left, *right = np.atleast_1d(figure.subplots(1, panels))
    points = fitted.points
    low, high = _reach(fitted)
    inside, beyond = np.geomspace(low, high, 60), np.geomspace(high, high * 10**DECADES, 60)
    draw = {"power": _points, "parametric": _sizes, "envelope": _curves, "isoflop": _parabolas}[fitted.method]
    draw(left, fitted)
    left.set_ylabel("loss, nats per token")
    if fitted.method != "isoflop":
        left.set_xlabel("training FLOPs")
        _line(left, fitted, "loss", inside, beyond)
    for axes in right:
        if fitted.optima is not None:
            axes.scatter(
                fitted.optima.flops, fitted.optima.params, s=14, color="tab:blue", label="best found", zorder=3
            )
        else:
            axes.scatter(points.flops, points.params, s=8, color=FAINT, label="points")
        _line(axes, fitted, "params", inside, beyond)
        a, ends = fitted.coefficients["a"], fitted.intervals.get("a")
        told = f"best params ~ flops^{a:.3f}" + (f" ({ends[0]:.3f} to {ends[1]:.3f})" if ends else "")
        axes.set(yscale="log", xlabel="training FLOPs", ylabel="parameters", title=told)
    for axes in (left, *right):
        axes.set_xscale("log")
        plain(axes)
        axes.legend(frameon=False, fontsize=9)
        axes.title.set_fontsize(10)
    return write(figure, path)


def _predictions(fitted: Fitted) -> list[dict]:
    """At powers of ten, from the one under the largest budget that was fitted to DECADES above it."""
    top = math.floor(math.log10(_reach(fitted)[1]))
    # Not 10.0**power, of which some machines make 1.0000000000000001e+23.
    found = fitted.predict(np.array([float(f"1e{power}") for power in range(top, top + DECADES + 1)]))
    rows = []
    for i, flops in enumerate(found.flops):
        row: dict = {"flops": float(flops), "intervals": {}}
        for name in ("params", "tokens", "loss"):
            column = getattr(found, name)
            if column is None:
                continue
            value, *ends = map(float, column[:, i])
            row[name] = value
            if fitted.bootstraps:
                row["intervals"][name] = ends
        rows.append(row)
    return rows


def _reach(fitted: Fitted) -> tuple[float, float]:
    """The least and the largest FLOPs that the fit rests on."""
    flops = fitted.points.flops if fitted.optima is None else fitted.optima.flops
    return flops.min(), flops.max()


def _line(axes, fitted: Fitted, name: str, inside: np.ndarray, beyond: np.ndarray) -> None:
    """The fitted `name` over FLOPs: solid among the points, dashed beyond them, the interval as a band."""
    for flops, style, label in ((inside, "-", "fit"), (beyond, "--", "extrapolated")):
        column = getattr(fitted.predict(flops), name)
        if column is None:
            return
        axes.plot(flops, column[0], style, color=FITTED, linewidth=1.6, label=label, zorder=4)
        if fitted.bootstraps:
            axes.fill_between(flops, column[1], column[2], color=FITTED, alpha=0.15, linewidth=0)


def _points(axes, fitted: Fitted) -> None:
    axes.scatter(fitted.points.flops, fitted.points.loss, s=20, color="tab:blue", label="points", zorder=3)
    axes.set_title(FORMULAS["power"])


def _sizes(axes, fitted: Fitted) -> None:
    points = fitted.points
    shades = _shades(points.params, points.params)
    axes.scatter(points.flops, points.loss, s=12, c=shades, label="points, the darker the smaller", zorder=3)
    axes.set_title("fit: the best size at each budget")


def _curves(axes, fitted: Fitted) -> None:
    points = fitted.points
    keys = np.array(points.run or points.params)
    for key in dict.fromkeys(keys):
        rows = np.flatnonzero(keys == key)
        rows = rows[np.argsort(points.flops[rows])]
        shade = _shades(points.params[rows[:1]], points.params)[0]
        axes.plot(points.flops[rows], points.loss[rows], color=shade, linewidth=0.9)
    axes.set_title("training curves, the darker the smaller")


def _parabolas(axes, fitted: Fitted) -> None:
    search = IsoFlop(fitted.points)
    budgets = np.array([budget for budget, *_ in search.budgets])
    for (budget, log_params, _, loss), shade in zip(search.budgets, _shades(budgets, budgets), strict=True):
        grid = np.linspace(log_params.min(), log_params.max(), 60)
        axes.plot(np.exp(grid), parabola(log_params, loss)(grid - log_params.mean()), color=shade, linewidth=1.2)
        axes.scatter(np.exp(log_params), loss, s=14, color=shade, label=f"{budget:.2g} FLOPs")
    axes.scatter(fitted.optima.params, fitted.optima.loss, marker="x", color=FITTED, label="best", zorder=4)
    axes.set(xlabel="parameters", title="final losses and their parabolas")


def _shades(values: np.ndarray, among: np.ndarray):
    """Colours of a sequential map by the logarithm of `values`, dark for the least of `among`."""
    from matplotlib import colormaps

    low, high = np.log(among.min()), np.log(among.max())
    return colormaps["viridis"](0.9 * (np.log(values) - low) / max(high - low, 1e-9))


def _figure(value: float) -> str:
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1000 else f"{value:.4g}"
