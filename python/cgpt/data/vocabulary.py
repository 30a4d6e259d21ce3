"""A byte-pair vocabulary learnt from a corpus.

    bytes, and again and again: the pair of neighbours that comes up most often becomes a token

A small model's parameters would mostly be GPT-2's 50257 embeddings; a vocabulary of a few thousand leaves them to the
layers. Pairs are counted within the pieces of GPT-2's pattern, over the text that `prepare` hands in: what training
will see. Equal counts go by the order of ids, so the same text in any order and on any number of threads gives the same
bytes.

Source: Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units" (arXiv 1508.07909).
"""

from __future__ import annotations

from collections.abc import Iterable

from cgpt.data.tokenizer import EOT_TEXT, Tokenizer, parse_tokenizer
from cgpt.errors import InputError

SMALLEST = 257  # every byte, and the end of a document
LARGEST = 65535  # shards hold uint16
LEAST_COUNT = 2  # of a pair; one that comes up once says nothing about text yet to come


def check_size(n_vocab: int) -> None:
    """Raises InputError for a size that no vocabulary can have, or where the tokenizers package is missing."""
    if not SMALLEST <= n_vocab <= LARGEST:
        wanted = f"a number from {SMALLEST} (the bytes and {EOT_TEXT}) to {LARGEST} (ids are stored in 16 bits)"
        raise InputError(f"--vocab-size: wanted {wanted}, got {n_vocab}")
    try:
        import tokenizers  # noqa: F401
    except ImportError as error:
        wanted = "wanted the tokenizers package to learn a vocabulary"
        raise InputError(f"--vocab-size: {wanted}, got none: pip install tokenizers") from error


def learn(texts: Iterable[str], n_vocab: int) -> Tokenizer:
    """The vocabulary of `n_vocab` ids, bytes and `<|endoftext|>` among them, that `texts` give.

    Reads `texts` once. Raises what they raise, and InputError where `n_vocab` is out of bounds, the tokenizers package
    is missing, or the text has too few pairs that come up twice.
    """
    check_size(n_vocab)
    from tokenizers import Tokenizer as Learner
    from tokenizers import decoders, models, pre_tokenizers, trainers

    learner = Learner(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab - 1,
        min_frequency=LEAST_COUNT,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    learner.add_special_tokens([EOT_TEXT])  # only now, so that it comes last
    if (got := learner.get_vocab_size()) < n_vocab:
        wanted = f"wanted at most {got}, as the text has no more pairs that come up twice"
        raise InputError(f"--vocab-size: {wanted}, got {n_vocab}")
    return parse_tokenizer(learner.to_str(pretty=True).encode(), "tokenizers")
