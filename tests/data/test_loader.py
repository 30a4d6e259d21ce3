"""The loader: a split that leaks nothing, an order that is a bijection, batches from one integer."""

import math
import tracemalloc

import numpy as np
import pytest

from cgpt.data import loader as room
from cgpt.data.loader import Loader, permutation, train_val_split, unigram_loss
from cgpt.data.prepare import open_corpus
from cgpt.data.shards import TokenDataset, open_dataset
from cgpt.data.tokenizer import EOT, gpt2
from cgpt.errors import InputError


def dataset_of(lengths, pieces=3, **more):
    """Token i is i, so a token says where it stands; documents of these lengths, over several files."""
    tokens = np.arange(sum(lengths), dtype=np.uint32)
    more = {"vocab_size": 2**32, **more}
    return TokenDataset("numbers", np.array_split(tokens, pieces), np.cumsum(lengths), **more)


def all_tokens(split):
    return split.tokens(0, split.n_tokens)


@pytest.fixture(scope="module")
def moby_dick(tmp_path_factory):
    return open_corpus("moby-dick", tmp_path_factory.mktemp("cache"), progress=False)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 257, 1000, 4096, 4097, 65_537])
def test_permutation_is_a_bijection(n):
    for seed, epoch in ((0, 0), (1, 0), (2**63, 5), (-3, 10**6)):
        image = permutation(np.arange(n), n, seed, epoch)
        assert np.array_equal(np.sort(image), np.arange(n))


