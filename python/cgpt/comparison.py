"""Several runs in one picture: what `cgpt plot` draws from their config.json, metrics.jsonl and summary.json.

    bits per byte = nats per token · (held-out bits per byte / held-out nats per token of the run)

The factor is the run's own, of its vocabulary on its held-out text; the training curve takes it too. Runs cut off
before they measured it take it from one that holds out the same tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cgpt.errors import InputError
from cgpt.metrics import METRICS, SUMMARY, human, read
from cgpt.pictures import COLOURS, blank, check_plot, plain, write
from cgpt.plot_flags import Plot
from cgpt.plots import short, smoothed
from cgpt.recipe import CONFIG, Recipe, read_config
from cgpt.scaling.flops import flops_per_token

LABELS = {
    "tokens": "tokens seen",
    "flops": "training FLOPs",
    "time": "time in training steps",
    "steps": "steps",
    "loss": "loss, nats per token",
    "bits-per-byte": "loss, bits per byte",
    "lr": "learning rate",
    "grad-norm": "gradient norm",
    "tokens-per-second": "tokens per second",
}
COLUMNS = {"loss": "loss", "bits-per-byte": "loss"}  # of the metrics; the others are called as their flag is
LOSSES = ("loss", "bits-per-byte")
CURVES_WITH_STEPS = 4  # of more runs than this the single steps would hide each other
LEGEND_INSIDE = 6
LEGEND_ROW = 0.19  # inches
LENGTHS = 10  # between runs, from which on a linear axis would leave the short one no room
START = 0.04  # share of a run whose loss falls too far to share an axis with the rest of it
POINTS = 2000  # of a curve; more than the picture is wide
STYLES = ("-", "--", ":", "-.")  # once the colours are used up
MOST_RUNS = len(COLOURS) * len(STYLES)  # that can be told apart


@dataclass(frozen=True)
class Curves:
    """One run. x, y: of training. held_x, held_y: of held-out text, empty where y is no loss. All finite, float64."""

    name: str
    x: np.ndarray
    y: np.ndarray
    held_x: np.ndarray
    held_y: np.ndarray
    vocabulary: str | None
    held_out: tuple
    dropped: int  # values that were not finite


def compare(command: Plot) -> tuple[Path, list[str]]:
    """Draws what `command` asks for; (the picture, notes for people, a line each).

    Raises InputError for folders that hold no run, damaged runs, runs none of which has a step, and `bits-per-byte` of
    runs that nowhere say it; OSError naming the file.
    """
    check_plot(command.out, "--out")
    if command.smooth is not None and command.smooth < 1:
        raise InputError(f"--smooth: wanted at least 1 step, got {command.smooth}")
    folders = _folders(command.runs)
    if len(folders) > MOST_RUNS:
        raise InputError(f"{command.runs[0]}: wanted at most {MOST_RUNS} runs in one picture, got {len(folders)}")
    loaded = [(name, *_load(folder)) for name, folder in zip(_names(folders), folders, strict=True)]
    factors = _factors(loaded) if command.y == "bits-per-byte" else [1.0] * len(loaded)
    found, notes = [], []
    for (name, folder, recipe, identity, rows), factor in zip(loaded, factors, strict=True):
        curves = _curves(name, folder, recipe, identity, rows, command.x, command.y, factor)
        if len(curves.x) or len(curves.held_x):
            found.append(curves)
        else:
            notes.append(f"{folder} has no {command.y} yet and is left out")
        if curves.dropped:
            notes.append(f"{folder}: {curves.dropped} values of {command.y} are not finite and are left out")
    if not found:
        raise InputError(f"{command.runs[0]}: wanted a run with {command.y} in {METRICS}, got none yet")
    notes += _cautions(found, command.y)
    return _draw(found, command), notes


def _folders(paths: Sequence[Path]) -> list[Path]:
    """The runs that `paths` are or hold, each once."""
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise InputError(f"{path}: wanted a run folder, or a folder of them, got {_kind(path)}")
        inside = sorted(each for each in path.iterdir() if (each / CONFIG).is_file())
        runs = [path] if (path / CONFIG).is_file() else inside
        if not runs:
            raise InputError(f"{path}: wanted a run folder, or a folder of them ({CONFIG}), got none")
        found += [run for run in runs if run.resolve() not in {each.resolve() for each in found}]
    return found


def _kind(path: Path) -> str:
    return "a file" if path.exists() else "no folder"


def _names(folders: list[Path]) -> list[str]:
    """The folders' last parts, as many as tell them apart, as matplotlib takes them for text."""
    parts = [folder.resolve().parts for folder in folders]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    names = [_plain("/".join(part[-depth:])) for part in parts]
    return [f"./{name}" if name.startswith("_") else name for name in names]  # a label in _ is kept out of legends


