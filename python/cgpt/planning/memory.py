"""`cgpt plan`: where a model's memory would live on a machine that need not be here, and how fast it would train.

Settings tried: numbers of visits a step a quarter apart, micro-batches of one and of four sequences, activations on the
device and on the host, more or fewer layers at home on the device. The fastest by forecast wins; of those within half
a percent, the one with the largest micro-batches and then the fewest tokens a visit. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from cgpt.errors import InputError
from cgpt.model.config import GPTConfig
from cgpt.model.presets import PRESETS
from cgpt.recipe import MICRO_BATCH_TOKENS
from cgpt.scaling.flops import matmul_flops_per_token
from cgpt.stream.account import Account, account
from cgpt.stream.forecast import Forecast, Rates, Work, forecast, hides
from cgpt.stream.format import Format
from cgpt.stream.gpt_plans import gpt_plans
from cgpt.stream.hardware import DEVICES, DRIVE, LINKS, Hardware, Link
from cgpt.stream.limits import Budgets, limits, parse_bytes
from cgpt.stream.placement import Placement
from cgpt.stream.planner import DoesNotFit, Setting, place

NEAR_BEST = 1.005
RESIDENT_BEST = 1.03  # what a model that fits may lose to streaming, whose forecast rests on more assumptions
GRID = 1.25  # from one number of visits that is tried to the next
DAY = 86400


@dataclass(frozen=True)
class Problem:
    """What is asked: a model and its name, its machine, and one step."""

    model: str
    shape: GPTConfig
    hardware: Hardware
    link: Link
    budgets: Budgets
    rates: Rates
    tokens_per_step: int
    tokens_per_visit: int | None
    format: Format

    @property
    def beside(self) -> str:
        """The tier that torch's own memory is of."""
        return "host" if self.link is LINKS["copy"] else "device"

    @property
    def work(self) -> Work:
        shape = self.shape
        attention = 2 * shape.seq_len * shape.d_model  # causal: half of every score and of every weighted sum
        return Work(self.format, self.tokens_per_step, shape.d_model, attention, self.hardware.bandwidth)


@dataclass(frozen=True)
class Found:
    """An answer: a setting, its placement, what it takes and how long."""

    problem: Problem
    setting: Setting
    placement: Placement
    account: Account
    forecast: Forecast

    @property
    def tokens_per_visit(self) -> int:
        return self.setting.micro_batches * self.setting.micro_batch_tokens

    @property
    def model_flops(self) -> float:
        """FLOP/s of the model's own products: recomputation is not counted."""
        return matmul_flops_per_token(self.problem.shape) * self.forecast.tokens / self.forecast.seconds

    @property
    def streamed(self) -> float:
        """The share of weights that comes to the device in every visit."""
        plans = gpt_plans(self.problem.shape)
        sizes = [(plan.owned.size, at) for plan, at in zip(plans, self.placement.weights, strict=True)]
        return sum(size for size, at in sizes if at != "device") / sum(size for size, _ in sizes)

    @property
    def hides_from(self) -> dict[str, float]:
        """Tokens a visit from which on each lane hides behind the arithmetic."""
        problem = self.problem
        away = any(home != "device" for home in self.placement.state)
        found = hides(problem.rates, problem.format, self.streamed, self.setting.visits)
        return {lane: tokens for lane, tokens in found.items() if tokens and away}

    @property
    def drive_days(self) -> float | None:
        """Days until a drive of the disk's budget has been written as often as it is rated for."""
        if not self.forecast.disk_written:
            return None
        steps = DRIVE.endurance * self.problem.budgets.disk / self.forecast.disk_written
        return steps * self.forecast.seconds / DAY


