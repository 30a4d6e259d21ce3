"""Generation: the distribution it draws from, what a draw depends on, its ends, and that it streams."""

import math

import pytest
import torch

from cgpt.errors import InputError
from cgpt.evaluate.generate import generate
from cgpt.evaluate.sampling import sample_token
from cgpt.model.config import GPTConfig
from cgpt.model.gpt import GPT

CONFIG = GPTConfig(
    n_layer=1, n_head=2, d_model=16, d_head=8, d_ff=64, vocab_size=50, seq_len=12, embedding_init_std=0.5
)
PROMPT = [3, 1, 4]


@pytest.fixture(scope="module")
def model():
    return GPT(CONFIG)


def naive_greedy(model, ids, count):
    ids = list(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids[window(len(ids)) :]]))[0, -1].argmax()))
    return ids


def window(length):
    """Past the 12 positions of the model the context begins at a multiple of 6."""
    return next(start for start in range(0, length, 6) if length - start <= 12)


def test_greedy_equals_the_full_forward_past_the_context(model):
    assert PROMPT + list(generate(model, PROMPT, 20, temperature=0)) == naive_greedy(model, PROMPT, 20)


def test_a_prompt_longer_than_the_context_slides(model):
    prompt = [i % 50 for i in range(40)]
    assert list(generate(model, prompt, 3, temperature=0)) == naive_greedy(model, prompt, 3)[40:]


def test_a_draw_depends_on_seed_and_position_alone(model):
    whole = list(generate(model, PROMPT, 24, seed=5))
    assert list(generate(model, PROMPT, 24, seed=5)) == whole
    assert list(generate(model, PROMPT, 24, seed=6)) != whole
    torch.manual_seed(0)
    resumed = list(generate(model, PROMPT + whole[:10], 14, seed=5))
    assert resumed == whole[10:]


def test_every_position_draws_anew():
    flat = GPT(CONFIG)
    with torch.no_grad():
        flat.wte.weight.zero_()
    assert len(set(generate(flat, PROMPT, 40, seed=1))) > 20  # 40 uniform draws of 50 tokens: 28 +- 3 distinct


def test_tokens_come_one_at_a_time_and_the_callers_grad_mode_is_kept(model, monkeypatch):
    calls = []
    embed = GPT.embed
    monkeypatch.setattr(GPT, "embed", lambda self, ids, step: calls.append(ids.shape) or embed(self, ids, step))
    stream = generate(model, PROMPT, 5)
    assert calls == []
    next(stream)
    assert calls == [(1, 3)]
    assert torch.is_grad_enabled()
    next(stream)
    assert calls == [(1, 3), (1, 1)]


def test_the_head_sees_the_last_position_only(model, monkeypatch):
    seen = []
    head = type(model.head)
    logits = head.logits
    monkeypatch.setattr(head, "logits", lambda self, x: seen.append(tuple(x.shape)) or logits(self, x))
    list(generate(model, PROMPT, 2))
    assert seen == [(1, 16), (1, 16)]


def test_end_of_text_ends_it_and_is_not_yielded(model):
    whole = list(generate(model, PROMPT, 24, seed=5))
    stop = whole[9]
    assert list(generate(model, PROMPT, 24, seed=5, eot=stop)) == whole[: whole.index(stop)]
    assert list(generate(model, PROMPT, 0)) == []


def test_top_k_one_is_greedy_at_any_temperature(model):
    greedy = list(generate(model, PROMPT, 10, temperature=0))
    assert list(generate(model, PROMPT, 10, temperature=5.0, top_k=1)) == greedy
    assert list(generate(model, PROMPT, 10, temperature=1e-300)) == greedy
    assert list(generate(model, PROMPT, 10, top_p=1e-12)) == greedy


# probabilities 0.4, 0.3, 0.2, 0.1 at tokens 2, 0, 3, 1
LOGITS = torch.tensor([0.3, 0.1, 0.4, 0.2], dtype=torch.float64).log()


def shares(**cut):
    """How often each token is drawn over a fine, even grid of uniforms."""
    grid = 1000
    drawn = [sample_token(LOGITS, (i + 0.5) / grid, **cut) for i in range(grid)]
    return [drawn.count(token) / grid for token in range(4)]


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        ({"temperature": 1.0}, [0.3, 0.1, 0.4, 0.2]),
        ({"temperature": 0.5}, [9 / 30, 1 / 30, 16 / 30, 4 / 30]),
        ({"temperature": 1.0, "top_k": 2}, [3 / 7, 0, 4 / 7, 0]),
        ({"temperature": 1.0, "top_k": 99}, [0.3, 0.1, 0.4, 0.2]),
        ({"temperature": 1.0, "top_p": 0.65}, [3 / 7, 0, 4 / 7, 0]),
        ({"temperature": 1.0, "top_p": 0.75}, [3 / 9, 0, 4 / 9, 2 / 9]),
        ({"temperature": 1.0, "top_p": 0.4 - 1e-9}, [0, 0, 1, 0]),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.5}, [3 / 7, 0, 4 / 7, 0]),
        ({"temperature": math.inf}, [0.25, 0.25, 0.25, 0.25]),
    ],
)
def test_sampling_follows_the_cut_distribution(cut, expected):
    assert shares(**cut) == pytest.approx(expected, abs=1.1e-3)


def test_the_ends_of_the_unit_interval_stay_on_the_table():
    assert sample_token(LOGITS, 0.0, 1.0) == 2
    assert sample_token(LOGITS, math.nextafter(1.0, 0.0), 1.0) == 1
    assert sample_token(torch.zeros(2, dtype=torch.float64), 0.5, 1.0) == 1  # each token owns [start, end)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": []}, "the prompt must be at least one token, got none"),
        ({"ids": [3, 50]}, r"prompt ids must be in \[0, 50\), got 50"),
        ({"max_tokens": -1}, "max_tokens must not be negative, got -1"),
        ({"temperature": -0.5}, "temperature must be finite and not negative, got -0.5"),
        ({"temperature": float("nan")}, "temperature must be finite and not negative, got nan"),
        ({"top_k": -1}, r"top_k must not be negative \(0 keeps every token\), got -1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\], got 1.1"),
    ],
)
def test_bad_arguments_are_named_at_the_call(model, change, message):
    with pytest.raises(InputError, match=message):
        generate(model, **{"ids": PROMPT, "max_tokens": 3} | change)


def test_a_broken_model_says_so():
    broken = GPT(CONFIG)
    with torch.no_grad():
        broken.ln_f.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="logits at position 3 must be finite, got NaN or Inf"):
        next(generate(broken, PROMPT, 3))
