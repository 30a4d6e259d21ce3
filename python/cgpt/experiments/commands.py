"""`cgpt sweep` and `cgpt ablate`: cells, their runs, and what they show."""

from __future__ import annotations

import json
import sys
from functools import partial

from cgpt.experiments import ablate, report, sweep
from cgpt.experiments.flags import Ablate, Sweep
from cgpt.experiments.matrix import Cell, Outcome, run_matrix
from cgpt.experiments.sweep import Grid
from cgpt.files import write_atomically
from cgpt.train import job_of


def run_sweep(command: Sweep) -> None:
    """Raises InputError for what makes no run, and Stopped where a signal ended it."""
    grid = Grid(
        command.widths,
        command.lr,
        command.init_std,
        command.embedding_scale,
        command.parametrization,
        command.seeds,
        command.random,
    )
    outcomes = _run(command, sweep.cells(job_of(command.config()).recipe, grid))
    _show(command, report.sweep_json(outcomes), report.sweep_text(outcomes), "sweep")
    _say(command, str(report.plot_sweep(command.out / "sweep.png", outcomes)))


def run_ablate(command: Ablate) -> None:
    """As run_sweep."""
    recipe = job_of(command.config()).recipe
    chosen = command.positions, command.activation, command.embedding_norm, command.seeds
    outcomes = _run(command, ablate.cells(recipe, *chosen))
    _show(command, report.ablate_json(outcomes), report.ablate_text(outcomes), "ablate")
    _say(command, str(report.plot_ablate(command.out / "ablate.png", outcomes)))


def _run(command: Sweep | Ablate, cells: list[Cell]) -> list[Outcome]:
    tokens = cells[0].recipe.tokens
    _say(command, f"{len(cells)} runs of {tokens:,} tokens each, in {command.out}")
    return run_matrix(command.out, cells, partial(_say, command))


def _show(command: Sweep | Ablate, found: dict, text: str, name: str) -> None:
    data = json.dumps(found, indent=1)
    write_atomically(command.out / f"{name}.json", data.encode() + b"\n")
    print(data if command.json else f"\n{text}\n")


def _say(command: Sweep | Ablate, text: str) -> None:
    """On stderr where JSON is asked for, which alone goes to stdout then."""
    print(text, file=sys.stderr if command.json else sys.stdout, flush=True)
