"""Log-likelihoods of continuations: what the tasks that choose, complete or measure text come down to.

    log p(c | x) = sum over i of ln softmax(logits(x c_1 ... c_(i-1)))[c_i]         nats

A model sees at most seq_len tokens at once. What comes before them is cut off from the left; a continuation of more is
taken in pieces of seq_len, the last of them as long as what remains, each after as many tokens as then fit: every token
is predicted once. Pieces that differ in their last token alone, such as answers of one token, are one forward, and
inputs of about one length go together, padded on the right, where nothing that is read can see it.

Logits are in the weights' dtype, as the model computes them; from there on all is fp32. Source: the conventions of
EleutherAI's lm_eval (HFLM), which these follow so that results can be compared digit by digit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from cgpt.errors import InputError
from cgpt.stream.account import HEAD_BYTES
from cgpt.stream.executor import Executor

Pair = tuple[Sequence[int], Sequence[int]]  # ids of a context, at least one, and of its continuation
COPIES = 3  # of a position's logits that are there at once: the head's, in fp32, normalised


@dataclass(frozen=True)
class Answer:
    """logprob: in nats. greedy: whether each token is the most probable one where it stands."""

    logprob: float
    greedy: bool


@dataclass(frozen=True)
class Piece:
    """Part `part` of pair `owner`. inputs: at most seq_len ids. targets: what follows the last len(targets) of them."""

    owner: int
    part: int
    inputs: tuple[int, ...]
    targets: tuple[int, ...]


Group = list[Piece]  # of the same inputs


def log_likelihoods(
    executor: Executor, seq_len: int, vocab_size: int, pairs: Sequence[Pair], batch_size: int, *, progress: bool = False
) -> list[Answer]:
    """log p(continuation | context) of each pair; of an empty continuation 0 and True. Equal pairs are read once.

    batch_size: full sequences whose tokens go through a layer at once, of shorter ones as many as make as many tokens.
    Raises ValueError for an empty context, and InputError where the model's logits are not finite.
    """
    asked = [(tuple(context), tuple(continuation)) for context, continuation in pairs]
    pairs = list(dict.fromkeys(asked))
    batches = list(_batches(_groups(pairs, seq_len), batch_size * seq_len))
    parts: list[dict[int, float]] = [{} for _ in pairs]
    greedy = [True] * len(pairs)
    at_once, device = executor.store.placement.micro_batches, executor.store.device
    total = sum(map(_size, batches))
    with tqdm(total=total, unit=" tokens", unit_scale=True, desc="likelihoods", disable=not progress) as bar:
        for first in range(0, len(batches), at_once):
            visit = batches[first : first + at_once]
            heads = [_Head([piece for group in batch for piece in group], batch, vocab_size) for batch in visit]
            read = executor.read(
                [_padded(batch).to(device) for batch in visit],
                lambda module, row, x, heads=heads: heads[row](module, x),
            )
            for batch, head, (logprobs, hits) in zip(visit, heads, read, strict=True):
                logprobs, hits = logprobs.cpu(), hits.cpu()
                if not torch.isfinite(logprobs).all():
                    raise InputError("wanted a model with finite logits, got NaN or Inf")
                start = 0
                for piece in head.pieces:
                    stop = start + len(piece.targets)
                    parts[piece.owner][piece.part] = float(logprobs[start:stop].sum())
                    greedy[piece.owner] &= bool(hits[start:stop].all())
                    start = stop
                bar.update(_size(batch))
    sums = [sum(value for _, value in sorted(found.items())) for found in parts]
    answers = (Answer(float(logprob), flag) for logprob, flag in zip(sums, greedy, strict=True))
    found = dict(zip(pairs, answers, strict=True))
    return [found[pair] for pair in asked]


def pieces(context: Sequence[int], continuation: Sequence[int], seq_len: int, owner: int = 0) -> list[Piece]:
    """What is to be read for one pair; nothing for an empty continuation. Raises ValueError for an empty context."""
    if not len(context):
        raise ValueError("log_likelihoods: a context must be at least one token, got none")
    whole, found = (*context, *continuation), []
    for start in range(len(context), len(whole), seq_len):
        stop = min(start + seq_len, len(whole))
        found.append(Piece(owner, len(found), whole[max(0, stop - 1 - seq_len) : stop - 1], whole[start:stop]))
    return found


def _groups(pairs: Sequence[Pair], seq_len: int) -> list[Group]:
    """The pieces of all pairs by their inputs, the longest first: then the time that is left is not underestimated."""
    by_inputs: dict[tuple[int, ...], Group] = {}
    for owner, pair in enumerate(pairs):
        for piece in pieces(*pair, seq_len, owner):
            by_inputs.setdefault(piece.inputs, []).append(piece)
    return [by_inputs[inputs] for inputs in sorted(by_inputs, key=lambda inputs: (-len(inputs), inputs))]


def _batches(groups: list[Group], tokens: int) -> Iterator[list[Group]]:
    """Neighbours, at most `tokens` padded ones together."""
    start = 0
    while start < len(groups):
        stop = start + max(1, tokens // len(groups[start][0].inputs))
        yield groups[start:stop]
        start = stop


def _size(batch: list[Group]) -> int:
    return len(batch) * len(batch[0][0].inputs)


def _padded(batch: list[Group]) -> Tensor:
    """(B, T) int64: the inputs, longest first, with zeros behind them."""
    ids = torch.zeros(len(batch), len(batch[0][0].inputs), dtype=torch.int64)
    for row, (first, *_) in enumerate(batch):
        ids[row, : len(first.inputs)] = torch.tensor(first.inputs)
    return ids


class _Head:
    """Reads a batch's targets off the head: for each, its log-probability and whether it is the most probable."""

    def __init__(self, pieces: list[Piece], batch: list[Group], vocab_size: int):
        self.pieces = pieces
        self.at_once = max(1, HEAD_BYTES // (COPIES * 4 * vocab_size))
        rows = [row for row, group in enumerate(batch) for piece in group for _ in piece.targets]
        places = [len(piece.inputs) - len(piece.targets) + i for piece in pieces for i in range(len(piece.targets))]
        self.rows, self.places = torch.tensor(rows), torch.tensor(places)
        self.targets = torch.tensor([target for piece in pieces for target in piece.targets])

    def __call__(self, module: Callable, x: Tensor) -> tuple[Tensor, Tensor]:
        """The head's module and its input (B, T, D) -> (n,) fp32 and (n,) bool, in the order of the pieces."""
        logprobs, hits = [], []
        where = (each.to(x.device).split(self.at_once) for each in (self.rows, self.places, self.targets))
        for rows, places, targets in zip(*where, strict=True):
            found = torch.log_softmax(module.logits(x[rows, places][None])[0].float(), dim=-1)
            hits.append(found.argmax(dim=-1) == targets)  # of equal ones the first, as HFLM does
            logprobs.append(found.gather(-1, targets[:, None])[:, 0])
        return torch.cat(logprobs), torch.cat(hits)
