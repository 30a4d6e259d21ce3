"""Tokens to other trainers' files and back: the same ids, documents and split, and a folder that is whole or absent."""

import errno
import os
import re

import numpy as np
import pytest

from cgpt import cli
from cgpt.data import export as room
from cgpt.data.export import export, stream_of
from cgpt.data.formats import llmc
from cgpt.data.formats.table import WRITERS
from cgpt.data.formats.token_file import Stream
from cgpt.data.loader import train_val_split
from cgpt.data.prepare import open_corpus, own_vocab_size, prepare
from cgpt.data.shards import TokenDataset, open_dataset
from cgpt.data.sources import find
from cgpt.data.tokenizer import EOT
from cgpt.errors import InputError


@pytest.fixture(scope="module")
def whale(tmp_path_factory):
    return prepare("moby-dick", tmp_path_factory.mktemp("whale") / "out", progress=False, shard_tokens=50_000)


def toy(n_documents=40, seed=0, dtype="<u2", **more):
    rng = np.random.default_rng(seed)
    parts = [np.append(rng.integers(0, 50256, size=rng.integers(0, 30)), EOT) for _ in range(n_documents)]
    tokens = np.concatenate(parts).astype(dtype)
    cuts = [len(tokens) // 3, len(tokens) // 2]
    return TokenDataset("toy", np.split(tokens, cuts), np.cumsum([len(part) for part in parts]), **more)


def flat(dataset):
    return dataset.tokens(0, dataset.n_tokens).tolist()


def ends_of(split):
    """Naively: a document's end, or the split's own cut."""
    found, at = [], 0
    for start, stop in zip(split.starts, split.stops, strict=True):
        inside = [int(end) for end in split.dataset.document_ends if start < end < stop]
        found += [at + end - int(start) for end in inside] + [at + int(stop - start)]
        at += int(stop - start)
    return found


@pytest.mark.parametrize("kind", WRITERS)
def test_a_corpus_there_and_back(whale, tmp_path, kind):
    export(whale, kind, tmp_path / "out")
    found = open_dataset(tmp_path / "out")
    train, val = train_val_split(whale, 1024)  # what `cgpt train` does
    assert train.rule == "documents"
    assert flat(found) == [*train.tokens(0, train.n_tokens), *val.tokens(0, val.n_tokens)]
    assert found.validation_start == train.n_tokens
    assert found.document_ends.tolist() == [*ends_of(train), *(train.n_tokens + end for end in ends_of(val))]
    assert found.n_documents == whale.n_documents
    again = [split.tokens(0, split.n_tokens).tolist() for split in train_val_split(found, 1024)]
    assert again == [split.tokens(0, split.n_tokens).tolist() for split in (train, val)]


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("seed", range(5))
def test_any_documents_in_one_part(tmp_path, kind, seed):
    dataset = toy(seed=seed)
    export(dataset, kind, tmp_path / "out", fraction=0)
    found = open_dataset(tmp_path / "out")
    assert flat(found) == flat(dataset)
    assert found.document_ends.tolist() == dataset.document_ends.tolist()
    assert found.validation_start is None


@pytest.mark.parametrize("kind", WRITERS)
def test_the_least_there_can_be(tmp_path, kind):
    export(TokenDataset("one", [np.array([7], "<u2")], np.array([1])), kind, tmp_path / "one", fraction=0)
    assert flat(open_dataset(tmp_path / "one")) == [7]
    with pytest.raises(InputError, match="one: wanted at least 4 tokens"):
        export(TokenDataset("one", [np.array([7], "<u2")], np.array([1])), kind, tmp_path / "two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one"]


@pytest.mark.parametrize("kind", ["megatron", "datatrove"])
def test_documents_without_eot_keep_their_ends(tmp_path, kind):
    dataset = TokenDataset("plain", [np.arange(1, 9, dtype="<u2")], np.array([3, 4, 8]))
    export(dataset, kind, tmp_path / "out", fraction=0)
    assert open_dataset(tmp_path / "out").document_ends.tolist() == [3, 4, 8]


def test_a_split_that_cuts_a_document(tmp_path):
    dataset = TokenDataset("one", [np.append(np.arange(1, 100), EOT).astype("<u2")], np.array([100]))
    export(dataset, "megatron", tmp_path / "out", fraction=0.1)
    found = open_dataset(tmp_path / "out")
    assert flat(found) == flat(dataset)
    assert (found.document_ends.tolist(), found.validation_start) == ([90, 100], 90)


def test_the_datasets_own_validation_stays_it(tmp_path):
    dataset = toy(validation_start=300)
    export(dataset, "nanogpt", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train.bin", "val.bin"]
    assert (tmp_path / "out/train.bin").stat().st_size == 600
    assert open_dataset(tmp_path / "out").validation_start == 300


def test_llmc_files_are_cut_where_llmc_cuts(tmp_path, monkeypatch):
    monkeypatch.setattr(llmc, "FILE_TOKENS", 100)
    dataset = toy()
    export(dataset, "llmc", tmp_path / "out", fraction=0)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [f"all_{i:06d}.bin" for i in range(-(-dataset.n_tokens // 100))]
    header = np.fromfile(tmp_path / "out/all_000000.bin", dtype="<i4", count=256)
    assert header.tolist() == [20240520, 1, 100, *[0] * 253]
    assert flat(open_dataset(tmp_path / "out")) == flat(dataset)


def test_ids_past_16_bits(tmp_path):
    tokens = np.array([3, 70_000, 5], "<u4")
    dataset = TokenDataset("wide", [tokens], np.array([3]), vocab_size=100_000, eot=0)
    with pytest.raises(InputError) as caught:
        export(dataset, "nanogpt", tmp_path / "out", fraction=0)
    wanted = "wide: wanted token ids under 65536, which are all that uint16 holds, got 70000 at position 1"
    assert str(caught.value) == wanted
    assert list(tmp_path.iterdir()) == []
    for kind in ("llmc", "megatron", "datatrove"):
        export(dataset, kind, tmp_path / kind, fraction=0)
        assert flat(open_dataset(tmp_path / kind, vocab_size=100_000, eot=0)) == tokens.tolist()


def test_chunks_say_where_an_id_does_not_fit(monkeypatch):
    from cgpt.data.formats import token_file

    monkeypatch.setattr(token_file, "CHUNK_TOKENS", 4)
    tokens = np.zeros(11, dtype="<u4")
    tokens[9] = 65536
    stream = Stream("t", lambda start, stop: tokens[start:stop], 11, np.array([11]), 70_000, "unknown")
    assert np.concatenate(list(stream.chunks("<u2", 2, 9))).tolist() == [0] * 7
    with pytest.raises(InputError, match=r"got 65536 at position 9$"):
        list(stream.chunks("<u2"))


def test_a_vocabulary_goes_along(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = " ".join(f"whale {i % 7} ship" for i in range(2000))
    (tmp_path / "a.txt").write_text(text)
    dataset = prepare(tmp_path / "a.txt", tmp_path / "own", progress=False, vocab_size=270)
    for kind in WRITERS:
        out = tmp_path / kind
        export(dataset, kind, out)
        found = open_corpus(out)
        assert (found.vocab_size, found.eot, own_vocab_size(out)) == (270, 269, 270)
        assert found.tokenizer.hash == dataset.tokenizer.hash
        ids = flat(found)
        assert found.tokenizer.decode(ids[:-1]) == text
        assert found.n_documents == 2  # one, that the split cuts
        single = next(path for path in sorted(out.iterdir()) if path.suffix in (".bin", ".ds"))
        assert open_dataset(single).vocab_size == own_vocab_size(single) == 270
    (tmp_path / "nanogpt/tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"nanogpt/tokenizer\.json: wanted a byte-level BPE vocabulary"):
        open_dataset(tmp_path / "nanogpt")


def test_folders_that_are_in_use(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/a").write_text("")
    (tmp_path / "empty").mkdir()
    for out, wanted in (("full", "new or empty folder, got one in use"), ("full/a", "new or empty folder, got a file")):
        with pytest.raises(InputError, match=wanted):
            export(toy(), "nanogpt", tmp_path / out)
    export(toy(), "nanogpt", tmp_path / "empty")
    assert (tmp_path / "empty/train.bin").exists()
    with pytest.raises(InputError, match="--format: wanted one of nanogpt, llmc, megatron, datatrove, got jax"):
        export(toy(), "jax", tmp_path / "new")
    with pytest.raises(InputError, match=r"validation fraction: wanted a number between 0 and 1, got 1\.5"):
        export(toy(), "nanogpt", tmp_path / "new", fraction=1.5)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
@pytest.mark.parametrize("at", ["_sync", "sync_folder"])
def test_a_fault_leaves_nothing(tmp_path, monkeypatch, fault, at):
    def fail(path):
        raise fault

    monkeypatch.setattr(room, at, fail)
    with pytest.raises(type(fault)) as caught:
        export(toy(), "megatron", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    if isinstance(fault, OSError):
        assert caught.value.filename == str(tmp_path / "out")


def test_progress_counts_every_token_once(whale, tmp_path):
    for kind in WRITERS:
        for split in train_val_split(whale, 1):
            told = []
            (tmp_path / kind).mkdir(exist_ok=True)
            WRITERS[kind](tmp_path / kind, split.name, stream_of(split, told.append))
            assert sum(told) == split.n_tokens


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert cli.main("data export moby-dick --format megatron --out out".split()) == 0
    said = capsys.readouterr().out
    assert re.search(r"^out/train\.idx  [\d,]+ bytes$", said, re.M)
    assert cli.main("data info out --json".split()) == 0
    assert f'"documents": {sum(1 for _ in room_documents())}' in capsys.readouterr().out
    assert cli.main("data export moby-dick --format megatron --out out".split()) == 2
    assert capsys.readouterr().err == "cgpt: out: wanted a new or empty folder, got one in use\n"
    assert cli.main("data export moby-dick --format tfrecord --out out2".split()) == 2
    assert "invalid choice 'tfrecord'" in capsys.readouterr().err


def room_documents():
    from collections import Counter

    from cgpt.data.sources import read

    return (piece for piece in read(find("moby-dick"), Counter()) if piece.ends_document)
