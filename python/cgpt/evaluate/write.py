"""Text from text: what a model makes of prompts, in characters, as its tokens come.

    prompt --(tokenizer)--> ids --(generate_batch)--> tokens --(UTF-8, up to a stop)--> text

A character that spans tokens is shown with its last one. What might be the beginning of a stop is held back until it
is known to be none; a stop is looked for in what the model writes alone.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cgpt.data.tokenizer import Tokenizer
from cgpt.errors import InputError
from cgpt.evaluate.generate import AT_ONCE, Text, generate_batch
from cgpt.evaluate.sampling import Draw
from cgpt.model.gpt import GPT
from cgpt.stream.executor import Executor


@dataclass(frozen=True)
class Written:
    """A continuation that has ended. text: up to the stop, if one ended it. tokens: all that were drawn but an
    end-of-text. finish_reason: "eot", "stop", "length" or "interrupted"."""

    prompt: str
    sample: int
    text: str
    tokens: list[int]
    finish_reason: str


def write(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_tokens: int,
    draw: Draw | None = None,
    stop: Sequence[str] = (),
    walk: Executor | None = None,
    at_once: int = AT_ONCE,
    samples: int = 1,
    context: int | None = None,
    show: Callable[[str], None] | None = None,
) -> Iterator[Written]:
    """What the model makes of each prompt, in the prompts' order, each as soon as it and all before it have ended.

    An empty prompt starts from the end-of-text token. stop: a text ends before the first of these. show: is given the
    first text piece by piece as it comes. The other arguments are `generate_batch`'s. A KeyboardInterrupt ends all that
    grow, which are given as they are before it goes on. Raises InputError as `generate_batch` does, for an empty stop,
    and for a model of fewer ids than the tokenizer's; more are padding, whose text is U+FFFD.
    """
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stop:
        raise InputError("--stop: wanted a text, got an empty one")
    if model.config.vocab_size < tokenizer.n_vocab:
        wanted = f"a model of the vocabulary's {tokenizer.n_vocab} ids"
        raise InputError(f"generate: wanted {wanted}, got one of {model.config.vocab_size}")
    ids = [encode(tokenizer, prompt) for prompt in prompts]
    growing = generate_batch(model, ids, max_tokens, draw, tokenizer.eot, walk, at_once, samples, context)
    return _write(growing, tokenizer, prompts, stop, samples, show)


def encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids that a prompt is gone on from."""
    return tokenizer.encode_ordinary(prompt) or [tokenizer.eot]


def _write(
    growing: Iterator[Text],
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    stop: Sequence[str],
    samples: int,
    show: Callable[[str], None] | None,
) -> Iterator[Written]:
    begun: dict[int, _Page] = {}  # by place in the order of what is given
    given, interrupted = 0, None
    try:
        for text in growing:
            place = text.prompt * samples + text.sample
            page = begun.setdefault(place, _Page(text, tokenizer, stop))
            piece = page.read()
            if show is not None and place == 0:
                show(piece)
            while given in begun and begun[given].text.reason is not None:
                page, given = begun.pop(given), given + 1
                yield page.written(prompts[page.text.prompt])
    except KeyboardInterrupt as error:
        interrupted = error
    for _, page in sorted(begun.items()):
        page.text.end("interrupted")
        piece = page.read()
        if show is not None and page.text.prompt == page.text.sample == 0:
            show(piece)
        yield page.written(prompts[page.text.prompt])
    if interrupted is not None:
        raise interrupted


class _Page:
    """A Text in characters."""

    def __init__(self, text: Text, tokenizer: Tokenizer, stop: Sequence[str]):
        self.text, self.stop, self.bytes_of = text, stop, tokenizer.decode_single_token_bytes
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.known: list[str] = []  # what no stop can reach any more
        self.held = ""
        self.n_read = 0

    def read(self) -> str:
        """The characters that new tokens have made certain; ends the text at a stop."""
        found = ""
        for token in self.text.ids[self.text.n_prompt + self.n_read :]:
            self.n_read += 1
            found += self._take(self.decoder.decode(self.bytes_of(token)))
        if self.text.reason is not None:
            found += self._take(self.decoder.decode(b"", final=True)) + self.held
            self.known.append(self.held)
            self.held = ""
        return found

    def _take(self, new: str) -> str:
        self.held += new
        at = min((place for place in map(self.held.find, self.stop) if place >= 0), default=None)
        if at is not None:
            sure, self.held, self.stop = self.held[:at], "", ()
            self.decoder.reset()
            self.text.reason = "stop"
        else:
            sure = self.held[: len(self.held) - self._longest_beginning()]
            self.held = self.held[len(sure) :]
        self.known.append(sure)
        return sure

    def _longest_beginning(self) -> int:
        """Characters at the end of what is held that a stop begins with."""
        longest = min(len(self.held), max(map(len, self.stop), default=1) - 1)
        ends = (self.held[-n:] for n in range(longest, 0, -1))
        return next((len(end) for end in ends if any(text.startswith(end) for text in self.stop)), 0)

    def written(self, prompt: str) -> Written:
        return Written(prompt, self.text.sample, "".join(self.known), self.text.tokens, self.text.reason)
