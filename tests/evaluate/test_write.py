"""Texts: decoding as tokens come, stops, the order in which they are given, and what an interruption leaves."""

import itertools

import pytest

from cgpt.data.tokenizer import gpt2
from cgpt.errors import InputError
from cgpt.evaluate import write as module
from cgpt.evaluate.generate import Draw, Text
from cgpt.evaluate.write import Written, write
from cgpt.model.config import GPTConfig
from cgpt.model.gpt import GPT

MODEL = GPT(GPTConfig(n_layer=1, n_head=1, d_model=8, d_head=8, d_ff=8, vocab_size=50257, seq_len=16))


class Script:
    """Stands for generate_batch: gives texts, round by round, the tokens that they are to get."""

    def __init__(self, *texts, reason="length", interrupt_after=None, samples=1):
        self.tokens = [list(map(int, tokens)) for tokens in texts]
        self.reason, self.interrupt_after, self.samples, self.ended = reason, interrupt_after, samples, []

    def __call__(self, model, ids, max_tokens, draw, eot, walk, at_once, samples, context):
        texts = [Text(i // self.samples, i % self.samples, [1], 1) for i in range(len(self.tokens))]
        given = 0
        for t in range(max(map(len, self.tokens))):
            for text, tokens in zip(texts, self.tokens, strict=True):
                if text.reason is None and t < len(tokens):
                    if given == self.interrupt_after:
                        raise KeyboardInterrupt
                    text.ids.append(tokens[t])
                    if t + 1 == len(tokens):
                        text.end(self.reason)
                    given += 1
                    yield text
                    if text.reason:
                        self.ended.append((text.prompt, text.sample, t + 1))


@pytest.fixture
def say(monkeypatch):
    """say(Script, ...) -> (what was written, the pieces that were shown)."""

    def run(script, prompts=None, **options):
        monkeypatch.setattr(module, "generate_batch", script)
        pieces = []
        prompts = prompts or ["p"] * (len(script.tokens) // script.samples)
        written = write(MODEL, gpt2(), prompts, 9, samples=script.samples, show=pieces.append, **options)
        return written, pieces

    return run


def test_a_character_that_spans_tokens_comes_with_its_last(say):
    text = "na\u00efve \u6f22\u5b57 \U0001f40b"
    tokens = gpt2().encode_ordinary(text)
    written, pieces = say(Script(tokens))
    assert next(written) == Written("p", 0, text, tokens, "length")
    assert len(pieces) == len(tokens)
    assert "" in pieces  # a token that ends within a character shows nothing yet
    assert "".join(pieces) == text
    assert "\ufffd" not in text


def test_bytes_that_are_no_text_are_marked(say):
    tokens = gpt2().encode_ordinary("\u6f22")
    assert len(tokens) > 1
    written, pieces = say(Script(tokens[:-1]))
    assert next(written).text == "".join(pieces) == "\ufffd"


STOPS = [
    (["one", " two"], "one two three", "", 1),
    ([" two"], "one two three", "one", 2),
    (["e t", "two t"], "one two three", "on", 2),
    (["wo th"], "one two three", "one t", 3),
    (["\n\n"], "one\n\ntwo", "one", None),
    (["three."], "one two three", "one two three", None),
    (["absent"], "one two three", "one two three", None),
    (["eee", "e"], "one eee", "on", 1),
    (["ne tw", "o"], "one two", "", 1),
]


@pytest.mark.parametrize(("stop", "text", "wanted", "read"), STOPS)
def test_a_text_ends_before_its_first_stop_and_nothing_of_it_is_shown(say, stop, text, wanted, read):
    tokens = gpt2().encode_ordinary(text)
    script = Script(tokens)
    written, pieces = say(script, stop=stop)
    (found,) = written
    assert found.text == "".join(pieces) == wanted
    stopped = wanted != text
    assert found.finish_reason == ("stop" if stopped else "length")
    if read:
        assert script.ended == [(0, 0, read)]
        assert found.tokens == tokens[:read]
    shown = ""
    for piece in pieces:
        shown += piece
        assert wanted.startswith(shown)


def test_what_may_begin_a_stop_is_held_back_no_longer_than_it_must(say):
    tokens = [gpt2().encode_ordinary(letter)[0] for letter in "abaabac"]
    written, pieces = say(Script(tokens), stop=["abac!"])
    next(written)
    assert pieces == ["", "", "", "aba", "", "", "abac"]


def test_texts_are_given_in_the_prompts_order_each_as_soon_as_can_be(say):
    letters = {c: gpt2().encode_ordinary(c)[0] for c in "abcdef"}
    script = Script(*([letters[c] for c in text] for text in ("abc", "d", "ef", "a")), samples=2)
    written, pieces = say(script, ["x", "y"])
    assert script.ended == []
    first = next(written)
    assert first == Written("x", 0, "abc", [letters[c] for c in "abc"], "length")
    assert script.ended == [(0, 1, 1), (1, 1, 1), (1, 0, 2)]  # the first itself has not been gone on from
    assert [(row.prompt, row.sample, row.text) for row in written] == [("x", 1, "d"), ("y", 0, "ef"), ("y", 1, "a")]
    assert pieces == ["a", "b", "c"]


def test_an_interruption_gives_what_there_is_and_goes_on(say):
    a, b = (gpt2().encode_ordinary(c)[0] for c in "ab")
    written, pieces = say(Script([a] * 6, [b], [a, b, a], interrupt_after=6), ["x", "y", "z"], stop=["aaab"])
    found = [(row.prompt, row.text, row.finish_reason) for row in itertools.islice(written, 3)]
    with pytest.raises(KeyboardInterrupt):
        next(written)
    assert found == [("x", "aaa", "interrupted"), ("y", "b", "length"), ("z", "ab", "interrupted")]
    assert "".join(pieces) == "aaa"  # what was held back too


def test_a_real_model_writes(say):
    found = list(write(MODEL, gpt2(), ["", "the whale", "\u6f22"], 5, Draw(seed=2), samples=2))
    assert [(row.prompt, row.sample) for row in found] == [(p, s) for p in ("", "the whale", "\u6f22") for s in (0, 1)]
    for row in found:
        assert row.text == gpt2().decode(row.tokens)
        assert len(row.tokens) == 5
    assert len({row.text for row in found}) == 6
    (alone,) = write(MODEL, gpt2(), ["the whale"], 5, Draw(seed=2), stop="no such text")
    assert alone == found[2]


def test_what_cannot_be_is_refused_at_the_call():
    with pytest.raises(InputError, match="--stop: wanted a text, got an empty one"):
        write(MODEL, gpt2(), ["a"], 5, stop=["a", ""])
    small = GPT(GPTConfig(n_layer=1, n_head=1, d_model=8, d_head=8, d_ff=8, vocab_size=300, seq_len=16))
    with pytest.raises(InputError, match="wanted a model of the vocabulary's 50257 ids, got one of 300"):
        write(small, gpt2(), ["a"], 5)
