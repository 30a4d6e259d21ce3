"""What `cgpt sweep` and `cgpt ablate` are asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cgpt.recipe import Int, Switch, Text, TrainConfig

Folder = Annotated[Path, tyro.conf.arg(metavar="DIR")]
Integers = Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT...")]
Floats = Annotated[tuple[float, ...], tyro.conf.arg(metavar="FLOAT...")]
Words = Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT...")]


@dataclass(frozen=True)
class Runs:
    """Flags of every experiment: what all of its runs share."""

    out: Folder
    """Folder for the runs, their results and a picture. The same command again goes on where it stopped."""
    model: Annotated[str, tyro.conf.arg(metavar="TEXT")] = "tiny"
    """A preset: depth, heads and the rest of the recipe."""
    data: Text = None
    """As for train; a prepared folder with a small vocabulary makes small models fast (default: moby-dick)."""
    steps: Int = None
    """Optimizer steps of each run (default: the preset's)."""
    batch_size: Int = None
    """Sequences a step (default: the preset's)."""
    seq_len: Int = None
    """Tokens a sequence (default: the preset's)."""
    eval_tokens: Int = None
    """Held-out tokens that the loss is measured on (default: 65536)."""
    seeds: Integers = (0,)
    """Each point is trained from every one of them."""
    json: Switch = False
    """Print JSON."""

    def config(self) -> TrainConfig:
        """What all runs share, as for `cgpt train`. Checkpoints and held-out losses at the end alone."""
        huge = 1 << 40
        return TrainConfig(
            model=self.model,
            data=self.data,
            steps=self.steps,
            batch_size=self.batch_size,
            seq_len=self.seq_len,
            eval_tokens=self.eval_tokens,
            eval_every=huge,
            checkpoint_every=huge,
            keep=1,
            out=self.out / "run",
        )


@dataclass(frozen=True)
class Sweep(Runs):
    """Find the best learning rate of small models at several widths, and see whether it stays there.

    Under muP what is best for the narrowest is best for all: tune that one, then train a wide one with
    `cgpt train --transfer-from RUN`. With several values of --init-std and --embedding-scale, all combinations are
    tried, or --random draws between the least and the largest of each.
    """

    widths: Integers = (48, 96, 192, 384)
    """Of the models, multiples of the preset's head width. The narrowest is the base, the same by every rule."""
    lr: Floats = (7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2, 4.8e-2)
    """Peak learning rates."""
    init_std: Floats = (0.08,)
    """Of the base's initial weights."""
    embedding_scale: Floats = (10.0,)
    """Factor on the embeddings."""
    parametrization: Words = ("mup",)
    """sp, mup, completep: one or several."""
    random: Int = None
    """So many random points instead of all combinations."""


@dataclass(frozen=True)
class Ablate(Runs):
    """Train every combination of positions, activation and embedding norm on equal tokens; what is each worth?"""

    positions: Words = ("learned", "none", "rotary", "alibi")
    """How tokens know their place."""
    activation: Words = ("gelu", "swiglu")
    """Of the MLP; swiglu is 2/3 as wide, for about as many parameters."""
    embedding_norm: Words = ("off", "on")
    """A LayerNorm behind the embedding."""
    seeds: Integers = (0, 1)
    """Each combination is trained from every one of them: their spread says which differences mean something."""
