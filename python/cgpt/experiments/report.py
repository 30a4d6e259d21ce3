"""Sweeps and ablations for people and programs: tables, JSON, pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from cgpt.experiments import ablate, sweep
from cgpt.experiments.matrix import Outcome
from cgpt.pictures import blank, plain, write


def sweep_json(outcomes: Sequence[Outcome]) -> dict:
    """Every point with its mean loss (null where it diverged), the best of each width, and how far those lie apart."""
    found = sweep.best(outcomes)
    names = ("parametrization", "width", *sweep.POINT)
    table = sweep.means(outcomes)
    return {
        "points": [dict(zip(names, key, strict=True)) | {"loss": _number(loss)} for key, loss in table.items()],
        "best": [asdict(row) | {"loss": _number(row.loss)} for row in found],
        "drift": {kind: sweep.drift(found, kind) for kind in dict.fromkeys(row.parametrization for row in found)},
    }


def sweep_text(outcomes: Sequence[Outcome]) -> str:
    """Loss by learning rate and width, the best of each column marked; of further hyperparameters the best is shown."""
    lines, found = [], sweep.best(outcomes)
    for kind in dict.fromkeys(row.parametrization for row in found):
        mine = {key[1:3]: math.inf for key in sweep.means(outcomes) if key[0] == kind}
        for key, loss in sweep.means(outcomes).items():
            if key[0] == kind:
                mine[key[1:3]] = min(mine[key[1:3]], loss)
        widths, rates = sorted({width for width, _ in mine}), sorted({lr for _, lr in mine})
        lines.append(f"{kind:10} " + "".join(f"{f'width {width}':>12}" for width in widths))
        for lr in rates:
            cells = []
            for width in widths:
                loss = mine.get((width, lr))
                best = loss is not None and loss == min(value for key, value in mine.items() if key[0] == width)
                cells.append("" if loss is None else f"{_loss(loss)}{'*' if best else ' '}")
            lines.append(f"lr {lr:<7.3g} " + "".join(f"{cell:>12}" for cell in cells))
        for row in found:
            if row.parametrization == kind:
                point = f"lr {row.lr:.3g}, init std {row.init_std:.3g}, embedding scale {row.embedding_scale:.3g}"
                lines.append(f"best at width {row.width}: {point}, loss {_loss(row.loss)}")
        lines.append(f"{kind}: best learning rates lie {sweep.drift(found, kind)} grid steps apart")
        lines.append("")
    return "\n".join(lines).rstrip()


def plot_sweep(path: Path, outcomes: Sequence[Outcome]) -> Path:
    """Loss over learning rate, a line a width, a panel a parametrization; the best of each width is a dot."""
    from matplotlib import colormaps

    found, table = sweep.best(outcomes), sweep.means(outcomes)
    kinds = list(dict.fromkeys(row.parametrization for row in found))
    figure, panels = _figure(1, len(kinds), (1.2 + 4.8 * len(kinds), 4.2))
    widths = sorted({row.width for row in found})
    for axes, kind in zip(panels, kinds, strict=True):
        for shade, width in enumerate(widths):
            colour = colormaps["viridis"](0.9 * shade / max(1, len(widths) - 1))
            lowest: dict[float, float] = {}
            for (name, wide, lr, *_), loss in table.items():
                if (name, wide) == (kind, width) and math.isfinite(loss):
                    lowest[lr] = min(loss, lowest.get(lr, math.inf))
            axes.plot(*_sorted(lowest), color=colour, marker="o", markersize=3, label=f"width {width}")
            for row in found:
                if (row.parametrization, row.width) == (kind, width) and math.isfinite(row.loss):
                    axes.plot(row.lr, row.loss, "o", color=colour, markersize=9, markeredgecolor="black")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
        axes.set(xlabel="peak learning rate", title=f"{kind}: best {sweep.drift(found, kind)} steps apart")
    panels[0].set_ylabel("held-out loss, nats per token")
    panels[0].legend(frameon=False)
    return write(figure, path)


def ablate_json(outcomes: Sequence[Outcome]) -> dict:
    """Rows of all combinations and of each choice, best first; spread is the standard deviation between seeds."""
    rows = {"combinations": ablate.combinations(outcomes), "choices": ablate.by_choice(outcomes)}
    return {name: [asdict(row) | {"loss": _number(row.loss)} for row in found] for name, found in rows.items()}


def ablate_text(outcomes: Sequence[Outcome]) -> str:
    """The table of combinations, then what each choice is worth on average."""
    lines = [f"{'positions':10} {'activation':11} {'norm':5} {'parameters':>11} {'loss':>9} {'spread':>8}  bits/byte"]
    for row in ablate.combinations(outcomes):
        kind, activation, norm = (row.choices[field] for field in ablate.CHOICES)
        lines.append(f"{kind:10} {activation:11} {norm:5} {row.parameters:11,} {_measured(row)}")
    choices = ablate.by_choice(outcomes)
    lines += ["", "on average over the others"] * bool(choices)
    for row in choices:
        ((field, value),) = row.choices.items()
        lines.append(f"{field.replace('_', ' '):15} {value:23} {_measured(row)}")
    seeds = {outcome.fields["seed"] for outcome in outcomes}
    if len(seeds) > 1:
        lines += ["", f"spread: standard deviation between {len(seeds)} seeds of the same combination"]
    return "\n".join(lines)


def plot_ablate(path: Path, outcomes: Sequence[Outcome]) -> Path:
    """A row a combination, the best on top: each seed a dot, the mean a bar."""
    rows = ablate.combinations(outcomes)
    figure, (axes,) = _figure(1, 1, (7.5, 1.2 + 0.28 * len(rows)))
    for place, row in enumerate(rows):
        mine = [x.loss for x in outcomes if x.loss and all(x.fields[k] == v for k, v in row.choices.items())]
        axes.plot(mine, [place] * len(mine), "o", color="tab:blue", alpha=0.6, markersize=5)
        if math.isfinite(row.loss):
            axes.plot(row.loss, place, "|", color="tab:orange", markersize=14, markeredgewidth=2.5)
    names = [
        ", ".join((c["positions"], c["activation"], f"norm {c['embedding_norm']}")) for c in (r.choices for r in rows)
    ]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("held-out loss, nats per token: seeds and their mean")
    return write(figure, path)


def _measured(row: ablate.Row) -> str:
    spread = "" if row.spread is None else f"{row.spread:.4f}"
    bits = "" if row.bits_per_byte is None else f"{row.bits_per_byte:.3f}"
    return f"{_loss(row.loss):>9} {spread:>8}  {bits}"


def _loss(loss: float) -> str:
    return f"{loss:.4f}" if math.isfinite(loss) else "diverged"


def _number(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


def _sorted(found: dict[float, float]) -> tuple[list[float], list[float]]:
    keys = sorted(found)
    return keys, [found[key] for key in keys]


def _figure(rows: int, columns: int, size: tuple[float, float]):
    figure = blank(*size)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for axes in panels:
        plain(axes)
    return figure, panels
