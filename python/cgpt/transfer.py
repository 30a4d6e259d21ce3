"""From a tuned run to a larger model: `cgpt train --transfer-from RUN`.

The run's shape, its numbers and its peak learning rate are the base (cgpt.model.parametrization), so that what was
found on a small model serves a wide one (Yang et al. 2022, arXiv 2203.03466, algorithm 1). Without --model the run
stands for the preset as well: what is not asked otherwise is as it was there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from cgpt.model.parametrization import Base
from cgpt.model.presets import Preset
from cgpt.schedule import steps_for

if TYPE_CHECKING:
    from cgpt.recipe import Recipe
    from cgpt.train_flags import TrainConfig

KIND = "mup"  # unless another is asked for
CARRIED = ("data", "seq_len", "precision", "moments", "device", "seed", "eval_tokens")
LENGTH = ("steps", "batch_size", "batch_schedule", "seq_len")  # flags that make a run see other text, or more of it


def base_of_run(run: Recipe) -> Base:
    """What was tuned there."""
    return Base(run.shape, run.lr)


def as_preset(run: Recipe, config: TrainConfig) -> tuple[Preset, TrainConfig]:
    """The run in the place of a preset, and `config` with the run's flags where none was given."""
    flags = {name: getattr(run, name) for name in CARRIED}
    if config.seq_len is None:
        flags["micro_batch_size"] = run.micro_batch_size
    if all(getattr(config, name) is None for name in LENGTH):
        flags |= {"steps": run.steps, "warmup_tokens": run.warmup_tokens}
    preset = Preset(
        name=run.model,
        config=run.shape,
        batch_schedule=run.batch_schedule,
        steps=steps_for(run.tokens, run.batch_schedule, run.shape.seq_len),  # a preset's sequences are its longest
        lr=run.lr,
        warmup_tokens=run.warmup_tokens,
        decay=run.decay,
        adam_eps=run.eps,
        beta1=run.beta1,
        beta2=run.beta2,
        weight_decay=run.weight_decay,
        grad_clip=run.clip,
        min_lr_ratio=run.min_lr_ratio,
        parametrization=run.parametrization,
    )
    given = {name: value for name, value in flags.items() if getattr(config, name) is None}
    return preset, replace(config, **given)
