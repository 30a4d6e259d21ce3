"""`cgpt plan`: where a model's memory would live on a machine that need not be here, and how fast it would train.

Settings tried: numbers of visits a step a quarter apart, micro-batches of one and of four sequences, activations on the
device and on the host, more or fewer layers at home on the device. The fastest by forecast wins; of those within half
a percent, the one with the largest micro-batches and then the fewest tokens a visit. Imports no torch.

Of several devices each has the same share of a step and of the state. A micro-batch may then be as large as a device's
share, for each one's gradients cross the wire: shares are cut into one, two, four micro-batches and so on.
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
from cgpt.stream.forecast import arithmetic_seconds, forecast
from cgpt.stream.format import Format
from cgpt.stream.gpt_plans import gpt_plans
from cgpt.stream.hardware import DEVICES, DRIVE, LINKS, NET_HOP, NETWORKS, Hardware, Link, Network, wire
from cgpt.stream.layout import LayerPlan
from cgpt.stream.limits import Budgets, limits, parse_bytes
from cgpt.stream.placement import Placement
from cgpt.stream.planner import DoesNotFit, Setting, place
from cgpt.stream.rates import Forecast, Rates, Work, hides

NEAR_BEST = 1.005
RESIDENT_BEST = 1.03  # what a model that fits may lose to streaming, whose forecast rests on more assumptions
GRID = 1.25  # from one number of visits that is tried to the next; of several devices GRIDS
GRIDS = 2.0
MOST_SEQUENCES = 32  # of a micro-batch
DAY = 86400


@dataclass(frozen=True)
class Problem:
    """What is asked: a model and its name, its machine, and one step.

    budgets, rates: of each of `count` devices, of which up to `node` share a machine: its host memory, its disk and
    what is moved in a second of both. network: between machines.
    """

    model: str
    shape: GPTConfig
    hardware: Hardware
    link: Link
    budgets: Budgets
    rates: Rates
    tokens_per_step: int
    tokens_per_visit: int | None
    format: Format
    count: int = 1
    node: int = 1
    network: Network | None = None

    @property
    def sequences(self) -> int:
        """Of a step."""
        return self.tokens_per_step // self.shape.seq_len

    @property
    def sharing(self) -> int:
        """Devices of one machine."""
        return min(self.count, self.node)

    @property
    def beside(self) -> str:
        """The tier that torch's own memory is of."""
        return "host" if self.link is LINKS["copy"] else "device"

    def work(self, micro_batch_tokens: int) -> Work:
        """A step in micro-batches of so many tokens."""
        shape, each = self.shape, micro_batch_tokens
        attention = 2 * shape.seq_len * shape.d_model  # causal: half of every score and of every weighted sum
        return Work(self.format, self.tokens_per_step, shape.d_model, attention, self.hardware.bandwidth, each)


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
        """FLOP/s a device of the model's own products: recomputation is not counted."""
        return matmul_flops_per_token(self.problem.shape) * self.speed / self.problem.count

    @property
    def speed(self) -> float:
        """Tokens/s of all devices."""
        return self.forecast.tokens / self.forecast.seconds

    @property
    def work(self) -> Work:
        return self.problem.work(self.setting.micro_batch_tokens)

    @property
    def streamed(self) -> float:
        """The share of weights that comes to the device in every visit."""
        plans = gpt_plans(self.problem.shape)
        sizes = [(plan.owned.size, at) for plan, at in zip(plans, self.placement.weights, strict=True)]
        return sum(size for size, at in sizes if at != "device") / sum(size for size, _ in sizes)

    @property
    def hides_from(self) -> dict[str, float]:
        """A device's tokens a visit from which on each lane hides behind the arithmetic."""
        problem, setting = self.problem, self.setting
        shared = problem.count, setting.micro_batches
        found = hides(problem.rates, problem.format, self.streamed, setting.visits, *shared)
        away = self.placement.streams
        return {lane: tokens for lane, tokens in found.items() if tokens and (away or lane.startswith("wire"))}

    @property
    def drive_days(self) -> float | None:
        """Days until a drive of a device's share of the disk has been written as often as it is rated for."""
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
    count: int = 1,
    network: str | None = None,
    node: int | None = None,
) -> Problem:
    """From names and sizes as they are written, None for what is not given. Raises InputError, naming the flag.

    shape: of a model that is no preset; then `model` is any name, and tokens_per_step is wanted. count: of devices,
    `node` of which share a machine.
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
    if not 1 <= count <= step // seq_len:
        raise InputError(f"--count: wanted 1 to the {step // seq_len} sequences of a step, got {count}")
    share = -(-(step // seq_len) // count) * seq_len
    if tokens_per_visit is not None and tokens_per_visit > share:
        whose = "a step" if count == 1 else "a device's share of a step"
        raise InputError(f"--tokens-per-visit: wanted at most the {share} of {whose}, got {tokens_per_visit}")
    node = 1 if node is None else node
    if node < 1:
        raise InputError(f"--node: wanted a number above 0, got {node}")
    if sustained is not None and not 0 < sustained <= 1:
        raise InputError(f"--sustained: wanted a share of the peak up to 1, got {sustained:g}")
    sharing = min(count, node)
    budgets = Budgets(
        parse_bytes(device_memory, "--device-memory") if device_memory else int(hardware.memory),
        (parse_bytes(host_memory, "--host-memory") if host_memory else limits().host or 0) // sharing,
        (parse_bytes(disk_space, "--disk-space") if disk_space else 0) // sharing,
    )
    sustained = hardware.sustained if sustained is None else sustained
    format = format or Format()
    slower = 2 if format.precision == "fp32" else 1  # products of tf32 go at half the rate of bf16
    bus = LINKS[link or hardware.link]
    between = _network(network or hardware.network)
    memory = parse_bytes(host_bandwidth, "--host-bandwidth") if host_bandwidth else hardware.host
    if not memory:
        raise InputError(f"--host-bandwidth: wanted more than nothing, got {host_bandwidth}")
    received, each = wire(count, node, NETWORKS[hardware.peers], between)
    flops, disk = hardware.peak * sustained / slower, (DRIVE.read / sharing, DRIVE.write / sharing)
    rates = Rates(flops, bus.rate, bus.rate, memory / sharing, *disk, wire=received, wire_latency=each)
    kind = step, tokens_per_visit, format
    return Problem(model, shape, hardware, bus, budgets, rates, *kind, count, node, between)


def _network(name: str) -> Network:
    """One of NETWORKS, or a rate as it is written, such as 50GB."""
    if name in NETWORKS:
        return NETWORKS[name]
    try:
        rate = parse_bytes(name, "--network")
    except InputError:
        rate = 0
    if not rate:
        raise InputError(f"--network: wanted one of {', '.join(NETWORKS)}, or bytes a second such as 50GB, got {name}")
    return Network(rate, NET_HOP, "as asked for")


def solve(problem: Problem) -> Found:
    """The fastest setting that fits. Raises DoesNotFit with the nearest one that would, in flags."""
    plans, found = gpt_plans(problem.shape), []
    refusals: list[tuple[DoesNotFit, Setting]] = []
    for setting in _settings(problem):
        best = min((answer.forecast.seconds for answer in found), default=math.inf)
        try:
            found += _placed(problem, plans, setting, RESIDENT_BEST * best)
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
    seq_len, width, ranks = problem.shape.seq_len, problem.shape.d_model, problem.count
    for each in _micro_batches(problem):
        asked = -(-problem.sequences // each)
        count = -(-asked // ranks)  # a device's
        grid = GRIDS if ranks > 1 else GRID
        if problem.tokens_per_visit and problem.tokens_per_visit % (each * seq_len):
            continue
        if problem.tokens_per_visit:
            rows = [problem.tokens_per_visit // (each * seq_len)]
        else:
            rows = sorted({-(-count // round(grid**power)) for power in range(math.ceil(math.log(count, grid)) + 1)})
        for some in rows:
            yield Setting(problem.format, each * seq_len, width, some, -(-count // some), problem.beside, ranks=ranks)


def _micro_batches(problem: Problem) -> list[int]:
    """Sequences of one that are tried, the largest first."""
    seq_len, share = problem.shape.seq_len, -(-problem.sequences // problem.count)
    if problem.count == 1:
        return [n for n in (4, 1) if n <= share and n * seq_len <= max(seq_len, MICRO_BATCH_TOKENS)]
    least = max(1, -(-share // MOST_SEQUENCES))
    parts = [least << power for power in range(share.bit_length()) if least << power < share]
    return list(dict.fromkeys([*(-(-share // n) for n in parts), 1]))


def _placed(problem: Problem, plans: list[LayerPlan], setting: Setting, most_seconds: float) -> list[Found]:
    """One setting with activations here and there, and with all, some and none of the records that the device could
    hold, but for those whose arithmetic alone takes more than `most_seconds`."""
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
    speed = problem.rates, problem.work(setting.micro_batch_tokens)
    return [
        Found(
            problem,
            setting,
            placement,
            account(plans, placement, setting.format, setting.micro_batch_tokens, setting.width, setting.beside),
            forecast(plans, placement, *speed),
        )
        for placement in found
        if arithmetic_seconds(plans, placement, *speed) <= most_seconds
    ]


def _nearest(problem: Problem, refusals: list[tuple[DoesNotFit, Setting]]) -> InputError:
    """The refusal that lacks least, and every single flag that would mend it."""
    lacks_host = [pair for pair in refusals if pair[0].limit == "host"]
    refusal, setting = min(lacks_host or refusals, key=lambda pair: pair[0].wanted)
    sharing = problem.sharing
    flags = [f"--{refusal.limit}-memory {_whole(refusal.wanted * (sharing if refusal.limit == 'host' else 1))}"]
    disks = [pair[0].disk for pair in refusals if pair[0].disk]
    if disks:
        flags.append(f"--disk-space {_whole(min(disks) * sharing)}")
    for flag, tokens in (("tokens-per-visit", _tokens_a_visit(problem)), ("tokens-per-step", _tokens_in_one(problem))):
        if tokens:
            flags.append(f"--{flag} {tokens}")
    each = "" if problem.count == 1 else f", on each of {problem.count} devices"
    return InputError(
        f"--{refusal.limit}-memory: {problem.model} at {setting.micro_batches * setting.micro_batch_tokens} tokens a "
        f"visit, {setting.visits} visit{'s' * (setting.visits > 1)} a step{each}: {refusal}; nearest: "
        f"{' or '.join(flags)}"
    )


def _tokens_a_visit(problem: Problem) -> int | None:
    """The most tokens that fit where more a visit were asked for. None where even one sequence does not."""
    if problem.tokens_per_visit is None:
        return None
    share = -(-problem.sequences // problem.count)
    return _most_sequences(problem, problem.tokens_per_visit, lambda rows: -(-share // rows))


def _tokens_in_one(problem: Problem) -> int | None:
    """The most tokens a step that fit in one visit: gradients are then half as large."""
    if problem.tokens_per_visit is None:
        most = _most_sequences(problem, problem.tokens_per_step // problem.count, lambda rows: 1)
        return most and most * problem.count
    step = problem.tokens_per_visit * problem.count
    if step >= problem.tokens_per_step:
        return None
    alone = replace(problem, tokens_per_step=step)
    return step if _fits(alone, problem.tokens_per_visit // problem.shape.seq_len, 1) else None


def _most_sequences(problem: Problem, refused: int, visits: Callable[[int], int]) -> int | None:
    """The most tokens below `refused` whose sequences fit into a visit, when that makes so many visits."""
    low, high = 0, refused // problem.shape.seq_len
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _fits(problem, middle, visits(middle)) else (low, middle)
    return low * problem.shape.seq_len or None


def _fits(problem: Problem, sequences: int, visits: int) -> bool:
    shape = problem.shape
    setting = Setting(
        problem.format, shape.seq_len, shape.d_model, sequences, visits, problem.beside, ranks=problem.count
    )
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
