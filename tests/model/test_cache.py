"""Keys and values that are kept: reading token by token gives what reading all at once gives, whoever reads beside."""

from dataclasses import replace

import pytest
import torch
from definition import error, gpt_logits, lively, tokens

from cgpt.errors import InputError
from cgpt.model.cache import Cache, cache_bytes
from cgpt.model.config import GPTConfig

CONFIG = GPTConfig(n_layer=2, n_head=3, d_model=48, d_head=16, d_ff=96, vocab_size=101, seq_len=40)
SCALES = {"embedding_scale": 7.0, "softmax_scale": 0.2, "residual_scale": 0.5, "logits_scale": 0.4}
VARIANTS = {
    "learned": CONFIG,
    "none": replace(CONFIG, positions="none", activation="gelu_tanh"),
    "rotary": replace(CONFIG, positions="rotary", activation="swiglu"),
    "alibi": replace(CONFIG, positions="alibi", embedding_norm=True),
    "scaled": replace(CONFIG, **SCALES),
    "scaled rotary": replace(CONFIG, positions="rotary", **SCALES),
}


def cache_of(model, slots, capacity):
    """A cache whose every row is NaN until it is written."""
    cache = Cache(model.config, slots, capacity, model.wte.weight.dtype, torch.device("cpu"))
    for pair in cache._pairs:
        for memory in pair:
            memory.fill_(float("nan"))
    return cache


@torch.no_grad()
def read(model, cache, *parts):
    """Logits (parts, V) after new tokens: (slot, tokens it holds, ids) each."""
    step = cache.step([(slot, held, len(ids)) for slot, held, ids in parts])
    packed = torch.cat([ids for _, _, ids in parts])[None]
    return model(packed, step=step)


@torch.no_grad()
def whole(model, ids):
    return model(ids[None])[0, -1]


@pytest.mark.parametrize("name", VARIANTS)
def test_token_by_token_is_all_at_once(name):
    config = VARIANTS[name]
    model = lively(config)
    ids = tokens(config, 1, 40)[0][0]
    weights = {key: value.double() for key, value in model.state_dict().items()}
    truth = gpt_logits(weights, ids[None], config)[0]
    cache = cache_of(model, 1, 40)
    rows = [read(model, cache, (0, 0, ids[:7]))[0]]
    rows += [read(model, cache, (0, t, ids[t : t + 1]))[0] for t in range(7, 40)]
    with torch.no_grad():
        uncached = model(ids[None])[0]
    for t, row in zip(range(6, 40), rows, strict=True):
        assert error(row, truth[t]) < 2e-6
        assert error(row, uncached[t].double()) < 2e-6
        assert row.argmax() == uncached[t].argmax()


@pytest.mark.parametrize(("dtype", "bar"), [(torch.bfloat16, 1e-2), (torch.float16, 1.5e-3)])
@pytest.mark.parametrize("name", ["learned", "rotary", "alibi"])
def test_low_precision_is_as_near_the_truth_as_without_a_cache(name, dtype, bar):
    model = lively(VARIANTS[name], dtype)
    weights = {key: value.double() for key, value in model.state_dict().items()}
    errors, without = [], []
    for ids in tokens(model.config, 8, 24)[0]:  # one alone may be lucky: the two round differently
        truth = gpt_logits(weights, ids[None], model.config)[0, -1]
        cache = cache_of(model, 1, 24)
        for t in range(24):
            row = read(model, cache, (0, t, ids[t : t + 1]))[0]
        assert row.dtype == dtype
        errors.append(error(row, truth))
        without.append(error(whole(model, ids), truth))
    assert max(errors) < bar
    assert sum(errors) < 1.25 * sum(without)


@pytest.mark.parametrize("name", VARIANTS)
def test_slots_do_not_see_each_other(name):
    """Prompts of unlike lengths, packed; one goes on, one comes late, one starts anew where another was."""
    model = lively(VARIANTS[name])
    ids, _ = tokens(model.config, 4, 20)
    cache = cache_of(model, 3, 20)
    first = read(model, cache, (0, 0, ids[0, :1]), (2, 0, ids[2, :13]))
    second = read(model, cache, (0, 1, ids[0, 1:4]), (1, 0, ids[1, :9]), (2, 13, ids[2, 13:14]))
    third = read(model, cache, (0, 0, ids[3, :5]), (1, 9, ids[1, 9:10]))
    found = [*first, *second, *third]
    alone = [ids[0, :1], ids[2, :13], ids[0, :4], ids[1, :9], ids[2, :14], ids[3, :5], ids[1, :10]]
    for row, sequence in zip(found, alone, strict=True):
        assert error(row, whole(model, sequence).double()) < 2e-6


def test_what_a_step_says():
    cache = Cache(CONFIG, 3, 10, torch.float32, torch.device("cpu"))
    step = cache.step([(0, 4, 1), (2, 0, 3)])
    assert step.positions.tolist() == [4, 0, 1, 2]
    assert step.last.tolist() == [0, 3]
    past = step.layers[1]
    assert len(step.layers) == 2
    assert past.rows.tolist() == [4, 20, 21, 22]
    assert past.ends_k.tolist() == [0, 5, 20, 23]  # the stretch between is a sequence without a query
    assert past.ends_q.tolist() == [0, 1, 1, 4]
    assert (past.longest_q, past.longest_k, past.end) == (3, 15, 23)


def test_bytes_are_those_that_are_taken():
    cache = Cache(CONFIG, 3, 10, torch.bfloat16, torch.device("cpu"))
    taken = sum(memory.nbytes for pair in cache._pairs for memory in pair)
    assert cache_bytes(CONFIG, 3, 10, 2) == taken == 2 * 2 * 3 * 10 * 48 * 2


@pytest.mark.parametrize(
    ("slots", "capacity", "parts", "message"),
    [
        (0, 10, [], "wanted at least one slot of 1 to 40 tokens, got 0 of 10"),
        (1, 41, [], "wanted at least one slot of 1 to 40 tokens, got 1 of 41"),
        (1, 0, [], "got 1 of 0"),
        (2, 10, [], "Cache: wanted a slot to read, got none"),
        (2, 10, [(0, 8, 3)], r"wanted slots in order below 2, each of up to 10 tokens, got 8 \+ 3 in slot 0"),
        (2, 10, [(2, 0, 1)], r"got 0 \+ 1 in slot 2"),
        (2, 10, [(1, 0, 1), (0, 0, 1)], r"got 0 \+ 1 in slot 0"),
        (2, 10, [(0, 3, 1), (0, 0, 1)], r"got 0 \+ 1 in slot 0"),
        (2, 10, [(0, 3, 0)], r"got 3 \+ 0 in slot 0"),
        (2, 10, [(0, -1, 1)], r"got -1 \+ 1 in slot 0"),
    ],
)
def test_rows_that_are_not_there_are_refused(slots, capacity, parts, message):
    with pytest.raises(InputError, match=message):
        Cache(CONFIG, slots, capacity, torch.float32, torch.device("cpu")).step(parts)
