"""Text generation: one token at a time, each drawn by a counter-based uniform.

    p = softmax(logits / temperature), cut to the top_k largest, then to the fewest that hold top_p of the
    mass token at position t = inverse CDF of p at u(seed, t), tokens ordered by falling probability

The draw at a position depends on (seed, position) and the context alone, so a generation can be cut and
continued anywhere. top_p: Holtzman et al. 2020 (arXiv 1904.09751).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cgpt.errors import InputError
from cgpt.model.gpt import GPT
from cgpt.model.init import counter_rng
from cgpt.stream.executor import Executor


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
    Ends before max_tokens when `eot` is drawn, which is not yielded. Past the model's seq_len the context
    slides: its last seq_len tokens are read, from position 0. walk: runs the model where its weights are not all
    on the device. Raises InputError at the call for bad
    arguments, and at a step whose logits are not finite.
    """
    _check(model, ids, max_tokens, temperature, top_k, top_p)
    return _stream(model, list(ids), max_tokens, temperature, top_k, top_p, seed, eot, walk)


def _check(model: GPT, ids: Sequence[int], max_tokens: int, temperature: float, top_k: int, top_p: float) -> None:
    if not len(ids):
        raise InputError("generate: the prompt must be at least one token, got none")
    wrong = [i for i in ids if not 0 <= i < model.config.vocab_size]
    if wrong:
        raise InputError(f"generate: prompt ids must be in [0, {model.config.vocab_size}), got {wrong[0]}")
    if max_tokens < 0:
        raise InputError(f"generate: max_tokens must not be negative, got {max_tokens}")
    if not 0 <= temperature < float("inf"):
        raise InputError(f"generate: temperature must be finite and not negative, got {temperature}")
    if top_k < 0:
        raise InputError(f"generate: top_k must not be negative (0 keeps every token), got {top_k}")
    if not 0 < top_p <= 1:
        raise InputError(f"generate: top_p must be in (0, 1], got {top_p}")


def _stream(
    model: GPT,
    ids: list[int],
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    eot: int | None,
    walk: Executor | None,
) -> Iterator[int]:
    for _ in range(max_tokens):
        logits = _last_logits(model, ids[-model.config.seq_len :], walk)
        if not torch.isfinite(logits).all():
            raise InputError(f"generate: the model's logits at position {len(ids)} must be finite, got NaN or Inf")
        if temperature == 0:
            token = int(logits.argmax())
        else:
            uniform = counter_rng(seed, f"token {len(ids)}").random()
            token = sample(logits, uniform, temperature, top_k, top_p)
        if token == eot:
            return
        ids.append(token)
        yield token


@torch.no_grad()  # here, not around the loop: a generator's context would leak to its caller between tokens
def _last_logits(model: GPT, ids: list[int], walk: Executor | None) -> Tensor:
    """Logits (V,) of the token after `ids`, fp64 on the CPU; the wide head sees one position only."""
    if walk is not None:
        return walk.logits(torch.tensor([ids], device=walk.store.device))[0].double().cpu()
    x = model.embed(torch.tensor([ids], device=model.wte.weight.device))
    for block in model.h:
        x = block(x)
    return model.head.logits(x[:, -1:])[0, 0].double().cpu()


def sample(logits: Tensor, uniform: float, temperature: float, top_k: int = 0, top_p: float = 1.0) -> int:
    """The token of `logits` (V,) fp64 at `uniform` in [0, 1) of the cut distribution's CDF."""
    ranked, tokens = torch.sort(logits, descending=True, stable=True)
    if top_k:
        ranked = ranked[:top_k]
    mass = torch.softmax((ranked - ranked[0]) / temperature, dim=0).cumsum(0)
    kept = min(int(torch.searchsorted(mass, top_p * mass[-1])) + 1, len(mass))
    rank = int(torch.searchsorted(mass[:kept], uniform * mass[kept - 1], right=True))
    return int(tokens[min(rank, kept - 1)])
