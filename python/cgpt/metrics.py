"""What a run leaves to read: metrics.jsonl, one line a step, and summary.json, the run in a dozen numbers."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

from cgpt.files import write_atomically

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"

WARMUP_STEPS = 5  # steps whose speed says more about caches and page faults than about training


@dataclass
class Summary:
    """A finished run. Losses in nats per token; rates per second; None where there is nothing to tell."""

    model: str
    data: str
    parameters: int
    steps: int
    tokens: int
    seconds: float  # of wall time, all sessions of the run together
    train_loss: float | None  # mean of the last tenth of the steps, at most 100
    val_loss: float | None
    unigram_loss: float
    bits_per_byte: float | None
    val_tokens: int
    tokens_per_second: float | None  # median, after warm-up
    model_flops_per_second: float | None
    peak_memory_bytes: int  # of the rank that took most
    skipped_steps: int
    stopped_by: int | None  # number of the signal that ended it before its last step
    checkpoint: str | None

    def write(self, folder: Path) -> None:
        write_atomically(folder / SUMMARY, json.dumps(asdict(self), indent=1).encode() + b"\n")


class Metrics:
    """Appends to `folder`/metrics.jsonl. Raises OSError naming the file."""

    def __init__(self, folder: Path, resume_step: int = 0):
        """resume_step: lines of later steps are dropped, and so is one torn by a crash: steps repeat nowhere.

        furthest: the last step that there was a line of, dropped or not."""
        self.path = folder / METRICS
        rows = read(folder)
        self.furthest = max((row["step"] for row in rows), default=0)
        self.rows = [row for row in rows if row["step"] <= resume_step]
        write_atomically(self.path, b"".join(_line(row) for row in self.rows))
        self._file = self.path.open("ab", buffering=0)

    def append(self, row: dict) -> None:
        self.rows.append(row)
        try:
            self._file.write(_line(row))
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def close(self) -> None:
        self._file.close()

    def column(self, name: str) -> list[float]:
        return [row[name] for row in self.rows if row.get(name) is not None]

    def tokens_per_second(self) -> float | None:
        speeds = self.column("tokens_per_second")
        return statistics.median(speeds[WARMUP_STEPS:] or speeds) if speeds else None

    def train_loss(self) -> float | None:
        losses = self.column("loss")
        tail = losses[-min(100, max(1, len(losses) // 10)) :]
        return statistics.fmean(tail) if tail else None


def read(folder: Path) -> list[dict]:
    """Rows of metrics.jsonl; a torn last line is left out, a missing file is no rows."""
    rows = []
    with contextlib.suppress(FileNotFoundError), (folder / METRICS).open("rb") as file:
        for line in file:
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


def peak_memory_bytes(device: str = "cpu") -> int:
    """Largest resident set of this process so far; on a GPU, the most that torch's allocator has held."""
    if device != "cpu":
        import torch

        return torch.cuda.max_memory_allocated(device)
    scale = 1 if os.uname().sysname == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def bits_per_byte(loss: float, tokens: int, text_bytes: int | None) -> float | None:
    """Mean loss in nats over `tokens` tokens that spell `text_bytes` bytes of text, in bits per byte."""
    return loss * tokens / (math.log(2) * text_bytes) if text_bytes else None


def human(number: float, unit: str = "") -> str:
    """Three digits and a decimal prefix: 1234567 -> "1.23 M"."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{number / factor:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}".rstrip()


def _line(row: dict) -> bytes:
    return json.dumps(row).encode() + b"\n"
