"""Flags of `cgpt plot`. Imports no torch, so that --help is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cgpt.train_flags import Int, Switch, Text

Runs = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...", help_behavior_hint="")]


@dataclass(frozen=True)
class Plot:
    """Several runs in one picture: training and held-out loss over tokens, FLOPs, time or steps.

    Runs may be unfinished or resumed. Nats per token compare runs of one vocabulary; --y bits-per-byte compares any
    that are held out on the same text.
    """

    runs: Runs
    """Run folders, or folders of them."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """The picture to write (.png, .svg, .pdf)."""
    x: Literal["tokens", "flops", "time", "steps"] = "tokens"
    """flops: by the published convention. time: of training steps alone."""
    y: Literal["loss", "bits-per-byte", "lr", "grad-norm", "tokens-per-second"] = "loss"
    """loss: in nats per token."""
    smooth: Int = None
    """Steps that a training curve is averaged over, 1 for none (default: a fortieth of the run)."""
    log_x: Switch = False
    """A logarithmic axis, as --x flops and runs of very different lengths have anyway."""
    title: Text = None
    """Above the picture (default: none)."""
