"""Learning rate and batch size as pure functions of tokens seen: nothing to save, nothing to restore.

    lr(t) = peak · t / warmup                                             t < warmup
          = peak · (r + (1 - r) · g((t - warmup) / (total - warmup)))     after, r = min_ratio
    g(x)  = 1 - x (linear),  (1 + cos πx) / 2 (cosine)                    or lr(t) = peak (constant)

t counts the tokens seen once the step's own batch is in: the first step's rate is above zero and the last
step's is peak · r exactly. Source: Dey et al. 2023, Cerebras-GPT (arXiv 2304.03208), table 1.
"""

import itertools
import math
from collections.abc import Sequence

from cgpt.errors import InputError

DECAYS = ("linear", "cosine", "constant")

BatchSchedule = Sequence[tuple[int, int]]
"""(from_tokens, sequences) steps, the first from 0, ascending: ((0, 720), (84_049_920_000, 1080))."""


def learning_rate(
    tokens: int,
    *,
    peak: float,
    total_tokens: int,
    warmup_tokens: int = 0,
    decay: str = "linear",
    min_ratio: float = 0.1,
) -> float:
    """The learning rate of the step that brings the count of tokens seen to `tokens`.

    Past total_tokens the rate stays where it ended. Raises InputError for a negative count, an unknown decay,
    a min_ratio outside [0, 1], or a warm-up longer than the run.
    """
    if decay not in DECAYS:
        raise InputError(f"learning_rate: decay must be one of {', '.join(DECAYS)}, got {decay!r}")
    if not 0 <= min_ratio <= 1:
        raise InputError(f"learning_rate: min_ratio must be in [0, 1], got {min_ratio}")
    if not 0 <= warmup_tokens <= total_tokens:
        raise InputError(f"learning_rate: warmup_tokens must be in [0, {total_tokens}], got {warmup_tokens}")
    if tokens < 0:
        raise InputError(f"learning_rate: tokens must not be negative, got {tokens}")
    if tokens < warmup_tokens:
        return peak * tokens / warmup_tokens
    if decay == "constant":
        return peak
    span = total_tokens - warmup_tokens
    if span == 0:  # the whole run was warm-up: its top is still the peak, anything later is the floor
        return peak if tokens == total_tokens else peak * min_ratio
    done = min((tokens - warmup_tokens) / span, 1.0)
    if done == 1.0:
        return peak * min_ratio
    left = 1 - done if decay == "linear" else (1 + math.cos(math.pi * done)) / 2
    return peak * (min_ratio + (1 - min_ratio) * left)


def batch_size(tokens: int, schedule: BatchSchedule) -> int:
    """Sequences in the step that starts with `tokens` seen. Raises InputError for a malformed schedule."""
    check_batch_schedule(schedule)
    if tokens < 0:
        raise InputError(f"batch_size: tokens must not be negative, got {tokens}")
    return next(batch for start, batch in reversed(schedule) if tokens >= start)


def tokens_after(steps: int, schedule: BatchSchedule, seq_len: int) -> int:
    """Tokens seen after `steps` steps of `batch_size` sequences of seq_len tokens each, in closed form.

    A step that starts below a schedule's boundary keeps its own batch size, so a boundary that no step ends
    on is overrun by less than a step.
    """
    if steps < 0 or seq_len < 1:
        raise InputError(f"tokens_after: steps must be >= 0 and seq_len >= 1, got {steps} and {seq_len}")
    check_batch_schedule(schedule)
    tokens = 0
    for (_, batch), (end, _) in zip(schedule, [*schedule[1:], (None, 0)], strict=True):
        step = batch * seq_len
        here = steps if end is None else min(steps, max(0, -(-(end - tokens) // step)))
        tokens += here * step
        steps -= here
    return tokens


def steps_for(tokens: int, schedule: BatchSchedule, seq_len: int) -> int:
    """The fewest steps after which at least `tokens` tokens were seen: the inverse of `tokens_after`."""
    if tokens < 0 or seq_len < 1:
        raise InputError(f"steps_for: tokens must be >= 0 and seq_len >= 1, got {tokens} and {seq_len}")
    check_batch_schedule(schedule)
    seen = steps = 0
    for (_, batch), (end, _) in zip(schedule, [*schedule[1:], (tokens, 0)], strict=True):
        step = batch * seq_len
        here = max(0, -(-(min(end, tokens) - seen) // step))
        seen += here * step
        steps += here
    return steps


def check_batch_schedule(schedule: BatchSchedule) -> None:
    """Raises InputError unless `schedule` starts at 0 tokens, ascends, and every batch is at least one
    sequence."""
    starts = [start for start, _ in schedule]
    if not starts or starts[0] != 0 or any(a >= b for a, b in itertools.pairwise(starts)):
        raise InputError(f"batch schedule: starts must ascend from 0 tokens, got {starts}")
    for start, batch in schedule:
        if batch < 1:
            raise InputError(f"batch schedule: batch from {start} tokens must be at least 1 sequence, got {batch}")


def most_micro_batches(batch: int, micro_batch: int, ranks: int) -> int:
    """How many of a step's micro-batches a rank has at most; sizes in sequences. Raises InputError where some rank has
    none."""
    count = -(-batch // micro_batch)
    if ranks > count:
        more = f"--micro-batch-size {batch // ranks} or less" if ranks <= batch else "a larger --batch-size"
        wanted = f"wanted at most the {count} micro-batch{'es' * (count > 1)} of a step"
        raise InputError(f"--devices: {wanted}, got {ranks}; {more} makes more")
    return -(-count // ranks)
