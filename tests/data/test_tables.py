"""Text in columns: what parquet and Arrow files and saved datasets give, and every way they can be bad."""

import json
import random
import re
from collections import Counter
from itertools import chain

import pytest

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

from cgpt import cli  # noqa: E402
from cgpt.data import prepare as room  # noqa: E402
from cgpt.data import tables, writer  # noqa: E402
from cgpt.data.prepare import prepare  # noqa: E402
from cgpt.data.sources import find, read  # noqa: E402
from cgpt.data.tokenizer import EOT, gpt2  # noqa: E402
from cgpt.errors import InputError  # noqa: E402

TEXTS = ["Call me Ishmael.", "", "naïve — 漢字 😀", "x = 1\n", "a\0b"]


def documents(source, **options):
    skipped = Counter()
    pieces = list(read(find(source, **options), skipped))
    assert all(piece.ends_document for piece in pieces)
    size = find(source, **options).size()
    assert [piece.consumed for piece in pieces] == sorted(piece.consumed for piece in pieces)
    assert all(0 <= piece.consumed <= size for piece in pieces)
    return [piece.text for piece in pieces], dict(skipped)


def refusal(source, pattern, **options):
    with pytest.raises(InputError) as caught:
        documents(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert re.search(pattern, message), message


def table(texts, kind=None, name="text", **more):
    return pyarrow.table({"id": list(range(len(texts))), name: pyarrow.array(texts, kind), **more})


def arrow(path, content, is_file=False):
    writer = pyarrow.ipc.new_file if is_file else pyarrow.ipc.new_stream
    with pyarrow.OSFile(str(path), "wb") as sink, writer(sink, content.schema) as out:
        out.write_table(content, max_chunksize=3)
    return path


def save(path, content):
    if path.suffix == ".parquet":
        parquet.write_table(content, path, row_group_size=2)
        return path
    return arrow(path, content)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "A.PARQUET"])
@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string()])
def test_rows_are_documents(tmp_path, name, kind):
    path = tmp_path / name
    parquet.write_table(table(TEXTS, kind), path) if path.suffix != ".arrow" else arrow(path, table(TEXTS, kind))
    assert documents(path) == ([text for text in TEXTS if text], {"empty documents": 1})


def test_other_layouts_of_the_same_text(tmp_path):
    wanted = ([text for text in TEXTS if text], {"empty documents": 1})
    assert documents(arrow(tmp_path / "file.arrow", table(TEXTS), is_file=True)) == wanted
    packed = pyarrow.table({"text": pyarrow.array(TEXTS).dictionary_encode()})
    assert documents(arrow(tmp_path / "dict.arrow", packed)) == wanted
    assert documents(save(tmp_path / "dict.parquet", packed)) == wanted
    assert documents(arrow(tmp_path / "view.arrow", table(TEXTS, pyarrow.string_view()))) == wanted
    for compression in ("zstd", "gzip", "none"):
        parquet.write_table(table(TEXTS), tmp_path / "c.parquet", compression=compression)
        assert documents(tmp_path / "c.parquet") == wanted


