"""The shard format and other trainers' token files: reading, and refusing what is damaged."""

import json
import os
import re
import shutil

import numpy as np
import pytest

from cgpt.data import shards
from cgpt.data.formats import llmc as llmc_format
from cgpt.data.formats.scan import SCAN_TOKENS
from cgpt.data.prepare import prepare
from cgpt.data.shards import TokenDataset, open_dataset
from cgpt.data.tokenizer import EOT, gpt2
from cgpt.errors import InputError
from cgpt.files import write_signed_json

TEXTS = [f"Document {i}: " + "the whale " * (40 * i % 97) for i in range(60)]


@pytest.fixture
def folder(tmp_path):
    """A prepared dataset of several shards."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    prepare(tmp_path / "a.jsonl", tmp_path / "out", progress=False, shard_tokens=1000)
    assert len(list((tmp_path / "out").glob("shard-*.bin"))) >= 4
    return tmp_path / "out"


def refusal(path, pattern, **options):
    with pytest.raises(InputError) as caught:
        open_dataset(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert re.search(pattern, message), message


def nanogpt(path, tokens):
    path.parent.mkdir(exist_ok=True)
    np.asarray(tokens, dtype="<u2").tofile(path)
    return path


def llmc(path, tokens, magic=20240520, version=1, count=None):
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    body = np.asarray(tokens, dtype="<u2" if magic == 20240520 else "<u4")
    path.write_bytes(header.tobytes() + body.tobytes())
    return path


def test_prepared_dataset_holds_the_text(folder):
    dataset = open_dataset(folder)
    expected = [[*gpt2().encode_ordinary(text), EOT] for text in TEXTS]
    flat = np.concatenate(expected)
    assert dataset.tokens(0, dataset.n_tokens).tolist() == flat.tolist()
    assert dataset.document_ends.tolist() == np.cumsum([len(each) for each in expected]).tolist()
    assert (dataset.n_documents, dataset.text_bytes) == (60, sum(len(text.encode()) for text in TEXTS))
    assert (dataset.vocab_size, dataset.eot, dataset.dtype) == (50257, 50256, np.dtype("<u2"))
    assert dataset.validation_start is None
    assert dataset.info["corpora"] == ["a.jsonl"]


def test_tokens_across_every_boundary():
    arrays = [np.arange(a, b, dtype=np.uint16) for a, b in ((0, 3), (3, 4), (4, 11), (11, 12))]
    dataset = TokenDataset("t", arrays, np.array([12]))
    for start in range(13):
        for stop in range(start, 13):
            part = dataset.tokens(start, stop)
            assert part.tolist() == list(range(start, stop))
            assert part.dtype == np.uint16
    for bad in ((-1, 3), (0, 13), (5, 4)):
        with pytest.raises(IndexError):
            dataset.tokens(*bad)


def test_one_shard_is_read_without_a_copy(tmp_path):
    dataset = open_dataset(nanogpt(tmp_path / "a.bin", range(100)))
    assert isinstance(dataset.tokens(10, 20).base, np.memmap)


@pytest.mark.parametrize("cut", [1, 2, 500])
def test_truncated_files(folder, cut):
    for name in ("shard-00001.bin", "documents.idx"):
        path = folder / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-cut])
        refusal(folder, rf"{name}: wanted size in bytes {len(whole)}, got {len(whole[:-cut])}$", verify=False)
        path.unlink()
        refusal(folder, rf"{name}: wanted size in bytes {len(whole)}, got no file$")
        path.write_bytes(whole)
    open_dataset(folder)


def test_one_flipped_bit_anywhere(folder):
    open_dataset(folder)
    assert (folder / ".verified").exists()
    rng = np.random.default_rng(0)
    for path in sorted(folder.iterdir()):
        if path.name == ".verified":
            continue
        whole = path.read_bytes()
        for at in [*rng.integers(len(whole), size=4).tolist(), 0, len(whole) - 2]:
            damaged = bytearray(whole)
            damaged[at] ^= 1 << int(rng.integers(8))
            with path.open("r+b") as file:  # in place: the size stays, only the times move
                file.write(damaged)
            if path.name == "dataset.json":
                if _same_json(damaged, whole):
                    continue
                refusal(folder, r"dataset\.json: wanted ")
            else:
                refusal(folder, rf"{path.name}: wanted sha256 [0-9a-f]{{64}}, got [0-9a-f]{{64}}$")
        path.write_bytes(whole)
    open_dataset(folder)


def _same_json(left, right):
    try:
        return json.loads(left) == json.loads(right)
    except ValueError:
        return False


def test_checksums_are_compared_once_and_again_after_any_change(folder, monkeypatch):
    hashed = []
    real = shards.sha256_of
    monkeypatch.setattr(shards, "sha256_of", lambda path: hashed.append(path.name) or real(path))
    open_dataset(folder)
    n_files = len(hashed)
    assert n_files == len(list(folder.glob("shard-*"))) + 1
    open_dataset(folder)
    assert len(hashed) == n_files
    times = (folder / "shard-00000.bin").stat()
    data = bytearray((folder / "shard-00000.bin").read_bytes())
    data[7] ^= 1
    (folder / "shard-00000.bin").write_bytes(data)
    os.utime(folder / "shard-00000.bin", ns=(times.st_atime_ns, times.st_mtime_ns))  # hides it from mtime only
    refusal(folder, r"shard-00000\.bin: wanted sha256")
    data[7] ^= 1
    (folder / "shard-00000.bin").write_bytes(data)
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy)
    (copy / ".verified").write_text("{broken")
    hashed.clear()
    open_dataset(copy)
    assert len(hashed) == n_files


def test_metadata_of_another_version_or_vocabulary(folder):
    manifest = shards.read_manifest(folder / "dataset.json")
    write_signed_json(folder / "dataset.json", {**manifest, "version": 2})
    refusal(folder, r"dataset\.json: wanted version 1, got 2")
    write_signed_json(folder / "dataset.json", {**manifest, "vocabulary_hash": "f00"})
    refusal(folder, r"dataset\.json: wanted vocabulary [0-9a-f]{64}, got f00")
    for damaged in (b"", b"[]", b"{}", b"{", b"\xff"):
        (folder / "dataset.json").write_bytes(damaged)
        refusal(folder, r"dataset\.json: wanted signed JSON, got a damaged file")


def test_missing_and_unfinished(tmp_path, folder):
    refusal(tmp_path / "nowhere", "nowhere: no such file or folder; wanted a token dataset")
    (folder / "dataset.json").rename(folder / "unfinished.json")
    refusal(folder, "out: wanted a whole dataset, got an unfinished one")
    refusal(tmp_path / "a.jsonl", r"a\.jsonl: wanted a token file \(\.bin, \.idx, \.ds\) or a folder, got the suffix")
    (tmp_path / "empty").mkdir()
    refusal(tmp_path / "empty", r"empty: wanted a folder with dataset\.json or token files \(\.bin, \.idx, \.ds\), got")


def test_nanogpt_file(tmp_path):
    tokens = [5, 6, EOT, 7, EOT, EOT, 8, 9]
    dataset = open_dataset(nanogpt(tmp_path / "a.bin", tokens))
    assert dataset.tokens(0, 8).tolist() == tokens
    assert dataset.document_ends.tolist() == [3, 5, 6, 8]
    assert (dataset.text_bytes, dataset.validation_start) == (None, None)


def test_nanogpt_folder_is_its_own_split(tmp_path):
    nanogpt(tmp_path / "n/train.bin", [1, 2, EOT, 3])
    nanogpt(tmp_path / "n/val.bin", [4, EOT])
    (tmp_path / "n/meta.pkl").write_bytes(b"never opened")
    dataset = open_dataset(tmp_path / "n")
    assert dataset.tokens(0, 6).tolist() == [1, 2, EOT, 3, 4, EOT]
    assert dataset.document_ends.tolist() == [3, 4, 6]
    assert dataset.validation_start == 4


def test_llmc_files(tmp_path):
    dataset = open_dataset(llmc(tmp_path / "a.bin", [EOT, 1, 2, EOT, 3]))
    assert dataset.tokens(0, 5).tolist() == [EOT, 1, 2, EOT, 3]
    assert dataset.dtype == np.dtype("<u2")
    path = llmc(tmp_path / "b.bin", [70_000, 128_001, 5], magic=20240801, version=7)
    dataset = open_dataset(path, vocab_size=128_256, eot=128_001)
    assert dataset.tokens(0, 3).tolist() == [70_000, 128_001, 5]
    assert dataset.dtype == np.dtype("<u4")
    assert dataset.document_ends.tolist() == [2, 3]


def test_llmc_folder_by_name_and_documents_running_over_files(tmp_path):
    llmc(tmp_path / "fineweb_val_000000.bin", [9, EOT])
    llmc(tmp_path / "fineweb_train_000002.bin", [3, EOT, 4])
    llmc(tmp_path / "fineweb_train_000001.bin", [EOT, 1, 2])
    dataset = open_dataset(tmp_path)
    assert dataset.tokens(0, 8).tolist() == [EOT, 1, 2, 3, EOT, 4, 9, EOT]
    assert dataset.document_ends.tolist() == [1, 5, 6, 8]
    assert dataset.validation_start == 6
    (tmp_path / "fineweb_val_000000.bin").unlink()
    assert open_dataset(tmp_path).validation_start is None


def test_no_llmc_magic_is_a_pair_of_gpt2_ids():
    for magic in llmc_format.KINDS:
        assert max(np.array([magic], dtype="<i4").view("<u2")) > EOT


@pytest.mark.parametrize("place", [0, SCAN_TOKENS - 1, SCAN_TOKENS, 2 * SCAN_TOKENS])
def test_ids_past_the_vocabulary(tmp_path, place):
    tokens = np.ones(2 * SCAN_TOKENS + 1, dtype=np.uint16)
    tokens[-1] = EOT
    tokens[place] = 50257
    path = nanogpt(tmp_path / "a.bin", tokens)
    refusal(path, rf"a\.bin: wanted token ids under 50257, got 50257 at position {place}$")
    assert open_dataset(path, vocab_size=50258).vocab_size == 50258
    refusal(llmc(tmp_path / "b.bin", [1, 2**31], 20240801, 7), "wanted token ids under 50257, got 2147483648 at")


def test_damaged_token_files(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"")
    refusal(path, r"a\.bin: wanted tokens, got an empty file")
    path.write_bytes(b"\1\0\2")
    refusal(path, r"a\.bin: wanted uint16 tokens, an even number of bytes, got 3")
    refusal(llmc(path, []), r"a\.bin: wanted tokens, got an empty file")
    refusal(llmc(path, [1, 2, 3], count=4), r"bytes for the 4 tokens of its header: 1032, got 1030")
    refusal(llmc(path, [1], version=2), "wanted llm.c format 20240520 version 1, got 2")
    path.write_bytes(llmc(path, [1]).read_bytes()[:100])
    refusal(path, "bytes for the 1 tokens of its header: 1026, got 100")
