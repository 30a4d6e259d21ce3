"""`cgpt train --init`: the first step is the given weights', wherever layers live; then PATH is needed no more."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hub import model_of, tokenizer_of, untied, write
from safetensors.torch import load_file

import cgpt
from cgpt import cli
from cgpt.checkpoint import newest
from cgpt.data.loader import Loader, train_val_split
from cgpt.data.prepare import open_corpus
from cgpt.interchange.importing import import_
from cgpt.recipe import read_config
from nano import NANO, Runs

VOCABULARY = 300
STEPS = "--steps 4 --batch-size 2 --eval-tokens 64 --checkpoint-every 2 --keep 9 --precision fp32 --seed 5".split()
HF = {"vocab_size": VOCABULARY, "n_positions": 16}


@pytest.fixture
def folder(here):
    """hf/, with a vocabulary of 300, beside a corpus."""
    model = model_of(**HF)
    write(here / "hf", model.config.to_dict(), untied(model))
    (here / "hf/tokenizer.json").write_bytes(tokenizer_of(VOCABULARY).file)
    return here / "hf"


def said(capsys, line, *more, code=0):
    capsys.readouterr()
    assert cli.main([*line.split(), *more]) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err


def losses(run):
    return [json.loads(line)["loss"] for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def weights(run, step=None):
    path = newest(Path(run, "checkpoints"))[0] if step is None else Path(run, f"checkpoints/step-{step:08d}")
    return {key: value for file in sorted(path.glob("*.safetensors")) for key, value in load_file(file).items()}


def test_the_first_loss_is_the_given_models(folder, capsys):
    report = said(capsys, "train --init hf --data corpus.txt --out tuned", *STEPS)
    assert "from the weights of hf" in report
    assert "vocabulary of 300" in report
    recipe, identity = read_config(Path("tuned"))
    assert recipe.init == "hf"
    assert identity["vocabulary"] == tokenizer_of(VOCABULARY).hash
    dataset = open_corpus("corpus.txt", tokenizer=tokenizer_of(VOCABULARY), progress=False)
    ids, targets = Loader(train_val_split(dataset, 16)[0], 16, 5).batch(0, 2)
    with torch.no_grad():
        want = cgpt.load("hf")(torch.from_numpy(ids), torch.from_numpy(targets)).item()
    assert losses("tuned")[0] == pytest.approx(want, abs=1e-6)
    assert losses("tuned")[-1] < want
    start = weights("tuned", 0)
    assert set(start) == {name.removeprefix("transformer.") for name in untied(model_of(**HF))}  # weights alone
    assert json.loads(Path("tuned/checkpoints/step-00000000/manifest.json").read_text())["moments"] is False
    assert said(capsys, "generate tuned --max-tokens 2 --prompt whale").startswith("whale")
    said(capsys, "export tuned --out back")


def test_a_run_or_its_source_give_the_same_bits(folder, capsys):
    import_("hf", "run")
    for source, out in (("hf", "one"), ("run", "two")):
        said(capsys, f"train --init {source} --data corpus.txt --out {out}", *STEPS)
    one, two = weights("one"), weights("two")
    assert all(torch.equal(one[key], two[key]) for key in one)
    said(capsys, "train --init one --data corpus.txt --out three", *STEPS)  # of a run that was trained
    start = weights("three", 0)
    assert all(torch.equal(start[key], one[key]) for key in start)
    assert "exp_avg/wte.weight" in one
    assert "exp_avg/wte.weight" not in start
    assert read_config(Path("three"))[0].lr == pytest.approx(read_config(Path("one"))[0].lr / 10)


def test_a_resumed_run_needs_its_source_no_more(folder, capsys):
    said(capsys, "train --init hf --data corpus.txt --out whole", *STEPS)
    for step in (2, 0):
        shutil.copytree("whole", f"cut{step}", symlinks=True)
        for name in Path(f"cut{step}/checkpoints").glob("step-*"):
            if int(name.name[5:]) > step:
                shutil.rmtree(name)
    shutil.rmtree("hf")
    for step in (2, 0):
        assert f"resumed  at step {step} of 4" in said(capsys, f"train --resume --out cut{step}")
        one, two = weights("whole"), weights(f"cut{step}")
        assert all(torch.equal(one[key], two[key]) for key in one)
    shutil.rmtree("cut0/checkpoints")
    assert "cut0/checkpoints: wanted a checkpoint, got none" in said(capsys, "train --resume --out cut0", code=2)
    assert "a resumed run keeps its recipe" in said(capsys, "train --resume --out cut2 --init other", code=2)


def test_layers_that_stream_give_the_same_bits(folder, capsys):
    """Layers on the device, on the host, on the disk, and split between the last two."""
    command = "train --init hf --data corpus.txt --out {} --steps 2 --eval-tokens 32 --seed 5 --keep 9"
    said(capsys, command.format("resident"))
    runs = Runs(folder.parent)
    try:
        code, told = runs.run(*command.format("mixed").split(), where="mixed")
    finally:
        runs.close()
    assert code == 0, told
    want, got = weights("resident"), weights("mixed")
    assert all(torch.equal(got[key], want[key]) for key in want)
    start, source = weights("mixed", 0), untied(model_of(**HF))
    assert all(torch.equal(value, source[f"transformer.{name}"]) for name, value in start.items())


def test_defaults_are_those_of_fine_tuning(folder, capsys):
    said(capsys, "train --init hf --data corpus.txt --out short --eval-tokens 32 --steps 1 --eval-every 1 --seq-len 8")
    recipe, _ = read_config(Path("short"))
    assert recipe.seq_len == 8
    assert recipe.shape == cgpt.load("short").config
    assert recipe.shape.seq_len == 16
    assert recipe.batch_schedule == ((0, 8),)
    assert recipe.lr == pytest.approx(NANO.lr / 10)  # of the nearest preset in size
    from cgpt.recipe import TrainConfig, resolve

    assert resolve(TrainConfig(init=Path("hf"))).steps == 1000
    assert resolve(TrainConfig(init=Path("hf"), lr=1e-3, steps=7)) == replace(
        resolve(TrainConfig(init=Path("hf"), steps=7)), lr=1e-3
    )


@pytest.mark.parametrize(
    "flags",
    ["--model tiny", "--width 64", "--layers 3", "--positions rotary", "--activation gelu", "--embedding-norm",
     "--parametrization mup", "--transfer-from hf", "--config x.json"],
)  # fmt: skip
def test_flags_of_another_model_are_refused(folder, capsys, flags):
    line = said(capsys, f"train --init hf --data corpus.txt --out out {flags}", code=2)
    assert line == f"cgpt: --init: wanted it or {flags.split()[0]}, got both: the model is that of the weights\n"
    assert not Path("out").exists()


def test_what_cannot_be_started_from_is_refused_before_anything_is_made(folder, capsys):
    for line, told in (
        ("--init hf --seq-len 17", "--init: wanted --seq-len of at most the model's 16 positions, got 17"),
        ("--init nowhere", "--init: nowhere: wanted a run folder or a Hugging Face folder (config.json), got no fol"),
        ("--init hf --resume", "out: wanted a run to resume"),
    ):
        assert told in said(capsys, f"train --data corpus.txt --out out {line}", code=2)
    Path("hf/config.json").write_text('{"model_type": "gpt2", "activation_function": "relu"}')
    assert "config.json: activation_function: wanted" in said(capsys, "train --init hf --out out", code=2)
    assert not Path("out").exists()


def test_tokens_of_another_vocabulary_are_refused(folder, capsys):
    said(capsys, "data prepare corpus.txt --out gpt2")
    said(capsys, "data prepare corpus.txt --out own --vocab-size 280")
    for data, size in (("gpt2", 50257), ("own", 280)):
        line = said(capsys, f"train --init hf --out out --data {data}", *STEPS, code=2)
        wanted = "wanted text, or tokens of the vocabulary of 300 ids that the weights were trained in"
        assert line == f"cgpt: {data}: {wanted}, got tokens of another, of {size}\n"
    assert not Path("out").exists()


def test_a_source_found_damaged_leaves_nothing_to_resume(folder, capsys):
    state = untied(model_of(**HF))
    state["transformer.ln_f.bias"] = torch.full((32,), float("nan"))
    write(folder, model_of(**HF).config.to_dict(), state)
    line = said(capsys, "train --init hf --data corpus.txt --out out", *STEPS, code=2)
    assert "finite numbers in ln_f.bias, got NaN or Inf" in line
    assert not Path("out/config.json").exists()
    write(folder, model_of(**HF).config.to_dict(), untied(model_of(**HF)))
    said(capsys, "train --init hf --data corpus.txt --out out", *STEPS)  # into the same folder
    assert not list(Path("out").glob("*.tmp"))


def test_mup_goes_on_under_its_own_rates(here, capsys):
    values = model_of(vocab_size=50257).config.to_dict() | {
        "model_type": "btlm", "mup_width_scale": 0.25, "mup_embeddings_scale": 10.0, "mup_scale_qk_dot_by_d": True,
    }  # fmt: skip
    write(here / "hf", values, untied(model_of(vocab_size=50257)))
    said(capsys, "train --init hf --data corpus.txt --out tuned", *STEPS)
    recipe, identity = read_config(Path("tuned"))
    assert (recipe.parametrization, recipe.shape.hidden_lr_scale, recipe.lr) == ("mup", 0.25, pytest.approx(6e-4))
    assert "vocabulary" not in identity
