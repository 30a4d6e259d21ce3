"""Learning rate and batch size in tokens: shapes, ends, edges, and the closed forms against a plain loop."""

import math
from itertools import pairwise

import pytest

from cgpt.errors import InputError
from cgpt.schedule import batch_size, learning_rate, steps_for, tokens_after

RUN = {"peak": 6e-4, "total_tokens": 1100, "warmup_tokens": 100}
STEPPED = ((0, 4), (100, 6), (101, 7), (1000, 3))


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [(0, 0.0), (1, 6e-6), (50, 3e-4), (99, 5.94e-4), (100, 6e-4), (1100, 6e-5), (5000, 6e-5)],
)
@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_warm_up_and_both_ends(tokens, rate, decay):
    assert learning_rate(tokens, decay=decay, **RUN) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize(("tokens", "done"), [(350, 0.25), (600, 0.5), (850, 0.75)])
def test_decay_in_between(tokens, done):
    assert learning_rate(tokens, decay="linear", **RUN) == pytest.approx(6e-4 * (1 - 0.9 * done), rel=1e-12)
    cosine = 6e-4 * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)
    assert learning_rate(tokens, decay="cosine", **RUN) == pytest.approx(cosine, rel=1e-12)
    assert learning_rate(tokens, decay="constant", **RUN) == 6e-4


def test_constant_stays_at_the_peak_for_ever():
    assert learning_rate(10**9, decay="constant", **RUN) == 6e-4


@pytest.mark.parametrize("decay", ["linear", "cosine", "constant"])
def test_rises_then_never_rises_again(decay):
    rates = [learning_rate(tokens, decay=decay, **RUN) for tokens in range(1200)]
    assert all(a < b for a, b in pairwise(rates[:101]))
    assert all(a >= b for a, b in pairwise(rates[100:]))


def test_floor_is_exact_and_min_ratio_counts():
    assert learning_rate(1100, decay="cosine", min_ratio=0.1, **RUN) == 6e-4 * 0.1
    assert learning_rate(1100, decay="linear", min_ratio=0.0, **RUN) == 0.0
    assert learning_rate(1100, decay="linear", min_ratio=1.0, **RUN) == 6e-4


def test_no_warm_up_starts_at_the_peak():
    assert learning_rate(0, peak=1e-3, total_tokens=10) == 1e-3


def test_a_run_of_warm_up_alone_ends_at_the_peak():
    only = {"peak": 1e-3, "total_tokens": 10, "warmup_tokens": 10}
    assert learning_rate(5, **only) == pytest.approx(5e-4)
    assert learning_rate(10, **only) == 1e-3
    assert learning_rate(11, **only) == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decay": "exponential"}, "decay must be one of linear, cosine, constant, got 'exponential'"),
        ({"min_ratio": 1.5}, r"min_ratio must be in \[0, 1\], got 1.5"),
        ({"warmup_tokens": 1101}, r"warmup_tokens must be in \[0, 1100\], got 1101"),
        ({"warmup_tokens": -1}, r"warmup_tokens must be in \[0, 1100\], got -1"),
        ({"tokens": -1}, "tokens must not be negative, got -1"),
    ],
)
def test_bad_rates_are_named(change, message):
    arguments = {"tokens": 5} | RUN | change
    with pytest.raises(InputError, match=message):
        learning_rate(arguments.pop("tokens"), **arguments)


@pytest.mark.parametrize(("tokens", "batch"), [(0, 4), (99, 4), (100, 6), (101, 7), (999, 7), (1000, 3), (10**12, 3)])
def test_batch_size_switches_on_the_boundary(tokens, batch):
    assert batch_size(tokens, STEPPED) == batch


@pytest.mark.parametrize("seq_len", [1, 7, 32, 500])
@pytest.mark.parametrize("schedule", [((0, 5),), STEPPED, ((0, 1), (10, 1000))])
def test_closed_forms_equal_the_loop(schedule, seq_len):
    tokens = 0
    for step in range(300):
        assert tokens_after(step, schedule, seq_len) == tokens
        assert steps_for(tokens, schedule, seq_len) == step
        assert steps_for(tokens + 1, schedule, seq_len) == step + 1
        tokens += batch_size(tokens, schedule) * seq_len


def test_the_13b_run_in_closed_form():
    schedule = ((0, 720), (57_000 * 720 * 2048, 1080))
    assert tokens_after(135_223, schedule, 2048) == 257_066_680_320
    assert steps_for(257_066_680_320, schedule, 2048) == 135_223


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ((), r"starts must ascend from 0 tokens, got \[\]"),
        (((5, 4),), r"starts must ascend from 0 tokens, got \[5\]"),
        (((0, 4), (9, 5), (9, 6)), r"starts must ascend from 0 tokens, got \[0, 9, 9\]"),
        (((0, 4), (9, 0)), "batch from 9 tokens must be at least 1 sequence, got 0"),
    ],
)
def test_bad_batch_schedules_are_named(schedule, message):
    for call in (
        lambda: batch_size(0, schedule),
        lambda: tokens_after(1, schedule, 8),
        lambda: steps_for(1, schedule, 8),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_negative_counts_are_named():
    with pytest.raises(InputError, match="tokens must not be negative, got -1"):
        batch_size(-1, STEPPED)
    with pytest.raises(InputError, match="got -1 and 8"):
        tokens_after(-1, STEPPED, 8)
    with pytest.raises(InputError, match="got 5 and 0"):
        steps_for(5, STEPPED, 0)
