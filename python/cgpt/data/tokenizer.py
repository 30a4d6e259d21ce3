"""Byte-level byte-pair encodings, offline: GPT-2's, and those that `vocabulary.py` learns from a corpus.

    text --(pattern)--> pieces --(UTF-8 bytes, merged by lowest id)--> ids in [0, n_vocab)

The 256 single bytes come first (the 188 that print, then the other 68, each group in byte order), then one id per merge
in the order in which they were learnt, then `<|endoftext|>`. So the list of merges alone fixes every id: GPT-2's is
shipped, a corpus' own stands in a `tokenizer.json` as Hugging Face's tokenizers write it. The encoding itself runs in
tiktoken's native code; its own `gpt2` is the same table, fetched over the network.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; vocab.bpe: OpenAI, MIT.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
import lzma
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path

import numpy as np
import tiktoken

from cgpt.errors import InputError

EOT = 50256  # GPT-2's
VOCAB_SIZE = 50257
TOKENIZER = "tokenizer.json"  # in a dataset's folder and in a run's, where the vocabulary is not GPT-2's
EOT_TEXT = "<|endoftext|>"
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"

# How text falls apart before bytes are merged. Possessive quantifiers keep the matcher linear on long runs.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


class Tokenizer:
    """One vocabulary: text to ids and back.

    strings: the bytes behind every id but the last, in id order; the last, `eot`, is `<|endoftext|>`, which no text
    gives. file: what its `tokenizer.json` holds; None for GPT-2's, which needs none. A pair of neighbours is merged
    wherever the two together are one of `strings`, the lowest id first.
    """

    def __init__(self, strings: Sequence[bytes], file: bytes | None = None):
        self.strings = tuple(strings)
        self.file = file
        self.eot = len(self.strings)
        self.n_vocab = self.eot + 1

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of `text`; never `eot`, whatever the text says."""
        return self.encoding.encode_ordinary(text)

    def encode_with_eot(self, text: str) -> list[int]:
        """As `encode_ordinary`, but `<|endoftext|>` written in `text` is `eot`: for prompts of those who know it."""
        return self.encoding.encode(text, allowed_special={EOT_TEXT}, disallowed_special=())

    def encode_to_numpy(self, text: str) -> np.ndarray:
        """As `encode_ordinary`, (n,) uint32; other threads run meanwhile."""
        # `<|endoftext|>` written in a text is just text (tiktoken before 0.11 would not listen).
        return self.encoding.encode_to_numpy(text, disallowed_special=())

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; `eot` becomes its name, bytes that are no UTF-8 and ids past the vocabulary U+FFFD: a model
        whose vocabulary is padded can draw those."""
        return b"".join(map(self.decode_single_token_bytes, ids)).decode(errors="replace")

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """`decode`, id by id as they come: a character that spans tokens is given with its last one."""
        text = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in ids:
            yield text.decode(self.decode_single_token_bytes(token))
        yield text.decode(b"", final=True)

    def decode_single_token_bytes(self, token: int) -> bytes:
        """The bytes behind one id; U+FFFD's past the vocabulary."""
        return self.encoding.decode_single_token_bytes(token) if token < self.n_vocab else "\ufffd".encode()

    def bytes_of(self, tokens: np.ndarray) -> int:
        """UTF-8 bytes that `tokens` (integers of any shape) decode to, `eot` counting as none.

        Bits per byte is loss in nats x tokens / (ln 2 x bytes_of(tokens)). Raises IndexError past the vocabulary.
        """
        return int(self._lengths[np.asarray(tokens)].sum())

    @functools.cached_property
    def encoding(self) -> tiktoken.Encoding:
        """tiktoken's, built at first use: 0.1 s for GPT-2's."""
        return tiktoken.Encoding(
            name="gpt2" if self.file is None else f"bpe-{self.n_vocab}",
            pat_str=PATTERN,
            mergeable_ranks={string: rank for rank, string in enumerate(self.strings)},
            special_tokens={EOT_TEXT: self.eot},
            explicit_n_vocab=self.n_vocab,
        )

    @functools.cached_property
    def hash(self) -> str:
        """sha256 (hex) of all that decides which ids a text becomes: pattern, byte strings in id order, EOT."""
        digest = hashlib.sha256(PATTERN.encode())
        for string in self.strings:
            digest.update(len(string).to_bytes(4, "little") + string)
        digest.update(EOT_TEXT.encode())
        return digest.hexdigest()

    @functools.cached_property
    def _lengths(self) -> np.ndarray:
        """Bytes behind each id, (n_vocab,) int64; EOT stands for no text, so 0."""
        return np.array([*map(len, self.strings), 0], dtype=np.int64)

    def __repr__(self) -> str:
        return f"Tokenizer({'GPT-2' if self.file is None else 'own'}, {self.n_vocab} ids)"