@pytest.mark.parametrize("rows", [1, 2, 7, 1000])
def test_batches_change_nothing(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(tables, "ROWS", rows)
    texts = [f"document {i} " * (i % 5 + 1) for i in range(50)]
    for name in ("a.parquet", "a.arrow"):
        assert documents(save(tmp_path / name, table(texts)))[0] == texts


def test_no_rows_and_no_text(tmp_path):
    for name in ("a.parquet", "a.arrow"):
        assert documents(save(tmp_path / name, table([], pyarrow.string()))) == ([], {})
    with pytest.raises(InputError, match=r"a\.parquet: wanted text, got none"):
        prepare(tmp_path / "a.parquet", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_another_column(tmp_path):
    path = save(tmp_path / "a.parquet", table(["one"], name="content", text=["two"]))
    assert documents(path, text_field="content")[0] == ["one"]
    assert documents(path)[0] == ["two"]
    assert find(path).fingerprint() != find(path, text_field="content").fingerprint()
    (tmp_path / "a.jsonl").write_text('{"text": 1, "content": "three"}\n')
    assert documents(tmp_path / "a.jsonl", text_field="content")[0] == ["three"]
    refusal(tmp_path / "a.jsonl", 'a.jsonl:1: wanted a JSON object with a string field "body"', text_field="body")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_columns_that_hold_no_text(tmp_path, name):
    path = save(tmp_path / name, pyarrow.table({"body": ["a"], "text": [3]}))
    refusal(path, rf"{name}: wanted one text column 'text' \(--text-field names another\), got one of int64")
    refusal(path, "wanted one text column 'words' .*, got the columns body, text", text_field="words")
    refusal(save(tmp_path / name, pyarrow.table({"text": [["a"]]})), "got one of list")
    refusal(save(tmp_path / name, pyarrow.table({"text": [b"a"]})), "got one of binary")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_bad_rows_are_named(tmp_path, monkeypatch, name):
    monkeypatch.setattr(tables, "ROWS", 2)
    path = save(tmp_path / name, table(["a", "b", "c", None, "e"]))
    refusal(path, rf"{name}: row 3: wanted text, got null")
    bad = pyarrow.array([b"a", b"b", b"c", b"d", b"w\xe4le"], pyarrow.binary()).view(pyarrow.string())
    refusal(save(tmp_path / name, pyarrow.table({"text": bad})), rf"{name}: row 4: wanted UTF-8 text, got byte 0xe4 at")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_damage_anywhere_is_one_line_or_harmless(tmp_path, name):
    texts = [f"document {i} " * 20 for i in range(40)]
    path = save(tmp_path / name, table(texts))
    whole = path.read_bytes()
    rng, refused = random.Random(0), []
    for trial in range(150):
        damaged = bytearray(whole)
        if trial % 3:
            for _ in range(trial % 3 * 2):
                damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        else:
            del damaged[rng.randrange(len(whole)) :]
        path.write_bytes(damaged)
        try:
            documents(path) if damaged else None
        except InputError as error:
            refused.append(str(error))
    assert len(refused) > 40
    assert all(str(path) in message and "\n" not in message for message in refused)


def test_an_arrow_column_whose_offsets_lie(tmp_path):
    content = table(["aaaa", "bbbb", "cccc", "dddd"]).select(["text"])
    path = arrow(tmp_path / "a.arrow", content)
    data = path.read_bytes()
    at = data.index((8).to_bytes(4, "little") + (12).to_bytes(4, "little"))
    path.write_bytes(data[:at] + (2**30).to_bytes(4, "little") + data[at + 4 :])
    refusal(path, r"a\.arrow: wanted a whole \.arrow file, got a damaged one: ")


def test_saved_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    dataset = datasets.Dataset.from_dict({"text": [text for text in TEXTS if text] * 5, "n": list(range(20))})
    dataset.save_to_disk(tmp_path / "plain", num_shards=3)
    (tmp_path / "plain/cache-1234.arrow").write_bytes(b"what map leaves behind")
    wanted = list(dataset["text"])
    assert documents(tmp_path / "plain") == (wanted, {})
    dataset.shuffle(seed=1).save_to_disk(tmp_path / "shuffled")
    assert documents(tmp_path / "shuffled")[0] == list(dataset.shuffle(seed=1)["text"]) != wanted
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "one")
    assert documents(tmp_path / "one")[0] == documents(tmp_path / "one/train")[0] == wanted
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(tmp_path / "two")
    refusal(tmp_path / "two", "two: wanted one split, as .*two/train, got the dataset's train, test")


def test_saved_datasets_that_are_damaged(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    arrow(folder / "data.arrow", table(["a"]))
    for content, wanted in (
        ('{"_data_files": [{"filename": "data.arrow"}]}', None),
        (
            '{"_data_files": [{"filename": "gone.arrow"}]}',
            r"gone\.arrow: no such file; wanted what .*state\.json",
        ),
        ('{"_data_files": [{"filename": "../d/data.arrow"}]}', r"state\.json: wanted names in its folder"),
        ('{"_data_files": []}', r"state\.json: wanted Arrow files, got none"),
        ('{"_data_files": [3]}', r"state\.json: wanted what save_to_disk writes, got a damaged file"),
        ("{", r"state\.json: wanted what save_to_disk writes"),
    ):
        (folder / "state.json").write_text(content)
        refusal(folder, wanted) if wanted else documents(folder)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["gone"]}')
    refusal(tmp_path, r"gone/state\.json: no such file")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["../d"]}')
    refusal(tmp_path, "wanted names in its folder")
    (tmp_path / "dataset_dict.json").write_text('{"splits": []}')
    refusal(tmp_path, "wanted a split, got the dataset's none")


def test_a_folder_of_all_kinds(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    save(tmp_path / "b.parquet", table(["two", "three"]))
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "four"}))
    dataset = prepare(tmp_path, tmp_path / "out", progress=False)
    encoded = [[*gpt2().encode_ordinary(text), EOT] for text in ("one", "two", "three", "four")]
    assert dataset.tokens(0, dataset.n_tokens).tolist() == list(chain(*encoded))


def test_an_interrupted_preparation_goes_on(tmp_path, monkeypatch):
    rng = random.Random(0)
    path = save(
        tmp_path / "a.parquet", table([" ".join(rng.choices("the whale sea".split(), k=60)) for _ in range(90)])
    )
    options = {"progress": False, "shard_tokens": 600, "workers": 1}
    prepare(path, tmp_path / "whole", **options)
    real = writer.ShardWriter.add

    def interrupted(self, batch):
        if self.batches == 5:
            raise KeyboardInterrupt
        real(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(writer.ShardWriter, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(path, tmp_path / "out", **options)
    kept = {each.name: each.stat().st_mtime_ns for each in (tmp_path / "out").glob("shard-*.bin")}
    assert kept
    prepare(path, tmp_path / "out", **options)
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == time for name, time in kept.items())
    names = sorted(each.name for each in (tmp_path / "whole").iterdir())
    assert [(tmp_path / "out" / name).read_bytes() for name in names] == [
        (tmp_path / "whole" / name).read_bytes() for name in names
    ]


def test_without_pyarrow(tmp_path, monkeypatch):
    import sys

    path = save(tmp_path / "a.parquet", table(["a"]))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refusal(path, r"wanted the pyarrow package to read \.parquet, got none: pip install 'cgpt-ext\[data\]'")


def test_the_command(tmp_path, monkeypatch, capsys):
    save(tmp_path / "a.parquet", table(["one whale"], name="content"))
    monkeypatch.chdir(tmp_path)
    assert cli.main("data prepare a.parquet --out d --text-field content".split()) == 0
    assert cli.main("data prepare a.parquet --out e".split()) == 2
    assert "--text-field names another" in capsys.readouterr().err
    assert room.open_corpus(tmp_path / "d").n_documents == 1
