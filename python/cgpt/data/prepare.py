"""Text to token shards: read in order, tokenize in parallel, write in order, survive a kill.

    pieces of text --(batches of a fixed size)--> threads --(in order)--> shard-00000.bin, ...
    what training will see first --(where asked for)--> tokenizer.json

Batches and shards are cut by the text alone, so the bytes written depend neither on the number of workers
nor on interruptions. tiktoken releases the interpreter lock while it encodes (97 % of a batch's time, EPYC
core), so threads do the work without copying text between processes. A run that finds whole shards of an
interrupted one keeps them, reads past their text without tokenizing it, and goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cgpt.data import shards
from cgpt.data.loader import held_out, most_held_out
from cgpt.data.sources import BUILT_IN, TEXT_FIELD, Corpus, Piece, find, read
from cgpt.data.tokenizer import TOKENIZER, Tokenizer, gpt2, read_tokenizer
from cgpt.data.vocabulary import check_size, learn
from cgpt.data.writer import DTYPE, Encoded, ShardWriter, folder_for_one
from cgpt.errors import InputError
from cgpt.files import user_cache

BATCH_CHARS = 1 << 20  # about 0.25M tokens: 50 ms of work, against which handing it over costs nothing
SHARD_TOKENS = 1 << 26  # 128 MiB of uint16
BLOCK_DOCUMENTS = 1 << 14  # whose hashes are computed at once


def prepare(
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    workers: int | None = None,
    progress: bool = True,
    shard_tokens: int = SHARD_TOKENS,
    vocab_size: int | None = None,
    vocabulary: Tokenizer | None = None,
    text_field: str = TEXT_FIELD,
) -> shards.TokenDataset:
    """Tokenize `sources` (as `sources.find` knows them) into the dataset folder `out`.

    Each document is followed by EOT. `vocab_size` asks for a vocabulary of that many ids learnt from the sources, which
    are then read twice; `vocabulary` is one to use (default: GPT-2's). `text_field` is of JSON lines and tables.
    `workers` threads encode (default: the cores this process may use).
    `out` must be new, empty, or left by an interrupted run with the same sources and vocabulary, which is then
    finished; one that holds the finished dataset of the same sources is opened. A shard closes at the first batch
    that takes it to `shard_tokens`.

    Raises InputError for sources that are missing, empty, binary, not UTF-8, damaged, or of unknown form,
    after which nothing is left in `out`, for an `out` in use or holding something else, and as `vocabulary.learn` does.
    Raises OSError naming the file where the disk is full or not writable; whole shards, if any, and the vocabulary stay
    for the next run.
    """
    if vocab_size is not None:
        check_size(vocab_size)
    if vocab_size is not None and vocabulary is not None:
        raise InputError("--vocab-from: wanted it or --vocab-size, got both")
    corpora = [find(source, text_field) for source in ([sources] if isinstance(sources, str | Path) else sources)]
    if not corpora:
        raise InputError(f"{out}: wanted at least one source to prepare, got none")
    out = Path(out)
    vocabulary = vocab_size or vocabulary or gpt2()
    fingerprint = _fingerprint(corpora, vocabulary, shard_tokens)
    with folder_for_one(out, wait=False):
        return _prepare_locked(corpora, out, vocabulary, fingerprint, workers, progress, shard_tokens)


def open_corpus(
    name_or_path: str | Path,
    cache_dir: str | Path | None = None,
    *,
    progress: bool = True,
    tokenizer: Tokenizer | None = None,
) -> shards.TokenDataset:
    """The dataset behind what a user calls data: a built-in name, text, a prepared folder, or token files.

    Text is prepared on first use, in a folder of `cache_dir` (default: `cgpt` in the user's cache folder)
    keyed by the names, sizes and modification times of its files; processes that ask at once share the work
    of one. `tokenizer` is for text only (default: GPT-2's): tokens that are ready keep their own. Raises as `prepare`
    and `shards.open_dataset` do.
    """
    if _has_tokens(name_or_path):
        return shards.open_dataset(name_or_path)
    corpus = find(name_or_path)
    vocabulary = tokenizer or gpt2()
    fingerprint = _fingerprint([corpus], vocabulary, SHARD_TOKENS)
    cache = Path(cache_dir) if cache_dir else user_cache()
    out = cache / f"{corpus.name}-{fingerprint[:16]}"
    if not (out / shards.MANIFEST).exists():
        with folder_for_one(out, wait=True):
            _prepare_locked([corpus], out, vocabulary, fingerprint, None, progress, SHARD_TOKENS)
    return shards.open_dataset(out)


def own_vocab_size(name_or_path: str | Path) -> int | None:
    """Ids of the vocabulary that this data brings along; None for all that comes in GPT-2's, text above all.

    Reads manifest or `tokenizer.json` alone: a model can be sized before its text is tokenized.
    """
    if not _has_tokens(name_or_path):
        return None
    manifest = Path(name_or_path) / shards.MANIFEST
    if not manifest.exists():
        own = shards.vocabulary_beside(Path(name_or_path))
        return own and read_tokenizer(own).n_vocab
    content = shards.read_manifest(manifest)
    return content["vocab_size"] if TOKENIZER in content["files"] else None


def _has_tokens(name_or_path: str | Path) -> bool:
    return name_or_path not in BUILT_IN and shards.is_token_source(Path(name_or_path))


def _fingerprint(corpora: list[Corpus], vocabulary: Tokenizer | int, shard_tokens: int) -> str:
    """Equal where a run would write the same bytes, as far as names, sizes and times of the sources tell."""
    kind = f"{vocabulary} learnt from what is trained on" if isinstance(vocabulary, int) else vocabulary.hash
    settings = [shards.VERSION, kind, BATCH_CHARS, shard_tokens]
    parts = settings + [corpus.fingerprint() for corpus in corpora]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _prepare_locked(
    corpora: list[Corpus],
    out: Path,
    vocabulary: Tokenizer | int,
    fingerprint: str,
    workers: int | None,
    progress: bool,
    shard_tokens: int,
) -> shards.TokenDataset:
    """vocabulary: one to use, or the size of one to learn."""
    writer = ShardWriter(out, fingerprint, shard_tokens)
    if not writer.finished:
        skipped: Counter[str] = Counter()
        try:
            tokenizer = _settle(vocabulary, corpora, writer, progress)
            _encode_all(corpora, tokenizer, writer, skipped, workers or len(os.sched_getaffinity(0)), progress)
            if not writer.documents:
                where = ", ".join(str(corpus.where) for corpus in corpora)
                raise InputError(f"{where}: wanted text, got none (passed over: {dict(skipped) or 'nothing'})")
            writer.finish([corpus.name for corpus in corpora], dict(sorted(skipped.items())), tokenizer)
        except InputError:
            writer.remove()
            raise
        except BaseException:
            writer.abandon()
            raise
    return shards.open_dataset(out, verify=False)


def _settle(vocabulary: Tokenizer | int, corpora: list[Corpus], writer: ShardWriter, progress: bool) -> Tokenizer:
    """The tokenizer to encode with, learnt if need be, and kept in the dataset's folder where it is not GPT-2's."""
    if isinstance(vocabulary, Tokenizer) and vocabulary.hash == gpt2().hash:
        return vocabulary
    if (kept := writer.vocabulary()) is not None:
        return kept
    if isinstance(vocabulary, int):
        vocabulary = _learn(vocabulary, corpora, progress)
    writer.keep(vocabulary)
    return vocabulary


def _learn(n_vocab: int, corpora: list[Corpus], progress: bool) -> Tokenizer:
    """The vocabulary of the documents that training sees by default: those not held out by their hash.

    Where that would hold out so much that `train_val_split` goes another way, which is known once all have been read,
    all are read again and count. A single document is held out from its tail on, and counts whole.
    """
    shares = Counter()
    try:
        with _bar("learning", corpora, progress) as bar:
            found = learn(_texts(corpora, bar, shares), n_vocab)
    except InputError:
        if shares["held out"] <= most_held_out() * shares.total():
            raise
    else:
        if shares["held out"] <= most_held_out() * shares.total():
            return found
    with _bar("learning", corpora, progress) as bar:
        return learn(_texts(corpora, bar), n_vocab)


def _texts(corpora: list[Corpus], bar: tqdm, shares: Counter[str] | None = None) -> Iterator[str]:
    """All texts; with `shares`, in which characters are counted, without the documents that are held out."""
    marks = _marks()
    finished, held = 0, next(marks)
    for corpus in corpora:
        for piece in read(corpus, Counter()):
            if shares is not None:
                shares["held out" if held else "seen"] += len(piece.text)
            if not held or shares is None:
                yield piece.text
            if piece.ends_document:
                held = next(marks)
            bar.update(finished + piece.consumed - bar.n)
        finished += corpus.size()


def _marks() -> Iterator[bool]:
    """Whether document 0, 1, ... is held out."""
    for start in count(0, BLOCK_DOCUMENTS):
        yield from held_out(np.arange(start, start + BLOCK_DOCUMENTS)).tolist()


def _encode_all(
    corpora: list[Corpus],
    tokenizer: Tokenizer,
    writer: ShardWriter,
    skipped: Counter[str],
    workers: int,
    progress: bool,
) -> None:
    with _bar("tokenizing", corpora, progress) as bar:
        done, before, since = writer.batches, writer.tokens, time.monotonic()

        def to_encode() -> Iterator[tuple[int, list[Piece]]]:
            """Batches not yet on disk, with the bytes of source read so far."""
            batches = _batches(corpora, skipped, min(BATCH_CHARS, writer.shard_tokens))
            for number, (consumed, pieces) in enumerate(batches):
                if number >= done:
                    yield consumed, pieces
                else:
                    bar.update(consumed - bar.n)
                    bar.initial = bar.n  # read past, not worked through: leave it out of the rate

        for consumed, encoded in _in_order(to_encode(), tokenizer, workers):
            writer.add(encoded)
            rate = (writer.tokens - before) / (time.monotonic() - since)
            bar.set_postfix_str(f"{writer.tokens / 1e6:.2f}M tokens, {rate / 1e6:.2f}M tokens/s", refresh=False)
            bar.update(consumed - bar.n)


def _bar(doing: str, corpora: list[Corpus], progress: bool) -> tqdm:
    """Bytes of source read, time left, tokens per second; a line every ten seconds where nobody watches."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    total = sum(corpus.size() for corpus in corpora)
    return tqdm(total=total or None, unit="B", unit_scale=True, desc=doing, disable=not progress, mininterval=interval)


def _batches(corpora: list[Corpus], skipped: Counter[str], size: int) -> Iterator[tuple[int, list[Piece]]]:
    """Lists of pieces, the shortest with at least `size` characters, and the bytes of source read so far."""
    pieces: list[Piece] = []
    length = finished = 0
    for corpus in corpora:
        for piece in read(corpus, skipped):
            pieces.append(piece)
            length += len(piece.text)
            if length >= size:
                yield finished + piece.consumed, pieces
                pieces, length = [], 0
        finished += corpus.size()
    if pieces:
        yield finished, pieces


def _in_order(
    batches: Iterator[tuple[int, list[Piece]]], tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[int, Encoded]]:
    """Encode on `workers` threads; results in the order of `batches`, at most two per worker in memory."""
    tokenizer.encode_ordinary("")  # built here once, not by every thread at the same time
    pending: deque = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for consumed, pieces in batches:
                pending.append((consumed, pool.submit(_encode, tokenizer, pieces)))
                if len(pending) > 2 * workers:
                    consumed, future = pending.popleft()
                    yield consumed, future.result()
            while pending:
                consumed, future = pending.popleft()
                yield consumed, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _encode(tokenizer: Tokenizer, pieces: list[Piece]) -> Encoded:
    end_mark = np.array([tokenizer.eot], dtype=DTYPE)
    parts, ends, length, text_bytes = [], [], 0, 0
    for text, ends_document, _ in pieces:
        tokens = tokenizer.encode_to_numpy(text).astype(DTYPE)
        parts.append(tokens)
        length += len(tokens)
        text_bytes += len(text.encode())
        if ends_document:
            parts.append(end_mark)
            length += 1
            ends.append(length)
    return Encoded(np.concatenate(parts), np.array(ends, dtype=np.int64), text_bytes)
