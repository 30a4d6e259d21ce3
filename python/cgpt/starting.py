"""Weights to go on from: what a model of Hugging Face's is imported as, and what `cgpt train --init PATH` starts with.

A config.json says nothing of how its model was trained, so an imported run has the numbers of the preset nearest in
parameters. Fine-tuning has a tenth of the peak learning rate, where published runs ended theirs.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cgpt.errors import InputError
from cgpt.model.huggingface import shape_of
from cgpt.model.presets import PRESETS, Preset

if TYPE_CHECKING:
    from cgpt.recipe import Recipe
    from cgpt.train_flags import TrainConfig

IMPORTED = "imported"  # in the place of the data's identity: where an imported run's weights came from
STEPS, SEQUENCES, LR_SHARE = 1000, 8, 0.1  # of fine-tuning, unless asked otherwise
DECIDED = (  # flags of what PATH has decided
    "model", "config", "width", "layers", "positions", "activation", "embedding_norm", "parametrization",
    "transfer_from",
)  # fmt: skip


def imported(folder: Path) -> dict[str, Any]:
    """The fields of the recipe under which the Hugging Face model in `folder` is imported; the file has been found to
    be JSON. Raises InputError, naming file and field, for a model that is none of ours."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_bytes())
        shape, kind = shape_of(values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    near = min(
        (preset for preset in PRESETS.values() if preset.parametrization == kind),
        key=lambda preset: abs(math.log(preset.config.n_params / shape.n_params)),
    )
    return {
        "model": folder.resolve().name,
        "data": "",
        "shape": shape,
        "steps": 0,
        "batch_schedule": ((0, SEQUENCES),),
        "micro_batch_size": 1,
        "seq_len": shape.seq_len,
        "lr": near.lr,
        "warmup_tokens": 0,
        "decay": near.decay,
        "min_lr_ratio": near.min_lr_ratio,
        "beta1": near.beta1,
        "beta2": near.beta2,
        "eps": near.adam_eps,
        "weight_decay": near.weight_decay,
        "clip": near.grad_clip,
        "precision": "fp32",
        "device": "cpu",
        "seed": 0,
        "eval_every": 1,
        "eval_tokens": 65536,
        "checkpoint_every": 1,
        "keep": 1,
        "parametrization": kind,
    }


def as_start(run: Recipe, config: TrainConfig) -> tuple[Preset, TrainConfig]:
    """A run to start from in the place of a preset, and `config` with the steps of fine-tuning where none were given.

    Raises InputError for flags that ask for another model than the run's.
    """
    for name in DECIDED:
        if getattr(config, name) not in (None, False):
            flag = "--" + name.replace("_", "-")
            raise InputError(f"wanted it or {flag}, got both: the model is that of the weights")
    longest = run.shape.seq_len
    if config.seq_len is not None and config.seq_len > longest and run.shape.position_rows:
        raise InputError(f"wanted --seq-len of at most the model's {longest} positions, got {config.seq_len}")
    preset = Preset(
        name=run.model,
        config=run.shape,
        batch_schedule=((0, SEQUENCES),),
        steps=STEPS,
        lr=run.lr * LR_SHARE,
        warmup_tokens=STEPS * SEQUENCES * longest,
        decay="linear",
        adam_eps=run.eps,
        beta1=run.beta1,
        beta2=run.beta2,
        weight_decay=run.weight_decay,
        grad_clip=run.clip,
        parametrization=run.parametrization,
    )
    return preset, replace(config, steps=config.steps or STEPS)
