"""What the flags of a run come to: defaults, presets, a run to resume.

Precedence: a flag that was given, the run being resumed, the preset, the default named in the flag's help. Imports no
torch, so that `cgpt --help` is quick.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from cgpt.errors import InputError
from cgpt.files import write_atomically
from cgpt.model.config import ACTIVATIONS, POSITIONS, GPTConfig, resized, variant
from cgpt.model.parametrization import CEREBRAS, KINDS, parametrize
from cgpt.model.presets import PRESETS, Preset
from cgpt.schedule import batch_size, check_batch_schedule, steps_for, tokens_after
from cgpt.starting import IMPORTED, as_start, imported
from cgpt.stream.format import Format
from cgpt.stream.limits import parse_bytes
from cgpt.train_file import read_train_file
from cgpt.train_flags import TrainConfig
from cgpt.transfer import KIND, as_preset, base_of_run

CONFIG = "config.json"
SHAPE = {  # flags that are fields of the model's config, and their names there
    "width": "d_model",
    "layers": "n_layer",
    "positions": "positions",
    "activation": "activation",
    "embedding_norm": "embedding_norm",
}
HUGGING_FACE = ("model_type", "architectures", "n_embd")  # a config.json with any of them is theirs
RUNS = Path("runs")
DEVICES = ("cpu", "cuda")

# What may change when a run is resumed; everything else is what makes it that run.
CHANGEABLE = (
    "steps", "checkpoint_every", "keep", "eval_every", "eval_tokens", "device", "micro_batch_size",
    "placement", "device_memory", "host_memory", "disk",
)  # fmt: skip
# What no recipe holds.
APART = ("config", "out", "resume", "timeline", "track", "project", "devices", "max_restarts", "hang_timeout")

WARMUP_PART = 5  # warm-up takes at most a fifth of a run that is shorter than its preset's
MICRO_BATCH_TOKENS = 8192  # activations of one micro-batch of the 111M model: about 1.6 GB in bf16


@dataclass(frozen=True)
class Recipe:
    """A run in full: nothing left to look up. Field meanings as in TrainConfig; `shape` is the model's own."""

    model: str
    data: str
    shape: GPTConfig
    steps: int
    batch_schedule: tuple[tuple[int, int], ...]
    micro_batch_size: int
    seq_len: int
    lr: float
    warmup_tokens: int
    decay: str
    min_lr_ratio: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip: float
    precision: str
    device: str
    seed: int
    eval_every: int
    eval_tokens: int
    checkpoint_every: int
    keep: int
    placement: str = "resident"
    device_memory: int | None = None
    host_memory: int | None = None
    disk: str | None = None
    moments: str = "fp32"
    parametrization: str = "sp"
    transfer_from: str | None = None
    init: str | None = None

    @property
    def format(self) -> Format:
        """How weights and optimizer state are kept."""
        return Format(self.precision, self.moments)

    @property
    def tokens(self) -> int:
        """Tokens seen in the whole run."""
        return tokens_after(self.steps, self.batch_schedule, self.seq_len)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `from_dict` gives back an equal recipe."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        known = {field.name for field in fields(cls)}
        needed = {field.name for field in fields(cls) if field.default is MISSING}
        if not needed <= set(values) <= known:
            raise InputError(f"recipe: wanted the fields {', '.join(sorted(known))}, got {', '.join(sorted(values))}")
        schedule = tuple((start, batch) for start, batch in values["batch_schedule"])
        return cls(**{**values, "shape": GPTConfig.from_dict(values["shape"]), "batch_schedule": schedule})


