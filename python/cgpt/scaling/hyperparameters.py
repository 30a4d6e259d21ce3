"""How a model of N parameters is trained on D tokens, by the published table.

    learning rate, batch   on the line between the published neighbours in logarithms, along the trend of all seven
                           (N^-0.36, N^0.45) beyond them; a published size has its published numbers
    batch                  in a run that would take fewer than 1000 steps smaller; from 10B on two thirds of it for the
                           first 33 % of the tokens, as 13B had
    warm-up                375M tokens, or a fifth of the run; then linear decay to a tenth
    eps                    1e-8, from 6.7B on 1e-9 (the border is drawn half way from 2.7B)

Source: Dey et al. 2023, Cerebras-GPT (arXiv 2304.03208), tables 1 and 6, and the released configurations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cgpt.scaling.published import between

LEAST_STEPS = 1000
GROWS_FROM = 10e9  # parameters
GROWS_AT = 57_000 * 720 * 2048 / 257_066_680_320  # of the tokens
WARMUP_TOKENS, WARMUP_PART = 375_000_000, 5
HIGHEST_LR = 6e-3  # muP's, at a width of 256: nothing published is higher
SMALL_EPS_FROM = math.sqrt(2_651_553_280 * 6_658_404_352)  # parameters


@dataclass(frozen=True)
class Hyperparameters:
    """batch_schedule: (from_tokens, sequences) steps. tokens: seen in `steps` steps, a whole number of them. lr: the
    peak. decay: of cgpt.schedule. warmup_tokens, min_lr_ratio: of the learning rate."""

    batch_schedule: tuple[tuple[int, int], ...]
    steps: int
    tokens: int
    lr: float
    warmup_tokens: int
    decay: str = "linear"
    min_lr_ratio: float = 0.1
    adam_eps: float = 1e-8


def hyperparameters(params: float, tokens: float, seq_len: int = 2048) -> Hyperparameters:
    """For `params` parameters on about `tokens` tokens in sequences of seq_len: the nearest whole number of steps."""
    largest = _sequences(min(between(params, lambda row: row.batch), tokens / LEAST_STEPS) / seq_len)
    schedule, seen, steps = [], 0, 0
    if params >= GROWS_FROM and tokens / LEAST_STEPS >= largest * seq_len:
        first = _sequences(largest * 2 / 3)
        steps = max(1, round(GROWS_AT * tokens / (first * seq_len)))
        seen = steps * first * seq_len
        schedule.append((0, first))
    schedule.append((seen, largest))
    rest = max(1, round((tokens - seen) / (largest * seq_len)))
    steps, seen = steps + rest, seen + rest * largest * seq_len
    step = schedule[0][1] * seq_len
    return Hyperparameters(
        batch_schedule=tuple(schedule),
        steps=steps,
        tokens=seen,
        lr=float(f"{min(HIGHEST_LR, between(params, lambda row: row.lr)):.2g}"),
        warmup_tokens=min(WARMUP_TOKENS, seen // WARMUP_PART) // step * step,
        adam_eps=1e-9 if params > SMALL_EPS_FROM else 1e-8,
    )


def _sequences(count: float) -> int:
    """A whole number of sequences, of eights where there are many."""
    return round(count / 8) * 8 if count >= 64 else max(1, round(count))
