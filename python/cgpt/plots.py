"""loss.png: training and held-out loss over tokens seen, with the unigram baseline as the line to beat."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from cgpt.files import write_atomically

LOSS = "loss.png"


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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # no pyplot: no global state, no window system

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
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
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_formatter(lambda value, _: _tokens(value))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    data = io.BytesIO()
    figure.savefig(data, format="png")
    write_atomically(folder / LOSS, data.getvalue())
    return folder / LOSS


def _tokens(value: float) -> str:
    for factor, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:g}{letter}"
    return f"{value:g}"
