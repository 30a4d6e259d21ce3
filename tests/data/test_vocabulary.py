"""Vocabularies learnt from a corpus: against naive counting, tokenizers' own encoding, and interruptions."""

import errno
import hashlib
import json
import os
import random
import re
import shutil
import sys
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import regex  # a dependency of tiktoken
import tokenizers

from cgpt import cli
from cgpt.data import prepare as room
from cgpt.data import shards, writer
from cgpt.data.loader import held_out, train_val_split
from cgpt.data.prepare import open_corpus, own_vocab_size, prepare
from cgpt.data.sources import find, read
from cgpt.data.tokenizer import PATTERN, gpt2, parse_tokenizer, read_tokenizer
from cgpt.data.vocabulary import learn
from cgpt.errors import InputError

SIZE = 700
SHARD_TOKENS = 8192


@pytest.fixture(scope="module")
def texts():
    return [piece.text for piece in read(find("moby-dick"), Counter())][:30]


@pytest.fixture(scope="module")
def seen(texts):
    """What is trained on."""
    return [text for document, text in enumerate(texts) if not held_out(document)]


@pytest.fixture(scope="module")
def learnt(seen):
    return learn(seen, SIZE)


@pytest.fixture(scope="module")
def source(texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "some.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """The folder of an uninterrupted preparation."""
    out = tmp_path_factory.mktemp("whole") / "out"
    prepare(source, out, workers=1, progress=False, shard_tokens=SHARD_TOKENS, vocab_size=SIZE)
    return out


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refusal(pattern, call, *arguments, **options):
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert re.search(pattern, message), message


def random_texts(seed, n):
    """Unicode of all planes, white space and controls, English letters: not a surrogate among them."""
    rng, hard = random.Random(seed), "ab Z09.,'\n\t  \r\0\u00a0\u2003\u0085's漢😀\u0301ß٣<|>endoftext"
    for _ in range(n):
        yield "".join(chr(rng.choice((rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)))) for _ in range(30))
        yield "".join(rng.choices(hard, k=rng.randrange(60)))
        yield "".join(rng.choices("etaoinshr  ", k=60))


def naive_merges(texts, n):
    """Count all pairs anew for each merge; the most frequent wins, of equals the one of lowest ids."""
    words = Counter(piece for text in texts for piece in regex.findall(PATTERN, text))
    words = [([bytes([byte]) for byte in word.encode()], count) for word, count in words.items()]
    ids = {string: i for i, string in enumerate(gpt2().strings[:256])}
    merges = []
    for _ in range(n):
        counts = Counter()
        for parts, count in words:
            for pair in pairwise(parts):
                counts[pair] += count
        best = min(counts, key=lambda pair: (-counts[pair], ids[pair[0]], ids[pair[1]]))
        for parts, _ in words:
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = [parts[i] + parts[i + 1]]
                i += 1
        merges.append(b"".join(best))
        ids[merges[-1]] = len(ids)
    return merges


def test_the_merges_are_those_of_naive_counting(texts):
    assert list(learn(texts[:3], 257 + 120).strings[256:]) == naive_merges(texts[:3], 120)


def test_the_layout_of_ids(learnt):
    assert (learnt.n_vocab, learnt.eot, len(learnt.strings)) == (SIZE, SIZE - 1, SIZE - 1)
    assert learnt.strings[:256] == gpt2().strings[:256]
    assert len(set(learnt.strings)) == SIZE - 1
    assert learnt.decode([learnt.eot]) == "<|endoftext|>"
    assert learnt.hash != gpt2().hash


def test_any_text_and_any_bytes_come_back(learnt):
    for text in random_texts(0, 200):
        ids = learnt.encode_ordinary(text)
        assert learnt.decode(ids) == "".join(learnt.stream(ids)) == text
        assert learnt.eot not in ids
        assert learnt.bytes_of(np.array([*ids, learnt.eot])) == len(text.encode())
        assert learnt.encode_to_numpy(text).tolist() == ids
    id_of = {string: i for i, string in enumerate(learnt.strings)}
    data = random.Random(1).randbytes(2000) + bytes(range(256))
    assert b"".join(learnt.decode_single_token_bytes(id_of[bytes([byte])]) for byte in data) == data


def test_a_stream_gives_a_character_with_its_last_byte_and_a_broken_one_at_the_end(learnt):
    id_of = {string: i for i, string in enumerate(learnt.strings)}
    ids = [id_of[bytes([byte])] for byte in "漢".encode()]
    assert list(learnt.stream(ids)) == ["", "", "漢", ""]
    assert list(learnt.stream(ids[:2])) == ["", "", "\ufffd"]


def test_ids_are_those_of_the_tokenizers_package(learnt, texts):
    theirs = tokenizers.Tokenizer.from_str(learnt.file.decode())
    assert theirs.get_vocab_size() == SIZE
    for text in (*texts, *random_texts(2, 300)):
        if "<|endoftext|>" not in text:  # there it is no text
            assert learnt.encode_ordinary(text) == theirs.encode(text).ids
    assert theirs.token_to_id("<|endoftext|>") == learnt.eot


def test_same_text_same_bytes_in_any_order(learnt, seen):
    shuffled = random.Random(3).sample(seen, len(seen))
    assert learn(iter(shuffled), SIZE).file == learnt.file
    assert learn(seen[1:], SIZE).file != learnt.file


def test_what_is_held_out_teaches_nothing(tmp_path, texts):
    """Another text in a held-out document changes no id; in any other it does."""
    rows = [{"text": text} for text in texts]
    hidden = [i for i in range(len(texts)) if held_out(i)]
    assert hidden
    files = {}
    for name, changed in (("as it is", None), ("held out", hidden[0]), ("seen", hidden[0] + 1)):
        path = tmp_path / "a.jsonl"
        other = [{"text": "zzzyx " * 3000} if i == changed else row for i, row in enumerate(rows)]
        path.write_text("".join(json.dumps(row) + "\n" for row in other))
        dataset = prepare(path, tmp_path / name, progress=False, vocab_size=SIZE)
        files[name] = (tmp_path / name / "tokenizer.json").read_bytes()
        split = train_val_split(dataset, 64)[1]
        assert split.rule == "documents"
        ends = dataset.document_ends.tolist()
        assert [ends[i] for i in hidden if i + 1 not in hidden] == split.stops.tolist()
    assert files["as it is"] == files["held out"] != files["seen"]


def test_documents_too_uneven_for_the_hash_are_all_learnt_from(tmp_path):
    assert held_out([0, 1]).tolist() == [False, True]
    texts = ["a short one about nothing", " ".join(f"the whale {i % 50} of the sea" for i in range(4000))]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    dataset = prepare(path, tmp_path / "out", progress=False, vocab_size=300)
    assert dataset.tokenizer.file == learn(texts, 300).file
    refusal("wanted at most [0-9]+, as the text has no more pairs", prepare, path, tmp_path / "b", vocab_size=60_000)


@pytest.mark.parametrize("block", [1, 3])
def test_blocks_of_hashes_change_nothing(monkeypatch, block):
    monkeypatch.setattr(room, "BLOCK_DOCUMENTS", block)
    assert list(islice(room._marks(), 100)) == held_out(np.arange(100)).tolist()


def test_a_vocabulary_from_elsewhere(whole, source, learnt, tmp_path, capsys):
    (tmp_path / "b.txt").write_text("another text about the whale")
    dataset = prepare(tmp_path / "b.txt", tmp_path / "b", progress=False, vocabulary=shards.vocabulary_of(whole))
    assert dataset.tokens(0, dataset.n_tokens).tolist() == [
        *learnt.encode_ordinary("another text about the whale"),
        SIZE - 1,
    ]
    assert dataset.tokenizer.hash == learnt.hash
    assert shards.vocabulary_of(whole / "tokenizer.json").hash == learnt.hash
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"dataset": {"vocabulary": learnt.hash}}))
    refusal("tokenizer.json: no such file", shards.vocabulary_of, run)
    shutil.copy(whole / "tokenizer.json", run)
    assert shards.vocabulary_of(run).hash == learnt.hash
    (run / "config.json").write_text(json.dumps({"dataset": {"vocabulary": "f00"}}))
    refusal("wanted vocabulary f00, got ", shards.vocabulary_of, run)
    (run / "config.json").write_text(json.dumps({"dataset": {"name": "a"}}))
    (run / "tokenizer.json").unlink()
    assert shards.vocabulary_of(run) is gpt2()
    prepare(tmp_path / "b.txt", tmp_path / "c", progress=False, vocabulary=gpt2())
    assert shards.vocabulary_of(tmp_path / "c") is gpt2()
    assert not (tmp_path / "c/tokenizer.json").exists()
    for content in ("{", "[]", '{"model_type": "gpt2"}'):
        (run / "config.json").write_text(content)
        refusal("config.json: wanted a run's configuration, got another file", shards.vocabulary_of, run)
    refusal("wanted a prepared dataset or a run, to take its vocabulary", shards.vocabulary_of, tmp_path)
    both = {"vocab_size": 300, "vocabulary": learnt}
    refusal("--vocab-from: wanted it or --vocab-size, got both", prepare, source, tmp_path / "d", **both)
    assert (
        cli.main(["data", "prepare", str(tmp_path / "b.txt"), "--out", str(tmp_path / "e"), "--vocab-from", str(whole)])
        == 0
    )
    assert (tmp_path / "e/tokenizer.json").read_bytes() == learnt.file


def test_a_file_gives_back_the_vocabulary(learnt, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(learnt.file)
    again = read_tokenizer(tmp_path / "tokenizer.json", learnt.hash)
    assert (again.strings, again.file, again.hash) == (learnt.strings, learnt.file, learnt.hash)


def test_reading_and_encoding_need_no_tokenizers_package(learnt, whole, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    dataset = shards.open_dataset(whole)
    assert dataset.tokenizer.encode_ordinary("the whale") == learnt.encode_ordinary("the whale")


def test_files_that_are_no_such_vocabulary(learnt, tmp_path):
    def altered(**changes):
        return json.dumps({**json.loads(learnt.file), **changes}).encode()

    model = json.loads(learnt.file)["model"]
    swapped = {token: {300: 301, 301: 300}.get(i, i) for token, i in model["vocab"].items()}
    doubled = {token: 300 if i == 301 else i for token, i in model["vocab"].items()}
    cases = (
        (b"", "damaged"),
        (b"[]", "damaged"),
        (learnt.file[:-9], "damaged"),
        (altered(model={**model, "vocab": 3}), "damaged"),
        (altered(model={**model, "vocab": {**model["vocab"], " ": 5}}), "damaged"),
        (altered(added_tokens=[]), "damaged"),
        (altered(normalizer={"type": "NFC"}), "the normalizer"),
        (altered(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}), "the pattern"),
        (altered(model={**model, "type": "Unigram"}), "the kind"),
        (altered(model={**model, "vocab": swapped}), "the merges in id order"),
        (altered(model={**model, "vocab": doubled}), "the ids"),
        (altered(added_tokens=[{"content": "<s>", "id": SIZE - 1}]), "endoftext"),
    )
    for data, pattern in cases:
        refusal(f"^here: wanted .*{pattern}", parse_tokenizer, data, "here")
    refusal("none: no such file; wanted the vocabulary", read_tokenizer, tmp_path / "none")


def test_a_dataset_is_the_encoding_of_its_text(whole, texts, learnt):
    dataset = shards.open_dataset(whole)
    expected = [[*learnt.encode_ordinary(text), learnt.eot] for text in texts]
    assert dataset.tokens(0, dataset.n_tokens).tolist() == np.concatenate(expected).tolist()
    assert dataset.document_ends.tolist() == np.cumsum([len(each) for each in expected]).tolist()
    assert (dataset.vocab_size, dataset.eot) == (SIZE, SIZE - 1)
    assert dataset.text_bytes == dataset.tokenizer.bytes_of(dataset.tokens(0, dataset.n_tokens))


def test_the_manifest_names_the_vocabulary(whole, learnt):
    manifest = json.loads((whole / "dataset.json").read_bytes())
    data = (whole / "tokenizer.json").read_bytes()
    assert data == learnt.file
    assert manifest["files"]["tokenizer.json"] == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert (manifest["vocab_size"], manifest["vocabulary_hash"]) == (SIZE, learnt.hash)
    assert len(manifest["files"]) > 8  # of several shards


def test_datasets_that_have_no_vocabulary_of_their_own(source, tmp_path):
    dataset = prepare(source, tmp_path / "out", progress=False)
    assert dataset.tokenizer is gpt2()
    assert not (tmp_path / "out/tokenizer.json").exists()
    np.arange(300, dtype="<u2").tofile(tmp_path / "n.bin")
    assert shards.open_dataset(tmp_path / "n.bin").tokenizer is gpt2()
    assert shards.open_dataset(tmp_path / "n.bin", vocab_size=400, eot=0).tokenizer is None


def test_the_size_that_data_brings_along(source, whole, tmp_path):
    prepare(source, tmp_path / "plain", progress=False)
    assert own_vocab_size(whole) == own_vocab_size(str(whole)) == SIZE
    for other in (tmp_path / "plain", source, "moby-dick", tmp_path / "none"):
        assert own_vocab_size(other) is None


def test_workers_do_not_change_a_byte(source, whole, tmp_path):
    options = {"progress": False, "shard_tokens": SHARD_TOKENS, "vocab_size": SIZE}
    prepare(source, tmp_path / "out", workers=3, **options)
    wanted = {name: data for name, data in contents(whole).items() if name != ".verified"}
    assert contents(tmp_path / "out") == wanted
    prepare(source, tmp_path / "out", **options)  # opened and left alone
    assert contents(tmp_path / "out") == wanted
    for other in (SIZE + 1, None):
        held = rf"got the dataset of other sources \(some.jsonl, \d+ tokens\) or another vocabulary \({SIZE}\)"
        refusal(held, prepare, source, tmp_path / "out", **{**options, "vocab_size": other})


def test_interrupted_it_goes_on_with_the_vocabulary_it_has(source, whole, tmp_path, monkeypatch):
    options = {"progress": False, "shard_tokens": SHARD_TOKENS, "vocab_size": SIZE}
    real = writer.ShardWriter.add
    for stop in (0, 5):

        def interrupted(self, batch, stop=stop):
            if self.batches == stop:
                raise KeyboardInterrupt
            real(self, batch)

        out = tmp_path / str(stop)
        with monkeypatch.context() as patch:
            patch.setattr(writer.ShardWriter, "add", interrupted)
            with pytest.raises(KeyboardInterrupt):
                prepare(source, out, **options)
        assert {"tokenizer.json", "unfinished.json"} <= contents(out).keys()
        assert (out / "shard-00000.bin").exists() == (stop > 0)
        refusal("wanted the sources of the unfinished", prepare, source, out, **{**options, "vocab_size": SIZE + 1})
        with monkeypatch.context() as patch:
            patch.setattr(room, "learn", None)
            prepare(source, out, **options)
        assert contents(out) == {name: data for name, data in contents(whole).items() if name != ".verified"}


def test_an_altered_vocabulary_is_not_gone_on_with(source, tmp_path, monkeypatch):
    options = {"progress": False, "shard_tokens": SHARD_TOKENS, "vocab_size": SIZE}

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(room, "_encode_all", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(source, tmp_path / "out", **options)
    path = tmp_path / "out/tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b"the", b"teh"))
    refusal("tokenizer.json: wanted sha256", prepare, source, tmp_path / "out", **options)


def test_a_full_disk_leaves_the_vocabulary_or_nothing(source, whole, learnt, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "learn", lambda texts, _: list(texts) and learnt)
    options = {"progress": False, "shard_tokens": SHARD_TOKENS, "vocab_size": SIZE}
    out, real, left = tmp_path / "out", os.fsync, []
    for fault in range(8):
        calls = []

        def full(descriptor, calls=calls, fault=fault):
            calls.append(descriptor)
            if len(calls) > fault:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match=r"No space left on device: '.*out"):
                prepare(source, out, **options)
        left.append(contents(out).keys() if out.exists() else set())
        if left[-1]:
            recorded = shards.read_manifest(out / "unfinished.json")["files"]
            assert left[-1] - {"documents.idx"} == {*recorded, "unfinished.json"}
            assert "tokenizer.json" in recorded
        prepare(source, out, **options)
        assert contents(out) == {name: data for name, data in contents(whole).items() if name != ".verified"}
        shutil.rmtree(out)
    assert left[0] == set() != left[-1]


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_death_at_every_sync_and_rename_is_resumable(tmp_path, monkeypatch):
    row = json.dumps({"text": "It was a dark and stormy night. " * 20})
    (tmp_path / "a.jsonl").write_text(f"{row}\n" * 4)
    arguments = (tmp_path / "a.jsonl", tmp_path / "out")
    options = {"workers": 1, "progress": False, "shard_tokens": 256, "vocab_size": 270}
    ready = learn([json.loads(row)["text"]] * 4, 270)
    monkeypatch.setattr(room, "learn", lambda texts, _: list(texts) and ready)  # its threads would not survive a fork
    prepare(arguments[0], tmp_path / "whole", **options)
    steps = 0

    def dying(real, at):
        def call(*arguments):
            nonlocal steps
            steps += 1
            if steps == at:
                os._exit(9)
            return real(*arguments)

        return call

    for at in range(1, 200):
        child = os.fork()
        if child == 0:
            for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "replace"), (Path, "unlink")):
                setattr(owner, name, dying(getattr(owner, name), at))
            prepare(*arguments, **options)
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            break
        prepare(*arguments, **options)
        assert contents(tmp_path / "out") == contents(tmp_path / "whole"), at
        shutil.rmtree(tmp_path / "out")
    assert 20 < at < 200


def test_sizes_that_are_none(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    for size in (-1, 0, 256, 65536):
        refusal(
            rf"^--vocab-size: wanted a number from 257 .* to 65535 .*, got {size}$",
            prepare, source, out, progress=False, vocab_size=size,
        )  # fmt: skip
    (tmp_path / "a.txt").write_text("hello hello")
    wanted = r"^--vocab-size: wanted at most 261, .*, got 262$"
    refusal(wanted, prepare, tmp_path / "a.txt", out, progress=False, vocab_size=262)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    refusal("got none: pip install tokenizers$", prepare, source, out, progress=False, vocab_size=300)
    assert not out.exists()


def test_the_bounds_of_what_a_text_can_give(tmp_path):
    (tmp_path / "a.txt").write_text("hello hello é")
    dataset = prepare(tmp_path / "a.txt", tmp_path / "257", progress=False, vocab_size=257)
    strings = [dataset.tokenizer.decode_single_token_bytes(token) for token in dataset.tokens(0, 14)]
    assert strings == [bytes([byte]) for byte in "hello hello é".encode()]
    assert dataset.tokens(14, dataset.n_tokens).tolist() == [256] == [dataset.eot]
    dataset = prepare(tmp_path / "a.txt", tmp_path / "260", progress=False, vocab_size=260)
    assert dataset.tokenizer.decode(dataset.tokens(0, dataset.n_tokens)) == "hello hello é<|endoftext|>"


def test_the_largest_vocabulary_fits_its_shards(tmp_path):
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(48_000)]
    (tmp_path / "a.txt").write_text(" ".join(words * 2))
    dataset = prepare(tmp_path / "a.txt", tmp_path / "out", progress=False, vocab_size=65535)
    tokens = dataset.tokens(0, dataset.n_tokens)
    assert tokens.max() == tokens[-1] == dataset.eot == 65534
    assert dataset.tokenizer.decode(tokens[:-1]) == " ".join(words * 2)


def test_bad_text_leaves_nothing(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine words " * 200_000 + b"\0")
    refusal("NUL byte", prepare, tmp_path / "a.txt", tmp_path / "out", progress=False, vocab_size=270)
    assert not (tmp_path / "out").exists()


def test_an_altered_vocabulary_is_found_at_opening(whole, source, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "out")
    path, data = folder / "tokenizer.json", (whole / "tokenizer.json").read_bytes()
    path.write_bytes(data.replace(b'"add_prefix_space": false', b'"add_prefix_space": falsE'))
    refusal("tokenizer.json: wanted sha256", shards.open_dataset, folder)
    path.unlink()
    refusal(f"tokenizer.json: wanted size in bytes {len(data)}, got no file", shards.open_dataset, folder)
    path.write_bytes(data)
    dataset = shards.open_dataset(folder)
    prepare(source, tmp_path / "other", progress=False, vocab_size=SIZE - 1)
    shutil.copy(tmp_path / "other/tokenizer.json", path)
    refusal(f"tokenizer.json: wanted vocabulary {dataset.info['vocabulary_hash']}, got", lambda: dataset.tokenizer)


def test_open_corpus_reads_text_in_the_vocabulary_asked_for(source, whole, learnt, tmp_path):
    plain = open_corpus(source, tmp_path, progress=False)
    own = open_corpus(source, tmp_path, progress=False, tokenizer=learnt)
    assert (plain.vocab_size, own.vocab_size) == (50257, SIZE)
    assert own.tokenizer.hash == learnt.hash
    assert own.tokens(0, own.n_tokens).tolist() == shards.open_dataset(whole).tokens(0, own.n_tokens).tolist()
    assert len(list(tmp_path.iterdir())) == 2
    assert open_corpus(whole, tmp_path, tokenizer=gpt2()).vocab_size == SIZE  # tokens that are ready stay as they are
