"""Runs of a small model by torch.optim.AdamW or ours, whose batches are functions of the step."""

import torch

from cgpt_ext.optim import AdamW

torch_adamw = torch.optim.AdamW
KINDS = {"torch": torch_adamw, "ours": AdamW}
BOTH_WAYS = [("torch", "ours"), ("ours", "torch")]


def model(dtype=torch.float32):
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.GELU(), torch.nn.Linear(16, 2)).to(dtype)


def groups(net):
    """Weights that decay, biases that do not, at learning rates of their own, and a group that waits to be filled."""
    return [
        {"params": [net[0].weight, net[2].weight], "weight_decay": 0.3, "betas": (0.8, 0.95)},
        {"params": [net[0].bias, net[2].bias], "weight_decay": 0.0, "lr": 0.03, "eps": 1e-6},
        {"params": []},
    ]


def train(net, optimizer, first, last, scheduler=None):
    """Steps `first` to `last`, whose batches are functions of the step; returns every loss."""
    losses = []
    for i in range(first, last):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        loss = net(x.to(net[0].weight.dtype)).float().square().mean()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step(loss.item()) if hasattr(scheduler, "best") else scheduler.step()
        losses.append(loss.item())
    return losses


def close(net, other, rtol=1e-5, atol=1e-6):
    for x, y in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)
