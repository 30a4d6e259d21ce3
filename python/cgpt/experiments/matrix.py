"""Runs that differ in a few fields, trained one after another. Begun again, with as many or more, it goes on.

FOLDER/NAME/           a run, as `cgpt train` leaves it
FOLDER/NAME.log        what it said
FOLDER/results.jsonl   a line a finished run: its fields, loss, size and recipe
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cgpt.console import clock
from cgpt.errors import Diverged, InputError
from cgpt.files import lock_folder
from cgpt.opening import Job
from cgpt.recipe import CONFIG, Recipe, read_config
from cgpt.train import train_job

RESULTS = "results.jsonl"


@dataclass(frozen=True)
class Cell:
    """One run. name: of its folder, unlike all others. fields: what tells it from the others."""

    name: str
    fields: dict[str, Any]
    recipe: Recipe


@dataclass(frozen=True)
class Outcome:
    """What came of a cell. loss: held out, in nats per token; None where training diverged. seconds: all sessions'."""

    name: str
    fields: dict[str, Any]
    loss: float | None
    bits_per_byte: float | None
    parameters: int
    tokens: int
    seconds: float

    @property
    def rank(self) -> float:
        """The loss, or what is worse than any."""
        return float("inf") if self.loss is None else self.loss


class Stopped(Exception):
    """A signal has ended the matrix, its runs saved."""

    def __init__(self, signal: int):
        super().__init__(f"stopped by signal {signal}")
        self.signal = signal


def run_matrix(folder: Path, cells: Sequence[Cell], say: Callable[[str], None] = print) -> list[Outcome]:
    """Trains every cell that has no result in `folder`; returns all outcomes in the cells' order.

    A run that was interrupted is resumed. Raises Stopped where SIGINT or SIGTERM ended it, InputError where the folder
    holds other runs of the same names, and what training raises, but for Diverged, which is a result.
    """
    if len({cell.name for cell in cells}) != len(cells):
        raise InputError("matrix: wanted cells of different names, got two of one")
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(lock_folder(folder)):
        found = _finished(folder)
        for cell in cells:
            if cell.name in found:
                _check_same(cell, found[cell.name]["recipe"], folder)
        left = [cell for cell in cells if cell.name not in found]
        if len(left) < len(cells):
            say(f"{len(cells) - len(left)} of {len(cells)} runs are in {folder} already")
        began = time.monotonic()
        for done, cell in enumerate(left, 1):
            outcome = _train(folder, cell)
            row = asdict(outcome) | {"recipe": cell.recipe.to_dict()}
            with (folder / RESULTS).open("a") as file:
                file.write(json.dumps(row) + "\n")
            found[cell.name] = row
            taken = time.monotonic() - began
            told = "diverged" if outcome.loss is None else f"loss {outcome.loss:.4f}"
            rest = clock(taken / done * (len(left) - done))
            say(f"{len(cells) - len(left) + done:4}/{len(cells)}  {cell.name}: {told}, {rest} left")
    return [_outcome(found[cell.name]) for cell in cells]


def _train(folder: Path, cell: Cell) -> Outcome:
    run, began, identity = folder / cell.name, time.monotonic(), None
    if (run / CONFIG).is_file():
        saved, identity = read_config(run)
        _check_same(cell, saved.to_dict(), folder)
    loss = bits = None
    seconds = None
    with (folder / f"{cell.name}.log").open("a") as log, contextlib.redirect_stdout(log):
        try:
            summary = train_job(Job(cell.recipe, run, identity))
        except Diverged as error:
            print(error)
        else:
            if summary.stopped_by:
                raise Stopped(summary.stopped_by)
            loss, bits, seconds = summary.val_loss, summary.bits_per_byte, summary.seconds
    seconds = time.monotonic() - began if seconds is None else seconds
    return Outcome(cell.name, cell.fields, loss, bits, cell.recipe.shape.n_params, cell.recipe.tokens, seconds)


def _finished(folder: Path) -> dict[str, dict]:
    """Rows of results.jsonl by name; a line torn by a crash is left out, and its run resumed at its end."""
    rows = {}
    with contextlib.suppress(FileNotFoundError):
        for line in (folder / RESULTS).read_text().splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                rows[row["name"]] = row
    return rows


def _check_same(cell: Cell, saved: dict, folder: Path) -> None:
    asked = cell.recipe.to_dict()
    for name in asked.keys() | saved.keys():
        if asked.get(name) != saved.get(name):
            raise InputError(
                f"{folder / cell.name}: wanted a run with {name} {asked.get(name)}, got one with {saved.get(name)}; "
                "another --out begins anew"
            )


def _outcome(row: dict) -> Outcome:
    return Outcome(**{name: value for name, value in row.items() if name != "recipe"})
