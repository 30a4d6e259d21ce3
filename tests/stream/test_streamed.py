"""Anyone's modules trained by streaming: what a user does with `Streamed`, and what it refuses."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_streaming import everywhere
from torch import nn

from cgpt.errors import InputError
from cgpt.stream import Streamed
from cgpt.stream.format import Format
from cgpt.stream.gradients import Gradients
from cgpt.stream.optimizer import AdamW
from cgpt.stream.placement import Placement
from cgpt.stream.store import Layer, Store
from cgpt_ext import grad_norm

VOCAB, WIDTH = 31, 16


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear, self.drop = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Dropout(0.2)
        self.register_buffer("shift", torch.linspace(0, 1, WIDTH), persistent=False)
        self.fails = False

    def forward(self, x):
        if self.fails:
            raise ZeroDivisionError("planted")
        return x + self.drop(torch.tanh(self.linear(self.norm(x)) + self.shift.to(x.dtype)))


class Head(nn.Module):
    def __init__(self, embed):
        super().__init__()
        self.norm, self.embed = nn.LayerNorm(WIDTH), embed

    def forward(self, x, targets):
        return F.cross_entropy((self.norm(x) @ self.embed.weight.T).flatten(0, 1).float(), targets.flatten())


def modules():
    torch.manual_seed(0)
    embed = nn.Embedding(VOCAB, WIDTH)
    return embed, [Block() for _ in range(3)], Head(embed)


def batch(seed, size=2, time=5):
    pair = torch.randint(VOCAB, (2, size, time), generator=torch.Generator().manual_seed(seed))
    return pair[0], pair[1]


def host(**options):
    return Placement(("host",) * 5, ("host",) * 5, (True,) * 5, **options)


def open_(placement=None, parts=None, **options):
    return Streamed(*(parts or modules()), placement=placement, **options)


def bits(trainer):
    store = trainer.store
    return trainer.state_dict() | {
        f"{kind} {name}": store.moment(kind, name) for name in store.names() for kind in ("exp_avg", "exp_avg_sq")
    }


def assert_bits(got, want):
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("placement", [None, host(), everywhere("disk", "disk")])
def test_a_resumed_run_goes_on_bit_for_bit(placement, tmp_path):
    with open_(placement, disk=str(tmp_path), seed=7) as trainer:
        for i in range(3):
            trainer.step([batch(i)], 1e-2)
        path = trainer.save(tmp_path / "run")
        assert path.name == "step-00000003"
        want = [trainer.step([batch(i)], 1e-2) for i in range(3, 6)], bits(trainer)
    with open_(placement, disk=str(tmp_path), seed=1) as trainer:
        assert trainer.resume(tmp_path / "run") == 3
        assert [trainer.step([batch(i)], 1e-2) for i in range(3, 6)] == want[0]
        assert_bits(bits(trainer), want[1])


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    with open_() as trainer:
        trainer.save(tmp_path)
    embed, blocks, head = modules()
    with open_(parts=(embed, blocks[:2], head)) as trainer, pytest.raises(InputError, match="another model's"):
        trainer.resume(tmp_path)
    with open_() as trainer, pytest.raises(InputError, match="wanted a checkpoint, got none"):
        trainer.resume(tmp_path / "nothing")


@pytest.mark.parametrize("placement", [None, host(), host(activations="host"), everywhere("disk", "disk")])
def test_an_error_in_a_module_leaves_a_trainer_that_goes_on(placement, tmp_path):
    found = []
    for fails in (False, True):
        parts = modules()
        with open_(placement, parts, disk=str(tmp_path), sample=batch(0)[0]) as trainer:
            rows = [trainer.step([batch(0)], 1e-2)]
            for block in parts[1][1:] if fails else ():
                block.fails = True
                with pytest.raises(ZeroDivisionError, match="planted"):
                    trainer.step([batch(1)], 1e-2)
                block.fails = False
            rows += [trainer.step([batch(i)], 1e-2) for i in (1, 2)]
            found.append((rows, bits(trainer)))
    assert found[0][0] == found[1][0]
    assert_bits(found[1][1], found[0][1])


def test_an_error_in_backward_leaves_a_trainer_that_goes_on():
    parts = modules()
    with open_(host(), parts) as trainer:
        trainer.step([batch(0)], 1e-2)
        handle = parts[1][1].linear.register_full_backward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.step([batch(1)], 1e-2)
        handle.remove()
        assert trainer.step([batch(1)], 1e-2).applied


def test_a_load_is_what_the_next_step_computes_with():
    want = None
    for placement in (None, host(), Placement(("device",) * 5, ("host",) * 5, (False,) * 5)):
        with open_(placement) as trainer:
            start = trainer.state_dict()
            first = trainer.step([batch(0)], 1e-2).loss
            moved = trainer.loss([batch(0)])
            assert moved != first
            versions = list(trainer.store.versions)
            trainer.load(lambda name, start=start: start[name] * 2)
            assert all(a > b for a, b in zip(trainer.store.versions, versions, strict=True))
            got = trainer.step([batch(0)], 1e-2).loss
            want = want or got
            assert got == want != moved


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("placement", [host(), everywhere("disk", "disk")])
def test_a_gradient_that_is_not_finite_leaves_every_bit(placement, bad, tmp_path):
    parts = modules()
    with open_(placement, parts, disk=str(tmp_path)) as trainer:
        trainer.step([batch(0)], 1e-2)
        before = bits(trainer)
        handle = parts[1][0].register_full_backward_hook(lambda module, inward, outward: (inward[0] * bad,))
        found = trainer.step([batch(1)], 1e-2)
        handle.remove()
        assert not found.applied
        assert trainer.optimizer.skipped == 1
        assert_bits(bits(trainer), before)
        assert trainer.step([batch(1)], 1e-2).applied


@pytest.mark.parametrize("placement", [host(), everywhere("disk", "disk")])
def test_norm_weights_at_one_move_at_a_small_rate(placement, tmp_path):
    with open_(placement, disk=str(tmp_path)) as trainer:
        name = "blocks.0.norm.weight"
        assert torch.equal(trainer.state_dict()[name], torch.ones(WIDTH))
        for i in range(3):
            trainer.step([batch(i)], 1e-5)
        moved = (trainer.state_dict()[name] - 1).abs()
        assert (moved > 0).all()
        assert (moved < 4e-5).all()


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_the_number_of_threads_changes_no_bit_of_the_norm_and_the_update(precision):
    """Of ours: torch's own kernels sum bias gradients in an order that depends on it."""
    sizes = ((70_001,), (300, 257), (1,))
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(size, generator=generator) for size in sizes]
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        layers = [Layer("one", None, {f"p{i}": nn.Parameter(value.clone()) for i, value in enumerate(values)})]
        store = Store(layers, Format(precision), placement=Placement(("host",), ("host",), (True,)))
        store.lanes.optimizer_threads = threads
        store.initialise(lambda name, tensor: tensor.copy_(values[int(name[1:])]))
        optimizer = AdamW(store)
        optimizer.loss_scale = 1.0
        norms = []
        for step in range(3):
            gradients = {f"p{i}": (value * (step + 1)).to(store.dtype) for i, value in enumerate(values)}
            norms.append(grad_norm(list(gradients.values())).item())
            optimizer.step(Gradients(0.0, gradients, {}, norms[-1]), 1e-2)
        tensors = [store.read(name) for name in store.names()]
        moments = [store.moment(kind, name) for name in store.names() for kind in ("exp_avg", "exp_avg_sq")]
        found.append((norms, tensors + moments))
        store.lanes.close()
    for norms, tensors in found[1:]:
        assert norms == found[0][0]
        assert all(torch.equal(a, b) for a, b in zip(tensors, found[0][1], strict=True))


