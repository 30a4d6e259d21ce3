"""`cgpt plan --budget ...`: the model that a budget, a size, an amount of text or a loss asks for, and what it takes.

The law gives parameters and tokens, the published models shape and recipe, the streaming planner the memory and the
speed on all devices; time, energy and money are FLOPs / (devices x peak x utilisation). Imports no torch.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cgpt.errors import InputError
from cgpt.files import write_atomically
from cgpt.model.config import GPTConfig
from cgpt.model.parametrization import CEREBRAS, parametrize
from cgpt.model.presets import GPT2_VOCAB, Preset
from cgpt.planning.flags import Plan
from cgpt.planning.memory import Found, problem, solve
from cgpt.scaling.budget import Budget, Cost, cost, parse_budget
from cgpt.scaling.flops import flops_per_token
from cgpt.scaling.hyperparameters import Hyperparameters, hyperparameters
from cgpt.scaling.inference import Comparison
from cgpt.scaling.law_files import read_law
from cgpt.scaling.laws import LAWS, Law, law_named
from cgpt.scaling.planner import ANY_RATIO, Point, Wanted, beside, choose, over_life, settle
from cgpt.scaling.shapes import Family
from cgpt.stream.format import Format
from cgpt.stream.hardware import DEVICES, Hardware
from cgpt.train_file import to_dict

SEQ_LEN = 2048
NO_LIMIT = f"{1 << 50}B"  # of host memory, where none is given: the plan says how much it takes
RESIDUAL_STD, RESIDUAL_STD_OF = 0.0025, (0.88e9, 14e9)  # as released, of models of so many parameters


@dataclass(frozen=True)
class Proposal:
    """best: parameters that a shape was looked for of. point: the shape's parameters, its tokens, and the law.

    flops_per_token: of the shape, by the published convention. utilisation: of the devices' peak, in FLOPs of that
    convention, and `reason`, where it comes from. found: where its memory lives on each device, or None and `refusal`.
    options: other uses of the same FLOPs. life: with inference, the law that was asked and what it says.
    """

    wanted: Wanted
    budget: Budget | None
    law: Law
    best: float
    point: Point
    shape: GPTConfig
    flops_per_token: int
    training: Hyperparameters
    device: str
    count: int
    utilisation: float
    reason: str
    format: Format
    found: Found | None
    refusal: str | None
    options: dict[str, Point]
    life: tuple[Law, Comparison] | None

    @property
    def family(self) -> Family:
        return Family(self.shape.vocab_size, self.shape.seq_len)

    @property
    def laws(self) -> dict[str, Law]:
        """The plan's, and the one of any ratio beside it."""
        return {law.name: law for law in (self.law, LAWS[ANY_RATIO])}

    @property
    def name(self) -> str:
        """Such as plan-1.3B."""
        params = self.shape.n_params
        unit, factor = next((pair for pair in (("B", 1e9), ("M", 1e6), ("k", 1e3)) if params >= pair[1]), ("", 1))
        return f"plan-{params / factor:.3g}{unit}"

    @property
    def flops(self) -> float:
        """Of training."""
        return float(self.training.tokens * self.flops_per_token)

    @property
    def hardware(self) -> Hardware:
        return DEVICES[self.device]

    @property
    def cost(self) -> Cost:
        return cost(self.flops, self.hardware, self.count, self.utilisation)

    @property
    def checkpoint_bytes(self) -> int:
        """Weights, masters and moments."""
        return self.shape.n_params * self.format.record

    @property
    def export_bytes(self) -> int:
        """Of the weights alone in fp32."""
        return 4 * self.shape.n_params

    @property
    def forecast_utilisation(self) -> float | None:
        """As `utilisation`, by the forecast of this shape on so many devices; None where it does not fit."""
        if self.found is None:
            return None
        return self.found.speed / self.count * self.flops_per_token / self.hardware.peak

    @property
    def streams(self) -> bool:
        return self.found is not None and any(home != "device" for home in self.found.placement.state)


def propose(asked: Plan) -> Proposal:
    """Raises InputError, naming the flag, for what cannot be planned. What does not fit the device is still a plan."""
    _check(asked)
    family = Family(asked.vocab_size or GPT2_VOCAB, asked.seq_len or SEQ_LEN)
    budget = parse_budget(asked.budget, DEVICES) if asked.budget is not None else None
    device = asked.device or (budget and budget.device) or "h100"
    if device not in DEVICES:
        raise InputError(f"--device: wanted one of {', '.join(DEVICES)}, got {device}")
    flops, assumed = asked.flops, None
    if budget is not None:
        on = DEVICES[budget.device or device]
        assumed = asked.utilisation or _sustained(asked, on)
        flops = budget.flops(on, assumed)
    wanted = Wanted(flops, asked.params, asked.tokens, asked.loss, asked.inference_tokens)
    law = _law(asked.law)
    try:
        point = choose(wanted, law, family)
    except InputError as error:
        if budget is None:
            raise
        raise InputError(str(error).replace("--flops", "--budget, in FLOPs")) from error
    law, best = law or LAWS[point.law.name], point.params

    shape = _shape(family, point.params)
    each = flops_per_token(shape).total
    settled = settle(point, wanted, shape.n_params, each)
    if settled.tokens < family.seq_len:
        raise InputError(f"tokens: wanted at least a sequence of {family.seq_len}, got {settled.tokens:.3g}")
    training = hyperparameters(shape.n_params, settled.tokens, family.seq_len)
    count = asked.one_count
    smallest = min(batch for _, batch in training.batch_schedule)
    if count > smallest:
        raise InputError(f"--count: wanted at most the {smallest} sequences of a step, got {count}")
    found, refusal = _place(asked, shape, device, training, count)
    if asked.utilisation is not None:
        utilisation, reason = asked.utilisation, "as asked for"
    elif budget is not None and budget.kind != "flops" and (budget.device or device) == device:
        utilisation, reason = assumed, "assumed: the device's sustained share, by which the budget was counted"
    elif found is not None:
        utilisation = found.speed / count * each / DEVICES[device].peak
        reason = f"forecast for this shape on {'one device' if count == 1 else f'{count} devices'}"
    else:
        utilisation, reason = _sustained(asked, DEVICES[device]), "assumed: the device's sustained share"
    point = replace(settled, tokens=training.tokens)
    spent = float(training.tokens * each)
    return Proposal(
        wanted=wanted,
        budget=budget,
        law=law,
        best=best,
        point=point,
        shape=shape,
        flops_per_token=each,
        training=training,
        device=device,
        count=count,
        utilisation=utilisation,
        reason=reason,
        format=Format(asked.precision, asked.moments),
        found=found,
        refusal=refusal,
        options=beside(spent, law, family),
        life=over_life(point, asked.inference_tokens, law, family) if asked.inference_tokens else None,
    )


