"""What `cgpt plan` is asked: flags alone, so that `cgpt --help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from cgpt.errors import InputError
from cgpt.stream.format import Format
from cgpt.train_flags import Float, Int, Switch, Text

TARGETS = ("flops", "budget", "params", "tokens", "loss")
OF_TARGETS = ("inference_tokens", "law", "utilisation", "vocab_size", "seq_len", "write")

Link = Annotated[
    Literal["gen5", "gen4", "copy"] | None, tyro.conf.arg(metavar="{gen5,gen4,copy}", help_behavior_hint="")
]
File = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]


@dataclass(frozen=True)
class Plan:
    """What to train with what there is; or where a model's memory would live on a machine that need not be this one.

    With --flops, --budget, --params, --tokens or --loss: a model, its tokens and recipe, the loss to expect, time,
    energy and money. One of them asks for the best, two for the point that they make. Without: how fast --model would
    train; on a range of --count devices how speed grows with them, where that stops and for want of what. Layer
    weights, gradients and optimizer state go to the device, the host and a disk, as far as each has room. What cannot
    fit is refused with the nearest setting that can: a flag to change.
    """

    model: Text = None
    """A preset, as `cgpt info` lists them (default: 13B)."""
    flops: Float = None
    """Training FLOPs to spend, by the published convention."""
    budget: Text = None
    """What there is to spend: "1e6 A100-hours", "100 PF-days", "5000 USD", "10 MWh"."""
    params: Float = None
    """Parameters to have."""
    tokens: Float = None
    """Tokens to train on."""
    loss: Float = None
    """Nats per token to reach."""
    inference_tokens: Float = None
    """Tokens that the model will read and write in its life: with --loss alone the plan is the cheapest over training
    and inference, else that is shown beside it."""
    law: Text = None
    """That tells losses and the best use: cerebras, cerebras-mup, chinchilla, chinchilla-refit, kaplan, or FILE.json of
    `cgpt fit --json` (default: cerebras; chinchilla-refit away from 20 tokens a parameter)."""
    count: Text = None
    """Devices side by side, each with a share of the batch and of the state (default: 1). Or a range, 1..64, of which
    the powers of two are tried and both ends."""
    network: Text = None
    """Between machines, for each device: 400g, 200g, 100g, nvlink4, nvlink3, pcie or memory, or bytes received a second
    such as 50GB (default: the device's usual)."""
    node: Int = None
    """Devices that share a machine, its --host-memory, --host-bandwidth and --disk-space, and links of its own
    (default: 1)."""
    utilisation: Float = None
    """Share of the devices' peak (default: as forecast for the shape; for a budget of hours, money or energy what the
    device sustains)."""
    vocab_size: Int = None
    """Of the proposed model (default: 50257)."""
    seq_len: Int = None
    """Of the proposed model (default: 2048)."""
    plot: File = None
    """Draw the laws' frontiers, the published models and the plan; or speed over a range of devices (.png, .svg,
    .pdf)."""
    write: File = None
    """Write the plan as a file for `cgpt train --config` (.json)."""
    device: Text = None
    """h100, h200, a100-80gb, rtx-4090 or cpu (default: the budget's, else h100)."""
    device_memory: Text = None
    """Of it to use, such as 4GiB or 80GB (default: what the device has)."""
    host_memory: Text = None
    """Of the host to use (default: what this machine has left; for a proposal as much as it takes)."""
    disk_space: Text = None
    """For what the host has no room for, on an NVMe drive (default: none)."""
    link: Link = None
    """Between a host and its device: PCIe 5.0 or 4.0, or a copy in memory (default: the device's)."""
    host_bandwidth: Text = None
    """Of the host's memory for AdamW, a second, such as 150GB (default: a usual host's of the device)."""
    sustained: Float = None
    """Share of the device's peak that its products reach (default: measured by others on the device)."""
    tokens_per_step: Int = None
    """Tokens between two updates (default: the preset's largest batch). With all in one visit gradients are half as
    large."""
    tokens_per_visit: Int = None
    """Tokens that a layer's weights serve each time they come; activations grow with it (default: the fastest)."""
    precision: Annotated[Literal["bf16", "fp32", "fp16"], tyro.conf.arg(metavar="{bf16,fp32,fp16}")] = "bf16"
    """Of weights and activations."""
    moments: Annotated[Literal["fp32", "bf16"], tyro.conf.arg(metavar="{fp32,bf16}")] = "fp32"
    """Of AdamW's: 12 or 8 bytes of state a parameter."""
    json: Switch = False
    """Print JSON."""

    @property
    def target(self) -> str | None:
        """The first of TARGETS that is given."""
        return next((name for name in TARGETS if getattr(self, name) is not None), None)

    @property
    def counts(self) -> tuple[int, ...] | None:
        """Of a range of --count, ascending; None for one number. Raises InputError."""
        first, dots, last = (self.count or "").partition("..")
        if not dots:
            return None
        low, high = _count(first), _count(last)
        if low > high:
            raise InputError(f"--count: wanted a range such as 1..64, got {self.count}")
        powers = (1 << power for power in range(low.bit_length(), high.bit_length() + 1))
        return (low, *(n for n in powers if low < n < high), *([high] if high > low else []))

    @property
    def one_count(self) -> int:
        """Of --count, where it is no range. Raises InputError."""
        if self.count is not None and ".." in self.count:
            raise InputError(f"--count: wanted one number here, a range goes with --model, got {self.count}")
        return _count(self.count or "1")

    @property
    def machine(self) -> dict[str, Any]:
        """Arguments of `cgpt.planning.memory.problem`, but for the model and the device."""
        names = (
            "device_memory", "host_memory", "disk_space", "link", "sustained", "host_bandwidth", "tokens_per_step",
            "tokens_per_visit", "network", "node",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names} | {"format": Format(self.precision, self.moments)}

    def check_model(self) -> None:
        """Raises InputError where --model comes with flags of a proposal."""
        if self.target is not None:
            raise InputError(f"--model: wanted it or --{self.target}, got both")
        for name in OF_TARGETS:
            if getattr(self, name) is not None:
                flag = name.replace("_", "-")
                raise InputError(f"--{flag}: wanted --flops, --budget, --params, --tokens or --loss with it, got none")
        if self.plot is not None and self.counts is None:
            raise InputError("--plot: wanted --count 1..64, or --flops, --budget, --params, --tokens or --loss with it")


def _count(text: str) -> int:
    if not text.strip().isdecimal() or not int(text):
        raise InputError(f"--count: wanted a number above 0, or a range such as 1..64, got {text or 'nothing'}")
    return int(text)
