"""Megatron's .bin and .idx: the layout byte by byte, every dtype of ids, and indices that lie."""

import re
import struct

import numpy as np
import pytest

from cgpt.data.export import export
from cgpt.data.formats import megatron
from cgpt.data.shards import TokenDataset, open_dataset
from cgpt.data.tokenizer import EOT
from cgpt.errors import InputError


def pair(folder, tokens, lengths, documents=None, pointers=None, code=8, name="a", **lies):
    """A pair written by hand, field by field."""
    width = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 8, 7: 4, 8: 2}[code]
    kind = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}[code]
    documents = list(range(len(lengths) + 1)) if documents is None else documents
    if pointers is None:
        pointers = [width * sum(lengths[:i]) for i in range(len(lengths))]
    data = lies.get("magic", b"MMIDIDX\0\0")
    data += struct.pack("<Q", lies.get("version", 1)) + struct.pack("<B", lies.get("dtype", code))
    data += struct.pack("<Q", lies.get("n", len(lengths))) + struct.pack("<Q", lies.get("m", len(documents)))
    data += b"".join(struct.pack("<i", length) for length in lengths)
    data += b"".join(struct.pack("<q", pointer) for pointer in pointers)
    data += b"".join(struct.pack("<q", document) for document in documents)
    (folder / f"{name}.idx").write_bytes(data)
    (folder / f"{name}.bin").write_bytes(np.array(tokens).astype(kind).tobytes())
    return folder / f"{name}.idx"


def refusal(path, pattern):
    with pytest.raises(InputError) as caught:
        open_dataset(path)
    assert "\n" not in str(caught.value)
    assert re.search(pattern, str(caught.value)), str(caught.value)


@pytest.mark.parametrize("code", megatron.DTYPES)
def test_every_dtype_of_ids(tmp_path, code):
    tokens = [5, 6, 7, 127, 9, 10]
    for path in (pair(tmp_path, tokens, [2, 3, 1], code=code), tmp_path / "a.bin", tmp_path / "a"):
        dataset = open_dataset(path)
        assert dataset.tokens(0, 6).tolist() == tokens
        assert dataset.document_ends.tolist() == [2, 5, 6]
        assert dataset.dtype == np.dtype(megatron.DTYPES[code])


def test_documents_of_several_sequences_and_of_none(tmp_path):
    path = pair(tmp_path, range(10), [2, 0, 3, 4, 1], documents=[0, 0, 2, 2, 5, 5])
    assert open_dataset(path).document_ends.tolist() == [2, 10]


def test_sequences_in_another_order_than_the_ids(tmp_path):
    path = pair(tmp_path, range(10, 20), [2, 3, 2], pointers=[12, 0, 6])
    dataset = open_dataset(path)
    assert dataset.tokens(0, 7).tolist() == [16, 17, 10, 11, 12, 13, 14]
    assert dataset.document_ends.tolist() == [2, 5, 7]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_chunks_of_the_index_change_nothing(tmp_path, monkeypatch, chunk):
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 5, size=20).tolist()
    documents = [0, *sorted(rng.integers(0, 20, size=6).tolist()), 20]
    starts = np.cumsum([0, *lengths[:-1]])
    order = [*range(5), *range(12, 20), *range(5, 12)]
    tokens = rng.integers(0, 50000, size=sum(lengths))
    path = pair(tmp_path, tokens, [lengths[i] for i in order], documents, [2 * int(starts[i]) for i in order])
    monkeypatch.setattr(megatron, "CHUNK_TOKENS", chunk)
    dataset = open_dataset(path)
    wanted = np.concatenate([tokens[starts[i] : starts[i] + lengths[i]] for i in order])
    assert dataset.tokens(0, dataset.n_tokens).tolist() == wanted.tolist()
    ends = np.cumsum([lengths[i] for i in order])
    assert dataset.document_ends.tolist() == sorted({int(ends[d - 1]) for d in documents[1:] if d and ends[d - 1]})


def test_what_is_written_byte_by_byte(tmp_path):
    dataset = TokenDataset("t", [np.array([7, 8, EOT, 9, EOT], dtype="<u2")], np.array([3, 5]))
    export(dataset, "megatron", tmp_path / "out", fraction=0)
    assert (tmp_path / "out/all.bin").read_bytes() == struct.pack("<5H", 7, 8, EOT, 9, EOT)
    wanted = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 2, 3)
    wanted += struct.pack("<2i", 3, 2) + struct.pack("<2q", 0, 6) + struct.pack("<3q", 0, 1, 2)
    assert (tmp_path / "out/all.idx").read_bytes() == wanted


def test_a_large_vocabulary_takes_int32(tmp_path):
    dataset = TokenDataset("t", [np.array([70_000, 1], dtype="<u4")], np.array([2]), vocab_size=100_000, eot=0)
    export(dataset, "megatron", tmp_path / "out", fraction=0)
    assert (tmp_path / "out/all.bin").read_bytes() == struct.pack("<2i", 70_000, 1)
    found = open_dataset(tmp_path / "out", vocab_size=100_000, eot=0)
    assert (found.tokens(0, 2).tolist(), found.dtype) == ([70_000, 1], np.dtype("<i4"))


def test_a_document_that_no_int32_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(megatron, "MOST_LENGTH", 2)
    dataset = TokenDataset("t", [np.array([7, 8, EOT], dtype="<u2")], np.array([3]))
    with pytest.raises(InputError, match="t: wanted documents of at most 2 ids, got one of 3"):
        export(dataset, "megatron", tmp_path / "out", fraction=0)
    assert list(tmp_path.iterdir()) == []