def test_modules_on_the_meta_device_start_from_what_is_loaded():
    want = copy.deepcopy(modules())
    values = {}
    with open_(parts=want) as trainer:
        values = trainer.state_dict()
        loss = trainer.step([batch(0)], 1e-2).loss
    with torch.device("meta"):
        embed, blocks, head = modules()
    for block in blocks:
        block.shift = torch.linspace(0, 1, WIDTH)
    with open_(host(), (embed, blocks, head)) as trainer:
        trainer.load(values.__getitem__)
        assert trainer.step([batch(0)], 1e-2).loss == loss


def test_mistakes_are_refused_by_name():
    embed, blocks, head = modules()
    with pytest.raises(InputError, match=r"blocks\.1 must be a torch\.nn\.Module, got function"):
        open_(parts=(embed, [blocks[0], lambda x: x], head))
    with pytest.raises(InputError, match="wanted a placement of 5 layers, got one of 3"):
        open_(Placement.resident(3))
    with pytest.raises(InputError, match=r"placement.boundary, or a sample"):
        open_(host(activations="host"))
    with pytest.raises(InputError, match=r"blocks.0.0 keeps running statistics"):
        open_(parts=(embed, [nn.Sequential(nn.BatchNorm1d(5))], head))
    blocks[2].linear.bias.requires_grad_(False)
    with pytest.raises(InputError, match=r"blocks.2.linear.bias must require a gradient"):
        open_(parts=(embed, blocks, head))
    with torch.device("meta"), pytest.raises(InputError, match=r"blocks.0.shift must have its values"):
        open_()


def test_wrong_batches_are_refused_and_harmless():
    with open_(host(activations="host", micro_batches=2), sample=batch(0)[0]) as trainer:
        with pytest.raises(InputError, match="at least one micro-batch"):
            trainer.step([], 1e-2)
        with pytest.raises(InputError, match=r"batches\[0\] must be a pair"):
            trainer.step([batch(0)[0]], 1e-2)
        with pytest.raises(InputError, match=r"batches\[1\] must have as many ids as targets"):
            trainer.step([batch(0), (batch(0)[0], batch(0, size=1)[1])], 1e-2)
        with pytest.raises(InputError, match=r"at most 2 micro-batches .* got 3"):
            trainer.step([batch(i) for i in range(3)], 1e-2)
        with pytest.raises(InputError, match="wanted at most 384 bytes of activations a micro-batch"):
            trainer.step([batch(0, size=9), batch(0)], 1e-2)
        assert trainer.step([batch(0), batch(1)], 1e-2).applied
