"""What each trainer's test found: the README's table of trainers comes from these (bench/integrations.py)."""

import json
import math
import os
from importlib import metadata

import torch


def record(trainer: str, parts: list[str], steps: int, largest_difference: float, version: str | None = None) -> None:
    """Holds the losses with and without our parts to 1e-3, and leaves a line in the file that CGPT_RECORD names.

    trainer: a distribution's name, whose version is found, or any name with its version.
    """
    assert largest_difference <= 1e-3, f"{trainer}: losses differ by {largest_difference:.2e}"  # NaN fails too
    if path := os.environ.get("CGPT_RECORD"):
        row = {
            "trainer": trainer,
            "version": version or metadata.version(trainer),
            "parts": parts,
            "steps": steps,
            "largest_difference": largest_difference,
            "torch": torch.__version__,
        }
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")


def largest_difference(losses: list[float], other: list[float]) -> float:
    """Over equally many losses, that have moved: a run that learns nothing compares nothing."""
    assert len(losses) == len(other) > 1
    assert all(map(math.isfinite, [*losses, *other])), f"not finite: {losses}, {other}"
    assert max(other) - min(other) > 0.05, f"no learning: {other}"
    return max(abs(a - b) for a, b in zip(losses, other, strict=True))