def test_megatrons_own_reader_and_writer_agree(tmp_path):
    theirs = pytest.importorskip("megatron.core.datasets.indexed_dataset", exc_type=ImportError)
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 50257, size=n) for n in (3, 1, 40, 7)]
    dataset = TokenDataset("t", [np.concatenate(parts).astype("<u2")], np.cumsum([len(part) for part in parts]))
    export(dataset, "megatron", tmp_path / "out", fraction=0)
    read = theirs.IndexedDataset(str(tmp_path / "out/all"))
    assert [read[i].tolist() for i in range(len(read))] == [part.tolist() for part in parts]
    built = theirs.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for part in parts:
        built.add_item(torch.tensor(part))
        built.end_document()
    built.finalize(str(tmp_path / "theirs.idx"))
    for ending in ("bin", "idx"):
        assert (tmp_path / f"theirs.{ending}").read_bytes() == (tmp_path / f"out/all.{ending}").read_bytes()


LIES = {
    "a magic": ({"magic": b"TNTIDX\0\0\0"}, r"a\.idx: wanted Megatron's index to begin with b'MMIDIDX"),
    "a version": ({"version": 2}, "wanted index version 1, got 2"),
    "floats": ({"code": 7}, "wanted a dtype of ids, one of the codes 1, 2, 3, 4, 5, 8, got 7"),
    "a dtype": ({"dtype": 200}, "wanted a dtype of ids, .* got 200"),
    "one sequence more": ({"n": 4}, "bytes for the 4 sequences and 4 document entries of its header: 114, got 102"),
    "a huge count": ({"n": 2**63}, "bytes for the 9223372036854775808 sequences .* got 102"),
    "all the counts": ({"n": 2**64 - 1, "m": 2**64 - 1}, "of its header: 3\\d+, got 102"),
    "a pointer outside": ({"pointers": [0, 4, 12]}, "the 12 bytes of a.bin, got sequence 2 of 1 ids from byte 12"),
    "a pointer below": ({"pointers": [0, -2, 10]}, "got sequence 1 of 3 ids from byte -2 on"),
    "a pointer that overflows": ({"pointers": [0, 2**63 - 2, 10]}, "3 ids from byte 9223372036854775806 on"),
    "half an id": ({"pointers": [0, 3, 10]}, "wanted sequences of whole uint16 ids .* from byte 3 on"),
    "a negative length": ({"lengths": [2, -3, 1]}, "got sequence 1 of -3 ids"),
    "a length outside": ({"lengths": [2, 2**31 - 1, 1], "pointers": [0, 4, 10]}, "got sequence 1 of 2147483647 ids"),
    "too few ids": ({"lengths": [2, 2, 1]}, r"a\.bin: wanted bytes for the 5 ids of its index: 10, got 12"),
    "no first document": ({"documents": [1, 2, 3]}, "wanted document entries that rise from 0 to the 3 sequences"),
    "a last document past it": ({"documents": [0, 1, 4]}, "wanted document entries that rise from 0"),
    "documents that fall": ({"documents": [0, 2, 1, 3]}, "wanted document entries that rise from 0"),
    "a huge document": ({"documents": [0, 2**62, 3]}, "wanted document entries that rise from 0"),
    "no documents": ({"documents": []}, "wanted document entries that rise from 0"),
    "no sequences": ({"lengths": [], "documents": [0]}, "wanted sequences, got none"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_an_index_that_lies(tmp_path, lie):
    how, wanted = LIES[lie]
    refusal(pair(tmp_path, range(6), **{"lengths": [2, 3, 1], **how}), wanted)


def test_damaged_pairs(tmp_path):
    path = pair(tmp_path, range(6), [2, 3, 1])
    whole = path.read_bytes()
    for cut in (0, 5, 9, 20, 33, 50, len(whole) - 1):
        path.write_bytes(whole[:cut])
        refusal(path, r"a\.idx: wanted ")
    path.write_bytes(whole + b"\0")
    refusal(path, "of its header: 102, got 103")
    path.write_bytes(whole)
    (tmp_path / "a.bin").write_bytes(b"\0" * 11)
    refusal(path, "got sequence 2 of 1 ids from byte 10 on")
    (tmp_path / "a.bin").write_bytes(b"")
    refusal(path, "within the 0 bytes of a.bin, got sequence 0")
    (tmp_path / "a.bin").unlink()
    refusal(path, r"a\.bin: no such file; wanted both of Megatron's a\.bin and a\.idx")
    refusal(pair(tmp_path, [1, -2, 3], [3], code=4, name="b"), r"b\.idx: wanted token ids under 50257, got -2 at")
    refusal(pair(tmp_path, [], [0, 0], name="c"), r"c\.bin: wanted tokens, got an empty file")


def test_too_many_jumps_are_refused_before_they_cost(tmp_path, monkeypatch):
    monkeypatch.setattr(megatron, "MOST_PIECES", 3)
    refusal(pair(tmp_path, range(6), [1] * 4, pointers=[6, 4, 2, 0]), "wanted sequences that lie in order, got more")


def test_a_folder_of_pairs_is_train_and_validation(tmp_path):
    pair(tmp_path, [1, 2, EOT, 3, EOT], [3, 2], name="web_train_text_document")
    pair(tmp_path, [4, EOT], [2], name="web_val_text_document")
    dataset = open_dataset(tmp_path)
    assert dataset.tokens(0, 7).tolist() == [1, 2, EOT, 3, EOT, 4, EOT]
    assert (dataset.document_ends.tolist(), dataset.validation_start) == ([3, 5, 7], 5)