@functools.cache
def gpt2() -> Tokenizer:
    """GPT-2's vocabulary (50257 ids). Raises RuntimeError if the shipped merge list is not the published one."""
    strings = _single_bytes()
    byte_of = _byte_of_letter()
    for line in _merge_lines():
        left, right = line.split(" ")
        strings.append(bytes(byte_of[char] for char in left + right))
    return Tokenizer(strings)


def gpt2_letters() -> tuple[dict[str, int], list[list[str]]]:
    """GPT-2's vocabulary without `<|endoftext|>` and its merges, as tokenizer.json spells them: a letter a byte."""
    letters = {byte: letter for letter, byte in _byte_of_letter().items()}
    ranks = {"".join(letters[byte] for byte in string): rank for rank, string in enumerate(gpt2().strings)}
    return ranks, [line.split(" ") for line in _merge_lines()]


def read_tokenizer(path: Path, wanted: str | None = None) -> Tokenizer:
    """The vocabulary of a `tokenizer.json` that `vocabulary.learn` wrote. Reading it needs no tokenizers package.

    wanted: the hash that it must have. Raises InputError where the file is missing, damaged, holds a vocabulary of
    another build (a normalizer, another pattern, ids in another order), or not the one wanted.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; wanted the vocabulary of what lies beside it") from error
    tokenizer = parse_tokenizer(data, str(path))
    if wanted not in (None, tokenizer.hash):
        raise InputError(f"{path}: wanted vocabulary {wanted}, got {tokenizer.hash}")
    return tokenizer


def parse_tokenizer(data: bytes, where: str) -> Tokenizer:
    """The vocabulary that `data`, the content of a `tokenizer.json`, describes. InputError naming `where` if none."""
    byte_of = _byte_of_letter()
    try:
        content = json.loads(data)
        model, (eot,), splitter = content["model"], content["added_tokens"], content["pre_tokenizer"]
        strings = [bytes(byte_of[char] for char in token) for token in sorted(model["vocab"], key=model["vocab"].get)]
        merged = [bytes(byte_of[char] for char in left + right) for left, right in model["merges"]]
        facts = {
            "the kind": (model["type"], "BPE"),
            "the normalizer": (content["normalizer"], None),
            "the pattern": (
                [splitter[key] for key in ("type", "add_prefix_space", "use_regex")],
                ["ByteLevel", False, True],
            ),
            "the ids": (sorted(model["vocab"].values()), list(range(len(strings)))),
            "the single bytes": (strings[:256], _single_bytes()),
            "the merges in id order": (list(dict.fromkeys(merged)), strings[256:]),
            EOT_TEXT: ((eot["content"], eot["id"]), (EOT_TEXT, len(strings))),
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{where}: wanted a byte-level BPE vocabulary, got a damaged file ({error!r})") from error
    for what, (got, expected) in facts.items():
        if got != expected:
            raise InputError(f"{where}: wanted {what} as `cgpt data prepare --vocab-size` writes, got another build")
    return Tokenizer(strings, data)


def _merge_lines() -> list[str]:
    packed = resources.files("cgpt.data").joinpath("assets/vocab.bpe.xz").read_bytes()
    plain = lzma.decompress(packed)
    got = hashlib.sha256(plain).hexdigest()
    if got != MERGES_SHA256:
        raise RuntimeError(f"assets/vocab.bpe.xz: wanted sha256 {MERGES_SHA256}, got {got}; reinstall cgpt-ext")
    return plain.decode("utf-8").split("\n")[1:-1]  # the first line is a version comment


def _single_bytes() -> list[bytes]:
    """The first 256 ids: the bytes that print, then the others."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [bytes([byte]) for byte in printable + [byte for byte in range(256) if byte not in printable]]


def _byte_of_letter() -> dict[str, int]:
    """Merge lists are text, so bytes that do not print stand in them as the characters from U+0100 on."""
    order = [string[0] for string in _single_bytes()]
    return {chr(byte if i < 188 else 256 + i - 188): byte for i, byte in enumerate(order)}
