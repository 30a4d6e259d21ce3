"""What a run is asked to do (flags), and what that comes to (the recipe): defaults, presets, a run to resume.

Precedence: a flag that was given, the run being resumed, the preset, the default named in the flag's help. Imports no
torch, so that `cgpt --help` is quick.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from cgpt.errors import InputError
from cgpt.files import write_atomically
from cgpt.model.config import ACTIVATIONS, POSITIONS, GPTConfig, variant
from cgpt.model.parametrization import CEREBRAS, KINDS, parametrize
from cgpt.model.presets import PRESETS, Preset
from cgpt.schedule import batch_size, check_batch_schedule, steps_for, tokens_after
from cgpt.stream.format import Format
from cgpt.stream.limits import parse_bytes
from cgpt.train_file import read_train_file

CONFIG = "config.json"
VARIANTS = ("positions", "activation", "embedding_norm")  # flags that are fields of the model's config
RUNS = Path("runs")
DEVICES = ("cpu", "cuda")

# What may change when a run is resumed; everything else is what makes it that run.
CHANGEABLE = (
    "steps", "checkpoint_every", "keep", "eval_every", "eval_tokens", "device", "micro_batch_size",
    "placement", "device_memory", "host_memory", "disk",
)  # fmt: skip

WARMUP_PART = 5  # warm-up takes at most a fifth of a run that is shorter than its preset's
MICRO_BATCH_TOKENS = 8192  # activations of one micro-batch of the 111M model: about 1.6 GB in bf16


def _flag(metavar: str):
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


Int = Annotated[int | None, _flag("INT")]
Float = Annotated[float | None, _flag("FLOAT")]
Text = Annotated[str | None, _flag("TEXT")]
Switch = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]
Folder = Annotated[Path | None, _flag("DIR")]


@dataclass(frozen=True)
class TrainConfig:
    """Train a GPT. With no flags at all: the tiny model on Moby-Dick, a few minutes on two CPU cores."""

    model: Text = None
    """A preset, as `cgpt info` lists them (default: tiny)."""
    config: Annotated[Path | None, _flag("FILE")] = None
    """A preset of your own with flags that go with it, as `cgpt plan --write` leaves them (default: --model)."""
    data: Text = None
    """moby-dick, python-stdlib, text (.txt, .jsonl, packed or not), a prepared folder, or token files of nanoGPT or
    llm.c (default: moby-dick)."""
    positions: Annotated[Literal["learned", "none", "rotary", "alibi"] | None, _flag("{learned,none,rotary,alibi}")] = (
        None
    )
    """How tokens know their place (default: the preset's, which is learned)."""
    activation: Annotated[Literal["gelu", "gelu_tanh", "swiglu"] | None, _flag("{gelu,gelu_tanh,swiglu}")] = None
    """Of the MLP; swiglu makes it 2/3 as wide, for about as many parameters (default: the preset's, which is gelu)."""
    embedding_norm: Switch = False
    """A LayerNorm behind the embedding."""
    parametrization: Annotated[Literal["sp", "mup", "completep"] | None, _flag("{sp,mup,completep}")] = None
    """Rules that init, factors and learning rates follow. Others than the preset's start from the published base, 256
    wide, and --lr from its 6e-3 (default: the preset's: mup where it is called -mup, else sp)."""
    steps: Int = None
    """Optimizer steps of the whole run (default: as many as see the preset's tokens)."""
    batch_size: Int = None
    """Sequences a step (default: the preset's)."""
    batch_schedule: Text = None
    """Sequences a step as they grow, from counts of tokens seen: 0:720,84049920000:1080."""
    micro_batch_size: Int = None
    """Sequences that are on their way at once; more are accumulated (default: as many as make 8192 tokens)."""
    seq_len: Int = None
    """Tokens a sequence (default: the preset's). More than the preset has gives the model more positions."""
    lr: Float = None
    """Peak learning rate; under mup and completep the projections' is a fraction of it (default: the preset's)."""
    warmup_tokens: Int = None
    """Tokens of linear warm-up (default: the preset's, at most a fifth of the run)."""
    decay: Annotated[Literal["linear", "cosine", "constant"] | None, _flag("{linear,cosine,constant}")] = None
    """How the learning rate falls after warm-up (default: the preset's)."""
    min_lr_ratio: Float = None
    """Where it ends, as a share of the peak (default: 0.1)."""
    weight_decay: Float = None
    """On all but biases and LayerNorm (default: 0.1)."""
    clip: Float = None
    """Largest global gradient norm, 0 for none (default: 1)."""
    precision: Annotated[Literal["bf16", "fp32", "fp16"] | None, _flag("{bf16,fp32,fp16}")] = None
    """Of weights and activations; masters and losses are fp32 always (default: bf16)."""
    moments: Annotated[Literal["fp32", "bf16"] | None, _flag("{fp32,bf16}")] = None
    """Of AdamW's: 12 or 8 bytes of state a parameter. bf16 is rounded at random, so that small changes add up on
    average (default: fp32)."""
    device: Annotated[Literal["cpu", "cuda"] | None, _flag("{cpu,cuda}")] = None
    """Where to train (default: cpu)."""
    placement: Annotated[Literal["resident", "auto"] | None, _flag("{resident,auto}")] = None
    """resident: all layers on the device. auto: as many as fit, the others stream from the host and the disk (default:
    auto with any of the next three flags, else resident)."""
    device_memory: Text = None
    """Of the device, as 4GiB (default: all that is free). On a CPU, a stretch of memory that stands for a device's."""
    host_memory: Text = None
    """Of the host, on a CPU of the whole process (default: all that is free)."""
    disk: Folder = None
    """For optimizer state and weights that memory has no room for; what is written there is gone when the run ends."""
    timeline: Switch = False
    """Leave timeline.json (for chrome://tracing) and timeline.png of the last steps: what each lane did when."""
    seed: Int = None
    """Of initial weights, order of samples and rounding of bf16 moments (default: 0)."""
    eval_every: Int = None
    """Steps between held-out losses (default: a tenth of the run)."""
    eval_tokens: Int = None
    """Held-out tokens read each time, from the start of the split (default: 65536)."""
    checkpoint_every: Int = None
    """Steps between checkpoints (default: a tenth of the run, at most 1000); the end and Ctrl-C save too."""
    keep: Int = None
    """Checkpoints to keep (default: 2)."""
    out: Folder = None
    """Run folder (default: runs/MODEL-DATA, or the next free runs/MODEL-DATA-2, -3, ...)."""
    resume: Switch = False
    """Go on with the run in --out (default: the newest of runs/MODEL-DATA) from its newest whole checkpoint."""


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
    seq_len = config.seq_len or preset.config.seq_len
    shape, lr = _shape(config, preset)
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
        parametrization=config.parametrization or preset.parametrization,
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
    """The preset that is asked for, and `config` with its file's flags where none was given."""
    if config.config is None:
        name = config.model or "tiny"
        if name not in PRESETS:
            raise InputError(f"--model: wanted one of {', '.join(PRESETS)}, got {name}")
        return PRESETS[name], config
    if config.model is not None:
        raise InputError("--config: wanted it or --model, got both")
    preset, flags = read_train_file(config.config)
    return preset, replace(config, **{name: _given(getattr(config, name), flags[name]) for name in flags})


def resolve_resumed(config: TrainConfig, saved: Recipe, folder: Path) -> Recipe:
    """The saved recipe with what was asked to change. Raises InputError for what may not."""
    _check(config)
    changed = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if value is None or value is False or field.name in ("config", "out", "resume", "timeline"):
            continue
        value = _where(config).get(field.name, value)
        if field.name in ("batch_size", "batch_schedule"):
            before, value = saved.batch_schedule, _schedule(config)
        else:
            before = getattr(saved.shape if field.name in VARIANTS else saved, field.name)
        if value == before:
            continue
        if field.name not in CHANGEABLE:
            flag = "--" + field.name.replace("_", "-")
            raise InputError(f"{flag}: the run in {folder} has {before}, got {value}; a resumed run keeps its recipe")
        changed[field.name] = value
    return replace(saved, **changed)


def _shape(config: TrainConfig, preset: Preset) -> tuple[GPTConfig, float]:
    """The model, and the peak learning rate that its numbers were tuned with."""
    shape = variant(preset.config, config.positions, config.activation, config.embedding_norm or None)
    if config.parametrization in (None, preset.parametrization):
        return shape, preset.lr
    return parametrize(shape, config.parametrization, CEREBRAS), CEREBRAS.lr


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
    try:
        content = json.loads(path.read_bytes())
        return Recipe.from_dict(content["recipe"]), content["dataset"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: wanted a run's configuration, got a damaged file ({error})") from error


def _check(config: TrainConfig) -> None:
    positive = (
        "steps", "batch_size", "micro_batch_size", "seq_len", "lr",
        "eval_every", "eval_tokens", "checkpoint_every", "keep",
    )  # fmt: skip
    for name in positive:
        _bound(name, getattr(config, name), lambda value: 0 < value < float("inf"), "a number above 0")
    for name in ("warmup_tokens", "weight_decay", "clip", "seed"):
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
