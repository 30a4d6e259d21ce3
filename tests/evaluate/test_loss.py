import math

import numpy as np
import pytest
import torch

from cgpt.data.loader import Loader, train_val_split
from cgpt.data.prepare import open_corpus
from cgpt.data.tokenizer import gpt2
from cgpt.evaluate.loss import held_out_loss, windows_within
from cgpt.model.init import init_parameter
from cgpt.stream.build import build
from cgpt.stream.executor import Executor
from cgpt.stream.format import Format
from nano import NANO, write_corpus


@pytest.fixture
def loader(tmp_path):
    dataset = open_corpus(write_corpus(tmp_path), tmp_path / "cache", progress=False)
    return Loader(train_val_split(dataset, 16)[1], 16)


def test_it_is_the_mean_over_all_targets_whatever_the_batch_size(loader):
    model, store = build(NANO.config, Format("fp32", training=False), "cpu")
    store.initialise(lambda name, tensor: init_parameter(name, tensor, NANO.config, 0))
    found = [held_out_loss(Executor(store), loader, size) for size in (1, 4, 1000)]
    ids, targets = loader.batch(0, loader.n_windows)
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)).double().log_softmax(-1)
    want = -logits.gather(-1, torch.from_numpy(targets)[..., None]).mean().item()
    for each in found:
        assert each.loss == pytest.approx(want, rel=1e-6)
        assert each.tokens == targets.size
        text = gpt2().bytes_of(np.concatenate(list(loader.targets())))
        assert each.bits_per_byte == pytest.approx(each.loss * each.tokens / (math.log(2) * text))


def test_windows_within_a_number_of_tokens(loader):
    assert windows_within(loader, None) == loader.n_windows
    assert windows_within(loader, 40) == 2
    assert windows_within(loader, 1) == 1
    assert windows_within(loader, 10**9) == loader.n_windows


def test_a_bound_reads_the_first_windows_only(loader):
    _, store = build(NANO.config, Format(training=False), "cpu")
    store.initialise(lambda name, tensor: init_parameter(name, tensor, NANO.config, 0))
    assert held_out_loss(Executor(store), loader, 3, 5 * 16 + 3).tokens == 5 * 16
