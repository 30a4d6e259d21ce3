"""A model trained by the CUDA kernels alone learns as it does by the CPU's."""

import pytest
import torch

from cgpt import heap, train
from cgpt.metrics import read
from cgpt.model import presets
from cgpt.recipe import TrainConfig
from emulator import emulated
from nano import NANO, write_corpus


def losses(folder, precision):
    config = TrainConfig(
        model="nano",
        data="corpus.txt",
        steps=10,
        eval_tokens=64,
        eval_every=50,
        precision=precision,
        out=folder,
    )
    train.train(config)
    return [row["loss"] for row in read(folder) if "loss" in row]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_loss_falls_as_on_a_cpu(tmp_path, monkeypatch, precision):
    monkeypatch.setitem(presets.PRESETS, "nano", NANO)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(heap, "keep_large_buffers", lambda: None)
    write_corpus(tmp_path)
    want = losses(tmp_path / "cpu", precision)
    with emulated():
        got = losses(tmp_path / "emulated", precision)
    assert len(got) == 10
    assert got[-1] < got[0] - 0.5
    assert torch.allclose(torch.tensor(got), torch.tensor(want), rtol=0.02)