def resolve(config: TrainConfig, vocab_size: int | None = None) -> Recipe:
    """The recipe of a new run. Raises InputError, naming the flag, for values that make no run.

    vocab_size: of the data's own vocabulary (default: the preset's).
    """
    preset, config = _preset(config)
    _check(config)
    if config.init is not None:
        vocab_size = None
    seq_len = config.seq_len or preset.config.seq_len
    shape, kind, lr = _shape(config, preset)
    schedule = _schedule(config) or preset.batch_schedule
    steps = config.steps or steps_for(preset.tokens, schedule, seq_len)
    total = tokens_after(steps, schedule, seq_len)
    warmup = min(preset.warmup_tokens, total // WARMUP_PART)
    recipe = Recipe(
        model=preset.name,
        data=config.data or "moby-dick",
        shape=replace(shape, seq_len=max(seq_len, shape.seq_len)),
        steps=steps,
        batch_schedule=schedule,
        micro_batch_size=config.micro_batch_size or max(1, MICRO_BATCH_TOKENS // seq_len),
        seq_len=seq_len,
        lr=_given(config.lr, lr),
        warmup_tokens=_given(config.warmup_tokens, warmup),
        decay=config.decay or preset.decay,
        min_lr_ratio=_given(config.min_lr_ratio, preset.min_lr_ratio),
        beta1=preset.beta1,
        beta2=preset.beta2,
        eps=preset.adam_eps,
        weight_decay=_given(config.weight_decay, preset.weight_decay),
        clip=_given(config.clip, preset.grad_clip),
        precision=config.precision or "bf16",
        moments=config.moments or "fp32",
        parametrization=kind,
        transfer_from=config.transfer_from and str(config.transfer_from),
        init=config.init and str(config.init),
        device=config.device or "cpu",
        seed=_given(config.seed, 0),
        eval_every=config.eval_every or max(1, steps // 10),
        eval_tokens=config.eval_tokens or 65536,
        checkpoint_every=config.checkpoint_every or max(1, min(1000, steps // 10)),
        keep=config.keep or 2,
        **_where(config),
    )
    if vocab_size is not None:
        recipe = replace(recipe, shape=replace(recipe.shape, vocab_size=vocab_size))
    if recipe.warmup_tokens > recipe.tokens:
        raise InputError(f"--warmup-tokens: wanted at most the run's {recipe.tokens}, got {recipe.warmup_tokens}")
    return recipe


def _preset(config: TrainConfig) -> tuple[Preset, TrainConfig]:
    """The preset that is asked for, and `config` with the flags that come with it where none was given."""
    if config.init is not None:
        try:
            return as_start(read_start(config.init), config)
        except InputError as error:
            raise InputError(f"--init: {error}") from error
    if config.config is not None:
        if config.model is not None:
            raise InputError("--config: wanted it or --model, got both")
        preset, flags = read_train_file(config.config)
        return preset, replace(config, **{name: _given(getattr(config, name), flags[name]) for name in flags})
    if config.model is None and config.transfer_from is not None:
        return as_preset(_tuned(config.transfer_from), config)
    name = config.model or "tiny"
    if name not in PRESETS:
        raise InputError(f"--model: wanted one of {', '.join(PRESETS)}, got {name}")
    return PRESETS[name], config


def resolve_resumed(config: TrainConfig, saved: Recipe, folder: Path) -> Recipe:
    """The saved recipe with what was asked to change. Raises InputError for what may not."""
    _check(config)
    changed = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if value is None or value is False or field.name in APART:
            continue
        value = _where(config).get(field.name, value)
        if field.name in ("batch_size", "batch_schedule"):
            before, value = saved.batch_schedule, _schedule(config)
        else:
            before = getattr(saved.shape, SHAPE[field.name]) if field.name in SHAPE else getattr(saved, field.name)
            value = str(value) if field.name in ("transfer_from", "init") else value
        if value == before:
            continue
        if field.name not in CHANGEABLE:
            flag = "--" + field.name.replace("_", "-")
            raise InputError(f"{flag}: the run in {folder} has {before}, got {value}; a resumed run keeps its recipe")
        changed[field.name] = value
    return replace(saved, **changed)


def _shape(config: TrainConfig, preset: Preset) -> tuple[GPTConfig, str, float]:
    """The model, the parametrization of its numbers, and the peak learning rate that they were tuned with."""
    d_head = preset.config.d_head
    _bound("width", config.width, lambda width: width % d_head == 0, f"a multiple of the heads' {d_head}")
    same = resized(preset.config, config.width, config.layers)
    shape = variant(same, config.positions, config.activation, config.embedding_norm or None)
    if config.transfer_from is not None:
        kind, base = config.parametrization or KIND, base_of_run(_tuned(config.transfer_from))
        return parametrize(shape, kind, base), kind, base.lr
    kind = config.parametrization or preset.parametrization
    if kind == preset.parametrization and (kind == "sp" or same == preset.config):
        return shape, kind, preset.lr
    return parametrize(shape, kind, CEREBRAS), kind, preset.lr if kind == preset.parametrization else CEREBRAS.lr


def _tuned(folder: Path) -> Recipe:
    try:
        recipe, identity = read_config(folder)
    except InputError as error:
        raise InputError(f"--transfer-from: {error}") from error
    if IMPORTED in identity:
        wanted = "wanted a run that was tuned, got imported weights, which --init takes"
        raise InputError(f"--transfer-from: {folder}: {wanted}")
    return recipe


def _where(config: TrainConfig) -> dict[str, Any]:
    """The flags that say where layers live, as the recipe has them. Raises InputError for what is no size."""
    sizes = {"device_memory": config.device_memory, "host_memory": config.host_memory}
    found: dict[str, Any] = {
        name: size and parse_bytes(size, f"--{name.replace('_', '-')}") for name, size in sizes.items()
    }
    found["disk"] = None if config.disk is None else str(config.disk)
    given = any(value is not None for value in found.values())
    return {"placement": config.placement or ("auto" if given else "resident"), **found}


def batch_at(recipe: Recipe, tokens: int) -> int:
    """Sequences of the step that starts with `tokens` seen."""
    return batch_size(tokens, recipe.batch_schedule)


def new_folder(config: TrainConfig, recipe: Recipe) -> Path:
    """Where a new run goes: --out if it holds no run, else the first free name. Nothing is ever overwritten."""
    if config.out is not None:
        if config.out.exists() and not config.out.is_dir():
            raise InputError(f"{config.out}: wanted a folder for the run, got a file")
        if config.out.is_dir() and any(path.suffix not in (".tmp", ".lock") for path in config.out.iterdir()):
            raise InputError(f"{config.out}: wanted a new or empty folder, got one in use; --resume goes on with a run")
        return config.out
    name = _run_name(recipe.model, recipe.data)
    taken = _numbers(name)
    return RUNS / (f"{name}-{max(taken) + 1}" if taken else name)


def resumed_folder(config: TrainConfig) -> Path:
    """The run to go on with: --out, or the newest of its name. Raises InputError where there is none."""
    if config.out is not None:
        if not (config.out / CONFIG).is_file():
            raise InputError(f"{config.out}: wanted a run to resume ({CONFIG}), got none")
        return config.out
    preset, config = _preset(config)
    name = _run_name(preset.name, config.data or "moby-dick")
    taken = _numbers(name)
    if not taken:
        raise InputError(f"{RUNS / name}: wanted a run to resume, got none")
    return RUNS / (name if max(taken) == 1 else f"{name}-{max(taken)}")


def write_config(folder: Path, recipe: Recipe, dataset: dict) -> None:
    """Writes `folder`/config.json: the recipe, and the data's identity."""
    content = {"recipe": recipe.to_dict(), "dataset": dataset}
    write_atomically(folder / CONFIG, json.dumps(content, indent=1).encode() + b"\n")


def read_config(folder: Path) -> tuple[Recipe, dict]:
    """(recipe, data's identity) of a run. Raises InputError where the folder holds no run or a damaged one."""
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"{folder}: wanted a run folder ({CONFIG}), got {'none' if folder.is_dir() else 'no folder'}")
    if is_huggingface(folder):
        wanted = f"wanted a run folder, got a Hugging Face model; cgpt import {folder} --out RUN makes one"
        raise InputError(f"{folder}: {wanted}")
    try:
        content = json.loads(path.read_bytes())
        return Recipe.from_dict(content["recipe"]), dict(content["dataset"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: wanted a run's configuration, got a damaged file ({error})") from error


def read_resumed(folder: Path) -> tuple[Recipe, dict]:
    """`read_config` of a run that was begun here. Raises InputError for one that was imported, which has no moments."""
    recipe, identity = read_config(folder)
    if IMPORTED in identity:
        raise InputError(f"{folder}: wanted a run to resume, got imported weights; cgpt train --init {folder} goes on")
    return recipe, identity


def is_huggingface(folder: Path) -> bool:
    """Whether `folder` holds a model as Hugging Face saves it, going by its config.json."""
    try:
        content = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and "recipe" not in content and not content.keys().isdisjoint(HUGGING_FACE)


def check_start(folder: Path) -> None:
    """Raises InputError where `folder` can be neither a run nor a Hugging Face model."""
    if not (folder / CONFIG).is_file():
        got = "none" if folder.is_dir() else "no folder"
        raise InputError(f"{folder}: wanted a run folder or a Hugging Face folder ({CONFIG}), got {got}")


def read_start(folder: Path) -> Recipe:
    """The recipe of the run in `folder`, or the one that a Hugging Face model in its place is imported with. Raises
    InputError where there is neither, or a model that is none of ours."""
    check_start(folder)
    return Recipe(**imported(folder)) if is_huggingface(folder) else read_config(folder)[0]


def _check(config: TrainConfig) -> None:
    positive = (
        "width", "layers", "steps", "batch_size", "micro_batch_size", "seq_len", "lr",
        "eval_every", "eval_tokens", "checkpoint_every", "keep", "devices",
    )  # fmt: skip
    for name in positive:
        _bound(name, getattr(config, name), lambda value: 0 < value < float("inf"), "a number above 0")
    for name in ("warmup_tokens", "weight_decay", "clip", "seed", "max_restarts", "hang_timeout"):
        _bound(name, getattr(config, name), lambda value: 0 <= value < float("inf"), "a number of at least 0")
    _bound("min_lr_ratio", config.min_lr_ratio, lambda value: 0 <= value <= 1, "a share from 0 to 1")
    choices = {
        "precision": ("bf16", "fp32", "fp16"),
        "moments": ("fp32", "bf16"),
        "device": DEVICES,
        "decay": ("linear", "cosine", "constant"),
        "positions": POSITIONS,
        "activation": ACTIVATIONS,
        "parametrization": KINDS,
        "placement": ("resident", "auto"),
    }
    for name, known in choices.items():
        _bound(name, getattr(config, name), lambda value, known=known: value in known, f"one of {', '.join(known)}")
    if config.placement == "resident" and config.disk is not None:
        raise InputError("--disk: wanted --placement auto with it, got resident")
    if config.batch_size is not None and config.batch_schedule is not None:
        raise InputError("--batch-schedule: wanted it or --batch-size, got both")


def _bound(name: str, value, holds, wanted: str) -> None:
    if value is not None and not holds(value):
        raise InputError(f"--{name.replace('_', '-')}: wanted {wanted}, got {value}")


def _schedule(config: TrainConfig) -> tuple[tuple[int, int], ...] | None:
    if config.batch_size is not None:
        return ((0, config.batch_size),)
    if config.batch_schedule is None:
        return None
    if not re.fullmatch(r"\d+:\d+(,\d+:\d+)*", config.batch_schedule):
        raise InputError(f"--batch-schedule: wanted TOKENS:SEQUENCES,..., got {config.batch_schedule}")
    pairs = (pair.split(":") for pair in config.batch_schedule.split(","))
    schedule = tuple((int(start), int(batch)) for start, batch in pairs)
    check_batch_schedule(schedule)
    return schedule


def _given(value, default):
    return default if value is None else value


def _run_name(model: str, data: str) -> str:
    path = Path(data)
    stem = path.name.split(".")[0] or path.resolve().name
    return f"{model}-{stem}"


def _numbers(name: str) -> list[int]:
    """Numbers of the run folders of this name: 1 for the plain one, n for name-n."""
    if not RUNS.is_dir():
        return []
    matches = (re.fullmatch(re.escape(name) + r"(?:-(\d+))?", path.name) for path in RUNS.iterdir())
    return [int(match[1] or 1) for match in matches if match]
