"""A trained run as a model of EleutherAI's lm_eval.

    loglikelihood            log p(continuation | context), both text: choices, last words
    loglikelihood_rolling    log p(text), `<|endoftext|>` before it: perplexities
    generate_until           greedy text up to a stop string

What lm_eval's own adapter for Hugging Face's models (HFLM) makes of the same weights, this gives too: context and
continuation encoded together and cut where the context alone ends; what is too long cut from the left. In fp32 the
log-probabilities differ by the rounding of other kernels alone; where logits are bf16 they are normalised in fp32,
HFLM stays in bf16. Where HFLM gives up, this goes on: an empty continuation is certain, one that melts into its
context's last token is encoded alone, one of more than seq_len tokens is read in pieces.

Importing this file imports lm_eval (0.4.13), which takes seconds.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from lm_eval.api.model import TemplateLM
from tqdm import tqdm

from cgpt.data.tokenizer import EOT_TEXT
from cgpt.errors import InputError
from cgpt.evaluate.generate import generate_batch
from cgpt.evaluate.likelihood import Pair, log_likelihoods
from cgpt.evaluate.reader import Reader
from cgpt.evaluate.sampling import Draw

MOST_GENERATED = 256  # tokens, where a task does not say; HFLM's number
COUNTS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names of one thing


class RunLM(TemplateLM):
    """`reader`'s model, for lm_eval's `simple_evaluate(model=...)` too. batch_size: full sequences at once, and texts
    that grow together.

    failed: whether a request ended in an error, which then is none of the task's making.
    """

    def __init__(self, reader: Reader, batch_size: int = 8, *, progress: bool = False):
        super().__init__()
        self.reader, self.batch_size, self.progress, self.failed = reader, batch_size, progress, False
        self._device = reader.store.device

    @property
    def eot_token_id(self) -> int:
        return self.reader.tokenizer.eot

    @property
    def max_length(self) -> int:
        return self.reader.recipe.seq_len

    @property
    def tokenizer_name(self) -> str:
        return f"cgpt-{self.reader.tokenizer.hash}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Ids of `string`. `<|endoftext|>` in it is the token, as prompts mean it; nothing is put before it."""
        return self.reader.tokenizer.encode_with_eot(string)

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p in nats, whether greedy) for each request's (context, continuation)."""
        with self._working():
            answers = self._read([self._encode_pair(*request.args) for request in requests])
        return self._kept("loglikelihood", requests, answers)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        with self._working():
            return self._read([(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """log p in nats of each request's text, every token of it predicted once."""
        with self._working():
            answers = self._read([([self.prefix_token_id], self.tok_encode(request.args[0])) for request in requests])
        return self._kept("loglikelihood_rolling", requests, [logprob for logprob, _ in answers])

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """What follows each request's context, up to the first stop string, `<|endoftext|>` or the task's most tokens.

        Raises InputError for settings of generation that are not known here, and for as many tokens as positions.
        """
        with self._working():
            wanted = [_wanted(request.args[1], self.max_length, request.task_name) for request in requests]
            repeats: Counter = Counter()
            together: dict[tuple[int, Draw], list[int]] = {}
            for place, (request, each) in enumerate(zip(requests, wanted, strict=True)):
                draw = each.draw
                if draw.temperature:  # a prompt that is asked again is to be answered anew
                    draw = replace(draw, seed=repeats[request.args[0], each.count, draw])
                    repeats[request.args[0], each.count, each.draw] += 1
                together.setdefault((each.count, draw), []).append(place)
            found = [""] * len(requests)
            with tqdm(total=len(requests), unit=" texts", desc="generation", disable=not self.progress) as bar:
                for (count, draw), places in together.items():
                    prompts = [(requests[place].args[0], wanted[place].until) for place in places]
                    with self._naming():
                        for index, text in self._texts(prompts, count, draw):
                            found[places[index]] = text
                            bar.update()
        return self._kept("generate_until", requests, found)

    def _encode_pair(self, context: str, continuation: str) -> Pair:
        if not context:
            ids = self.tok_encode(continuation)  # which may bring its own `<|endoftext|>` to begin with
            return (ids[:1], ids[1:]) if ids[:1] == [self.prefix_token_id] else ([self.prefix_token_id], ids)
        before, after = super()._encode_pair(context, continuation)
        if continuation and not after:
            after = self.tok_encode(continuation)
        return before or [self.prefix_token_id], after  # white space alone goes over to the continuation

    def _read(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        reader = self.reader
        sizes = self.max_length, reader.recipe.shape.vocab_size
        with self._naming():
            answers = log_likelihoods(reader.executor, *sizes, pairs, self.batch_size, progress=self.progress)
        return [(answer.logprob, answer.greedy) for answer in answers]

    def _texts(self, prompts: Sequence[tuple[str, list[str]]], count: int, draw: Draw) -> Iterator[tuple[int, str]]:
        """What follows each (text, its stop strings), with its place, in the order in which they end."""
        reader = self.reader
        walk = reader.executor if reader.store.placement.streams else None
        ids = [(self.tok_encode(text) or [self.prefix_token_id])[-(self.max_length - count) :] for text, _ in prompts]
        numbers = count, draw, self.eot_token_id, walk, self.batch_size
        for text in generate_batch(reader.model, ids, *numbers, context=self.max_length):
            said, stops = reader.tokenizer.decode(text.tokens), [*prompts[text.prompt][1], EOT_TEXT]
            if any(stop in said for stop in stops):
                text.end("stop")
            if text.reason is not None:
                for stop in stops:
                    said = said.split(stop)[0]
                yield text.prompt, said

    def _kept(self, kind: str, requests, answers: list) -> list:
        """`answers`, noted in lm_eval's cache where its caller has one."""
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial(kind, request.args, answer)
        return answers

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        """Says of which run an error of the model is."""
        try:
            yield
        except InputError as error:
            raise InputError(f"{self.reader.run}: {error}") from error

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.failed = True
            raise


@dataclass(frozen=True)
class Wanted:
    """until: stop strings. count: tokens at most."""

    until: list[str]
    count: int
    draw: Draw


def _wanted(settings: Mapping, seq_len: int, task: str | None) -> Wanted:
    """A task's generation_kwargs. Greedy unless they ask for do_sample, or for a temperature above 0."""
    left = dict(settings)
    until = left.pop("until", None) or []
    counts = [count for name in COUNTS if (count := left.pop(name, None)) is not None]
    count = int(counts[0]) if counts else min(MOST_GENERATED, seq_len // 2)
    temperature, draws = left.pop("temperature", None), left.pop("do_sample", None)
    temperature = float(temperature if temperature is not None else 1.0 if draws else 0.0)
    sampling = {"temperature": 0.0 if draws is False else temperature}
    sampling |= {name: left.pop(name) for name in ("top_k", "top_p") if left.get(name) is not None}
    where = f"--tasks: {task}: generation_kwargs"
    if left:
        known = ", ".join(("until", "do_sample", "temperature", "top_k", "top_p", COUNTS[0]))
        raise InputError(f"{where}: wanted {known}, got {', '.join(map(str, left))}")
    if not 0 < count < seq_len:
        raise InputError(f"{where}: wanted {COUNTS[0]} of 1 to {seq_len - 1}, under the run's seq_len, got {count}")
    until = [until] if isinstance(until, str) else list(until)
    return Wanted([stop for stop in until if stop], count, Draw(**sampling))
