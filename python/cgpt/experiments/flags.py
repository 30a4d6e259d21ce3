"""What `cgpt coord-check`, `cgpt sweep` and `cgpt ablate` are asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cgpt.errors import InputError
from cgpt.model.parametrization import KINDS
from cgpt.train_flags import Int, Switch, Text, TrainConfig

Folder = Annotated[Path, tyro.conf.arg(metavar="DIR")]
Integers = Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT...")]
Floats = Annotated[tuple[float, ...], tyro.conf.arg(metavar="FLOAT...")]
Sizes = Annotated[tuple[int, ...] | None, tyro.conf.arg(metavar="INT...", help_behavior_hint="")]
File = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]
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


@dataclass(frozen=True)
class CoordCheck:
    """Whether activations, and what training adds to them, keep their size as a model grows in width or in depth.

    Small models that follow one base, that of the smallest size, take a few steps on one batch of text. Under mup all
    that is judged stays within 1.2 x over 4 x the width, under sp it does not; completep keeps it over depth too. A
    measurement: the exit code is 0 whatever it finds.
    """

    widths: Sizes = None
    """Widths to compare, the least of them the base's (default: 64 128 256); with --depths the one that all have."""
    depths: Sizes = None
    """Layers to compare, in place of widths: 4 8 16 shows what completep is for."""
    steps: int = 3
    """Optimizer steps."""
    seeds: int = 3
    """Models a size, averaged."""
    layers: Int = None
    """Of every model where widths are compared (default: 2)."""
    heads: int = 2
    """Of every model; they grow with the width."""
    parametrization: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="TEXT...", help_behavior_hint="")] = None
    """sp, mup, completep: one or several (default: mup sp, and over depths completep mup)."""
    lr: float = 6e-3
    """Of the base."""
    init_std: float = 0.08
    """Of the base."""
    embedding_scale: float = 10.0
    """Of the base."""
    data: Annotated[str, tyro.conf.arg(metavar="TEXT")] = "moby-dick"
    """As for train. Tokens are numbered by those that occur in the batch, so that the vocabulary is small."""
    precision: Annotated[Literal["fp32", "bf16"], tyro.conf.arg(metavar="{fp32,bf16}")] = "fp32"
    """Of weights and activations."""
    json: Switch = False
    """Print JSON: every row, and the verdict."""
    plot: File = None
    """Draw every quantity over the sizes, a line a step (.png, .svg, .pdf)."""
    out: File = None
    """Write the JSON into this file."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The parametrizations to look at."""
        return self.parametrization or (("completep", "mup") if self.depths else ("mup", "sp"))

    @property
    def grid(self) -> tuple[list[int], list[int]]:
        """(widths, depths), ascending; one of the two has a single value."""
        widths = self.widths or ((64,) if self.depths else (64, 128, 256))
        return sorted(widths), sorted(self.depths or (self.layers or 2,))

    def check(self) -> None:
        """Raises InputError, naming the flag, for what cannot be compared."""
        compared = "widths" if self.depths is None else "depths"
        values = getattr(self, compared)
        if values is not None and (len(values) < 2 or len(set(values)) < len(values)):
            raise InputError(f"--{compared}: wanted two or more, each once, got {_told(values)}")
        if self.depths is not None and self.widths is not None and len(self.widths) != 1:
            raise InputError(f"--widths: wanted one with --depths, got {_told(self.widths)}")
        if self.depths is not None and self.layers is not None:
            raise InputError("--layers: wanted it or --depths, got both")
        for name in ("steps", "seeds", "heads", "layers", "lr", "init_std", "embedding_scale"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"--{name.replace('_', '-')}: wanted a number above 0, got {value}")
        widths, depths = self.grid
        for width in widths:
            if width < 1 or width % self.heads:
                raise InputError(f"--widths: wanted multiples of the {self.heads} heads, got {width}")
        if depths[0] < 1:
            raise InputError(f"--depths: wanted numbers above 0, got {depths[0]}")
        if len(set(self.kinds)) < len(self.kinds) or not set(self.kinds) <= set(KINDS):
            raise InputError(
                f"--parametrization: wanted some of {', '.join(KINDS)}, each once, got {_told(self.kinds)}"
            )


def _told(values: Sequence) -> str:
    return " ".join(map(str, values)) or "none"
