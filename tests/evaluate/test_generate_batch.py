"""Prompts that grow together: each gets what it gets alone, wherever the layers live, in walks that all share."""

from dataclasses import replace

import pytest
import torch

from cgpt.errors import InputError
from cgpt.evaluate import generate as module
from cgpt.evaluate.generate import Draw, cache_shape, generate, generate_batch, window_start
from cgpt.model.config import GPTConfig
from cgpt.model.gpt import GPT
from cgpt.stream.build import build
from cgpt.stream.executor import Executor
from cgpt.stream.format import Format
from cgpt.stream.limits import Limits
from cgpt.stream.placement import Placement
from cgpt.stream.store import Store

CONFIG = GPTConfig(n_layer=2, n_head=2, d_model=32, d_head=16, d_ff=64, vocab_size=97, seq_len=24)
PROMPTS = [[5], [3, 1, 4, 1, 5, 9, 2, 6], list(range(40, 80)), [7, 7], [96] * 24, [3, 1, 4, 1, 5, 9, 2, 6]]
VARIANTS = {
    "learned": CONFIG,
    "rotary": replace(CONFIG, positions="rotary", activation="swiglu"),
    "alibi": replace(CONFIG, positions="alibi"),
    "none": replace(CONFIG, positions="none"),
    "scaled": replace(CONFIG, embedding_scale=7.0, softmax_scale=0.2, residual_scale=0.5, logits_scale=0.4),
}


def varied(config):
    """A model that does not say the same token over and over: every parameter is off its initial value."""
    model, generator = GPT(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


@pytest.fixture(scope="module")
def model():
    return varied(CONFIG)


def together(model, *arguments, **options):
    """What each text has come to: tokens and reason, by prompt and sample."""
    found = {}
    for text in generate_batch(model, *arguments, **options):
        found[text.prompt, text.sample] = text.tokens, text.reason
    return found


def uncached(model, ids, count, context):
    """Greedy tokens by the definition: a whole forward over the window for each."""
    ids = list(ids)
    for _ in range(count):
        start = next(s for s in range(0, len(ids) + 1, max(1, context // 2)) if len(ids) - s <= context)
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids[start:]]))[0, -1].argmax()))
    return ids[-count:]


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_is_the_uncached_definition_for_ragged_prompts_past_the_context(name):
    model = varied(VARIANTS[name])
    found = together(model, PROMPTS, 40, Draw(temperature=0), at_once=4)
    assert found == {(i, 0): (uncached(model, ids, 40, 24), "length") for i, ids in enumerate(PROMPTS)}
    assert len({tuple(tokens) for tokens, _ in found.values()}) == 5  # the last prompt is the second again


@pytest.mark.parametrize("context", [1, 2, 5, 23])
def test_a_shorter_context_slides_sooner(model, context):
    found = together(model, PROMPTS, 12, Draw(temperature=0), context=context)
    assert found == {(i, 0): (uncached(model, ids, 12, context), "length") for i, ids in enumerate(PROMPTS)}


