"""Lightning Fabric: modules and optimizer through fabric.setup, clipping, accumulation and checkpoints of its own."""

import warnings

import pytest
import torch

pytest.importorskip("lightning")

from lightning.fabric import Fabric

from cgpt_ext.optim import AdamW
from results import largest_difference, record
from tiny import batches, counted, gpt, loss_of

STEPS, ACCUMULATED = 10, 2
CLIPPING = {"norm": {"max_norm": 0.5}, "value": {"clip_val": 0.01}}


def start(mine, precision):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    model = gpt(mine)
    kind = AdamW if mine else torch.optim.AdamW
    return fabric, *fabric.setup(model, kind(model.parameters(), lr=0.02))


def train(fabric, model, optimizer, data, clipping="norm"):
    """A step every ACCUMULATED batches; returns the loss of every batch."""
    losses = []
    for i, batch in enumerate(data):
        last = i % ACCUMULATED == ACCUMULATED - 1
        with fabric.no_backward_sync(model, enabled=not last):
            loss = loss_of(model, batch)
            fabric.backward(loss / ACCUMULATED)
        losses.append(loss.item())
        if last:
            fabric.clip_gradients(model, optimizer, **CLIPPING[clipping])
            optimizer.step()
            optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("clipping", CLIPPING)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_losses_are_torchs(precision, clipping):
    data = batches(STEPS * ACCUMULATED)
    with counted() as calls:
        want = train(*start(False, precision), data, clipping)
    assert not calls
    with counted() as calls:
        got = train(*start(True, precision), data, clipping)
    forwards = 2 * len(data)
    assert calls == {"attention": forwards, "gelu_mlp": forwards, "layer_norm": 5 * len(data), "adamw": STEPS}
    difference = largest_difference(got, want)
    if precision == "32-true":
        record("lightning Fabric", sorted(calls), STEPS, difference, version=version())
    assert difference < (1e-3 if precision == "32-true" else 0.02)  # bf16 products, two orders of summation


def test_a_run_resumes_from_fabrics_checkpoint(tmp_path):
    data = batches(12)
    straight = train(*start(True, "32-true"), data)
    fabric, model, optimizer = start(True, "32-true")
    losses = train(fabric, model, optimizer, data[:6])
    fabric.save(tmp_path / "run.ckpt", {"model": model, "optimizer": optimizer})
    fabric, model, optimizer = start(True, "32-true")
    fabric.load(tmp_path / "run.ckpt", {"model": model, "optimizer": optimizer})
    losses += train(fabric, model, optimizer, data[6:])
    assert losses == straight


def test_a_closure_is_called_once():
    fabric, model, optimizer = start(True, "32-true")
    batch, called = batches(1)[0], []

    def closure():
        called.append(1)
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        fabric.backward(loss)
        return loss

    first, second = optimizer.step(closure), optimizer.step(closure)
    assert len(called) == 2
    assert second < first


def version():
    import lightning

    return lightning.__version__
