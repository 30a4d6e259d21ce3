"""The shipped encoding against an independent one: the published regular expression and naive merging."""

import functools
import itertools
import lzma
import random
import socket
from collections import Counter

import numpy as np
import pytest
import regex  # a dependency of tiktoken

from cgpt.data import tokenizer
from cgpt.data.sources import find, read
from cgpt.data.tokenizer import EOT, VOCAB_SIZE, gpt2

SPLIT = regex.compile(r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""")
CHARACTERS = "ab Z09.,'\n\t  \r\u00a0\u2003\u0085\x1c'sé漢字😀\u0301ß½٣<|>endoftext"


@pytest.fixture(scope="module")
def moby_dick() -> list[str]:
    return [piece.text for piece in read(find("moby-dick"), Counter())]


@functools.cache
def _merge_order() -> dict[tuple[bytes, bytes], int]:
    assets = tokenizer.resources.files("cgpt.data") / "assets/vocab.bpe.xz"
    lines = lzma.decompress(assets.read_bytes()).decode().split("\n")[1:-1]
    return {tuple(line.split(" ")): i for i, line in enumerate(lines)}


def _letters() -> dict[int, str]:
    spare = iter(range(256, 512))
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    return {b: chr(b if b in printable else next(spare)) for b in range(256)}


def naive_tokens(text: str) -> list[bytes]:
    """Merge the first listed pair until none is left; tokens as byte strings."""
    letters, order = _letters(), _merge_order()
    back = {letter: byte for byte, letter in letters.items()}
    out = []
    for piece in SPLIT.findall(text):
        word = [letters[byte] for byte in piece.encode()]
        while True:
            pairs = itertools.pairwise(word)
            ranked = [(order[pair], i) for i, pair in enumerate(pairs) if pair in order]
            if not ranked:
                break
            i = min(ranked)[1]
            word[i : i + 2] = [word[i] + word[i + 1]]
        out += [bytes(back[letter] for letter in part) for part in word]
    return out


def test_published_facts():
    assert gpt2().n_vocab == VOCAB_SIZE == 50257
    assert gpt2().encoding.encode("<|endoftext|>", allowed_special="all") == [EOT] == [50256]
    assert gpt2().encode_ordinary("Hello world") == [15496, 995]
    assert gpt2().decode_single_token_bytes(0) == b"!"
    assert gpt2().decode_single_token_bytes(255) == b"\xad"
    assert gpt2().decode_single_token_bytes(256) == b" t"
    assert len(set(gpt2().strings)) == gpt2().eot == 50256


def test_datasets_of_before_keep_their_hash():
    assert gpt2().hash == "66d9c5f7a1bcffa45fb01e20e79e1e0b66dff35c49add8b0289909872098b9a0"


def test_moby_dick_counts(moby_dick):
    assert len(moby_dick) == 138
    assert sum(len(gpt2().encode_ordinary(text)) for text in moby_dick) == 293_465
    assert sum(len(text.encode()) for text in moby_dick) == 1_216_140


def test_equals_naive_merging_on_prose(moby_dick):
    text = moby_dick[0] + moby_dick[40][:20_000]
    assert gpt2().encoding.decode_tokens_bytes(gpt2().encode_ordinary(text)) == naive_tokens(text)


def test_round_trip_and_naive_merging_on_random_text():
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices(CHARACTERS, k=rng.randrange(80)))
        tokens = gpt2().encode_ordinary(text)
        assert gpt2().decode(tokens) == text
        assert EOT not in tokens
        assert gpt2().encoding.decode_tokens_bytes(tokens) == naive_tokens(text)
        assert gpt2().bytes_of(np.array(tokens, dtype=np.uint16)) == len(text.encode())


def test_bytes_of_counts_no_text_for_eot_and_refuses_ids_past_the_vocabulary():
    assert gpt2().bytes_of(np.array([[15496, EOT], [EOT, 995]])) == len("Hello world")
    assert gpt2().bytes_of(np.array([], dtype=np.int64)) == 0
    with pytest.raises(IndexError):
        gpt2().bytes_of(np.array([VOCAB_SIZE]))


def test_needs_no_network_and_checks_the_asset(monkeypatch):
    def refuse(*_):
        raise AssertionError("opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    assert gpt2.__wrapped__().encode_ordinary("Hello world") == [15496, 995]
    monkeypatch.setattr(tokenizer, "MERGES_SHA256", "0" * 64)
    with pytest.raises(RuntimeError, match=r"vocab.bpe.xz: wanted sha256 000.*got 1ce166"):
        gpt2.__wrapped__()
