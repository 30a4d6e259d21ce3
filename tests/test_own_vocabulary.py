"""Training in a vocabulary that the data brings along: the model's size, the run's copy, text and bits per byte."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from cgpt import cli, heap, train
from cgpt.checkpoint import open_tokenizer, open_trained
from cgpt.data.loader import Loader, train_val_split
from cgpt.data.shards import open_dataset
from cgpt.data.tokenizer import gpt2
from cgpt.model import presets
from cgpt.recipe import TrainConfig, read_config
from nano import NANO, write_corpus

SIZE = 300
TRAIN = "train --model nano --data own --steps 3 --eval-tokens 160 --out run".split()


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """A working folder with a corpus, its dataset `own` in a vocabulary of 300, and the nano preset."""
    monkeypatch.setitem(presets.PRESETS, "nano", NANO)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(heap, "keep_large_buffers", lambda: None)  # for whole processes, not for a test runner's
    write_corpus(tmp_path)
    assert cli.main(f"data prepare corpus.txt --out own --vocab-size {SIZE}".split()) == 0
    assert "vocab_size 300" in capsys.readouterr().out
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def said(capsys, *argv):
    capsys.readouterr()
    assert cli.main([str(word) for word in argv]) == 0
    return capsys.readouterr().out


def refused(capsys, *argv):
    capsys.readouterr()
    assert cli.main([str(word) for word in argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_the_model_has_the_vocabulary_of_its_data(here, capsys):
    report = said(capsys, *TRAIN)
    assert "held out, vocabulary of 300\n" in report
    assert f"{NANO.config.n_params - (50257 - SIZE) * NANO.config.d_model:,} parameters" in report
    recipe, _, model, _ = open_trained(here / "run")
    assert recipe.shape.vocab_size == model.config.vocab_size == SIZE
    assert tuple(model.wte.weight.shape) == (SIZE, 16)
    assert (here / "run/tokenizer.json").read_bytes() == (here / "own/tokenizer.json").read_bytes()
    sample = report[report.index("sample   ") :]
    held_out = train_val_split(open_dataset("own"), 16)[1]
    assert sample.startswith(f"sample   {open_dataset('own').tokenizer.decode(held_out.tokens(0, 16))}|")


def test_a_run_on_gpt2_tokens_is_as_ever(here, capsys):
    said(capsys, *TRAIN, "--data", "corpus.txt")
    recipe, identity = read_config(here / "run")
    assert recipe.shape == NANO.config
    assert identity.keys() == {"name", "tokens", "documents"}
    assert not (here / "run/tokenizer.json").exists()
    assert open_tokenizer(here / "run", identity) is gpt2()
    assert "got tokens of another, of 300" in refused(capsys, "eval", "run", "--data", "own")


def test_text_is_written_with_the_data_gone(here, capsys):
    said(capsys, *TRAIN)
    shutil.rmtree(here / "own")
    texts = [said(capsys, "generate", "run", "--prompt", "the wh\u00e4le 漢", "--max-tokens", n) for n in (0, 12)]
    assert texts[0] == "the wh\u00e4le 漢\n"
    assert texts[1].startswith("the wh\u00e4le 漢")
    assert len(texts[1]) > len(texts[0])
    assert said(capsys, "generate", "run", "--prompt", "", "--max-tokens", "4")


def test_bits_per_byte_are_of_the_held_out_text(here, capsys):
    said(capsys, *TRAIN)
    found = json.loads(said(capsys, "eval", "run", "--tokens", "160", "--json"))
    summary = json.loads((here / "run/summary.json").read_text())
    assert found["loss"] == pytest.approx(summary["val_loss"], rel=1e-6)
    dataset = open_dataset("own")
    targets = np.concatenate(list(Loader(train_val_split(dataset, 16)[1], 16).targets(160 // 16)))
    strings = [dataset.tokenizer.decode_single_token_bytes(int(token)) for token in targets if token != dataset.eot]
    assert len(targets) == found["tokens"] == 160
    wanted = found["loss"] * 160 / math.log(2) / len(b"".join(strings))
    assert found["bits_per_byte"] == pytest.approx(wanted, rel=1e-12)
    assert summary["bits_per_byte"] == pytest.approx(wanted, rel=1e-6)


def test_eval_reads_text_in_the_runs_vocabulary(here, capsys):
    said(capsys, *TRAIN)
    same = json.loads(said(capsys, "eval", "run", "--json"))
    shutil.rmtree(here / "own")
    assert json.loads(said(capsys, "eval", "run", "--data", "corpus.txt", "--json")) == {**same, "data": "corpus.txt"}
    text = "na\u00efve whales and the sea " * 50
    (here / "other.txt").write_text(text)
    other = json.loads(said(capsys, "eval", "run", "--data", "other.txt", "--json"))
    ids = open_tokenizer(here / "run", read_config(here / "run")[1]).encode_ordinary(
        "na\u00efve whales and the sea " * 50
    )
    assert other["tokens"] == len(ids) // 16 * 16
    said(capsys, "data", "prepare", "corpus.txt", "--out", "plain")
    wanted = "cgpt: plain: wanted text, or tokens of the run's vocabulary of 300, got tokens of another, of 50257"
    assert refused(capsys, "eval", "run", "--data", "plain") == wanted


def test_a_resumed_run_keeps_its_vocabulary(here, capsys, monkeypatch):
    whole = train.train(
        TrainConfig(model="nano", data="own", steps=6, eval_tokens=160, checkpoint_every=3, out=here / "whole")
    )
    one_step = train.one_step

    def stopped(run):
        if run.step == 3:
            raise KeyboardInterrupt
        return one_step(run)

    with monkeypatch.context() as patch:
        patch.setattr(train, "one_step", stopped)
        assert cli.main([*TRAIN, "--steps", "6", "--checkpoint-every", "3"]) == 130
    (here / "run/tokenizer.json").unlink()
    said(capsys, "train", "--resume", "--out", "run")
    assert (here / "run/tokenizer.json").read_bytes() == (here / "own/tokenizer.json").read_bytes()
    assert json.loads((here / "run/summary.json").read_text())["val_loss"] == whole.val_loss
    said(capsys, "data", "prepare", "corpus.txt", "--out", "other", "--vocab-size", SIZE - 1)
    shutil.rmtree(here / "own")
    (here / "other").rename(here / "own")
    assert "own: wanted the run's data, " in refused(capsys, "train", "--resume", "--out", "run")


def test_a_run_whose_copy_is_gone_or_altered_is_refused(here, capsys):
    said(capsys, *TRAIN)
    path, data = here / "run/tokenizer.json", (here / "run/tokenizer.json").read_bytes()
    path.write_bytes(data[:-20])
    assert "run/tokenizer.json: wanted a byte-level BPE vocabulary, got a damaged" in refused(capsys, "generate", "run")
    said(capsys, "data", "prepare", "corpus.txt", "--out", "other", "--vocab-size", SIZE - 1)
    shutil.copy(here / "other/tokenizer.json", path)
    for command in ("generate", "eval"):
        assert "run/tokenizer.json: wanted vocabulary " in refused(capsys, command, "run")
    path.unlink()
    assert "run/tokenizer.json: no such file" in refused(capsys, "generate", "run")


def test_bytes_alone_are_a_vocabulary_to_train_on(here, capsys):
    said(capsys, "data", "prepare", "corpus.txt", "--out", "bytes", "--vocab-size", "257")
    assert "vocabulary of 257\n" in said(capsys, *TRAIN, "--data", "bytes")
    found = json.loads(said(capsys, "eval", "run", "--tokens", "160", "--json"))
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2), rel=1e-12)


def test_sizes_that_are_none_are_one_line(here, capsys):
    for size in ("256", "65536"):
        line = refused(capsys, "data", "prepare", "corpus.txt", "--out", "bad", "--vocab-size", size)
        assert line.startswith("cgpt: --vocab-size: wanted a number from 257 ")
    assert not (here / "bad").exists()
