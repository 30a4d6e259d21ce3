"""`cgpt coord-check`, `cgpt sweep` and `cgpt ablate`: what they run, and what they show."""

from __future__ import annotations

import json
import sys
from functools import partial

from cgpt.console import interactive
from cgpt.data.prepare import open_corpus
from cgpt.experiments import ablate, coordinates_report, report, sweep
from cgpt.experiments.coordinates import base_at, check, deeper, one_batch, wider
from cgpt.experiments.flags import Ablate, CoordCheck, Sweep
from cgpt.experiments.matrix import Cell, Outcome, run_matrix
from cgpt.experiments.sweep import Grid
from cgpt.files import write_atomically
from cgpt.opening import job_of
from cgpt.pictures import check_plot


def run_coord_check(command: CoordCheck) -> None:
    """Raises InputError for what cannot be compared, Diverged among it."""
    command.check()
    if command.plot:
        check_plot(command.plot)
    batch, vocab_size = one_batch(open_corpus(command.data, progress=interactive()))
    widths, depths = command.grid
    tuned = command.lr, command.init_std, command.embedding_scale
    base = base_at(widths[0], depths[0], command.heads, vocab_size, *tuned)
    shapes = [wider(base, width) for width in widths] if len(widths) > 1 else [deeper(base, depth) for depth in depths]
    steps, seeds, precision = command.steps, command.seeds, command.precision
    found = check(base, shapes, command.kinds, batch, steps=steps, seeds=seeds, precision=precision)
    data = json.dumps(coordinates_report.to_dict(found), indent=1)
    if command.out:
        write_atomically(command.out, data.encode() + b"\n")
    if command.plot:
        coordinates_report.plot(found, command.plot)
    print(data if command.json else coordinates_report.show(found))


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
