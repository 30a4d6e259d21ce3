"""Token datasets to batches: which tokens, in which order, as a pure function of one integer.

A split is a list of spans of the token stream. Its tokens, concatenated, are cut into windows of seq_len + 1
with stride seq_len, so that each token but the first is a target once per epoch and none is lost to padding.
Sample i is

    window permutation(seed, i // n_windows)(i % n_windows)

and a batch is samples consumed ... consumed + n - 1, so the number of samples consumed is all the state
there is, and a rank of a data-parallel run takes its micro-batches of those. The permutation is a Feistel network on
the next power of four, walked until it lands below n (cycle walking): a bijection computed per index, in no
memory.

Sources: Luby and Rackoff 1988 (Feistel networks permute); Black and Rogaway 2002, "Ciphers with Arbitrary
Finite Domains" (cycle walking); Steele, Lea and Flood 2014 (the splitmix64 mixing function).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from cgpt.data.shards import TokenDataset
from cgpt.errors import InputError

FEISTEL_ROUNDS = 6
CHUNK_TOKENS = 1 << 20
UNIGRAM_TOKENS = 1 << 26  # about 1 s of counting


class Split:
    """The tokens of spans [starts[i], stops[i]) of `dataset`, concatenated in order.

    starts, stops: (n_spans,) int64. rule: how the split was made ("files", "documents" or "tail").
    """

    def __init__(self, dataset: TokenDataset, name: str, rule: str, starts: np.ndarray, stops: np.ndarray):
        self.dataset = dataset
        self.name = name
        self.rule = rule
        self.starts = np.asarray(starts, dtype=np.int64)
        self.stops = np.asarray(stops, dtype=np.int64)
        self._offsets = np.concatenate([[0], np.cumsum(self.stops - self.starts)])

    @property
    def n_tokens(self) -> int:
        return int(self._offsets[-1])

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """ids [start, stop) of the split, (stop - start,) of the dataset's dtype; IndexError outside it."""
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"{self.name}: wanted tokens within [0, {self.n_tokens}), got [{start}, {stop})")
        first = int(np.searchsorted(self._offsets, start, side="right")) - 1
        last = int(np.searchsorted(self._offsets, stop, side="left"))
        parts = [np.empty(0, dtype=self.dataset.dtype)]
        for span in range(first, last):
            shift = int(self.starts[span] - self._offsets[span])
            end = min(stop, int(self._offsets[span + 1]))
            parts.append(self.dataset.tokens(max(start, int(self._offsets[span])) + shift, end + shift))
        return np.concatenate(parts)

    def __repr__(self) -> str:
        return f"Split({self.dataset.name!r}, {self.name!r}, {self.n_tokens} tokens by {self.rule})"


def train_val_split(
    dataset: TokenDataset, seq_len: int, *, fraction: float = 0.05, seed: int = 0
) -> tuple[Split, Split]:
    """(train, val): disjoint, together the whole dataset, each with at least seq_len + 1 tokens.

    Where the source brings its own validation files, those are the split. Otherwise a document is validation
    if a hash of its index and `seed` falls below `fraction` (`held_out`). If that gives validation less than one
    sequence, or so much (chance and one huge document) that it is nearer to all than to `fraction`, documents are taken
    in order of their hash until there is one sequence. A corpus that cannot be shared out so (a single
    document, above all) gives its last `fraction`, or one sequence if that is more.

    Raises InputError where the tokens are too few for a sequence on each side, or `fraction` is not between
    0 and 1.
    """
    if not 0 < fraction < 1:
        raise InputError(f"validation fraction: wanted a number between 0 and 1, got {fraction}")
    need, total = seq_len + 1, dataset.n_tokens
    if dataset.validation_start is not None:
        cut, rule = dataset.validation_start, "files"
        for name, got in (("train", cut), ("val", total - cut)):
            if got < need:
                raise InputError(f"{dataset.name}: wanted at least {need} {name} tokens (seq_len + 1), got {got}")
    else:
        if total < 2 * need:
            wanted = f"wanted at least {2 * need} tokens (seq_len + 1 = {need} to train on, as many to validate)"
            raise InputError(f"{dataset.name}: {wanted}, got {total}")
        held_out = _held_out_documents(dataset, need, fraction, seed)
        if held_out is not None:
            return (
                Split(dataset, "train", "documents", *_spans(dataset.document_ends, ~held_out)),
                Split(dataset, "val", "documents", *_spans(dataset.document_ends, held_out)),
            )
        cut, rule = max(total - max(round(total * fraction), need), need), "tail"
    return Split(dataset, "train", rule, [0], [cut]), Split(dataset, "val", rule, [cut], [total])


def _held_out_documents(dataset: TokenDataset, need: int, fraction: float, seed: int) -> np.ndarray | None:
    """(n_documents,) bool, or None where no choice by hash gives both sides enough tokens."""
    n = dataset.n_documents
    key = _mix(np.array([seed % 2**64], dtype=np.uint64))
    chunks = range(0, n, CHUNK_TOKENS)
    mask = np.concatenate([held_out(np.arange(at, min(at + CHUNK_TOKENS, n)), fraction, seed) for at in chunks])
    starts, stops = _spans(dataset.document_ends, mask)
    most = min(dataset.n_tokens - need, int(dataset.n_tokens * most_held_out(fraction)))
    if need <= int((stops - starts).sum()) <= most:
        return mask
    mask[:] = False
    held, lengths = 0, np.diff(dataset.document_ends, prepend=0)
    for document in np.argsort(_mix(np.arange(n, dtype=np.uint64) ^ key), kind="stable"):
        if held >= need:
            return mask
        if held + lengths[document] <= most:
            mask[document] = True
            held += int(lengths[document])
    return mask if held >= need else None