def problem(
    model: str,
    device: str,
    *,
    shape: GPTConfig | None = None,
    device_memory: str | None = None,
    host_memory: str | None = None,
    disk_space: str | None = None,
    link: str | None = None,
    sustained: float | None = None,
    host_bandwidth: str | None = None,
    tokens_per_step: int | None = None,
    tokens_per_visit: int | None = None,
    format: Format | None = None,
) -> Problem:
    """From names and sizes as they are written, None for what is not given. Raises InputError, naming the flag.

    shape: of a model that is no preset; then `model` is any name, and tokens_per_step is wanted.
    """
    if shape is None:
        _one_of("model", model, PRESETS)
    _one_of("device", device, DEVICES)
    hardware = DEVICES[device]
    _one_of("link", link or hardware.link, LINKS)
    step = tokens_per_step
    if shape is None:
        preset = PRESETS[model]
        shape = preset.config
        largest = shape.seq_len * max(batch for _, batch in preset.batch_schedule)
        step = largest if step is None else step
    seq_len = shape.seq_len
    for name, tokens in (("tokens-per-step", step), ("tokens-per-visit", tokens_per_visit)):
        if tokens is not None and (tokens < seq_len or tokens % seq_len):
            raise InputError(f"--{name}: wanted a multiple of {model}'s sequences of {seq_len} tokens, got {tokens}")
    if tokens_per_visit is not None and tokens_per_visit > step:
        raise InputError(f"--tokens-per-visit: wanted at most the {step} of a step, got {tokens_per_visit}")
    if sustained is not None and not 0 < sustained <= 1:
        raise InputError(f"--sustained: wanted a share of the peak up to 1, got {sustained:g}")
    budgets = Budgets(
        parse_bytes(device_memory, "--device-memory") if device_memory else int(hardware.memory),
        parse_bytes(host_memory, "--host-memory") if host_memory else limits().host or 0,
        parse_bytes(disk_space, "--disk-space") if disk_space else 0,
    )
    share = hardware.sustained if sustained is None else sustained
    format = format or Format()
    slower = 2 if format.precision == "fp32" else 1  # products of tf32 go at half the rate of bf16
    wire = LINKS[link or hardware.link]
    memory = parse_bytes(host_bandwidth, "--host-bandwidth") if host_bandwidth else hardware.host
    if not memory:
        raise InputError(f"--host-bandwidth: wanted more than nothing, got {host_bandwidth}")
    rates = Rates(hardware.peak * share / slower, wire.rate, wire.rate, memory, DRIVE.read, DRIVE.write)
    return Problem(model, shape, hardware, wire, budgets, rates, step, tokens_per_visit, format)


def solve(problem: Problem) -> Found:
    """The fastest setting that fits. Raises DoesNotFit with the nearest one that would, in flags."""
    plans, found = gpt_plans(problem.shape), []
    refusals: list[tuple[DoesNotFit, Setting]] = []
    for setting in _settings(problem):
        try:
            found += _placed(problem, plans, setting)
        except DoesNotFit as refusal:
            refusals.append((refusal, setting))
    if not found:
        raise _nearest(problem, refusals)
    best = min(answer.forecast.seconds for answer in found)
    resident = [answer for answer in found if set(answer.placement.state) == {"device"}]
    if resident and min(answer.forecast.seconds for answer in resident) <= RESIDENT_BEST * best:
        found, best = resident, min(answer.forecast.seconds for answer in resident)
    near = [answer for answer in found if answer.forecast.seconds <= NEAR_BEST * best]
    return min(near, key=lambda x: (-x.setting.micro_batch_tokens, x.tokens_per_visit, x.forecast.seconds))


