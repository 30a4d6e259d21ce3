"""Weights that are only read: wherever they live, the losses and the tokens are those of a model in memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cgpt import checkpoint
from cgpt.errors import InputError
from cgpt.evaluate.generate import generate
from cgpt.model.config import GPTConfig
from cgpt.model.init import init_parameter
from cgpt.stream import record
from cgpt.stream.build import build
from cgpt.stream.devices import CpuDevice
from cgpt.stream.executor import Executor
from cgpt.stream.format import Format
from cgpt.stream.gpt_plans import gpt_plans
from cgpt.stream.needs import needs
from cgpt.stream.placement import Placement

PRECISIONS = ("bf16", "fp16", "fp32")
VOCAB, TIME = 97, 12
# embed, h.0, h.1, h.2, head: (weights, state)
HOMES = {
    "host": (("host",) * 5, ("host",) * 5),
    "disk": (("disk",) * 5, ("disk",) * 5),
    "embedding kept": (("device", *("host",) * 4), ("device", *("host",) * 4)),
    "mixed": (("host", "device", "disk", "host", "disk"), ("host", "device", "disk", "host", "disk")),
    "copies": (("device", "host", "host", "disk", "device"), ("host", "disk", "host", "disk", "disk")),
}


def shape(depth=3):
    return GPTConfig(n_layer=depth, n_head=2, d_model=32, d_head=16, d_ff=128, vocab_size=VOCAB, seq_len=TIME)


def saved(folder, precision="bf16", depth=3):
    """(checkpoint, manifest) of a model that trains, and the loss that it trains with."""
    _, store = build(shape(depth), Format(precision), "cpu")
    store.initialise(lambda name, tensor: init_parameter(name, tensor, shape(depth), 3))
    return checkpoint.save(folder, store, 1, {}), Executor(store).loss(batches(1))


def opened(path, where, folder, precision="bf16", depth=3, device=None, **how):
    """The checkpoint in a store that reads, on a device with not one byte more than that needs."""
    weights, state = where
    placement = Placement(weights, state, tuple(home != "device" for home in weights))
    format = Format(precision, training=False)
    device = device or CpuDevice(needs(gpt_plans(shape(depth)), placement, format).device, **how)
    disk = str(folder) if "disk" in state else None
    model, store = build(shape(depth), format, device, placement=placement, disk=disk)
    checkpoint.load(path, store, checkpoint.verify(path))
    return model, store


def in_memory(depth=3):
    return ("device",) * (depth + 2), ("device",) * (depth + 2)


def batches(count, rows=2):
    pairs = torch.randint(VOCAB, (count, 2, rows, TIME), generator=torch.Generator().manual_seed(0))
    return [(pair[0], pair[1]) for pair in pairs]


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """precision -> (checkpoint, losses, tokens) of the model in memory, which are those that it trained with."""
    found = {}
    for precision in PRECISIONS:
        folder = tmp_path_factory.mktemp(precision)
        path, trained = saved(folder, precision)
        model, store = opened(path, in_memory(), folder, precision)
        losses = [Executor(store).loss([batch]) for batch in batches(3)]
        assert losses[0] == trained
        found[precision] = path, losses, list(generate(model, [3, 1, 4], 14, seed=5))
    return found


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_losses_and_tokens_are_those_of_the_model_in_memory(known, tmp_path, precision, home):
    path, losses, tokens = known[precision]
    model, store = opened(path, HOMES[home], tmp_path, precision)
    walk = Executor(store)
    assert walk.losses(batches(3)) == losses
    assert [walk.loss([batch]) for batch in batches(3)] == losses
    assert list(generate(model, [3, 1, 4], 14, seed=5, walk=walk)) == tokens
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    store.close()


@pytest.mark.parametrize("home", ["disk", "mixed"])
def test_nobody_reads_too_early_or_too_late(known, tmp_path, home):
    path, losses, tokens = known["bf16"]
    for seed in range(3):
        model, store = opened(path, HOMES[home], tmp_path, hunt=seed)
        walk = Executor(store)
        assert walk.losses(batches(3)) == losses
        assert list(generate(model, [3, 1, 4], 4, seed=5, walk=walk)) == tokens[:4]
        store.close()


def test_nothing_but_the_weights_is_held(tmp_path):
    plans, format = gpt_plans(shape()), Format(training=False)
    elements = [plan.owned.size for plan in plans]
    on_disk = needs(plans, Placement(*HOMES["disk"], (True,) * 5), format)
    block = -(-max(elements) * 2 // 4096) * 4096
    assert on_disk.host == 2 * block  # as they are fetched, so they are filled
    assert on_disk.disk == sum(-(-size * 2 // 4096) * 4096 for size in elements)
    on_host = needs(plans, Placement(*HOMES["host"], (True,) * 5), format)
    assert (on_host.host, on_host.disk) == (2 * sum(elements), 0)


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_the_arena_of_two_blocks_reads_any_depth(tmp_path, tier):
    def away(depth):
        return ("device", *(tier,) * (depth + 1)), ("device", *(tier,) * (depth + 1))

    arena = needs(gpt_plans(shape(2)), Placement(*away(2), (True,) * 4), Format(training=False)).device
    for depth in (2, 5, 9):
        path, _ = saved(tmp_path / str(depth), depth=depth)
        resident, _ = opened(path, in_memory(depth), tmp_path, depth=depth)
        device = CpuDevice(arena)
        model, store = opened(path, away(depth), tmp_path, depth=depth, device=device)
        assert device.taken <= arena
        tokens = list(generate(resident, [5, 9], 5, seed=1))
        assert list(generate(model, [5, 9], 5, seed=1, walk=Executor(store))) == tokens
        store.close()
    with pytest.raises(InputError, match=rf"device memory: wanted [\d,]+ bytes more, got [\d,]+ of {arena - 1:,}"):
        opened(path, away(depth), tmp_path, depth=depth, device=CpuDevice(arena - 1))


class Largest(TorchDispatchMode):
    """The most bytes of memory that an operator made, rather than was given."""

    nbytes = 0

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        made = operator(*arguments, **(options or {}))
        given = {x.untyped_storage().data_ptr() for x in arguments if isinstance(x, torch.Tensor)}
        for tensor in made if isinstance(made, tuple) else (made,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("home", ["disk", "host"])
def test_a_checkpoint_passes_in_pieces(known, tmp_path, monkeypatch, precision, home):
    path, losses, _ = known[precision]
    manifest = checkpoint.verify(path)
    _, store = opened(path, HOMES[home], tmp_path, precision)
    for index in range(5):  # what the first load left must not be what the second is seen to bring
        with store.record(index, writing=True) as each:
            each.memory.fill_(255)
    monkeypatch.setattr(record, "PIECE", 100)
    with Largest() as largest:
        checkpoint.load(path, store, manifest)
    assert largest.nbytes <= 400
    assert Executor(store).losses(batches(3)) == losses
    store.close()
