"""Hyperparameters of small models, at several widths: where the best learning rate lies, and whether it stays there.

    grid      every learning rate x init std x embedding scale that is given
    random    as many draws as asked, log-uniform between the least and the largest given of each

Under muP the optimum of one width is that of all (Yang et al. 2022, arXiv 2203.03466, figure 1): what is found on the
smallest serves the largest. Under SP it moves. Cerebras-GPT's own was found by 200 random draws on a 40M proxy.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cgpt.errors import InputError
from cgpt.experiments.matrix import Cell, Outcome
from cgpt.experiments.proxies import base_of, wide, widened
from cgpt.recipe import Recipe

POINT = ("lr", "init_std", "embedding_scale")


@dataclass(frozen=True)
class Grid:
    """What is tried. draws: None tries all combinations of the three lists; a number, so many random points within
    their bounds. Every point is trained at each width, by each parametrization and from each seed."""

    widths: tuple[int, ...]
    lr: tuple[float, ...]
    init_std: tuple[float, ...]
    embedding_scale: tuple[float, ...]
    parametrizations: tuple[str, ...]
    seeds: tuple[int, ...]
    draws: int | None = None

    def points(self) -> list[tuple[float, float, float]]:
        """(lr, init std, embedding scale), in the order in which they are tried."""
        lists = self.lr, self.init_std, self.embedding_scale
        if self.draws is None:
            return list(itertools.product(*(sorted(values) for values in lists)))
        generator = np.random.default_rng(0)
        bounds = [(math.log(min(values)), math.log(max(values))) for values in lists]
        drawn = [[math.exp(generator.uniform(*ends)) for ends in bounds] for _ in range(self.draws)]
        return [tuple(float(f"{number:.4g}") for number in point) for point in drawn]


def cells(recipe: Recipe, grid: Grid) -> list[Cell]:
    """The runs of a sweep around `recipe`, whose shape's depth and heads all models have. Raises InputError, naming the
    flag, for numbers that make no model."""
    for name in ("widths", "lr", "init_std", "embedding_scale", "parametrizations", "seeds"):
        values = getattr(grid, name)
        if not values or len(set(values)) < len(values):
            raise InputError(f"--{name.replace('_', '-')}: wanted values, each once, got {' '.join(map(str, values))}")
        if name in POINT and not all(0 < value < math.inf for value in values):
            raise InputError(f"--{name.replace('_', '-')}: wanted numbers above 0, got {' '.join(map(str, values))}")
    if grid.draws is not None and grid.draws < 1:
        raise InputError(f"--random: wanted at least 1 draw, got {grid.draws}")
    narrow = widened(recipe.shape, min(grid.widths))
    found = []
    for kind, point, seed in itertools.product(grid.parametrizations, grid.points(), grid.seeds):
        lr, std, scale = point
        base = base_of(narrow, *point)
        for width, shape in zip(grid.widths, wide(base, kind, grid.widths), strict=True):
            fields = {"parametrization": kind, "width": width, "lr": lr, "init_std": std, "embedding_scale": scale}
            name = f"{kind}-w{width}-lr{lr:.4g}-std{std:.4g}-emb{scale:.4g}-seed{seed}"
            one = replace(recipe, shape=shape, lr=lr, seed=seed, parametrization=kind)
            found.append(Cell(name, fields | {"seed": seed}, one))
    return found


@dataclass(frozen=True)
class Best:
    """The best of one parametrization and width. loss: the mean over seeds. place: of its learning rate among those
    tried there, from 0."""

    parametrization: str
    width: int
    lr: float
    init_std: float
    embedding_scale: float
    loss: float
    place: int


def means(outcomes: Sequence[Outcome]) -> dict[tuple, float]:
    """(parametrization, width, lr, init std, embedding scale) -> mean loss over seeds; infinite where one diverged."""
    losses: dict[tuple, list[float]] = {}
    for outcome in outcomes:
        key = tuple(outcome.fields[name] for name in ("parametrization", "width", *POINT))
        losses.setdefault(key, []).append(outcome.rank)
    return {key: statistics.fmean(found) for key, found in losses.items()}


def best(outcomes: Sequence[Outcome]) -> list[Best]:
    """The best point of each parametrization and width, in the order in which they were trained."""
    table = means(outcomes)
    found = []
    for kind, width in dict.fromkeys(key[:2] for key in table):
        mine = {key: loss for key, loss in table.items() if key[:2] == (kind, width)}
        key = min(mine, key=mine.get)
        rates = sorted({lr for _, _, lr, _, _ in mine})
        found.append(Best(*key, mine[key], rates.index(key[2])))
    return found


def drift(found: Sequence[Best], kind: str) -> int:
    """Grid steps between the best learning rates of the widths of one parametrization that lie furthest apart."""
    places = [row.place for row in found if row.parametrization == kind]
    return max(places) - min(places)