def test_permutations_of_seeds_and_epochs_differ_and_look_random():
    n = 10_007
    images = [permutation(np.arange(n), n, seed, epoch) for seed in range(4) for epoch in range(4)]
    for i, left in enumerate(images):
        for right in images[:i]:
            assert np.count_nonzero(left == right) < 12  # fixed points of a random one: Poisson with mean 1
        # Kendall-like check: rises of a random permutation are n/2 with standard deviation sqrt(n/12) = 29.
        assert abs(np.count_nonzero(np.diff(left) > 0) - n / 2) < 5 * math.sqrt(n / 12)
        # Mean place of the first half: uniform, standard error n / sqrt(12 * n/2) * sqrt(1/2).
        assert abs(left[: n // 2].mean() / n - 0.5) < 5 / math.sqrt(12 * n)


@pytest.mark.parametrize("n", [10**9, 2**40 + 1, 2**62])
def test_permutation_of_billions_needs_no_memory(n):
    places = np.random.default_rng(0).integers(n, size=1000)
    tracemalloc.start()
    image = permutation(places, n, 7, 3)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert ((image >= 0) & (image < n)).all()
    assert len(np.unique(image)) == len(np.unique(places))


def test_permutation_is_this_one_for_good():
    """Changing it would change every resumed run: these values are part of the checkpoint format."""
    assert permutation(np.arange(10), 10, 0, 0).tolist() == [0, 1, 2, 9, 8, 3, 4, 7, 6, 5]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_split_by_document_is_disjoint_and_complete(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 60, size=2000)
    dataset = dataset_of(lengths)
    train, val = train_val_split(dataset, 16, seed=seed)
    assert train.rule == val.rule == "documents"
    both = np.concatenate([all_tokens(train), all_tokens(val)])
    assert np.array_equal(np.sort(both), np.arange(dataset.n_tokens))
    document = np.searchsorted(dataset.document_ends, np.arange(dataset.n_tokens), side="right")
    ours, theirs = set(document[all_tokens(train)].tolist()), set(document[all_tokens(val)].tolist())
    assert not ours & theirs
    assert 60 < len(theirs) < 145  # 5 % of 2000 documents, within 4.5 standard deviations
    assert np.all(np.diff(all_tokens(train).astype(np.int64)) > 0)


def test_split_depends_on_document_index_and_seed_alone():
    lengths = np.random.default_rng(0).integers(20, 60, size=500)
    train, val = train_val_split(dataset_of(lengths), 16)
    again = train_val_split(dataset_of(lengths), 32)[1]
    assert np.array_equal(all_tokens(val), all_tokens(again))
    other = train_val_split(dataset_of(lengths), 16, seed=1)[1]
    assert not np.array_equal(all_tokens(val), all_tokens(other))
    longer = dataset_of([*lengths, 30, 30])
    first = all_tokens(train_val_split(longer, 16)[1])
    assert np.array_equal(first[first < sum(lengths)], all_tokens(val))
    half = train_val_split(dataset_of(lengths), 16, fraction=0.5)[1]
    assert set(all_tokens(val).tolist()) <= set(all_tokens(half).tolist())
    assert train.n_tokens + val.n_tokens == sum(lengths)


@pytest.mark.parametrize("lengths", [[100, 100], [40, 300, 40], [33] * 5, [300, 40], [40, 300]])
def test_few_documents_still_give_each_side_one(lengths):
    for seed in range(8):
        train, val = train_val_split(dataset_of(lengths), 32, seed=seed)
        assert train.rule == "documents"
        assert train.n_tokens >= 33
        assert val.n_tokens >= 33
        assert train.n_tokens + val.n_tokens == sum(lengths)


@pytest.mark.parametrize("lengths", [[10_000, 50], [50, 10_000], [40] * 10 + [10_000] + [40] * 9])
def test_one_huge_document_is_never_held_out(lengths):
    for seed in range(40):
        train, val = train_val_split(dataset_of(lengths), 32, seed=seed)
        assert train.rule == "documents"
        assert train.n_tokens >= 10_000
        assert val.n_tokens >= 33


@pytest.mark.parametrize(("lengths", "cut"), [([1000], 950), ([100], 67), ([66], 33), ([400, 10], 377)])
def test_single_documents_give_their_tail(lengths, cut):
    train, val = train_val_split(dataset_of(lengths), 32)
    assert train.rule == val.rule == "tail"
    assert all_tokens(train).tolist() == list(range(cut))
    assert all_tokens(val).tolist() == list(range(cut, sum(lengths)))


def test_files_that_are_a_split_stay_one(tmp_path):
    np.arange(100, dtype="<u2").tofile(tmp_path / "train.bin")
    np.arange(100, 150, dtype="<u2").tofile(tmp_path / "val.bin")
    dataset = open_dataset(tmp_path)
    train, val = train_val_split(dataset, 49)
    assert train.rule == "files"
    assert all_tokens(train).tolist() == list(range(100))
    assert all_tokens(val).tolist() == list(range(100, 150))
    with pytest.raises(InputError, match=r"wanted at least 51 val tokens \(seq_len \+ 1\), got 50"):
        train_val_split(dataset, 50)
    with pytest.raises(InputError, match=r"wanted at least 101 train tokens .* got 100"):
        train_val_split(dataset, 100)


def test_corpus_too_short_names_both_numbers():
    for lengths in ([65], [30, 35], [1]):
        with pytest.raises(InputError, match=rf"numbers: wanted at least 66 tokens .*, got {sum(lengths)}$"):
            train_val_split(dataset_of(lengths, pieces=1), 32)
    split = train_val_split(dataset_of([1000]), 32)[1]
    with pytest.raises(InputError, match=r"numbers: wanted at least 51 val tokens \(seq_len \+ 1\), got 50$"):
        Loader(split, 50)
    with pytest.raises(InputError, match="seq_len: wanted at least 1, got 0"):
        Loader(split, 0)
    for fraction in (0, 1, -0.1, math.nan):
        with pytest.raises(InputError, match="fraction: wanted a number between 0 and 1"):
            train_val_split(dataset_of([1000]), 32, fraction=fraction)


def test_windows_cover_every_target_once_an_epoch_and_stay_in_the_split():
    lengths = np.random.default_rng(3).integers(1, 50, size=300)
    train, _ = train_val_split(dataset_of(lengths), 16)
    loader = Loader(train, 16, seed=5)
    inputs, targets = loader.batch(0, loader.n_windows)
    stream = all_tokens(train).astype(np.int64)
    n = loader.n_windows * 16
    assert len(stream) - 17 < n <= len(stream) - 1
    assert np.array_equal(np.sort(targets.ravel()), stream[1 : n + 1])
    assert np.array_equal(np.sort(inputs.ravel()), stream[:n])
    assert np.array_equal(inputs[:, 1:], targets[:, :-1])
    assert not np.array_equal(targets.ravel(), stream[1 : n + 1])


def test_batch_is_a_function_of_samples_consumed(moby_dick):
    train, _ = train_val_split(moby_dick, 64)
    loader = Loader(train, 64, seed=1)
    inputs, targets = loader.batch(100, 24)
    assert inputs.shape == targets.shape == (24, 64)
    assert inputs.dtype == targets.dtype == np.int64
    assert inputs.flags.c_contiguous
    assert targets.flags.c_contiguous
    fresh = Loader(train, 64, seed=1)
    for size in (1, 5, 8, 24):
        parts = [fresh.batch(start, min(size, 124 - start)) for start in range(100, 124, size)]
        assert np.array_equal(np.concatenate([part[0] for part in parts]), inputs)
        assert np.array_equal(np.concatenate([part[1] for part in parts]), targets)
    row = fresh.sample(110)
    assert np.array_equal(row[:-1], inputs[10])
    assert np.array_equal(row[1:], targets[10])
    assert not np.array_equal(Loader(train, 64, seed=2).batch(100, 24)[0], inputs)
    for consumed, n in ((-1, 4), (0, 0)):
        with pytest.raises(ValueError, match="wanted consumed >= 0 and n >= 1"):
            loader.batch(consumed, n)


def test_epochs_follow_each_other_within_a_batch():
    train, _ = train_val_split(dataset_of([1000]), 10)
    loader = Loader(train, 10, seed=0)
    n = loader.n_windows
    epochs = [loader.windows(np.arange(n * e, n * (e + 1))) for e in range(3)]
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.arange(n))
    assert not np.array_equal(epochs[0], epochs[1])
    across, _ = loader.batch(n - 3, 2 * n)
    starts = np.concatenate(epochs)[n - 3 : 3 * n - 3] * 10
    assert np.array_equal(across[:, 0], starts)
    far = 10**15
    assert loader.windows(np.array([far]))[0] == permutation(np.array([far % n]), n, 0, far // n)[0]


def test_validation_windows_come_in_order(moby_dick):
    _, val = train_val_split(moby_dick, 32)
    loader = Loader(val, 32)
    _, targets = loader.batch(0, loader.n_windows)
    assert np.array_equal(targets.ravel(), np.concatenate(list(loader.targets())))
    assert np.array_equal(targets[:3].ravel(), np.concatenate(list(loader.targets(3))))


def test_text_bytes_are_those_of_the_targets(moby_dick, monkeypatch):
    monkeypatch.setattr(room, "CHUNK_TOKENS", 100)
    _, val = train_val_split(moby_dick, 32)
    loader = Loader(val, 32)
    for n_windows in (1, 7, None):
        tokens = np.concatenate(list(loader.targets(n_windows)))
        assert loader.text_bytes(n_windows) == len(gpt2().encoding.decode_bytes(tokens[tokens != EOT].tolist()))
    train, _ = train_val_split(dataset_of([1000]), 32)
    assert Loader(train, 32).text_bytes() is None


def test_unigram_loss_is_the_cross_entropy_it_says(moby_dick, monkeypatch):
    train, val = train_val_split(moby_dick, 64)
    counts = np.bincount(all_tokens(train), minlength=50257) + 1
    targets = np.concatenate(list(Loader(val, 64).targets(50)))
    expected = -np.mean(np.log(counts / counts.sum())[targets])
    exact = unigram_loss(Loader(train, 64), Loader(val, 64), 50)
    assert exact == pytest.approx(expected, rel=1e-12)
    assert 6 < exact < 8
    monkeypatch.setattr(room, "CHUNK_TOKENS", 1000)
    assert unigram_loss(Loader(train, 64), Loader(val, 64), 50) == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr(room, "UNIGRAM_TOKENS", train.n_tokens // 2)
    assert unigram_loss(Loader(train, 64), Loader(val, 64), 50) == pytest.approx(expected, abs=0.25)


def test_unigram_loss_of_equal_frequencies_is_log_of_the_vocabulary():
    tokens = np.tile(np.arange(8, dtype=np.uint16), 50)
    dataset = TokenDataset("even", [tokens], np.array([len(tokens)]), vocab_size=8, eot=7)
    train, val = train_val_split(dataset, 16, fraction=0.5)
    assert unigram_loss(Loader(train, 16), Loader(val, 16)) == pytest.approx(math.log(8), rel=1e-12)
