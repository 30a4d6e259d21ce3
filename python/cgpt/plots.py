"""loss.png: training and held-out loss over tokens seen, with the unigram baseline as the line to beat. And what each
lane of a streamed run did when."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cgpt.pictures import blank, plain, write

LOSS = "loss.png"
LANES = ("compute", "down", "up", "wire", "optimizer", "read", "write")  # from the top; no wire without other ranks
COLOURS = {  # by the last word of a span's name
    "forward": "tab:blue",
    "head": "tab:red",
    "backward": "tab:orange",
    "weights": "tab:green",
    "gradients": "tab:purple",
    "input": "tab:cyan",
    "AdamW": "tab:olive",
    "state": "tab:brown",
}
OTHER = "0.6"


def smoothed(losses: np.ndarray, width: int) -> np.ndarray:
    """Exponential moving average over about `width` steps, its start corrected for the missing past."""
    keep = 1 - 2 / (width + 1)
    out, mean, weight = np.empty(len(losses)), 0.0, 0.0
    for i, loss in enumerate(losses):
        mean = keep * mean + (1 - keep) * loss
        weight = keep * weight + (1 - keep)
        out[i] = mean / weight
    return out


def plot_loss(folder: Path, rows: list[dict], unigram_loss: float | None, title: str) -> Path:
    """Draws `rows` of metrics.jsonl into `folder`/loss.png and returns its path."""
    figure = blank(8, 4.5)
    axes = figure.add_subplot()
    trained = [row for row in rows if row.get("loss") is not None]
    held_out = [row for row in rows if row.get("val_loss") is not None]
    if trained:
        tokens = np.array([row["tokens"] for row in trained])
        losses = np.array([row["loss"] for row in trained])
        axes.plot(tokens, losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="training, each step")
        width = max(1, len(losses) // 60)
        axes.plot(tokens, smoothed(losses, width), color="tab:blue", linewidth=1.8, label="training, smoothed")
    if held_out:
        xs, ys = [row["tokens"] for row in held_out], [row["val_loss"] for row in held_out]
        axes.plot(xs, ys, color="tab:orange", marker="o", markersize=4, linewidth=1.5, label="held out")
        axes.annotate(f"{ys[-1]:.3f}", (xs[-1], ys[-1]), xytext=(6, 0), textcoords="offset points", va="center")
    if unigram_loss is not None:
        axes.axhline(unigram_loss, color="0.4", linestyle="--", linewidth=1.2, label=f"unigram {unigram_loss:.3f}")
    axes.set_xlabel("tokens seen")
    axes.set_ylabel("loss, nats per token")
    axes.set_title(title, fontsize=11)
    axes.margins(x=0.02)
    plain(axes)
    axes.xaxis.set_major_formatter(lambda value, _: short(value))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    return write(figure, folder / LOSS)


def plot_timeline(path: Path, spans: Sequence[Any]) -> Path:
    """Draws one step into the PNG `path`, a row a lane with its busy share, and returns it.

    spans: with lane, what ("h.0 forward"), begin and end (seconds), as a Timeline keeps them.
    """
    figure = blank(10, 3.5)
    axes = figure.add_subplot()
    begin = min((span.begin for span in spans), default=0.0)
    length = max((span.end for span in spans), default=1.0) - begin
    unit, factor = ("s", 1.0) if length >= 1 else ("ms", 1e3)
    names, lanes = [], [lane for lane in LANES if lane != "wire" or any(span.lane == lane for span in spans)]
    for row, lane in enumerate(lanes):
        mine = [span for span in spans if span.lane == lane]
        busy = sum(span.end - span.begin for span in mine)
        names.append(f"{lane} {busy / length:.0%}" if length else lane)
        bars = [((span.begin - begin) * factor, (span.end - span.begin) * factor) for span in mine]
        axes.broken_barh(
            bars,
            (row - 0.4, 0.8),
            facecolors=[COLOURS.get(_kind(span.what), OTHER) for span in mine],
            edgecolor="white",
            linewidth=0.3,
        )
    found = {_kind(span.what) for span in spans}
    for kind, colour in {**COLOURS, "other": OTHER}.items():
        if kind in found:
            axes.barh(0, 0, color=colour, label=kind)
    axes.set_yticks(range(len(lanes)), names)
    axes.set_ylim(len(lanes) - 0.5, -0.5)
    axes.set_xlim(0, length * factor or 1)
    axes.set_xlabel(f"{unit} from the first span")
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    if found:
        figure.legend(loc="outside upper center", ncols=len(found), frameon=False, fontsize=9)
    return write(figure, path)


def _kind(what: str) -> str:
    last = what.rpartition(" ")[2]
    return last if last in COLOURS else "other"


def short(value: float) -> str:
    """A count on an axis: 2500000 -> "2.5M"."""
    for factor, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:g}{letter}"
    return f"{value:g}"