def _law(name: str | None) -> Law | None:
    if name is None:
        return None
    return read_law(Path(name)) if name.endswith(".json") else law_named(name)


def _sustained(asked: Plan, hardware: Hardware) -> float:
    """Share of the bf16 peak that products reach; those of tf32 go at half the rate."""
    share = hardware.sustained if asked.sustained is None else asked.sustained
    return share / 2 if asked.precision == "fp32" else share


def mup_settings(shape: GPTConfig) -> dict[str, float]:
    """What the same shape takes in muP from the published base; `cgpt train --parametrization mup` sets it."""
    numbers, base = parametrize(shape, "mup", CEREBRAS), CEREBRAS.config.d_model
    return {
        "base_width": base,
        "width_ratio": shape.d_model / base,
        "lr": CEREBRAS.lr,
        "hidden_lr": CEREBRAS.lr * numbers.hidden_lr_scale,
        "embedding_init_std": numbers.embedding_init_std,
        "hidden_init_std": numbers.hidden_init_std,
        "residual_init_std": numbers.residual_std,
        "embedding_scale": numbers.embedding_scale,
        "softmax_scale": numbers.attention_scale,
        "logits_scale": numbers.logits_scale,
    }


def write(found: Proposal, path: Path) -> None:
    """A file for `cgpt train --config`. Raises InputError for another ending than .json, OSError naming the file."""
    content = to_dict(_preset(found), _flags(found)) | {
        "plan": {"flops": found.flops, "loss": found.point.loss, "law": found.point.law.name}
    }
    write_atomically(path, json.dumps(content, indent=1).encode() + b"\n")


def _check(asked: Plan) -> None:
    if asked.flops is not None and asked.budget is not None:
        raise InputError("--budget: wanted it or --flops, got both")
    for name in ("vocab_size", "seq_len"):
        value = getattr(asked, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')}: wanted a number above 0, got {value}")
    for name in ("utilisation", "sustained"):
        value = getattr(asked, name)
        if value is not None and not 0 < value <= 1:
            raise InputError(f"--{name}: wanted a share of the peak up to 1, got {value:g}")
    if asked.write is not None and asked.write.suffix != ".json":
        raise InputError(f"--write: wanted a file ending in .json, got {asked.write}")
    if asked.write is not None and not asked.write.parent.is_dir():
        raise InputError(f"--write: wanted a file in a folder that is there, got {asked.write}")


def _shape(family: Family, params: float) -> GPTConfig:
    layers, heads, width = family.nearest(params)
    low, high = RESIDUAL_STD_OF
    return GPTConfig(
        n_layer=layers,
        n_head=heads,
        d_model=width,
        d_head=width // heads,
        d_ff=4 * width,
        vocab_size=family.vocab_size,
        seq_len=family.seq_len,
        residual_init_std=RESIDUAL_STD if low <= params <= high else None,
    )


def _place(
    asked: Plan, shape: GPTConfig, device: str, training: Hyperparameters, count: int
) -> tuple[Found | None, str | None]:
    """Where its memory lives on each of the devices, in a step of the largest batch; or why it cannot."""
    largest = max(batch for _, batch in training.batch_schedule)
    machine = asked.machine
    machine["host_memory"] = machine["host_memory"] or NO_LIMIT
    machine["tokens_per_step"] = machine["tokens_per_step"] or largest * shape.seq_len
    shared = problem("the plan", device, shape=shape, count=count, **machine)
    try:
        return solve(shared), None
    except InputError as refusal:
        return None, str(refusal)


def _preset(found: Proposal) -> Preset:
    training = found.training
    return Preset(
        name=found.name,
        config=found.shape,
        batch_schedule=training.batch_schedule,
        steps=training.steps,
        lr=training.lr,
        warmup_tokens=training.warmup_tokens,
        decay=training.decay,
        adam_eps=training.adam_eps,
        min_lr_ratio=training.min_lr_ratio,
    )


def _flags(found: Proposal) -> dict:
    """Flags of `cgpt train` that go with it."""
    flags = {"device": "cpu" if found.device == "cpu" else "cuda", **asdict(found.format)}
    del flags["training"]
    if found.streams:
        flags["placement"] = "auto"
        flags["micro_batch_size"] = found.found.setting.micro_batch_tokens // found.shape.seq_len
    return flags
