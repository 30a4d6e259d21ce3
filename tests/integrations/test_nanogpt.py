"""nanoGPT's train.py, not a byte changed, with and without our parts.

CGPT_NANOGPT names a checkout of github.com/karpathy/nanoGPT; nothing of it is in this tree. Run as a file this trains
in the working folder, run after run, each in a process forked once everything is imported.
"""

import hashlib
import json
import os
import pickle
import runpy
import shutil
import subprocess
import sys
import types
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from cgpt_ext.integrations import nanogpt
from results import largest_difference, record
from tiny import counted

STEPS = 10
OPTIONS = {
    "dataset": "tiny", "device": "cpu", "dtype": "float32", "compile": False, "eval_iters": 1, "block_size": 16,
    "eval_interval": 5, "batch_size": 4, "n_layer": 2, "n_head": 2, "n_embd": 32, "gradient_accumulation_steps": 2,
    "max_iters": STEPS - 1, "learning_rate": 0.02, "warmup_iters": 0, "lr_decay_iters": 20, "grad_clip": 0.5,
}  # fmt: skip


# name -> who trains, what differs from OPTIONS
RUNS = {
    "theirs": ("torch", {"bias": True}),
    "mine": ("ours", {"bias": True}),
    "theirs, by us": ("ours", {"out_dir": "theirs", "init_from": "resume"}),
    "mine, by them": ("torch", {"out_dir": "mine", "init_from": "resume"}),
    "theirs without bias": ("torch", {"bias": False}),
    "mine without bias": ("ours", {"bias": False}),
    "mine with dropout": ("ours", {"dropout": 0.1}),
}


def drive():
    """Trains as a user would, and writes what the model's forward returned in training beside our kernels' calls."""

    for name, (who, options) in RUNS.items():
        if not os.fork():
            with open(f"{name}.txt", "w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            train(name, who, {**OPTIONS, "out_dir": name, **options})
            sys.exit(0)
        if os.wait()[1]:
            sys.exit(f"{name}: " + Path(f"{name}.txt").read_text())


def train(name, who, options):
    arguments = ["train.py", *(f"--{key}={value}" for key, value in options.items())]
    losses = []
    sys.path.insert(0, os.getcwd())
    gpt = import_module("model").GPT
    forward = gpt.forward

    def listening(self, *given):
        logits, loss = forward(self, *given)
        if self.training:
            losses.append(loss.item())
        return logits, loss

    gpt.forward = listening
    with counted() as calls:
        if who == "ours":
            assert nanogpt.main(arguments) == 0
        else:
            sys.argv = arguments
            runpy.run_path("train.py", run_name="__main__")
    Path(f"{name}.json").write_text(json.dumps({"losses": losses, "calls": calls}))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the scripts, with a corpus of 1500 tokens whose next is mostly the same number further."""
    if not os.environ.get("CGPT_NANOGPT"):
        pytest.skip("CGPT_NANOGPT must name a checkout of nanoGPT: its train.py, model.py and configurator.py")
    folder = tmp_path_factory.mktemp("nanogpt")
    for name in ("train.py", "model.py", "configurator.py"):
        shutil.copy(Path(os.environ["CGPT_NANOGPT"]) / name, folder)
    data = folder / "data" / "tiny"
    data.mkdir(parents=True)
    draw = np.random.default_rng(0)
    steps = np.where(draw.random(2000) < 0.1, draw.integers(37, size=2000), 3)
    tokens = (np.cumsum(steps) % 37).astype(np.uint16)
    tokens[:1500].tofile(data / "train.bin")
    tokens[1500:].tofile(data / "val.bin")
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 37}))
    return folder


@pytest.fixture(scope="module")
def found(checkout):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([*(path for path in sys.path if path), str(Path(__file__).parents[2])])
    command = [sys.executable, __file__]
    done = subprocess.run(
        command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: json.loads((checkout / f"{name}.json").read_text()) for name in RUNS}


def test_losses_are_torchs(checkout, found):
    theirs, mine = found["theirs"], found["mine"]
    assert not theirs["calls"]
    forwards = 2 * STEPS + 4  # the losses' and two evaluations of two splits
    calls = {"attention": 2 * forwards, "gelu_mlp": 2 * forwards, "layer_norm": 5 * forwards, "adamw": 2 * STEPS}
    assert mine["calls"] == calls
    difference = largest_difference(mine["losses"], theirs["losses"])
    text = (checkout / "train.py").read_bytes() + (checkout / "model.py").read_bytes()
    version = f"sha256 {hashlib.sha256(text).hexdigest()[:7]}"
    record("nanoGPT", sorted(calls), STEPS, difference, version=version)
    assert largest_difference(found["mine without bias"]["losses"], found["theirs without bias"]["losses"]) < 1e-3


def test_checkpoints_change_hands(checkout, found):
    saved = [torch.load(checkout / out / "ckpt.pt", weights_only=True) for out in ("theirs", "mine")]
    assert saved[0]["model"].keys() == saved[1]["model"].keys()
    by_us, by_them = found["theirs, by us"], found["mine, by them"]
    assert by_us["calls"]["adamw"] == 2 * (STEPS - 5)
    assert not by_them["calls"]
    assert by_us["losses"] == pytest.approx(by_them["losses"], abs=1e-3)
    assert by_us["losses"][0] < found["theirs"]["losses"][0] - 0.05  # it went on, and did not begin again


def test_attention_with_dropout_trains_by_nanogpts_own(checkout, found):
    assert "attention with dropout 0.1 trains by nanoGPT's own" in (checkout / "mine with dropout.txt").read_text()
    calls = found["mine with dropout"]["calls"]
    assert calls["attention"] == 2 * 4  # evaluations alone
    assert calls["gelu_mlp"] == 2 * (2 * STEPS + 4)


def test_what_is_not_nanogpt_is_refused(tmp_path, capsys):
    assert nanogpt.main([str(tmp_path / "train.py")]) == 2
    assert "wanted a script of nanoGPT's, with model.py beside it" in capsys.readouterr().err
    assert nanogpt.main(["--help"]) == 0
    assert "train_gpt2.py" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"got .* without CausalSelfAttention, MLP, LayerNorm"):
        nanogpt.apply_cgpt_kernels_to_nanogpt(types.ModuleType("model"))


if __name__ == "__main__":
    drive()