def held_out(documents: np.ndarray, fraction: float = 0.05, seed: int = 0) -> np.ndarray:
    """Which of `documents` (indices, any shape) are validation by their hash, bool of that shape."""
    key = _mix(np.array([seed % 2**64], dtype=np.uint64))
    return _mix(np.asarray(documents).astype(np.uint64) ^ key) < np.uint64(int(fraction * 2**64))


def most_held_out(fraction: float = 0.05) -> float:
    """The share of the tokens past which the choice by hash is not taken."""
    return (1 + fraction) / 2


def _spans(document_ends: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Starts and stops, in tokens, of the runs of documents where `mask` holds: far fewer than documents."""
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
    bounds = np.where(edges > 0, document_ends[edges - 1], 0).astype(np.int64)
    return bounds[::2], bounds[1::2]


class Loader:
    """Windows of a split as batches: sample i is a pure function of (split, seq_len, seed, i).

    With a seed, each epoch of n_windows samples is another permutation; `seed=None` keeps the order of the
    text, for validation. Raises InputError where the split is shorter than one sequence.
    """

    def __init__(self, split: Split, seq_len: int, seed: int | None = None):
        if seq_len < 1:
            raise InputError(f"seq_len: wanted at least 1, got {seq_len}")
        if split.n_tokens < seq_len + 1:
            wanted = f"wanted at least {seq_len + 1} {split.name} tokens (seq_len + 1)"
            raise InputError(f"{split.dataset.name}: {wanted}, got {split.n_tokens}")
        self.split = split
        self.seq_len = seq_len
        self.seed = seed
        self.n_windows = (split.n_tokens - 1) // seq_len

    def windows(self, samples: np.ndarray) -> np.ndarray:
        """Window of each sample: integers >= 0 of any shape -> int64 of that shape."""
        epochs, places = np.divmod(np.asarray(samples, dtype=np.int64), self.n_windows)
        if self.seed is None:
            return places
        order = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            order[here] = permutation(places[here], self.n_windows, self.seed, epoch)
        return order

    def sample(self, i: int) -> np.ndarray:
        """Tokens of sample i >= 0, (seq_len + 1,) int64: inputs, one ahead of them targets."""
        start = int(self.windows(np.array([i]))[0]) * self.seq_len
        return self.split.tokens(start, start + self.seq_len + 1).astype(np.int64)

    def batch(self, consumed: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, targets), each (n, seq_len) int64, of samples consumed ... consumed + n - 1.

        A micro-batch of b from sample i of a global batch on is `batch(consumed + i, b)`. Raises ValueError for a
        negative `consumed` or n < 1.
        """
        if consumed < 0 or n < 1:
            raise ValueError(f"batch: wanted consumed >= 0 and n >= 1, got {consumed} and {n}")
        starts = self.windows(np.arange(consumed, consumed + n)) * self.seq_len
        rows = np.empty((n, self.seq_len + 1), dtype=np.int64)
        for row, start in zip(rows, starts.tolist(), strict=True):
            row[:] = self.split.tokens(start, start + self.seq_len + 1)
        return np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])

    def targets(self, n_windows: int | None = None) -> Iterator[np.ndarray]:
        """Targets of the first `n_windows` windows (default: all) in the order of the text, in chunks."""
        stop = 1 + self.seq_len * min(n_windows or self.n_windows, self.n_windows)
        for start in range(1, stop, CHUNK_TOKENS):
            yield self.split.tokens(start, min(start + CHUNK_TOKENS, stop))

    def text_bytes(self, n_windows: int | None = None) -> int | None:
        """UTF-8 bytes of text behind `targets(n_windows)`; None where the vocabulary is not known.

        Bits per byte = mean loss in nats x number of targets / (ln 2 x this).
        """
        tokenizer = self.split.dataset.tokenizer
        return tokenizer and sum(tokenizer.bytes_of(chunk) for chunk in self.targets(n_windows))


def unigram_loss(train: Loader, val: Loader, n_windows: int | None = None) -> float:
    """Mean cross-entropy, in nats per token, of `val.targets(n_windows)` under train's token frequencies.

    p(token) = (count + 1) / (tokens + vocab_size), over all tokens of the train split or, past
    UNIGRAM_TOKENS of them, over evenly spaced chunks that make up about that many. It is what a model scores
    that has learnt frequencies only.
    """
    split, vocab_size = train.split, train.split.dataset.vocab_size
    stride = CHUNK_TOKENS * max(1, math.ceil(split.n_tokens / UNIGRAM_TOKENS))
    counts = np.ones(vocab_size, dtype=np.int64)
    for start in range(0, split.n_tokens, stride):
        counts += np.bincount(split.tokens(start, min(start + CHUNK_TOKENS, split.n_tokens)), minlength=vocab_size)
    wanted = np.zeros(vocab_size, dtype=np.int64)
    for chunk in val.targets(n_windows):
        wanted += np.bincount(chunk, minlength=vocab_size)
    return float(math.log(counts.sum()) - wanted @ np.log(counts) / wanted.sum())


def permutation(places: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Images of `places` (int64 in [0, n), any shape) under permutation (seed, epoch) of [0, n).

    At most four Feistel walks per index on average; n up to 2**62.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    key = _mix(_mix(np.array([seed % 2**64], dtype=np.uint64)) ^ np.uint64(epoch))
    round_keys = [_mix(key + np.uint64(i)) for i in range(FEISTEL_ROUNDS)]

    def walk(x: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & low
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key) & low)
        return (left << half) | right

    out = np.asarray(places).astype(np.uint64)
    todo = np.ones(out.shape, dtype=bool)
    while todo.any():
        out[todo] = walk(out[todo])
        todo = out >= n
    return out.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's output for states x, uint64 arrays (whose arithmetic wraps, as it must)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
