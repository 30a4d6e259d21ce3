"""Draws from large vocabularies: only the head is put in order, and that changes nothing."""

import numpy as np
import pytest
import torch

from cgpt.errors import InputError
from cgpt.evaluate.sampling import HEAD, Draw, sample_token
from cgpt.model.init import counter_rng


def by_definition(logits, uniform, temperature, top_k=0, top_p=1.0):
    """Everything put in order, in numpy."""
    order = np.argsort(-logits, kind="stable")
    p = np.exp((logits[order] - logits[order[0]]) / temperature)[: top_k or None]
    mass = np.cumsum(p)
    kept = min(int(np.searchsorted(mass, top_p * mass[-1])) + 1, len(mass))
    rank = int(np.searchsorted(mass[:kept], uniform * mass[kept - 1], side="right"))
    return int(order[min(rank, kept - 1)])


CUTS = [{}, {"top_p": 0.3}, {"top_p": 0.95}, {"top_p": 0.9999}, {"top_k": 40}, {"top_k": HEAD}, {"top_k": 3000}]
CUTS += [{"top_k": 9999}, {"top_k": 700, "top_p": 0.8}, {"top_k": 1}]


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
def test_the_head_alone_draws_what_the_whole_would(cut, spread):
    rng = np.random.default_rng(7)
    logits = rng.standard_normal(6000) * spread
    for uniform in [0.0, *rng.random(40), 1 - 1e-9, np.nextafter(1.0, 0.0)]:
        for temperature in (0.7, 1.5):
            found = sample_token(torch.tensor(logits), float(uniform), temperature, **cut)
            assert found == by_definition(logits, uniform, temperature, **cut)


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_equals_stand_in_the_order_of_their_tokens(cut):
    """Many ties, at the head's edge among them."""
    rng = np.random.default_rng(8)
    logits = rng.integers(0, 9, 6000) / 4
    for uniform in rng.random(60):
        assert sample_token(torch.tensor(logits), float(uniform), 1.0, **cut) == by_definition(
            logits, uniform, 1.0, **cut
        )


def test_most_draws_need_the_head_alone(monkeypatch):
    sizes = []
    topk = torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda self, k, **how: sizes.append(k) or topk(self, k, **how))
    logits = torch.randn(50257, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 6
    for i in range(20):
        sample_token(logits, i / 20, 0.8)
    assert sizes == [HEAD] * 20
    sample_token(logits, 0.5, 0.8, top_k=12)
    sample_token(logits * 0, 0.5, 1.0)
    assert sizes[20:] == [12, HEAD, 16 * HEAD]


def test_a_draw_is_of_seed_sample_and_position():
    logits = torch.zeros(50, dtype=torch.float64)
    flat = [Draw(seed=3).token(logits, position) for position in range(200)]
    assert flat == [Draw(seed=3).token(logits, position, 0) for position in range(200)]
    assert flat == [sample_token(logits, counter_rng(3, f"token {t}").random(), 1.0) for t in range(200)]
    for other in (Draw(seed=4), Draw(seed=3)):
        sample = int(other.seed == 3)
        agree = sum(other.token(logits, t, sample) == flat[t] for t in range(200))
        assert agree < 15  # 4 +- 2 by chance


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_no_numbers_are_named(bad, temperature):
    logits = torch.randn(300, dtype=torch.float64)
    logits[17] = bad
    with pytest.raises(InputError, match="logits at position 5 must be finite, got NaN or Inf"):
        Draw(temperature=temperature).token(logits, 5)
    logits[17], logits[18] = float("inf"), -float("inf")
    with pytest.raises(InputError, match="must be finite"):
        Draw(temperature=temperature).token(logits, 5)
    huge = torch.full((300,), torch.finfo(torch.float32).max, dtype=torch.float64)
    assert Draw(temperature=0).token(huge, 5) == 0
