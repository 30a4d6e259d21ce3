"""`cgpt eval` on text: several at once, short ones, a run in training, broken weights, and what is written."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cgpt.checkpoint import CHECKPOINTS, open_newest
from cgpt.data.tokenizer import gpt2
from cgpt.evaluate import reader, report
from cgpt.evaluate.loss import HeldOut
from cgpt.files import read_signed_json, sha256_of, write_signed_json


@pytest.fixture
def run(folder):
    """What is read and not written."""
    return folder / "run"


@pytest.fixture
def copy(folder, tmp_path, monkeypatch):
    """The run in a folder of the test's own."""
    for path in folder.glob("*.*"):
        shutil.copy(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(folder / "run", "run", symlinks=True)).resolve()


def test_several_texts_are_each_what_they_are_alone(run, said):
    names = ["other.txt", "rows.jsonl", "corpus.txt"]
    lines = said("eval", "run", "--json", *(word for name in names for word in ("--data", name)))
    rows = [json.loads(line) for line in lines.splitlines()]
    assert [row["data"] for row in rows] == names
    assert [row["split"] for row in rows] == ["all of it", "all of it", "held-out split"]
    for name, row in zip(names, rows, strict=True):
        assert json.loads(said("eval", "run", "--json", "--data", name)) == row
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]), rel=1e-12)
    assert json.loads(said("eval", "run", "--json")) == rows[2]


def test_the_file_holds_what_was_said_and_of_which_step(copy, said):
    text = said("eval", "run", "--data", "other.txt", "--out", "found.json")
    found = json.loads((copy.parent / "found.json").read_text())
    assert found == {"run": "run", "step": 3, "precision": "bf16", "texts": found["texts"], "tasks": []}
    (row,) = found["texts"]
    assert text == (
        f"other.txt (all of it): {row['loss']:.4f} nats a token, perplexity {row['perplexity']:.4f}, "
        f"{row['bits_per_byte']:.3f} bits a byte, over {row['tokens']} tokens\n"
    )


def test_a_text_shorter_than_the_runs_sequences_is_one_window(run, said):
    row = json.loads(said("eval", "run", "--data", "short.txt", "--json"))
    *_, model, store, _ = open_newest(run)
    ids = torch.tensor([[*gpt2().encode_ordinary("the whale"), gpt2().eot]])
    store.close()
    with torch.no_grad():
        logits = model(ids[:, :-1])[0].double().log_softmax(-1)
    wanted = -logits.gather(-1, ids[0, 1:, None]).mean().item()
    assert row["tokens"] == 2
    assert row["loss"] == pytest.approx(wanted, rel=5e-3)  # logits of bf16


def test_a_bf16_run_may_be_read_in_fp32(run, said):
    half, whole = (json.loads(said("eval", "run", "--json", *flags)) for flags in ((), ("--precision", "fp32")))
    assert half["loss"] != whole["loss"]
    assert half["loss"] == pytest.approx(whole["loss"], rel=1e-3)
    recipe, _, model, store, manifest = open_newest(run, precision="fp32")
    assert (recipe.precision, model.wte.weight.dtype, manifest["step"]) == ("fp32", torch.float32, 3)
    assert torch.equal(model.wte.weight, load_file(run / CHECKPOINTS / "step-00000003/embed.safetensors")["wte.weight"])
    store.close()


def test_a_run_that_trains_on_removes_its_checkpoint_meanwhile(copy, refused, said, monkeypatch):
    wanted = said("eval", "run", "--json")
    checkpoints = copy / CHECKPOINTS
    opened, tries = reader.open_newest, []

    def racing(*arguments, **options):
        tries.append(arguments)
        if len(tries) == 1:
            (checkpoints / "step-00000003").rename(checkpoints / "step-00000004")
            raise FileNotFoundError(2, "No such file or directory", str(checkpoints / "step-00000003/h.0.safetensors"))
        return opened(*arguments, **options)

    monkeypatch.setattr(reader, "open_newest", racing)
    assert said("eval", "run", "--json") == wanted
    assert len(tries) == 2
    shutil.rmtree(checkpoints)
    assert "run/checkpoints: wanted a checkpoint, got none" in refused("eval", "run")
    assert len(tries) == 3


def test_weights_that_are_no_numbers_are_one_line(copy, refused):
    folder = copy / CHECKPOINTS / "step-00000003"
    file = folder / "h.0.safetensors"
    tensors = load_file(file)
    tensors["h.0.ln_1.weight"][0] = math.nan
    save_file(tensors, file)
    manifest = read_signed_json(folder / "manifest.json")
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    write_signed_json(folder / "manifest.json", {key: value for key, value in manifest.items() if key != "sha256"})
    line = refused("eval", "run", "--data", "other.txt", "--out", "found.json")
    assert line == "cgpt: run: wanted a model with a finite loss, got nan on other.txt"
    assert not (copy.parent / "found.json").exists()


def test_a_perplexity_past_all_numbers_is_said_in_words():
    assert HeldOut(709.7, 1, None).perplexity == pytest.approx(1.65e308, rel=0.01)
    assert HeldOut(709.8, 1, None).perplexity is None
    row = {"data": "a", "split": "all of it", "loss": 800.0, "tokens": 5, "bits_per_byte": None}
    assert report.text_line(row | {"perplexity": None}) == (
        "a (all of it): 800.0000 nats a token, perplexity over 1e308, over 5 tokens"
    )
    assert "perplexity 1.65e+308, over" in report.text_line(row | {"perplexity": 1.65e308})


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ("--tokens 0", "--tokens: wanted at least 1, got 0"),
        ("--batch-size 0", "--batch-size: wanted at least 1, got 0"),
        ("--limit 3", "--limit: wanted --tasks with it, got none"),
        ("--num-fewshot 5", "--num-fewshot: wanted --tasks with it, got none"),
        ("--tasks piqa --limit 0", "--limit: wanted at least 1, got 0"),
        ("--tasks piqa --num-fewshot -1", "--num-fewshot: wanted at least 0, got -1"),
        ("--tasks piqa --tokens 9", "--tokens: wanted --data with it, got --tasks alone; --limit bounds those"),
        ("--tasks ,", "--tasks: wanted names, YAML files or folders, got none"),
        ("--out nowhere/found.json", "--out: wanted a file in a folder that is there, got nowhere/found.json"),
        ("--out .", "--out: wanted a file, got the folder ."),
        ("--data other.txt --data missing.txt", "missing.txt"),
        ("--precision fp8", "--precision"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_measured(run, refused, flags, wanted):
    assert wanted in refused("eval", "run", *flags.split())


def test_without_lm_eval_it_says_what_to_install(run, refused, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("harness", "tasks"):
        monkeypatch.delitem(sys.modules, f"cgpt.evaluate.{name}", raising=False)
        monkeypatch.delattr(f"cgpt.evaluate.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    line = refused("eval", "run", "--tasks", "piqa")
    assert line == "cgpt: --tasks: wanted lm_eval (pip install 'cgpt-ext[hf]'), got no module lm_eval"
