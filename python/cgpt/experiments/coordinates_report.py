"""What `cgpt coord-check` shows: a table for people, JSON for programs, a picture."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from cgpt.experiments.coordinates import JUDGED, LIMIT, QUANTITIES, Coordinates
from cgpt.pictures import blank, check_plot, plain, write

NOTE = """\
The last column is judged: means over seeds, the largest over the least size's, at the worst step from 1 on. scores and
readout are what training has added: to attention scores where the first gradient asked for it, to the right token's
logit. The logits themselves are not judged, for a tied readout is not zero at first: under mup they begin as
width^-1/2."""
RISEN = ("scores", "readout")  # 0 at first
NARROWEST = 4  # times from the least to the largest value of a panel: seeds' noise is to look like noise
MEANINGS = {
    "embedding": "mean |x| behind it",
    "attention": "mean |y| over blocks",
    "mlp": "mean |y| over blocks",
    "stream": "mean |x| at the end",
    "logits": "mean |logit|",
    "scores": "risen where asked",
    "readout": "risen, right token",
}


def to_dict(found: Coordinates) -> dict:
    """JSON values: `verdict` by parametrization, each with its ratios, and `rows`, one a parametrization, size, seed
    and step. A ratio that is not finite is null."""
    rows = []
    for kind, by_size in zip(found.kinds, found.values, strict=True):
        for size, by_seed in zip(found.sizes, by_size, strict=True):
            for seed, by_step in enumerate(by_seed):
                for step, values in enumerate(by_step):
                    named = dict(zip(QUANTITIES, map(float, values), strict=True))
                    rows.append({"parametrization": kind, found.along: size, "seed": seed, "step": step, **named})
    verdict = {}
    for kind in found.kinds:
        ratios = {name: found.ratio(kind, name) for name in QUANTITIES}
        finite = {name: value if math.isfinite(value) else None for name, value in ratios.items()}
        verdict[kind] = {"within": found.within(kind), "ratios": finite}
    return {
        "along": found.along,
        "sizes": list(found.sizes),
        "steps": found.steps,
        "seeds": found.seeds,
        "lr": found.base.lr,
        "base": found.base.config.to_dict(),
        "limit": LIMIT,
        "judged": list(JUDGED),
        "verdict": verdict,
        "rows": rows,
    }


def show(found: Coordinates) -> str:
    """For people: before and after the steps at each size, how far the sizes lie apart, and the verdict."""
    config, last = found.base.config, found.steps
    lines = [
        f"{found.along}s {', '.join(map(str, found.sizes))}; {found.seeds} seeds, lr {found.base.lr:g}, init std "
        f"{config.hidden_init_std:g}, embedding scale {config.embedding_scale:g}, {config.n_head} heads"
    ]
    width = 9 * len(found.sizes)
    for kind in found.kinds:
        sizes = "".join(f"{size:9}" for size in found.sizes)
        lines += ["", f"{kind:10}{'t = 0':>{width}} {f't = {last}':>{width}}", f"{'':10}{sizes} {sizes}   most / least"]
        for name in QUANTITIES:
            means = found.means(kind, name)
            begin, end = ("".join(f"{value:9.3g}" for value in means[:, step]) for step in (0, last))
            told = f"{found.ratio(kind, name):8.2f} x" + ("" if name in JUDGED else ", not judged")
            lines.append(f"{name:10}{begin} {end} {told}")
        lines.append(f"within {LIMIT:g} x: {'yes' if found.within(kind) else 'no'}")
    return "\n".join([*lines, "", NOTE])


def plot(found: Coordinates, path: Path) -> Path:
    """Draws a panel a quantity, a row a parametrization, into `path` (.png, .svg or .pdf) and returns it.

    Raises InputError for another ending, OSError naming the file.
    """
    check_plot(path)
    from matplotlib import colormaps
    from matplotlib.ticker import LogLocator

    height = 0.8 + 2.4 * len(found.kinds)
    figure = blank(2.3 * len(QUANTITIES), height)
    grid = figure.subplots(len(found.kinds), len(QUANTITIES), sharex=True, sharey="col", squeeze=False)
    shades = colormaps["viridis"]
    for row, (kind, panels) in enumerate(zip(found.kinds, grid, strict=True)):
        for name, axes in zip(QUANTITIES, panels, strict=True):
            means = found.means(kind, name)
            for step in range(name in RISEN, found.steps + 1):
                shade = shades(0.9 * step / found.steps)
                axes.plot(found.sizes, means[:, step], "o-", color=shade, markersize=3, linewidth=1.4, label=f"{step}")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.set_xticks(found.sizes, [str(size) for size in found.sizes])
            axes.minorticks_off()
            plain(axes)
            axes.tick_params(labelsize=8)
            ratio = found.ratio(kind, name)
            sound = "0.4" if name not in JUDGED else "tab:green" if ratio <= LIMIT else "tab:red"
            axes.text(0.04, 0.97, f"{ratio:.2f} x", transform=axes.transAxes, va="top", fontsize=9, color=sound)
            if row == 0:
                axes.set_title(f"{name}\n{MEANINGS[name]}", fontsize=9)
            if row == len(grid) - 1:
                axes.set_xlabel(found.along, fontsize=9)
        panels[0].set_ylabel(kind, fontsize=12)
    for axes, name in zip(grid[0], QUANTITIES, strict=True):
        axes.set_ylim(*_reach(found, name))
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, title="step", loc="outside right center", frameon=False, fontsize=9)
    return write(figure, path)


def _reach(found: Coordinates, name: str) -> tuple[float, float]:
    """Ends of the value axis: of every parametrization's means, no nearer than NARROWEST, with room for a text."""
    values = np.concatenate([found.means(kind, name)[:, name in RISEN :].ravel() for kind in found.kinds])
    values = values[values > 0]
    if not len(values):
        return 0.1, 1.0
    low, high = float(values.min()), float(values.max())
    more = max(1.0, math.sqrt(NARROWEST * low / high))
    return low / more / 1.2, high * more * 1.5
