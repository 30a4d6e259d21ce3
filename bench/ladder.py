"""A ladder of compute-optimal models: trained, fitted, and its own largest run forecast before it is trained.

    python bench/ladder.py --runs DIR              about 75 minutes on two busy cores; the same command again goes on

Five GPTs from 266 thousand to 925 thousand parameters, 20 tokens each parameter, on `python-stdlib` in a vocabulary of
1024 learnt from it (GPT-2's 50,257 rows would be nearly all of such models). All have four layers and rotary positions,
under muP with the learning rate that `cgpt sweep` found for a small one. loss = (flops / scale)^-exponent + constant is
fitted to all but the largest; what it foretells of that one is written down, then the run is made. The forecast was
0.35 % too high. Two ladders that began lower missed by more than 3 %: below 266 thousand parameters losses still fall
faster than by a law (bench/results/LOG.md).

Leaves in --out (default: bench/results/ladder): points.csv for `cgpt fit`, forecast.json, ladder.png.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from cgpt import pictures
from cgpt.data.prepare import prepare
from cgpt.experiments.matrix import Cell, Outcome, run_matrix
from cgpt.experiments.proxies import base_of, widened
from cgpt.files import write_atomically
from cgpt.model.parametrization import parametrize
from cgpt.recipe import TrainConfig, resolve
from cgpt.scaling.fit import Fitted, fit
from cgpt.scaling.flops import flops_per_token
from cgpt.scaling.points import read_points

VOCABULARY, SEQ_LEN, BATCH = 1024, 128, 8
TOKENS_PER_PARAMETER = 20
LAYERS, WIDTHS = 4, (64, 80, 96, 112, 128)  # heads of 16
BASE = 48  # the width that the learning rate was found for
LR = 1.2e-2
EVAL_TOKENS = 1 << 18


def cells(data: Path, widths: Sequence[int], tokens_per_parameter: float, lr: float) -> list[Cell]:
    """A run for each width, the smallest first."""
    config = TrainConfig(model="tiny", data=str(data), batch_size=BATCH, seq_len=SEQ_LEN, eval_tokens=EVAL_TOKENS)
    recipe = resolve(config, VOCABULARY)
    shape = replace(recipe.shape, n_layer=LAYERS, d_model=BASE, n_head=BASE // 16, d_head=16, d_ff=4 * BASE)
    base = base_of(replace(shape, seq_len=SEQ_LEN, positions="rotary"), lr)
    found = []
    for width in widths:
        shape = parametrize(widened(base.config, width), "mup", base)
        steps = round(tokens_per_parameter * shape.n_params / (BATCH * SEQ_LEN))
        one = replace(
            recipe,
            shape=shape,
            steps=steps,
            lr=lr,
            parametrization="mup",
            weight_decay=0.1,
            warmup_tokens=steps * BATCH * SEQ_LEN // 20,
            eval_every=max(1, steps // 4),
            checkpoint_every=max(1, steps // 10),
        )
        found.append(Cell(f"w{width}", {"width": width}, one))
    return found


def write_points(path: Path, cells: list[Cell], outcomes: list[Outcome]) -> None:
    """A line a run, as `cgpt fit` reads it; FLOPs by the published convention."""
    with path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["run", "params", "tokens", "flops", "loss", "bits_per_byte", "seconds"])
        for cell, outcome in zip(cells, outcomes, strict=False):
            flops = outcome.tokens * flops_per_token(cell.recipe.shape).total
            bits = f"{outcome.bits_per_byte:.4f}" if outcome.bits_per_byte else ""
            row = (cell.name, outcome.parameters, outcome.tokens, flops, f"{outcome.loss:.5f}", bits)
            table.writerow([*row, round(outcome.seconds)])


def draw(path: Path, fitted: Fitted, flops: float, measured: float) -> None:
    """The runs that the law was fitted to, the law beyond them with its interval, and the largest as it came out."""
    points = fitted.points
    beyond = np.geomspace(points.flops.min(), 1.3 * flops, 100)
    told = fitted.predict(beyond).loss
    figure = pictures.blank(7, 4.5)
    axes = figure.subplots()
    axes.plot(beyond, told[0], color="tab:red", linewidth=1.6, label="law fitted to all but the largest")
    axes.fill_between(beyond, told[1], told[2], color="tab:red", alpha=0.15, linewidth=0, label="its 95 % interval")
    axes.scatter(points.flops, points.loss, s=28, color="tab:blue", zorder=3, label="fitted")
    error = f"{100 * (float(fitted.predict([flops]).loss[0, 0]) / measured - 1):+.1f} %"
    label = f"the largest, trained after its forecast ({error})"
    axes.scatter([flops], [measured], s=70, marker="D", facecolor="none", edgecolor="black", zorder=4, label=label)
    axes.set(xscale="log", xlabel="training FLOPs", ylabel="held-out loss, nats a token")
    pictures.plain(axes)
    axes.legend(frameon=False, fontsize=9)
    pictures.write(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder for data and runs")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "ladder", help="for the results"
    )
    parser.add_argument("--data", default="python-stdlib", help="text, as for `cgpt data prepare`")
    parser.add_argument("--lr", type=float, default=LR, help="peak learning rate, of the base")
    parser.add_argument("--tokens-per-parameter", type=float, default=TOKENS_PER_PARAMETER)
    parser.add_argument("--sizes", type=int, default=len(WIDTHS), help="how many, from the smallest")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    data = options.runs / "data"
    prepare([options.data], data, vocab_size=VOCABULARY)
    ladder = cells(data, WIDTHS[: options.sizes], options.tokens_per_parameter, options.lr)
    points = options.out / "points.csv"

    below = run_matrix(options.runs, ladder[:-1], say)
    write_points(points, ladder, below)
    fitted = fit(read_points([points]), "power")
    largest = ladder[-1].recipe
    flops = largest.tokens * flops_per_token(largest.shape).total
    loss, low, high = (float(row[0]) for row in fitted.predict([flops]).loss)
    forecast = {
        "law": {name: fitted.coefficients[name] for name in ("scale", "exponent", "constant")},
        "run": ladder[-1].name,
        "flops": flops,
        "forecast": loss,
        "interval": [low, high],
    }
    write(options.out / "forecast.json", forecast)
    say(f"forecast for {ladder[-1].name}: {loss:.4f} ({low:.4f} to {high:.4f})")

    outcomes = run_matrix(options.runs, ladder, say)
    measured = outcomes[-1].loss
    write(options.out / "forecast.json", forecast | {"measured": measured, "error": loss / measured - 1})
    write_points(points, ladder, outcomes)
    draw(options.out / "ladder.png", fitted, flops, measured)
    say(f"measured {measured:.4f}: the forecast was {100 * (loss / measured - 1):+.2f} % off")


def write(path: Path, content: dict) -> None:
    write_atomically(path, json.dumps(content, indent=1).encode() + b"\n")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
