"""`cgpt train` on a GPU: the CPU's loss curve, and the same bits from two runs."""

import json

import pytest
import torch

pytest.importorskip("tyro", reason="the trainer reads its command line with tyro")

from cgpt import heap, train
from cgpt.metrics import read
from cgpt.model.presets import PRESETS
from cgpt.recipe import TrainConfig
from nano import NANO, write_corpus
from problems import GPU

STEPS = 50


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "nano", NANO)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(heap, "keep_large_buffers", lambda: None)  # for whole processes, not for a test runner's
    write_corpus(tmp_path)
    return tmp_path


def losses(here, device, name, model, **more):
    data = "moby-dick" if model == "tiny" else "corpus.txt"
    train.train(TrainConfig(model=model, data=data, device=device, out=here / name, eval_tokens=4096, **more))
    return torch.tensor([row["loss"] for row in read(here / name)])


DEVICES = pytest.mark.parametrize(("device", "model"), [("cpu", "nano"), pytest.param("cuda", "tiny", marks=GPU)])


@DEVICES
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_loss_curve_is_the_cpus(here, device, model, precision):
    """To 2 % at every one of 50 steps, and both learn. On the CPU itself: to the bit, in a few steps."""
    steps = STEPS if device == "cuda" else 3
    ours = losses(here, device, "ours", model, precision=precision, steps=steps)
    cpus = losses(here, "cpu", "cpus", model, precision=precision, steps=steps)
    assert len(ours) == steps
    assert ((ours - cpus).abs() <= (0.02 if device == "cuda" else 0) * cpus).all()
    if device == "cuda":
        assert ours[-5:].mean() < ours[:5].mean() - 1


@DEVICES
def test_two_runs_have_the_same_losses_and_can_be_resumed(here, device, model):
    whole = losses(here, device, "whole", model, steps=4, checkpoint_every=2)
    config = json.loads((here / "whole" / "config.json").read_text())
    assert config["recipe"]["device"] == device
    again = losses(here, device, "again", model, steps=4, checkpoint_every=2)
    assert torch.equal(whole, again)
    train.train(TrainConfig(out=here / "again", resume=True, steps=5))
    assert len(read(here / "again")) == 5