def _plain(text: str) -> str:
    """`text` without the dollars that would make it a formula."""
    return text.replace("$", r"\$")


def _load(folder: Path) -> tuple[Path, Recipe, dict, list[dict]]:
    recipe, identity = read_config(folder)
    rows = read(folder)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not all(_counts(row.get(name)) for name in ("step", "tokens")):
            raise InputError(f"{folder / METRICS}:{number}: wanted a row of metrics with step and tokens, got another")
    return folder, recipe, identity, rows


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _counts(value) -> bool:
    return _is_number(value) and 0 <= value < math.inf


def _factors(loaded: list[tuple]) -> list[float]:
    """Bits per byte of one nat per token, of each run."""
    own = [_factor(folder, rows) for _, folder, _, _, rows in loaded]
    tokens = [_held_out(recipe, identity) for _, _, recipe, identity, _ in loaded]
    known = {key: factor for key, factor in zip(tokens, own, strict=True) if factor}
    for (_, folder, *_), key in zip(loaded, tokens, strict=True):
        if key not in known:
            wanted = "wanted a run that has measured bits per byte, or one of the same data beside it"
            raise InputError(f"{folder}: {wanted}, got neither; --y loss needs none")
    return [factor or known[key] for key, factor in zip(tokens, own, strict=True)]


def _factor(folder: Path, rows: list[dict]) -> float | None:
    """From the last held-out loss, or from the summary of a run whose metrics do not say."""
    pairs = [(row.get("val_bits_per_byte"), row.get("val_loss")) for row in reversed(rows)]
    try:
        summary = json.loads((folder / SUMMARY).read_bytes())
        pairs.append((summary.get("bits_per_byte"), summary.get("val_loss")))
    except (FileNotFoundError, ValueError, AttributeError):
        pass
    for bits, nats in pairs:
        if _is_number(bits) and _is_number(nats) and 0 < bits < math.inf and 0 < nats < math.inf:
            return bits / nats
    return None


def _held_out(recipe: Recipe, identity: dict) -> tuple:
    """Equal for runs that are held out on the same tokens."""
    return (*sorted((key, str(value)) for key, value in identity.items()), recipe.seq_len, recipe.eval_tokens)


def _curves(
    name: str, folder: Path, recipe: Recipe, identity: dict, rows: list[dict], x: str, y: str, factor: float
) -> Curves:
    column = COLUMNS.get(y, y.replace("-", "_"))
    xs = _axis(recipe, rows, x)
    train, train_bad = _finite(rows, column)
    held, held_bad = _finite(rows, "val_loss") if y in LOSSES else (np.full(len(rows), np.nan), 0)
    some, told = ~np.isnan(train), ~np.isnan(held)
    label = f"{name} ({human(recipe.shape.n_params).strip()})"
    return Curves(
        label,
        xs[some],
        factor * train[some],
        xs[told],
        factor * held[told],
        identity.get("vocabulary"),
        _held_out(recipe, identity),
        train_bad + held_bad,
    )


def _finite(rows: list[dict], column: str) -> tuple[np.ndarray, int]:
    """(values, NaN where there is none or none that is finite; how many were there and not finite)."""
    values = [row.get(column) for row in rows]
    out = np.array([value if _is_number(value) and math.isfinite(value) else math.nan for value in values], float)
    return out, sum(value is not None for value in values) - int((~np.isnan(out)).sum())


def _axis(recipe: Recipe, rows: list[dict], x: str) -> np.ndarray:
    tokens = np.array([row["tokens"] for row in rows], dtype=float)
    if x == "steps":
        return np.array([row["step"] for row in rows], dtype=float)
    if x == "flops":
        return tokens * flops_per_token(recipe.shape).total
    if x == "tokens":
        return tokens
    speeds, _ = _finite(rows, "tokens_per_second")
    speeds[speeds <= 0] = math.nan
    usual = np.nanmedian(speeds) if (~np.isnan(speeds)).any() else math.inf
    return np.cumsum(np.diff(tokens, prepend=0) / np.where(np.isnan(speeds), usual, speeds))


