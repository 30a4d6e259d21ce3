"""Text generation: prompts read once, then a token each a walk over the layers, from keys and values that are kept.

    token at position t ~ p(. | ids[start(t) : t]),  start(t) = 0 up to t = S, then the least multiple of S // 2 with
                                                     t - start(t) <= S

S is the model's seq_len, or fewer: a context longer than that slides by half of it at once. Its tokens are then read
anew from position 0, about one walk of S / 2 tokens every S / 2 tokens, where sliding by one would read all S for each;
and that holds for every kind of positions. So a token depends on the ids before it and the draw's numbers alone.

Several prompts grow at once: a layer that streams crosses to the device once a walk, for all of them. Each of them
gets the tokens that it gets alone, to what rounding leaves: a product of more rows may be summed in another order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import index

import torch
from torch import Tensor

from cgpt.errors import InputError
from cgpt.evaluate.sampling import Draw
from cgpt.model.cache import Cache, Step, cache_bytes
from cgpt.model.config import GPTConfig
from cgpt.model.gpt import GPT
from cgpt.stream.executor import Executor
from cgpt.stream.limits import bytes_text, limits

AT_ONCE = 8  # prompts that grow together
SMALL = 64 << 20  # bytes; a sample after training is not refused for memory that rules can still find


@dataclass(eq=False)
class Text:
    """One continuation of one prompt, as far as it has come.

    prompt, sample: its places among the prompts, and among the continuations of that. ids: the prompt's tokens and the
    `tokens` that followed. reason: why it ended: "eot", "length", or what `end` was told; None while it grows.
    """

    prompt: int
    sample: int
    ids: list[int]
    n_prompt: int
    reason: str | None = None
    slot: int = field(default=-1, repr=False)  # of the cache
    held: int = field(default=0, repr=False)  # tokens in it
    start: int = field(default=0, repr=False)  # where they begin

    @property
    def tokens(self) -> list[int]:
        return self.ids[self.n_prompt :]

    def end(self, reason: str) -> None:
        """It grows no further."""
        self.reason = self.reason or reason


def generate(
    model: GPT,
    ids: Sequence[int],
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eot: int | None = None,
    walk: Executor | None = None,
) -> Iterator[int]:
    """Yield up to max_tokens token ids that continue `ids`, each as soon as it is known.

    temperature 0 takes the most probable token (the lowest id among equals); top_k 0 and top_p 1 cut nothing.
    Ends before max_tokens when `eot` is drawn, which is not yielded. Past the model's seq_len the context slides, as
    the module says. walk: runs the model where its weights are not all on the device. Raises InputError at the call for
    bad arguments, at the first step where there is no memory for keys and values, and at a step whose logits are not
    finite.
    """
    draw = Draw(temperature, top_k, top_p, seed)
    growing = generate_batch(model, [ids], max_tokens, draw, eot, walk)
    return (text.ids[-1] for text in growing if text.reason != "eot" and len(text.ids) > text.n_prompt)


def generate_batch(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    draw: Draw | None = None,
    eot: int | None = None,
    walk: Executor | None = None,
    at_once: int = AT_ONCE,
    samples: int = 1,
    context: int | None = None,
) -> Iterator[Text]:
    """Each prompt's `samples` continuations, as they grow: yields a Text whenever it has got a token, or has ended.

    prompts: token ids each, of any lengths; equal ones get equal tokens, a prompt's samples different ones. at_once:
    how many grow together, in a cache of `cache_shape`; where one ends the next takes its place. A prompt is read once
    for all its samples that grow together. context: S, at most the model's seq_len, which None means. The caller may
    `end` a Text that it has been given, for whatever reason. The other arguments are `generate`'s; draw None draws at
    temperature 1. Raises InputError as `generate` does.
    """
    draw = draw or Draw()
    context = model.config.seq_len if context is None else context
    prompts = [list(map(index, ids)) for ids in prompts]
    _check(model.config, prompts, max_tokens, at_once, samples, context)
    texts = (
        Text(prompt, sample, list(ids), len(ids)) for prompt, ids in enumerate(prompts) for sample in range(samples)
    )
    slots, capacity = cache_shape([len(ids) for ids in prompts], max_tokens, context, at_once, samples)
    return _grow(_Reader(model, slots, capacity, context, walk), texts, max_tokens, draw, eot)


def cache_shape(
    lengths: Sequence[int], max_tokens: int, context: int, at_once: int = AT_ONCE, samples: int = 1
) -> tuple[int, int]:
    """(slots, tokens of each) of the cache that prompts of such lengths take."""
    longest = max(lengths, default=1) + max(0, max_tokens - 1)  # the last token is not read any more
    return max(1, min(at_once, samples * len(lengths))), min(context, longest)


def window_start(length: int, context: int) -> int:
    """Where the context of the token behind `length` others begins."""
    hop = max(1, context // 2)
    return max(0, -((context - length) // hop) * hop)


def _check(
    config: GPTConfig, prompts: Sequence[Sequence[int]], max_tokens: int, at_once: int, samples: int, context: int
) -> None:
    vocab_size = config.vocab_size
    for ids in prompts:
        if not ids:
            raise InputError("generate: the prompt must be at least one token, got none")
        wrong = [i for i in ids if not 0 <= i < vocab_size]
        if wrong:
            raise InputError(f"generate: prompt ids must be in [0, {vocab_size}), got {wrong[0]}")
    if max_tokens < 0:
        raise InputError(f"generate: max_tokens must not be negative, got {max_tokens}")
    for name, value in (("at_once", at_once), ("samples", samples)):
        if value < 1:
            raise InputError(f"generate: {name} must be at least 1, got {value}")
    if not 1 <= context <= config.seq_len:
        raise InputError(f"generate: context must be 1 to the model's {config.seq_len} positions, got {context}")


def _grow(reader: _Reader, texts: Iterator[Text], max_tokens: int, draw: Draw, eot: int | None) -> Iterator[Text]:
    if max_tokens == 0:
        for text in texts:
            text.end("length")
            yield text
        return
    free, growing = deque(range(reader.slots)), []
    while True:
        while free and (text := next(texts, None)) is not None:
            text.slot = free.popleft()
            growing.append(text)
        if not growing:
            return
        for text, logits in reader.read(sorted(growing, key=lambda text: text.slot)):
            if text.reason is None:  # else its caller ended it while it was given others
                token = draw.token(logits, len(text.ids), text.sample)
                if token == eot:
                    text.end("eot")
                else:
                    text.ids.append(token)
                    if len(text.ids) - text.n_prompt == max_tokens:
                        text.end("length")
                yield text
        free += [text.slot for text in growing if text.reason is not None]
        growing = [text for text in growing if text.reason is None]


class _Reader:
    """A model and the cache of the texts that it reads, made when the first is read."""

    def __init__(self, model: GPT, slots: int, capacity: int, context: int, walk: Executor | None):
        self.model, self.walk, self.context = model, walk, context
        self.slots, self.capacity = slots, capacity
        self.device = model.wte.weight.device if walk is None else walk.store.device
        self.cache: Cache | None = None

    def read(self, texts: Sequence[Text]) -> list[tuple[Text, Tensor]]:
        """One walk for the tokens of `texts`, in slot order, that are not held yet, no more than `context` of them or
        one each; the texts of which nothing is left to read, with the logits (V,) of the next token, fp64 on the
        CPU."""
        if self.cache is None:
            self.cache = self._make_cache()
        ids: list[int] = []
        parts, whole = [], []
        most = max(self.context, len(texts))
        for text in self._with_prompts_shared(texts):
            start = window_start(len(text.ids), self.context)
            if start != text.start:
                text.start, text.held = start, 0
            new = text.ids[start + text.held :][: most - len(ids)]
            if new:
                parts.append((text.slot, text.held, len(new)))
                ids += new
                text.held += len(new)
                whole.append(text if start + text.held == len(text.ids) else None)
        logits = self._logits(torch.tensor([ids], device=self.device), self.cache.step(parts))
        return [(text, row) for text, row in zip(whole, logits, strict=True) if text is not None]

    def _with_prompts_shared(self, texts: Sequence[Text]) -> list[Text]:
        """`texts` but those that wait for another of their prompt, which reads it; those that it has read it for get
        all of it but the last token, whose logits they are to have."""
        starts = {text: window_start(text.n_prompt, self.context) for text in texts}
        readers = {text.prompt: text for text in reversed(texts) if text.held and text.start == starts[text]}
        ready = []
        for text in texts:
            if not text.held and len(text.ids) == text.n_prompt:
                reader, shared = readers.setdefault(text.prompt, text), text.n_prompt - starts[text] - 1
                if reader is not text:
                    if reader.held < shared:
                        continue
                    self.cache.copy(reader.slot, text.slot, shared)
                    text.start, text.held = starts[text], shared
            ready.append(text)
        return ready

    def _make_cache(self) -> Cache:
        """Raises InputError, with both numbers, where there is no memory for it."""
        config, dtype = self.model.config, self.model.wte.weight.dtype
        wanted = cache_bytes(config, self.slots, self.capacity, dtype.itemsize)
        left = limits().host if self.device.type == "cpu" else None
        try:
            if left is None or wanted <= max(left, SMALL):
                return Cache(config, self.slots, self.capacity, dtype, self.device)
        except torch.OutOfMemoryError:
            left = torch.cuda.mem_get_info(self.device)[0]
        what = f"keys and values of {self.slots} texts of {self.capacity} tokens"
        raise InputError(f"generate: {what} want {bytes_text(wanted, up=True)}, got {bytes_text(left)} of free memory")

    @torch.no_grad()  # here, not around the loop: a generator's context would leak to its caller between tokens
    def _logits(self, ids: Tensor, step: Step) -> Tensor:
        found = self.model(ids, step=step) if self.walk is None else self.walk.logits(ids, step)
        return found.double().cpu()
