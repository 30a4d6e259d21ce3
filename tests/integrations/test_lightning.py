"""Lightning's Trainer: its closures, clipping, accumulation, schedulers and checkpoints around our parts."""

import logging
import warnings

import pytest
import torch
from torch.utils.data import DataLoader

pytest.importorskip("lightning")

import lightning
from lightning.pytorch.plugins import MixedPrecision

from cgpt_ext.optim import AdamW
from results import largest_difference, record
from tiny import batches, counted, gpt, loss_of

STEPS, ACCUMULATED = 10, 2


class Module(lightning.LightningModule):
    def __init__(self, mine, **options):
        super().__init__()
        self.model, self.kind, self.options = gpt(mine), AdamW if mine else torch.optim.AdamW, options
        self.losses = []

    def training_step(self, batch, _):
        loss = loss_of(self.model, batch)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        optimizer = self.kind(self.parameters(), lr=0.02, **self.options)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=12)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Manual(Module):
    """Manual optimization, whose optimizer is wrapped and takes closures too."""

    def __init__(self, mine):
        super().__init__(mine)
        self.automatic_optimization = False

    def training_step(self, batch, _):
        optimizer = self.optimizers()

        def closure():
            optimizer.zero_grad()
            loss = loss_of(self.model, batch)
            self.losses.append(loss.item())
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)


def fit(module, data, folder, *, resume=None, **options):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if not module.automatic_optimization:
        options = {"accumulate_grad_batches": 1, "gradient_clip_val": None, **options}
    options = {"accumulate_grad_batches": ACCUMULATED, "gradient_clip_val": 0.5, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, default_root_dir=folder, **{"max_epochs": 1, **options},
        )  # fmt: skip
        trainer.fit(module, DataLoader(data, batch_size=None), ckpt_path=resume)
    return trainer


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("clipping", ["norm", "value"])
def test_losses_are_torchs(precision, clipping, tmp_path):
    data = batches(STEPS * ACCUMULATED)
    options = {"precision": precision, "gradient_clip_algorithm": clipping}
    options["gradient_clip_val"] = {"norm": 0.5, "value": 0.01}[clipping]
    theirs, mine = Module(False), Module(True)
    with counted() as calls:
        fit(theirs, data, tmp_path, **options)
    assert not calls
    with counted() as calls:
        trainer = fit(mine, data, tmp_path, **options)
    assert trainer.global_step == STEPS
    forwards = 2 * len(data)
    assert calls == {"attention": forwards, "gelu_mlp": forwards, "layer_norm": 5 * len(data), "adamw": STEPS}
    difference = largest_difference(mine.losses, theirs.losses)
    if precision == "32-true":
        record("lightning", sorted(calls), STEPS, difference)
    assert difference < (1e-3 if precision == "32-true" else 0.02)  # bf16 products, two orders of summation


@pytest.mark.parametrize("first", [True, False], ids=["ours", "torchs"])
def test_a_run_resumes_from_lightnings_checkpoint(first, tmp_path):
    """Ours goes on to the bit; a run that torch's optimizer began goes on in ours as it would have gone on."""
    data = batches(10)
    straight, before, after = Module(first), Module(first), Module(True)
    fit(straight, data, tmp_path, max_epochs=2)
    fit(before, data, tmp_path).save_checkpoint(tmp_path / "run.ckpt")
    trainer = fit(after, data, tmp_path, max_epochs=2, resume=tmp_path / "run.ckpt")
    assert trainer.global_step == STEPS
    losses = before.losses + after.losses
    assert losses == (straight.losses if first else pytest.approx(straight.losses, abs=1e-3))


def test_manual_optimization_with_closures(tmp_path):
    data = batches(STEPS)
    theirs, mine = Manual(False), Manual(True)
    fit(theirs, data, tmp_path)
    with counted() as calls:
        fit(mine, data, tmp_path)
    assert calls["adamw"] == len(mine.losses) == STEPS  # every closure is called, once
    assert largest_difference(mine.losses, theirs.losses) < 1e-3


def test_loss_scale(tmp_path):
    """16-mixed: Lightning clips only where GradScaler unscales, so not with torch's fused=True and not with ours."""

    def losses(mine, clip, **options):
        module = Module(mine, **options)
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))
        fit(module, batches(STEPS), tmp_path, plugins=[plugin], accumulate_grad_batches=1, gradient_clip_val=clip)
        return module.losses

    assert largest_difference(losses(True, 0.5), losses(False, 0.5)) < 0.02
    assert largest_difference(losses(True, None, fused=True), losses(False, None, fused=True)) < 0.02
    for mine in (True, False):
        with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
            losses(mine, 0.5, fused=True)
