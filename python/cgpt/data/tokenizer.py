"""GPT-2's byte-pair encoding, offline.

    text --(pattern)--> pieces --(UTF-8 bytes, merged by lowest rank)--> ids in [0, 50257)

The shipped merge list alone fixes every id: the 256 single bytes come first (the 188 that print, then the
other 68, each group in byte order), then one id per merge line in order, then `<|endoftext|>`. The encoding
itself runs in tiktoken's native code; its own `gpt2` is the same table, fetched over the network.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; vocab.bpe: OpenAI, MIT.
"""

from __future__ import annotations

import functools
import hashlib
import lzma
from importlib import resources

import numpy as np
import tiktoken

EOT = 50256
VOCAB_SIZE = 50257
EOT_TEXT = "<|endoftext|>"
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"

# How text falls apart before bytes are merged. Possessive quantifiers keep the matcher linear on long runs.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


def _merge_lines() -> list[str]:
    packed = resources.files("cgpt.data").joinpath("assets/vocab.bpe.xz").read_bytes()
    plain = lzma.decompress(packed)
    got = hashlib.sha256(plain).hexdigest()
    if got != MERGES_SHA256:
        raise RuntimeError(f"assets/vocab.bpe.xz: wanted sha256 {MERGES_SHA256}, got {got}; reinstall cgpt-ext")
    return plain.decode("utf-8").split("\n")[1:-1]  # the first line is a version comment


@functools.cache
def _byte_strings() -> tuple[bytes, ...]:
    """The bytes behind every id but `<|endoftext|>`, in id order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    # The merge list is text, so bytes that do not print stand in it as the characters from U+0100 on.
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    strings = [bytes([byte]) for byte in printable + others]
    for line in _merge_lines():
        left, right = line.split(" ")
        strings.append(bytes(byte_of[char] for char in left + right))
    return tuple(strings)


@functools.cache
def gpt2() -> tiktoken.Encoding:
    """The GPT-2 encoding (50257 ids), built once per process in about 0.1 s.

    `encode_ordinary` never produces `<|endoftext|>`, whatever the text says. Raises RuntimeError if the
    shipped merge list is not the published one.
    """
    return tiktoken.Encoding(
        name="gpt2",
        pat_str=PATTERN,
        mergeable_ranks={string: rank for rank, string in enumerate(_byte_strings())},
        special_tokens={EOT_TEXT: EOT},
        explicit_n_vocab=VOCAB_SIZE,
    )


@functools.cache
def vocabulary_hash() -> str:
    """sha256 (hex) of all that decides which ids a text becomes: pattern, byte strings in id order, EOT."""
    digest = hashlib.sha256(PATTERN.encode())
    for string in _byte_strings():
        digest.update(len(string).to_bytes(4, "little") + string)
    digest.update(EOT_TEXT.encode())
    return digest.hexdigest()


@functools.cache
def _token_lengths() -> np.ndarray:
    """UTF-8 bytes behind each id, (50257,) int64; EOT stands for no text, so 0."""
    lengths = np.zeros(VOCAB_SIZE, dtype=np.int64)
    lengths[:EOT] = [len(string) for string in _byte_strings()]
    lengths.setflags(write=False)
    return lengths


def bytes_of(tokens: np.ndarray) -> int:
    """UTF-8 bytes that `tokens` (integers of any shape, ids under 50257) decode to, EOT counting as none.

    Bits per byte is loss in nats x tokens / (ln 2 x bytes_of(tokens)). Raises IndexError past the vocabulary.
    """
    return int(_token_lengths()[np.asarray(tokens)].sum())
