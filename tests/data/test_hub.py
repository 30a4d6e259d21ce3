"""Datasets of the hub, from a local folder of its form: no network."""

import json
import re
from collections import Counter

import pytest

datasets = pytest.importorskip("datasets")

from cgpt.data.prepare import open_corpus, prepare  # noqa: E402
from cgpt.data.sources import find, read  # noqa: E402
from cgpt.errors import InputError  # noqa: E402


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A dataset of two splits, as JSON lines, and caches of its own."""
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "corpus"
    out.mkdir()
    write(out / "train.jsonl", [f"train {i}" for i in range(30)])
    write(out / "test.jsonl", ["", "test"])
    return out


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate(texts)))


def documents(source, **options):
    skipped = Counter()
    return [piece.text for piece in read(find(source, **options), skipped)], dict(skipped)


def refusal(source, pattern, **options):
    with pytest.raises(InputError) as caught:
        documents(source, **options)
    assert "\n" not in str(caught.value)
    assert re.search(pattern, str(caught.value)), str(caught.value)


def test_splits_and_configs(folder):
    assert documents(f"hf:{folder}") == ([f"train {i}" for i in range(30)], {})
    assert documents(f"hf:{folder}:test") == (["test"], {"empty documents": 1})
    assert documents(f"hf:{folder}:default:test")[0] == ["test"]
    assert find(f"hf:{folder}:test").name == "corpus-test"


def test_what_is_not_there(folder):
    refusal(f"hf:{folder}:dev", "wanted one of the splits .*train.*, got dev")
    refusal(f"hf:{folder}:no:train", "wanted a dataset, got ")
    refusal("hf:", "hf:: wanted hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
    refusal("hf:a:b:c:d", "wanted hf:NAME, hf:NAME:SPLIT or")
    refusal("hf:nobody/nothing", "hf:nobody/nothing: wanted a dataset, got ")


def test_rows_without_text_are_named(folder):
    refusal(f"hf:{folder}", r"row 0: wanted text in column 'body' \(--text-field names another\)", text_field="body")
    refusal(f"hf:{folder}", "row 0: wanted text in column 'n' .*, got a int", text_field="n")
    write(folder / "train.jsonl", ["a", None])
    refusal(f"hf:{folder}", "row 1: wanted text in column 'text' .*, got a NoneType")


def test_prepared_once_and_anew_after_a_change(folder):
    first = open_corpus(f"hf:{folder}:train", progress=False)
    assert first.n_documents == 30
    assert first.tokenizer.decode(first.tokens(0, int(first.document_ends[0])).tolist()) == "train 0<|endoftext|>"
    before = find(f"hf:{folder}:train").fingerprint()
    assert before == find(f"hf:{folder}:train").fingerprint() != find(f"hf:{folder}:test").fingerprint()
    write(folder / "train.jsonl", ["other", "rows"])
    assert find(f"hf:{folder}:train").fingerprint() != before
    assert open_corpus(f"hf:{folder}:train", progress=False).n_documents == 2


def test_a_fault_on_the_way_keeps_whole_shards(folder, tmp_path, monkeypatch):
    write(folder / "train.jsonl", ["the whale " * 50] * 30)
    options = {"progress": False, "shard_tokens": 300, "workers": 1}
    prepare(f"hf:{folder}", tmp_path / "whole", **options)
    real = datasets.IterableDataset.__iter__

    def failing(self):
        for i, row in enumerate(real(self)):
            if i == 20:
                raise RuntimeError("the line is down\nand so on")
            yield row

    with monkeypatch.context() as patch:
        patch.setattr(datasets.IterableDataset, "__iter__", failing)
        with pytest.raises(OSError, match=r"row 20: wanted the next row, got RuntimeError: the line is down and so on"):
            prepare(f"hf:{folder}", tmp_path / "out", **options)
    assert list((tmp_path / "out").glob("shard-*.bin"))
    prepare(f"hf:{folder}", tmp_path / "out", **options)
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_without_the_package(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    refusal("hf:a", "hf:a: wanted the datasets package to read from the hub, got none: pip install datasets")
