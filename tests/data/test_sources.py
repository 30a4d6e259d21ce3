"""Reading text: what each kind of file gives, where long files are cut, and every way a source can be bad."""

import gzip
import json
import lzma
import random
import re
import sys
from collections import Counter

import pytest
import zstandard

from cgpt.data import sources
from cgpt.data.sources import find, read
from cgpt.data.tokenizer import gpt2
from cgpt.errors import InputError

TEXTS = ["Call me Ishmael.\n\nSome years ago", "naïve — 漢字 😀", "x = 1\n"]
ZSTD = zstandard.ZstdCompressor(write_checksum=True)  # as the zstd command does
PACK = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": ZSTD.compress}


def documents(source):
    skipped = Counter()
    out, text = [], ""
    for piece in read(find(source), skipped):
        text += piece.text
        if piece.ends_document:
            out.append(text)
            text = ""
    assert text == ""
    return out, dict(skipped)


def jsonl(texts, **more):
    return "".join(json.dumps({"text": text, **more}) + "\n" for text in texts).encode()


def refusal(source, pattern):
    """The message of the InputError that reading `source` ends in: one line, matching `pattern`."""
    with pytest.raises(InputError) as caught:
        documents(source)
    message = str(caught.value)
    assert "\n" not in message
    assert re.search(pattern, message), message
    return message


@pytest.mark.parametrize("packing", PACK)
def test_every_kind_of_file(tmp_path, packing):
    (tmp_path / f"a.jsonl{packing}").write_bytes(PACK[packing](jsonl(TEXTS, meta={"id": 1})))
    (tmp_path / f"B.TXT{packing}").write_bytes(PACK[packing](TEXTS[1].encode()))
    assert documents(tmp_path / f"a.jsonl{packing}") == (TEXTS, {})
    assert documents(tmp_path / f"B.TXT{packing}") == ([TEXTS[1]], {})


def test_concatenated_archives_are_read_to_the_end(tmp_path):
    for packing in (".gz", ".xz", ".zst"):
        path = tmp_path / f"a.txt{packing}"
        path.write_bytes(PACK[packing](b"one ") + PACK[packing](b"two"))
        assert documents(path) == (["one two"], {})


def test_folder_is_recursive_sorted_and_counts_what_it_passes_over(tmp_path):
    files = {"b/z.txt": "3", "b/a/q.txt": "2", "a.txt": "1", "c.txt": "", ".hidden.txt": "no"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/x.txt").write_text("no")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0")
    expected = {"empty documents": 1, "files of other kinds": 1}
    assert documents(tmp_path) == (["1", "2", "3"], expected)


