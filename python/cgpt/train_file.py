"""A preset in a file, for `cgpt train --config FILE`: JSON, as `cgpt plan --write` leaves it.

    {"name": ..., "shape": {n_layer, n_head, d_model, ...}, "batch_schedule": [[0, 120]], "steps": ..., "lr": ...,
     "warmup_tokens": ..., "decay": ..., "adam_eps": ..., ..., "flags": {"device": "cuda", ...}}

shape is a GPTConfig, the others are fields of a Preset; those with defaults may be missing. flags are of `cgpt train`,
and any that is given there as well has precedence. "plan" is left unread.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from cgpt.errors import InputError
from cgpt.model.config import GPTConfig
from cgpt.model.parametrization import KINDS as PARAMETRIZATIONS
from cgpt.model.presets import Preset
from cgpt.schedule import DECAYS, check_batch_schedule

TYPES = {"str": str, "int": int, "float": (int, float)}  # of a Preset's fields, by their annotations
AT_LEAST = {"warmup_tokens": 0, "weight_decay": 0, "grad_clip": 0, "min_lr_ratio": 0}  # the others are above 0
CHOICES = {"decay": DECAYS, "parametrization": PARAMETRIZATIONS}
FLAGS = {
    "device": str,
    "precision": str,
    "moments": str,
    "placement": str,
    "device_memory": str,
    "host_memory": str,
    "micro_batch_size": int,
    "seed": int,
}


def to_dict(preset: Preset, flags: Mapping[str, Any]) -> dict:
    """What `read_train_file` reads, as JSON values."""
    values = asdict(preset)
    return {"name": values.pop("name"), "shape": values.pop("config"), **values, "flags": dict(flags)}


def read_train_file(path: Path) -> tuple[Preset, dict[str, Any]]:
    """(preset, flags). Raises InputError, naming the file and the field, for what is no such file."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: wanted JSON, got something else ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("shape"), dict):
        raise InputError(f"{path}: wanted a preset with a shape, as `cgpt plan --write` leaves it, got another file")
    try:
        return _preset(content), _flags(content.get("flags", {}))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _preset(content: dict) -> Preset:
    values = {name: value for name, value in content.items() if name not in ("shape", "flags", "plan")}
    kinds = {field.name: field for field in fields(Preset) if field.name != "config"}
    needed = {name for name, field in kinds.items() if field.default is MISSING}
    for what, names in (("lacks", needed - set(values)), ("has unknown", set(values) - set(kinds))):
        if names:
            raise InputError(f"the file {what} {', '.join(sorted(names))}")
    for name, value in values.items():
        kind = TYPES.get(str(kinds[name].type).removeprefix("<class '").removesuffix("'>"))
        if kind is not None:
            _is(name, value, kind)
        if name in CHOICES and value not in CHOICES[name]:
            raise InputError(f"{name}: wanted one of {', '.join(CHOICES[name])}, got {value}")
        least = AT_LEAST.get(name)
        if (isinstance(value, int | float) and not (value > 0 or value == least)) or value == math.inf:
            wanted = "a number above 0" if least is None else "a number of at least 0"
            raise InputError(f"{name}: wanted {wanted}, got {value}")
    schedule = values["batch_schedule"]
    pairs = isinstance(schedule, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in schedule)
    if not pairs or not all(type(number) is int for pair in schedule for number in pair):
        raise InputError(f"batch_schedule: wanted [[from_tokens, sequences], ...], got {schedule!r}")
    check_batch_schedule(schedule)
    values["batch_schedule"] = tuple((start, batch) for start, batch in schedule)
    return Preset(config=GPTConfig.from_dict(content["shape"]), **values)


def _flags(flags: Any) -> dict[str, Any]:
    if not isinstance(flags, dict) or not set(flags) <= set(FLAGS):
        raise InputError(f"flags: wanted some of {', '.join(FLAGS)}, got {flags!r}")
    for name, value in flags.items():
        _is(name, value, FLAGS[name])
    return flags


def _is(name: str, value: Any, kind: type | tuple[type, ...]) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        wanted = {str: "a text", int: "a whole number"}.get(kind, "a number")
        raise InputError(f"{name}: wanted {wanted}, got {value!r}")