def _settings(problem: Problem) -> Iterator[Setting]:
    """Micro-batches of up to MICRO_BATCH_TOKENS, visits from one a step to one a micro-batch."""
    seq_len, width = problem.shape.seq_len, problem.shape.d_model
    sequences = problem.tokens_per_step // seq_len
    for each in (4, 1):
        if each > sequences or each * seq_len > max(seq_len, MICRO_BATCH_TOKENS):
            continue
        count = -(-sequences // each)
        if problem.tokens_per_visit and problem.tokens_per_visit % (each * seq_len):
            continue
        if problem.tokens_per_visit:
            rows = [problem.tokens_per_visit // (each * seq_len)]
        else:
            rows = sorted({-(-count // round(GRID**power)) for power in range(math.ceil(math.log(count, GRID)) + 1)})
        for some in rows:
            yield Setting(problem.format, each * seq_len, width, some, -(-count // some), problem.beside)


def _placed(problem: Problem, plans, setting: Setting) -> list[Found]:
    """One setting with activations here and there, and with all, some and none of the records that the device could
    hold."""
    found, refusals = {}, []
    for activations in ("device", "host"):
        try:
            fullest = place(plans, problem.budgets, setting, activations=activations)
        except DoesNotFit as refusal:
            refusals.append(refusal)
            continue
        most = fullest.state.count("device")
        for state in {most, most // 2, 0}:
            for weights in (None, state):
                try:
                    options = {"activations": activations, "most_state": state, "most_weights": weights}
                    placement = place(plans, problem.budgets, setting, **options)
                except DoesNotFit:
                    continue  # the host has no room for so many
                found[placement] = None
    if not found:
        raise min(refusals, key=lambda refusal: (refusal.limit == "device", refusal.wanted))
    return [
        Found(
            problem,
            setting,
            placement,
            account(plans, placement, setting.format, setting.micro_batch_tokens, setting.width, setting.beside),
            forecast(plans, placement, problem.rates, problem.work),
        )
        for placement in found
    ]


def _nearest(problem: Problem, refusals: list[tuple[DoesNotFit, Setting]]) -> InputError:
    """The refusal that lacks least, and every single flag that would mend it."""
    lacks_host = [pair for pair in refusals if pair[0].limit == "host"]
    refusal, setting = min(lacks_host or refusals, key=lambda pair: pair[0].wanted)
    flags = [f"--{refusal.limit}-memory {_whole(refusal.wanted)}"]
    disks = [pair[0].disk for pair in refusals if pair[0].disk]
    if disks:
        flags.append(f"--disk-space {_whole(min(disks))}")
    for flag, tokens in (("tokens-per-visit", _tokens_a_visit(problem)), ("tokens-per-step", _tokens_in_one(problem))):
        if tokens:
            flags.append(f"--{flag} {tokens}")
    return InputError(
        f"--{refusal.limit}-memory: {problem.model} at {setting.micro_batches * setting.micro_batch_tokens} tokens a "
        f"visit, {setting.visits} visit{'s' * (setting.visits > 1)} a step: {refusal}; nearest: {' or '.join(flags)}"
    )


def _tokens_a_visit(problem: Problem) -> int | None:
    """The most tokens that fit where more a visit were asked for. None where even one sequence does not."""
    if problem.tokens_per_visit is None:
        return None
    sequences = problem.tokens_per_step // problem.shape.seq_len
    return _most_sequences(problem, problem.tokens_per_visit, lambda rows: -(-sequences // rows))


def _tokens_in_one(problem: Problem) -> int | None:
    """The most tokens a step that fit in one visit: gradients are then half as large."""
    if problem.tokens_per_visit is None:
        return _most_sequences(problem, problem.tokens_per_step, lambda rows: 1)
    if problem.tokens_per_visit == problem.tokens_per_step:
        return None
    alone = replace(problem, tokens_per_step=problem.tokens_per_visit)
    return problem.tokens_per_visit if _fits(alone, problem.tokens_per_visit // problem.shape.seq_len, 1) else None


def _most_sequences(problem: Problem, refused: int, visits: Callable[[int], int]) -> int | None:
    """The most tokens below `refused` whose sequences fit into a visit, when that makes so many visits."""
    low, high = 0, refused // problem.shape.seq_len
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _fits(problem, middle, visits(middle)) else (low, middle)
    return low * problem.shape.seq_len or None


def _fits(problem: Problem, sequences: int, visits: int) -> bool:
    shape = problem.shape
    setting = Setting(problem.format, shape.seq_len, shape.d_model, sequences, visits, problem.beside)
    try:
        place(gpt_plans(shape), problem.budgets, setting)
    except DoesNotFit:
        return False
    return True


def _whole(nbytes: int) -> str:
    """In whole GiB, or MiB where that is less than ten of them; never less than what is needed."""
    unit, name = (1 << 30, "GiB") if nbytes >= 10 << 30 else (1 << 20, "MiB")
    return f"{-(-nbytes // unit)}{name}"


def _one_of(flag: str, name: str, known) -> None:
    if name not in known:
        raise InputError(f"--{flag}: wanted one of {', '.join(known)}, got {name}")