def test_byte_order_mark_blank_lines_and_missing_last_newline(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhi")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n\n  \r\n{"text": "two"}')
    assert documents(tmp_path / "a.txt")[0] == ["hi"]
    assert documents(tmp_path / "a.jsonl")[0] == ["one", "two"]


def test_built_in_corpora():
    texts, skipped = documents("moby-dick")
    assert len(texts) == 138
    assert skipped == {}
    corpus = find("python-stdlib")
    names = [path.relative_to(corpus.root).as_posix() for path in corpus.files]
    assert {"os.py", "json/decoder.py", "asyncio/events.py"} <= set(names)
    assert not any({"test", "tests", "site-packages"} & set(name.split("/")) for name in names)


def test_python_sources_decode_as_the_tokenizer_does_and_false_encodings_are_counted(tmp_path):
    (tmp_path / "latin.py").write_bytes("# coding: latin-1\nx = 'é'\r\n".encode("latin-1"))
    (tmp_path / "bad.py").write_bytes(b"x = '\xff'\n")
    (tmp_path / "odd.py").write_bytes(b"# coding: no-such-codec\n")
    (tmp_path / "empty.py").write_bytes(b"")
    files = tuple(sorted(tmp_path.iterdir()))
    skipped = Counter()
    pieces = list(read(sources.Corpus("p", tmp_path, files, python=True), skipped))
    assert [piece.text for piece in pieces] == ["# coding: latin-1\nx = 'é'\n"]
    assert skipped == {"undecodable files": 2, "empty documents": 1}


def test_cutting_a_long_file_changes_no_token(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK", 13)
    rng = random.Random(1)
    path = tmp_path / "a.txt"
    cuts = 0
    for _ in range(200):
        text = "".join(rng.choices("ab9.'s\n\n   \t\r\u00a0\u2003\u0085\x1cé漢😀", k=rng.randrange(1, 200)))
        path.write_bytes(text.encode())
        pieces = [piece.text for piece in read(find(path), Counter())]
        assert "".join(pieces) == text
        apart = [token for piece in pieces for token in gpt2().encode_ordinary(piece)]
        assert apart == gpt2().encode_ordinary(text)
        cuts += len(pieces) - 1
    assert cuts > 300


def test_fingerprint_follows_name_size_and_time(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    first = find(path).fingerprint()
    assert find(path).fingerprint() == first
    path.write_text("three")
    assert find(path).fingerprint() != first


def test_nothing_there(tmp_path):
    refusal(tmp_path / "no.txt", "no.txt: no such file or folder; wanted one, or .* moby-dick, python-stdlib")
    refusal("mobydick", "mobydick: no such file or folder")


def test_empty_file_and_folder_without_text(tmp_path):
    (tmp_path / "a.txt").touch()
    refusal(tmp_path / "a.txt", "a.txt: wanted text, got an empty file")
    (tmp_path / "f").mkdir()
    (tmp_path / "f/x.pdf").touch()
    refusal(tmp_path / "f", r"f: wanted a folder of \.txt or \.jsonl .* files, got 1 others")


@pytest.mark.parametrize("name", ["a.pdf", "a.parquet.gz", "a", "a.txt.bz2", "a.gz"])
def test_unknown_suffix(tmp_path, name):
    (tmp_path / name).write_text("text")
    refusal(tmp_path / name, rf"{name}: wanted a \.txt or \.jsonl .* file, got the suffix")


@pytest.mark.parametrize("chunk", [4, 1 << 20])
def test_binary(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(sources, "CHUNK", chunk)
    (tmp_path / "a.txt").write_bytes(b"some text\0more")
    refusal(tmp_path / "a.txt", r"a.txt: wanted text, got binary data \(a NUL byte at byte offset 9\)")
    (tmp_path / "a.jsonl").write_bytes(jsonl(["ok"]) + b'{"text": "\0"}\n')
    refusal(tmp_path / "a.jsonl", r"a.jsonl: .* byte offset 25")


@pytest.mark.parametrize("chunk", [3, 1 << 20])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_not_utf8_names_the_byte(tmp_path, monkeypatch, chunk, mark):
    monkeypatch.setattr(sources, "CHUNK", chunk)
    (tmp_path / "a.txt").write_bytes(mark + "漢字 naïve ".encode() + b"caf\xe9 au lait")
    refusal(tmp_path / "a.txt", rf"a.txt: wanted UTF-8 text, got byte 0xe9 at byte offset {17 + len(mark)}$")
    (tmp_path / "b.txt").write_bytes(mark + b"cut " + "漢".encode()[:2])
    refusal(tmp_path / "b.txt", rf"b.txt: wanted UTF-8 text, got byte 0xe6 at byte offset {4 + len(mark)}$")
    line = jsonl(["ok"])
    (tmp_path / "a.jsonl").write_bytes(mark + line + b'{"text": "\xff"}\n')
    at = len(mark + line) + 10
    refusal(tmp_path / "a.jsonl", rf"a.jsonl: wanted UTF-8 text, got byte 0xff at byte offset {at}$")


@pytest.mark.parametrize(
    ("line", "got"),
    [
        ('{"content": "x", "id": 3}', r"got the fields \['content', 'id'\]"),
        ('{"text": 3}', "got a int$"),
        ('{"text": null}', "got a NoneType$"),
        ('["text"]', "got a JSON list"),
        ('{"text": "x"', "got no JSON"),
        ("plain prose", "got no JSON"),
        ("[" * 100_000, "got no JSON"),
        ('{"text": "\\ud83d"}', "got half a surrogate pair"),
    ],
)
def test_bad_json_line_is_named(tmp_path, line, got):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["fine", "fine"]) + line.encode() + b"\n" + jsonl(["fine"]))
    refusal(path, rf"a\.jsonl:3: wanted .*{got}")


@pytest.mark.parametrize("packing", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_damaged_archives(tmp_path, packing, name):
    rng = random.Random(0)
    text = "".join(rng.choices("abcdefgh \n", k=50_000))
    whole = PACK[packing](jsonl([text]) if name == "a.jsonl" else text.encode())
    path = tmp_path / (name + packing)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0x10
    cut_short = [whole[: len(whole) // 2], whole[:-1], whole[:7]]
    for damaged in (*cut_short, b"plain text, not an archive", bytes(flipped)):
        path.write_bytes(damaged)
        with pytest.raises(InputError) as caught:
            documents(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        if len(damaged) != len(whole):
            assert f"wanted a whole {packing} archive, got a damaged one" in str(caught.value)


def test_zst_without_the_package(tmp_path, monkeypatch):
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard.compress(b"text"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    refusal(path, r"a\.txt\.zst: wanted the zstandard package .* pip install 'cgpt-ext\[data\]'")
