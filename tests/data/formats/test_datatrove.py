"""datatrove's .ds: files of its own writer read here, ours read by its reader, and damage."""

import re
import struct

import numpy as np
import pytest

from cgpt.data.export import export
from cgpt.data.formats import datatrove
from cgpt.data.prepare import open_corpus
from cgpt.data.shards import open_dataset
from cgpt.data.tokenizer import EOT
from cgpt.errors import InputError

TOKENS = [5, 6, 50256, 7, 8, 9, 50256]


def ds(folder, tokens=TOKENS, ends=(3, 7), width=2, metadata="gpt2|2\n7\n7 T", name="00000.ds"):
    path = folder / name
    path.write_bytes(struct.pack(f"<{len(tokens)}{'H' if width == 2 else 'I'}", *tokens))
    for suffix, content in ((".index", ends and struct.pack(f"<{len(ends)}Q", *ends)), (".metadata", metadata)):
        beside = path.with_name(path.name + suffix)
        beside.unlink(missing_ok=True)
        if content is not None:
            beside.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(path, pattern):
    with pytest.raises(InputError) as caught:
        open_dataset(path)
    assert "\n" not in str(caught.value)
    assert re.search(pattern, str(caught.value)), str(caught.value)


@pytest.mark.parametrize("width", [2, 4])
def test_with_and_without_its_companions(tmp_path, width):
    for metadata, ends in ((f"a|b|{width}\n7\n7 T", (3, 7)), (None, (3, 7)), (f"gpt2|{width}\n7", None)):
        dataset = open_dataset(ds(tmp_path, ends=ends, width=width, metadata=metadata))
        assert dataset.tokens(0, 7).tolist() == TOKENS
        assert dataset.document_ends.tolist() == [3, 7]
        assert dataset.dtype.itemsize == width
    assert open_dataset(ds(tmp_path, ends=None, metadata=None)).tokens(0, 7).tolist() == TOKENS


def test_the_index_knows_documents_that_no_eot_tells(tmp_path):
    path = ds(tmp_path, tokens=[1, 2, 3, 4], ends=(0, 1, 1, 4), metadata=None)
    assert open_dataset(path).document_ends.tolist() == [1, 4]


DAMAGE = {
    "cut": ({"tokens": TOKENS[:-1]}, "bytes for the 7 ids of its metadata: 14, got 12"),
    "cut, no metadata": ({"tokens": TOKENS[:-1], "metadata": None}, "ends at the 6 ids of 00000.ds, got 7"),
    "an index too short": ({"ends": (3, 6)}, r"\.index: wanted a last document that ends at the 7 ids .*, got 6"),
    "an index past the end": ({"ends": (3, 2**64 - 1)}, "got 18446744073709551615"),
    "an index that falls": ({"ends": (4, 3, 7)}, "wanted ends of documents in rising order"),
    "an index that wraps": ({"ends": (2**63, 7)}, "wanted ends of documents in rising order"),
    "an empty index": ({"ends": b""}, "a multiple of 8 bytes, got 0"),
    "half an entry": ({"ends": b"\3\0\0"}, "a multiple of 8 bytes, got 3"),
    "metadata of another width": ({"metadata": "gpt2|4\n7\n"}, "bytes for the 7 ids of its metadata: 28, got 14"),
    "a width of none": ({"metadata": "gpt2|3\n7\n"}, "wanted ids of 2 or 4 bytes, got 3"),
    "no metadata": ({"metadata": ""}, "wanted the lines TOKENIZER"),
    "words": ({"metadata": "gpt2|2\nmany\n"}, "wanted the lines TOKENIZER"),
    "bytes": ({"metadata": b"\xff\xfe" * 90000}, "wanted the lines TOKENIZER"),
    "a count below": ({"metadata": "gpt2|2\n-7\n"}, "bytes for the -7 ids"),
    "no tokens": ({"tokens": [], "ends": None, "metadata": None}, "wanted tokens, got an empty file"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage(tmp_path, how):
    damage, wanted = DAMAGE[how]
    ends = damage.get("ends")
    path = ds(tmp_path, **{**damage, "ends": (3, 7) if isinstance(ends, bytes) else damage.get("ends", (3, 7))})
    if isinstance(ends, bytes):
        path.with_name("00000.ds.index").write_bytes(ends)
    refusal(path, wanted)


def test_an_odd_size(tmp_path):
    path = ds(tmp_path, ends=None, metadata=None)
    path.write_bytes(path.read_bytes()[:-1])
    refusal(path, "wanted ids of 2 bytes, got 13 bytes")


@pytest.mark.parametrize("width", [2, 4])
def test_files_of_datatroves_own_writer(tmp_path, width):
    tokenizer = pytest.importorskip("datatrove.pipeline.tokens.tokenizer")
    file = tokenizer.TokenizedFile(
        str(tmp_path), "00000.ds", save_final_metadata=True, tokenizer_name_or_path="gpt2", token_size=width
    )
    file.write(TOKENS[:3], None)
    file.write(TOKENS[3:], None)
    file.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.ds", "00000.ds.index", "00000.ds.metadata"]
    dataset = open_dataset(tmp_path)
    assert dataset.tokens(0, 7).tolist() == TOKENS
    assert dataset.document_ends.tolist() == [3, 7]
    assert dataset.dtype.itemsize == width


def test_datatrove_reads_ours(tmp_path, monkeypatch):
    reader = pytest.importorskip("datatrove.utils.dataset")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    dataset = open_corpus("moby-dick", progress=False)
    export(dataset, "datatrove", tmp_path / "out", fraction=0)
    path = tmp_path / "out/all.ds"
    found = reader.DatatroveFileDataset(str(path), seq_len=255, token_size=2, return_positions=True)
    n = len(found) * 256
    assert n > dataset.n_tokens - 256
    windows = [found[i] for i in range(len(found))]
    read = np.concatenate([window["input_ids"].numpy() for window in windows])
    assert read.tolist() == dataset.tokens(0, n).tolist()
    positions = np.concatenate([window["positions"].numpy() for window in windows])
    starts = np.flatnonzero(read[:-1] == EOT) + 1  # a document begins where one has ended, and counts from 0
    assert len(starts) > 100
    assert (positions[starts] == 0).all()
    merger = pytest.importorskip("datatrove.pipeline.tokens.merger")
    with path.with_name("all.ds.index").open("rb") as file:
        assert merger.load_doc_ends(file).tolist() == dataset.document_ends.tolist()


def test_the_width_follows_the_vocabulary(tmp_path):
    assert datatrove.WIDTHS[2] == "<u2"
    for vocab_size, width in ((65536, 2), (65537, 4)):
        from cgpt.data.shards import TokenDataset

        dataset = TokenDataset("t", [np.array([65535, 1], "<u4")], np.array([2]), vocab_size=vocab_size, eot=0)
        export(dataset, "datatrove", tmp_path / str(width), fraction=0)
        assert (tmp_path / str(width) / "all.ds").stat().st_size == 2 * width
        assert (tmp_path / str(width) / "all.ds.metadata").read_text().startswith(f"unknown|{width}\n2\n")
