"""Accelerate: prepare, accumulate, clip, save_state and load_state around our parts."""

import pytest
import torch
from torch.utils.data import DataLoader

pytest.importorskip("accelerate")

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState, PartialState

from cgpt_ext.optim import AdamW
from results import largest_difference, record
from tiny import batches, counted, gpt, loss_of

STEPS, ACCUMULATED = 10, 2


def reset():
    """Accelerate keeps its settings in the process; a run has its own."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(autouse=True)
def fresh():
    reset()
    yield
    reset()


class Run:
    def __init__(self, mine, data, precision="no"):
        reset()
        self.accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=ACCUMULATED)
        model = gpt(mine)
        optimizer = (AdamW if mine else torch.optim.AdamW)(model.parameters(), lr=0.02)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.03, total_steps=30)
        loader = DataLoader(torch.cat(data), batch_size=len(data[0]))
        self.model, self.optimizer, self.scheduler, self.loader = self.accelerator.prepare(
            model, optimizer, scheduler, loader
        )
        self.norms = []

    def train(self, skip=0, stop=None):
        """A step every ACCUMULATED batches; returns the loss of every batch."""
        losses = []
        loader = self.accelerator.skip_first_batches(self.loader, skip) if skip else self.loader
        for i, batch in enumerate(loader, skip):
            if i == stop:
                break
            with self.accelerator.accumulate(self.model):
                loss = loss_of(self.model, batch)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.norms.append(float(self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)))
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_losses_are_torchs(precision):
    data = batches(STEPS * ACCUMULATED)
    with counted() as calls:
        theirs = Run(False, data, precision)
        want = theirs.train()
    assert not calls
    with counted() as calls:
        mine = Run(True, data, precision)
        got = mine.train()
    forwards = 2 * len(data)
    assert calls == {"attention": forwards, "gelu_mlp": forwards, "layer_norm": 5 * len(data), "adamw": STEPS}
    assert isinstance(mine.optimizer.optimizer, AdamW)
    difference = largest_difference(got, want)
    assert mine.norms == pytest.approx(theirs.norms, rel=1e-4 if precision == "no" else 0.05)
    if precision == "no":
        record("accelerate", sorted(calls), STEPS, difference)
    assert difference < (1e-3 if precision == "no" else 0.02)  # bf16 products, two orders of summation


@pytest.mark.parametrize("first", [True, False], ids=["ours", "torchs"])
def test_a_run_resumes_from_save_state(first, tmp_path):
    """Ours goes on to the bit; a run that torch's optimizer began goes on in ours as it would have gone on."""
    data = batches(12)
    straight = Run(first, data)
    want = straight.train()
    before = Run(first, data)
    losses = before.train(stop=6)
    before.accelerator.save_state(tmp_path)
    after = Run(True, data)
    after.accelerator.load_state(tmp_path)
    losses += after.train(skip=6)
    assert losses == (want if first else pytest.approx(want, abs=1e-3))
    rates = [run.scheduler.get_last_lr()[0] for run in (after, straight)]
    assert rates[0] == rates[1]


@pytest.mark.parametrize("fused", [None, True])
def test_a_loss_scale_that_overflows_skips_the_step(fused):
    Accelerator(cpu=True)
    model, data = gpt(True), batches(2)
    scaler = torch.amp.GradScaler("cpu", init_scale=32.0)
    optimizer = AcceleratedOptimizer(AdamW(model.parameters(), lr=0.02, fused=fused), scaler=scaler)
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale(loss_of(model, data[0])).backward()
    model.wte.weight.grad[0, 0] = torch.inf
    optimizer.step()
    assert scaler.get_scale() == 16.0
    for param, kept in zip(model.parameters(), before, strict=True):
        assert torch.equal(param, kept)
    optimizer.zero_grad()
    scaler.scale(loss_of(model, data[1])).backward()
    optimizer.step()
    assert not torch.equal(model.wte.weight, before[0])
    assert not optimizer.step_was_skipped