def _cautions(found: list[Curves], y: str) -> list[str]:
    if y not in LOSSES:
        return []
    if y == "loss" and len({curves.vocabulary for curves in found}) > 1:
        return ["the runs have different vocabularies: nats per token do not compare, --y bits-per-byte does"]
    if len({curves.held_out for curves in found}) > 1:
        return ["the runs are held out on different tokens: their held-out losses compare only roughly"]
    return []


def _draw(found: list[Curves], command: Plot) -> Path:
    inside, losses = len(found) <= LEGEND_INSIDE, command.y in LOSSES
    figure = blank(8.5, 5) if inside else blank(10.5, max(5, 0.9 + LEGEND_ROW * len(found)))
    axes = figure.add_subplot()
    unit, factor = _unit(found) if command.x == "time" else ("", 1.0)
    late_x, late_y = [], []
    for i, curves in enumerate(found):
        style = {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i // len(COLOURS) % len(STYLES)]}
        xs, ys = factor * curves.x, curves.y
        smooth = smoothed(ys, command.smooth or max(1, len(ys) // 40))
        label = curves.name + (f": {curves.held_y[-1]:.3f}" if len(curves.held_y) else "")
        if len(found) <= CURVES_WITH_STEPS and command.smooth != 1:
            axes.plot(*_thinned(xs, ys), color=style["color"], alpha=0.15, linewidth=0.7)
        axes.plot(*_thinned(xs, smooth), **style, linewidth=1.5, label=label)
        if len(curves.held_y):
            dots = {"marker": "o", "markersize": 4.5, "markeredgecolor": "white", "markeredgewidth": 0.6}
            axes.plot(factor * curves.held_x, curves.held_y, **style, **dots, linewidth=0.8, zorder=3)
        start = int(START * len(xs)) if losses else 0
        late_x.append(np.concatenate([xs[start:], factor * curves.held_x]))
        late_y.append(np.concatenate([smooth[start:], curves.held_y]))
    _scale_x(axes, command, late_x)
    _scale_y(axes, command.y, np.concatenate(late_y))
    axes.set_xlabel(LABELS[command.x] + (f", {unit}" if unit else ""))
    axes.set_ylabel(LABELS[command.y])
    axes.set_title(_plain(command.title or ""), fontsize=11)
    plain(axes)
    told = "line: training, smoothed\ndots: held out, the last in numbers" if losses else None
    look = {"title": told, "title_fontsize": 8, "frameon": False, "fontsize": 9, "alignment": "left"}
    if inside:
        axes.legend(loc="best", **look)
    else:
        figure.legend(loc="outside right upper", **look)
    return write(figure, command.out)


def _scale_x(axes, command: Plot, late: list[np.ndarray]) -> None:
    ends = [float(xs.max()) for xs in late]
    begin = min(float(xs.min()) for xs in late)
    if begin > 0 and (command.x == "flops" or command.log_x or max(ends) >= LENGTHS * min(ends)):
        axes.set_xscale("log")
        axes.set_xlim(0.8 * begin, 1.3 * max(ends))
    if command.x in ("tokens", "steps"):
        axes.xaxis.set_major_formatter(lambda value, _: short(value))


def _scale_y(axes, y: str, late: np.ndarray) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = float(late.min()), float(late.max())
    if low > 0 and high > 1.3 * low and y != "tokens-per-second":
        axes.set_yscale("log")
        if high < 30 * low:
            close = high < 4 * low
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if close else (1, 2, 5)))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        margin = (high / low) ** 0.04
        axes.set_ylim(low / margin, high * margin)
    elif high > low:
        axes.set_ylim(low - 0.04 * (high - low), high + 0.04 * (high - low))


def _thinned(xs: np.ndarray, ys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most POINTS of them, the last among them."""
    every = -(-len(xs) // POINTS) or 1
    keep = np.arange(len(xs) - 1, -1, -every)[::-1]
    return xs[keep], ys[keep]


def _unit(found: list[Curves]) -> tuple[str, float]:
    longest = max(float(part[-1]) for curves in found for part in (curves.x, curves.held_x) if len(part))
    for unit, seconds in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if longest >= 2 * seconds:
            return unit, 1 / seconds
    return "seconds", 1.0
