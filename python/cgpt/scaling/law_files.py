"""A law from `cgpt fit --method parametric --json`, so that plans can rest on one's own runs.

The relative half width of its 95 % interval at C FLOPs is the root of squares of two: what the bootstraps left open at
the best use of C, between the budgets that the file foretells (beyond them as at the nearest), and twice the residual.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cgpt.errors import InputError
from cgpt.scaling.laws import ParametricLaw

NAMES = ("E", "A", "B", "alpha", "beta")


@dataclass(frozen=True, kw_only=True)
class FittedLaw(ParametricLaw):
    """residual: r.m.s. of the relative error. bands: (flops, relative half width of the loss's interval), ascending."""

    residual: float = 0.0
    bands: tuple[tuple[float, float], ...] = ()

    def half_width(self, flops: float) -> float:
        """Relative, of the 95 % interval at `flops` FLOPs."""
        open_ = 0.0
        if self.bands:
            at, widths = np.array(self.bands).T
            open_ = float(np.interp(math.log(flops), np.log(at), widths))
        return math.hypot(open_, 2 * self.residual)


def read_law(path: Path) -> FittedLaw:
    """Raises InputError, naming --law, for a file that is missing or holds no such fit; OSError for others."""
    try:
        row = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"--law: wanted the JSON of `cgpt fit`, got no file {path}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"--law: wanted the JSON of `cgpt fit`, got {path}: {error}") from error
    method = row.get("method") if isinstance(row, dict) else None
    if method != "parametric":
        raise InputError(f"--law: {path}: wanted a fit of parameters and tokens (--method parametric), got {method}")
    try:
        found = {name: float(row[name]) for name in NAMES}
        bands = [
            (float(at["flops"]), *map(float, at["intervals"]["loss"])) for at in row["predictions"] if at["intervals"]
        ]
        return FittedLaw(
            name=path.name,
            source=f"fitted to {row['source']}",
            residual=float(row["residual"] or 0),
            bands=tuple(sorted((flops, (high - low) / (high + low)) for flops, low, high in bands)),
            **_positive(path, found),
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"--law: wanted the JSON of `cgpt fit`, got {path}, a damaged one ({error!r})") from error


def _positive(path: Path, found: dict[str, float]) -> dict[str, float]:
    for name, value in found.items():
        if not (math.isfinite(value) and value > 0) and not (name == "E" and value == 0):
            raise InputError(f"--law: {path}: wanted {name} above 0, got {value:g}")
    return found