def test_windows_slide_by_half():
    assert [window_start(length, 4) for length in range(1, 12)] == [0, 0, 0, 0, 2, 2, 4, 4, 6, 6, 8]
    assert [window_start(length, 5) for length in range(4, 11)] == [0, 0, 2, 2, 4, 4, 6]
    assert [window_start(length, 1) for length in range(1, 5)] == [0, 1, 2, 3]
    for context in range(1, 12):
        for length in range(1, 60):
            held = length - window_start(length, context)
            assert min(length, context - max(1, context // 2) + 1) <= held <= context


@pytest.mark.parametrize("at_once", [1, 3, 6, 50])
def test_a_prompt_among_others_gets_what_it_gets_alone(model, at_once):
    how = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "seed": 4}
    eot = list(generate(model, PROMPTS[2], 30, **how))[-2]
    found = together(model, PROMPTS, 30, Draw(**how), eot=eot, at_once=at_once)
    for i, ids in enumerate(PROMPTS):
        alone = list(generate(model, ids, 30, **how, eot=eot))
        assert found[i, 0] == (alone, "length" if len(alone) == 30 else "eot")
    assert {reason for _, reason in found.values()} == {"length", "eot"}
    assert found[1, 0] == found[5, 0]


def test_samples_differ_and_the_first_is_the_only_one(model):
    found = together(model, PROMPTS[:2], 20, Draw(seed=1), samples=3, at_once=4)
    assert found.keys() == {(prompt, sample) for prompt in range(2) for sample in range(3)}
    assert found[1, 0][0] == list(generate(model, PROMPTS[1], 20, seed=1))
    assert len({tuple(tokens) for tokens, _ in found.values()}) == 6
    assert found == together(model, PROMPTS[:2], 20, Draw(seed=1), samples=3, at_once=1)
    assert found[1, 2] != together(model, PROMPTS[:2], 20, Draw(seed=2), samples=3)[1, 2]


def test_a_caller_ends_what_it_likes_and_its_place_is_taken(model):
    ended, tokens, order = set(), {}, []
    for text in generate_batch(model, PROMPTS, 6, Draw(temperature=0), at_once=2):
        assert text.prompt not in ended
        order.append(text.prompt)
        tokens[text.prompt] = text.tokens
        if text.prompt in (0, 3) and len(text.tokens) == 2:
            text.end("enough")
        if text.reason:
            ended.add(text.prompt)
            text.end("again")
            assert text.reason in ("enough", "length")
    assert {prompt: len(found) for prompt, found in tokens.items()} == {0: 2, 1: 6, 2: 6, 3: 2, 4: 6, 5: 6}
    assert order[:5] == [0, 1, 0, 1, 2]
    for prompt, found in tokens.items():
        assert found == uncached(model, PROMPTS[prompt], 6, 24)[: len(found)]


def test_a_text_that_is_ended_while_others_are_read_gets_no_more(model):
    texts = []
    for text in generate_batch(model, [[5], [7, 7], [3, 1, 4]], 9, Draw(temperature=0)):
        texts.append(text)
        if len(texts) == 4:  # the first's second token is known: so is the others' within this walk
            [other.end("not wanted") for other in texts]
    assert [len(text.tokens) for text in texts[:3]] == [2, 1, 1]
    assert [text.reason for text in texts[:3]] == ["not wanted"] * 3


def test_equal_ids_of_any_kind_give_equal_tokens(model):
    wanted = list(generate(model, [3, 1, 4], 5))
    assert list(generate(model, torch.tensor([3, 1, 4]), 5)) == wanted
    assert list(generate(model, torch.tensor([3, 1, 4]).numpy(), 5)) == wanted
    assert list(generate_batch(model, [], 5)) == []
    assert together(model, [[3], [4]], 0) == {(0, 0): ([], "length"), (1, 0): ([], "length")}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("home", ["host", "disk"])
def test_layers_that_stream_cross_once_a_walk_for_all(monkeypatch, tmp_path, precision, home):
    """The same bits as a resident model's, and as many walks as the longest text has tokens."""
    source = varied(CONFIG)

    def stored(placement):
        model, store = build(CONFIG, Format(precision, training=False), "cpu", placement=placement, disk=str(tmp_path))
        for name, value in source.state_dict().items():
            store.write(name, value)
        return model, store

    resident, _ = stored(Placement.resident(4))
    how = (PROMPTS, 30, Draw(seed=3))
    wanted = together(resident, *how, at_once=6)
    model, store = stored(Placement(*(((value,) * 4) for value in (home, home, True))))
    gathered = []
    gather = Store.gather
    monkeypatch.setattr(Store, "gather", lambda self, index: gathered.append(index) or gather(self, index))
    assert together(model, *how, at_once=6, walk=Executor(store)) == wanted
    store.close()
    walks = len(gathered) // 4
    assert gathered == [0, 1, 2, 3] * walks
    # A walk reads 24 tokens at most, so the prompts take a few; later contexts are read anew one behind the other.
    assert 30 <= walks <= 45


def test_without_long_prompts_a_token_is_a_walk(model, monkeypatch):
    read = []
    embed = GPT.embed
    monkeypatch.setattr(GPT, "embed", lambda self, ids, step: read.append(ids.shape[1]) or embed(self, ids, step))
    together(model, [[1, 2, 3], [4], [5, 6]], 10, Draw(temperature=0), at_once=2)
    assert read == [4, *[2] * 9, 2, *[1] * 9]


@pytest.mark.parametrize("name", ["learned", "rotary", "alibi"])
def test_a_prompt_is_read_once_for_its_samples(monkeypatch, name):
    """Of prompts within and past the context; the third sample comes when the first two have gone on."""
    model, read = varied(VARIANTS[name]), []
    embed = GPT.embed
    monkeypatch.setattr(GPT, "embed", lambda self, ids, step: read.append(ids.shape[1]) or embed(self, ids, step))
    found = together(model, [[9] * 5 + [3] * 15], 4, Draw(seed=1), samples=3, at_once=2)
    assert read == [20, 2, 2, 2, 2, 1, 1, 1]
    prompts = [[1], [2, 7], [4] * 9, list(range(60)), [4] * 9]
    found = together(model, prompts, 20, Draw(seed=1), samples=5, at_once=7)
    for (prompt, sample), (tokens, _) in found.items():
        alone = list(grown_alone(model, prompts[prompt], 20, Draw(seed=1), sample))
        assert tokens == alone


def grown_alone(model, ids, count, draw, sample):
    """By the definition: a whole forward over the window for each token."""
    ids = list(ids)
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([ids[window_start(len(ids), 24) :]]))[0, -1]
        ids.append(draw.token(logits.double(), len(ids), sample))
    return ids[-count:]


