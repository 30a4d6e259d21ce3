"""What each choice is worth: positions x activation x embedding norm, trained on equal tokens from several seeds.

The matrix of Le Scao et al. 2022 (arXiv 2210.15424), who found at 1.3B: ALiBi > learned > rotary > none, SwiGLU
slightly above GELU, and a norm behind the embedding costs quality.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cgpt.errors import InputError
from cgpt.experiments.matrix import Cell, Outcome
from cgpt.model.config import variant
from cgpt.recipe import Recipe

CHOICES = ("positions", "activation", "embedding_norm")
NORMS = {"off": False, "on": True}


@dataclass(frozen=True)
class Row:
    """One combination, or all with one choice. choices: field -> what it has. loss: mean over the runs in nats per
    token. spread: the standard deviation between seeds of one combination, pooled over combinations; None of
    a single seed. bits_per_byte: the mean, where it is known."""

    choices: dict[str, str]
    loss: float
    spread: float | None
    bits_per_byte: float | None
    parameters: int
    runs: int


def cells(
    recipe: Recipe,
    positions: Sequence[str],
    activations: Sequence[str],
    norms: Sequence[str],
    seeds: Sequence[int],
) -> list[Cell]:
    """Every combination around `recipe`, all with its steps and batches. norms: of "off" and "on". Raises InputError,
    naming the flag, for an unknown choice."""
    lists = {"positions": positions, "activation": activations, "embedding-norm": norms, "seeds": seeds}
    for name, values in lists.items():
        if not values or len(set(values)) < len(values):
            raise InputError(f"--{name}: wanted values, each once, got {' '.join(map(str, values))}")
    unknown = [norm for norm in norms if norm not in NORMS]
    if unknown:
        raise InputError(f"--embedding-norm: wanted off, on or both, got {unknown[0]}")
    found = []
    for kind, activation, norm, seed in itertools.product(positions, activations, norms, seeds):
        choices = dict(zip(CHOICES, (kind, activation, norm), strict=True))
        shape = variant(recipe.shape, kind, activation, NORMS[norm])
        name = f"{kind}-{activation}-norm-{norm}-seed{seed}"
        found.append(Cell(name, choices | {"seed": seed}, replace(recipe, shape=shape, seed=seed)))
    return found


def combinations(outcomes: Sequence[Outcome]) -> list[Row]:
    """A row a combination, the best first."""
    return sorted(_rows(outcomes, CHOICES), key=lambda row: row.loss)


def by_choice(outcomes: Sequence[Outcome]) -> list[Row]:
    """A row a choice, over everything that has it: of each field the best first."""
    found = []
    for field in CHOICES:
        if len({outcome.fields[field] for outcome in outcomes}) > 1:
            found += sorted(_rows(outcomes, (field,)), key=lambda row: row.loss)
    return found


def _rows(outcomes: Sequence[Outcome], fields: Sequence[str]) -> list[Row]:
    groups: dict[tuple, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(tuple(outcome.fields[field] for field in fields), []).append(outcome)
    rows = []
    for key, mine in groups.items():
        losses, bits = [outcome.rank for outcome in mine], [outcome.bits_per_byte for outcome in mine]
        rows.append(
            Row(
                dict(zip(fields, key, strict=True)),
                statistics.fmean(losses),
                _spread(mine),
                None if None in bits else statistics.fmean(bits),
                round(statistics.fmean(outcome.parameters for outcome in mine)),
                len(mine),
            )
        )
    return rows


def _spread(outcomes: Sequence[Outcome]) -> float | None:
    """Standard deviation between seeds of the same combination, pooled over combinations."""
    groups: dict[tuple, list[float]] = {}
    for outcome in outcomes:
        groups.setdefault(tuple(outcome.fields[field] for field in CHOICES), []).append(outcome.rank)
    freedom = sum(len(losses) - 1 for losses in groups.values())
    if not freedom or any(outcome.loss is None for outcome in outcomes):
        return None
    squares = sum((loss - statistics.fmean(losses)) ** 2 for losses in groups.values() for loss in losses)
    return (squares / freedom) ** 0.5
