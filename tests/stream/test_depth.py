"""A deeper model takes no more of the device: the same arena serves any number of layers."""

import pytest
import torch

from cgpt.errors import InputError
from cgpt.model.config import GPTConfig
from cgpt.model.init import init_parameter
from cgpt.stream.account import boundary_bytes
from cgpt.stream.build import build
from cgpt.stream.devices import CpuDevice
from cgpt.stream.executor import Executor
from cgpt.stream.format import Format
from cgpt.stream.gpt_plans import gpt_plans
from cgpt.stream.needs import needs
from cgpt.stream.optimizer import AdamW
from cgpt.stream.placement import Placement

ROWS, TIME = 2, 16


def shape(depth):
    return GPTConfig(n_layer=depth, n_head=8, d_model=512, d_head=64, d_ff=2048, vocab_size=96, seq_len=TIME)


def streamed(depth):
    everywhere = ("host",) * (depth + 2)
    boundary = boundary_bytes(Format(), TIME, 512)
    return Placement(everywhere, everywhere, (True,) * len(everywhere), "host", ROWS, boundary=boundary)


ARENA = needs(gpt_plans(shape(4)), streamed(4), Format()).device  # of four layers


@pytest.mark.parametrize("depth", [4, 8, 16, 32])
def test_the_arena_of_four_layers_trains_any_depth(depth):
    config, lanes = shape(depth), CpuDevice(ARENA)
    _, store = build(config, Format(), lanes, placement=streamed(depth))
    store.initialise(lambda name, tensor: init_parameter(name, tensor, config, 0))
    ids = torch.randint(96, (ROWS, 2, 1, TIME), generator=torch.Generator().manual_seed(0))
    executor, optimizer = Executor(store), AdamW(store)
    losses = []
    for _ in range(2):
        found = executor.gradients([[(row[0], row[1]) for row in ids]])
        assert optimizer.step(found, 1e-3)
        losses.append(found.loss)
    assert losses[1] < losses[0]
    assert lanes.taken <= lanes.arena_bytes == ARENA
    store.close()


def test_one_byte_less_is_refused_with_both_numbers():
    with pytest.raises(InputError, match=r"device memory: wanted [\d,]+ bytes more, got [\d,]+ of " + f"{ARENA - 1:,}"):
        Executor(build(shape(4), Format(), CpuDevice(ARENA - 1), placement=streamed(4))[1])