def test_the_cache_is_no_larger_than_asked(model, monkeypatch):
    made = []
    cache = module.Cache
    monkeypatch.setattr(module, "Cache", lambda *a: made.append(a[1:3]) or cache(*a))
    together(model, [[1, 2, 3], [4], [5, 6]], 10, at_once=8)
    together(model, [[1] * 20, [4]], 10, at_once=1, samples=2)
    together(model, [[1] * 3], 10, samples=3, context=7)
    assert made == [(3, 12), (1, 24), (3, 7)]
    assert made == [
        cache_shape([3, 1, 2], 10, 24, 8),
        cache_shape([20, 1], 10, 24, 1, 2),
        cache_shape([3], 10, 7, 8, 3),
    ]


def test_memory_that_is_not_there_is_refused_with_both_numbers(model, monkeypatch):
    monkeypatch.setattr(module, "limits", lambda: Limits({"free memory": 2 * 2 * 3 * 24 * 32 * 4 - 1}))
    assert len(list(generate_batch(model, [[1] * 20] * 3, 1))) == 3  # a few bytes are not asked for
    monkeypatch.setattr(module, "SMALL", 0)
    growing = generate_batch(model, [[1] * 20] * 3, 10)
    with pytest.raises(InputError, match=r"keys and values of 3 texts of 24 tokens want 36\.00 KiB, got 35\.99 KiB"):
        next(growing)
    assert len(list(generate_batch(model, [[1] * 20] * 3, 10, at_once=2))) == 30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [[1], []]}, "the prompt must be at least one token, got none"),
        ({"prompts": [[1], [97]]}, r"prompt ids must be in \[0, 97\), got 97"),
        ({"max_tokens": -1}, "max_tokens must not be negative, got -1"),
        ({"at_once": 0}, "at_once must be at least 1, got 0"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"context": 0}, "context must be 1 to the model's 24 positions, got 0"),
        ({"context": 25}, "context must be 1 to the model's 24 positions, got 25"),
    ],
)
def test_bad_arguments_are_named_at_the_call(model, change, message):
    with pytest.raises(InputError, match=message):
        generate_batch(model, **{"prompts": PROMPTS, "max_tokens": 3} | change)
