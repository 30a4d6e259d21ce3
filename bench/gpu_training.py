"""A model of random weights that trains on random tokens, placed in the memory that is free, and what is told of it.

A step lasts from the end of the one before it to its own: AdamW on the host works on into the next step. So the first
step of a turn is not timed, and a turn ends when its last update has, lest another's turn should hide it. FLOP/s are
those of the model's matrix products; recomputation is not counted.
"""

import gc
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from cgpt.model.config import GPTConfig
from cgpt.model.presets import PRESETS
from cgpt.plots import plot_timeline
from cgpt.scaling.flops import matmul_flops_per_token
from cgpt.stream.account import account
from cgpt.stream.build import build
from cgpt.stream.devices import open_device
from cgpt.stream.executor import Executor
from cgpt.stream.forecast import forecast
from cgpt.stream.format import Format
from cgpt.stream.gpt_plans import gpt_plans
from cgpt.stream.hardware import DEVICES, Hardware
from cgpt.stream.host import HostMemory
from cgpt.stream.limits import Budgets, limits
from cgpt.stream.optimizer import AdamW
from cgpt.stream.placement import Placement
from cgpt.stream.planner import DoesNotFit, Setting, place
from cgpt.stream.probe import flops_of, probe
from cgpt.stream.rates import Rates, Work
from cgpt.stream.store import Store
from cgpt.stream.timeline import Timeline

FORMAT = Format("bf16")
LR = 1e-4
VISIT = 16384  # tokens
STEPS_KEPT = 5  # on the timeline
HOST_RESERVE = 5 << 30  # bytes left to the driver and to this process
PIN_TRIAL, PIN_SHARE = 1 << 30, 0.4  # bytes; of a part's time, for pinning
LINK_BYTES, LINK_REPEATS = 256 << 20, 5
TINY = GPTConfig(n_layer=4, n_head=2, d_model=64, d_head=32, d_ff=256, vocab_size=256, seq_len=16)
PLENTY = Budgets(1 << 46, 1 << 46)

Row = dict


@dataclass(frozen=True)
class Bench:
    """Where a part runs, where it leaves files, and how many seconds it has."""

    device: str
    out: Path
    seconds: float
    began: float = field(default_factory=time.monotonic)

    @property
    def tiny(self) -> bool:
        return self.device == "cpu"

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.began)

    @property
    def visit(self) -> int:
        return 4 * TINY.seq_len if self.tiny else VISIT

    @property
    def beside(self) -> str:
        """The tier of torch's own memory."""
        return "host" if self.tiny else "device"

    @property
    def hardware(self) -> Hardware | None:
        """What is known of this GPU; nothing of a PCIe card, whose peak is another."""
        name = "" if self.tiny else torch.cuda.get_device_name().lower().replace(" ", "-")
        return next((found for key, found in DEVICES.items() if key in name and "pcie" not in name), None)

    def shape(self, model: str) -> GPTConfig:
        return TINY if self.tiny else PRESETS[model].config


class Training:
    """A model of random weights whose steps are timed."""

    def __init__(
        self,
        bench: Bench,
        shape: GPTConfig,
        placement: Placement,
        setting: Setting,
        disk: str | None = None,
        hunt: int | None = None,
    ):
        self.shape, self.setting, self.number, self.turns = shape, setting, 0, 0
        plans = gpt_plans(shape)
        self.account = account(plans, placement, FORMAT, setting.micro_batch_tokens, shape.d_model, bench.beside)
        self.timeline = Timeline(STEPS_KEPT)
        lanes = open_device(bench.device, self.account.needs.device, timeline=self.timeline, hunt=hunt)
        _, self.store = build(shape, FORMAT, lanes, placement=placement, disk=disk)
        _fill(self.store)
        self.executor, self.optimizer = Executor(self.store), AdamW(self.store)

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, *_) -> None:
        self.store.close()

    def batches(self, visits: int) -> list:
        """Random tokens, as many visits of micro-batches; another draw every time, the same for every Training."""
        self.turns += 1
        generator = torch.Generator().manual_seed(self.turns)
        rows = self.setting.micro_batch_tokens // self.shape.seq_len

        def micro_batch() -> tuple:
            drawn = torch.randint(self.shape.vocab_size, (rows, self.shape.seq_len + 1), generator=generator)
            return tuple(part.contiguous().to(self.store.device) for part in (drawn[:, :-1], drawn[:, 1:]))

        return [[micro_batch() for _ in range(self.setting.micro_batches)] for _ in range(visits)]

    def step(self, visits: list) -> tuple[float, float]:
        """(loss, gradient norm)."""
        begin = time.perf_counter()
        found = self.executor.gradients(visits)
        self.optimizer.step(found, LR)
        self.number += 1
        self.timeline.mark(self.number, begin, time.perf_counter())
        return found.loss, found.norm

    def turn(self, visits: int, steps: int) -> tuple[float, list[tuple[float, float]]]:
        """(seconds of one of `steps` steps that follow one of a single visit, what all of them came to)."""
        data, found, ends = [self.batches(1), *(self.batches(visits) for _ in range(steps))], [], []
        for batches in data:
            found.append(self.step(batches))
            ends.append(time.perf_counter())
        self.store.settle()
        return (ends[-1] - ends[0]) / steps, found


def _fill(store: Store) -> None:
    """Random weights, in seconds for billions of them: the working halves alone, over and over the same stretch."""
    for index, names in enumerate(store.owned):
        generator = torch.Generator().manual_seed(index)
        with store.record(index, writing=True) as record:
            if store.placement.state[index] == "disk":  # memory begins at zero, a buffer of the disk's does not
                record.memory.zero_()
            tile = torch.randn(1 << 20, generator=generator).mul_(0.02).to(store.dtype).to(record.memory.device)
            for name in names:
                weights = record.view("working", name)
                if weights.dim() == 1:
                    weights.fill_(0.0 if name.endswith("bias") else 1.0)
                    continue
                for part in weights.view(-1).split(len(tile)):
                    part.copy_(tile[: len(part)])


def placed(bench: Bench, shape: GPTConfig, budgets: Budgets, visits: int = 1, **options) -> tuple[Setting, Placement]:
    """With the largest micro-batches that fit. Raises DoesNotFit, of the smallest."""
    each = bench.visit
    while True:
        setting = Setting(FORMAT, each, shape.d_model, bench.visit // each, visits, bench.beside)
        try:
            return setting, place(gpt_plans(shape), budgets, setting, **options)
        except DoesNotFit:
            if each // 2 < shape.seq_len:
                raise
        each //= 2


def deepest(bench: Bench, shape: GPTConfig, budgets: Budgets) -> GPTConfig | None:
    """The same with as many layers as fit."""
    low, high = 0, shape.n_layer
    while high - low > 1:
        middle = (low + high) // 2
        try:
            placed(bench, replace(shape, n_layer=middle), budgets)
            low = middle
        except DoesNotFit:
            high = middle
    return replace(shape, n_layer=low) if low else None


def free_memory(bench: Bench, share: float) -> Budgets:
    """What a run may take: of the device a share, of the host all but a reserve, or what can be pinned in time."""
    device = int(share * torch.cuda.mem_get_info()[0])  # which makes the context, and costs seconds
    begin = time.monotonic()
    HostMemory(PIN_TRIAL, torch.device("cuda"))
    rate = PIN_TRIAL / (time.monotonic() - begin)
    host = (limits().host or PLENTY.host) - HOST_RESERVE
    return Budgets(device, min(host, int(rate * PIN_SHARE * bench.left)))


def tiny_budgets(bench: Bench, shape: GPTConfig, fewer: int) -> Budgets:
    """Room for a model of so many layers fewer, with nothing at home on the device."""
    shape = replace(shape, n_layer=shape.n_layer - fewer)
    setting, placement = placed(bench, shape, PLENTY, most_state=0, most_weights=0)
    there = account(gpt_plans(shape), placement, FORMAT, setting.micro_batch_tokens, shape.d_model, bench.beside)
    return Budgets(there.device, there.host)


def free(bench: Bench) -> None:
    gc.collect()
    if not bench.tiny:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def rates_of(store: Store) -> Rates:
    """`probe`'s rates, the link's with both directions busy and from memory as pinned as a run's own."""
    found, lanes = probe(store), store.lanes
    nbytes = LINK_BYTES if store.device.type == "cuda" else 1 << 20
    host = HostMemory(2 * nbytes, store.device)
    here, back = (host.allocate(nbytes) for _ in range(2))
    there, source = (torch.zeros(nbytes, dtype=torch.uint8, device=store.device) for _ in range(2))
    lanes.settle()
    for _ in range(LINK_REPEATS + 1):
        down = lanes.submit("down", "link", lambda: lanes.copy(there, here), nbytes=nbytes)
        up = lanes.submit("up", "link", lambda: lanes.copy(back, source), nbytes=nbytes)
        down.wait()
        up.wait()
    spans = [span for span in lanes.timeline.spans() if span.what == "link"]
    rates = {}
    for lane in ("down", "up"):
        times = [span.end - span.begin for span in spans if span.lane == lane]
        rates[lane] = nbytes / statistics.median(times[1:])
    return replace(found, **rates)


def speed(bench: Bench, shape: GPTConfig, tokens: int, seconds: float) -> Row:
    flops = matmul_flops_per_token(shape) * tokens / seconds
    share = flops / bench.hardware.peak if bench.hardware else None
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "model_flops_per_second": flops,
        "mfu": share,
    }


def told(bench: Bench, training: Training, rates: Rates, tokens: int, trace: str | None) -> Row:
    """The last step's lanes, predicted at the rate of the earliest step's arithmetic that is kept. trace: name under
    which its trace and its picture are left, if they are."""
    timeline, store, last = training.timeline, training.store, training.number
    steady = [number for number in timeline.steps() if number > 2]  # the first compiles, the second is the first whole
    rates = replace(rates, flops=max(1.0, flops_of(timeline, min(steady, default=last))))
    memory = bench.hardware and bench.hardware.bandwidth
    work = Work(FORMAT, tokens, training.shape.d_model, device_memory=memory)
    predicted, busy = forecast(store.plans, store.placement, rates, work), timeline.busy(last)
    if trace is not None:
        timeline.write(bench.out / f"streamed-{trace}.json")
        plot_timeline(bench.out / f"streamed-{trace}.png", timeline.spans(last))
    begin, end = timeline.steps()[last]
    return {
        "predicted_seconds": predicted.seconds,
        "bound_by": predicted.binding,
        "last_step": end - begin,
        "lanes": {lane: {"predicted": predicted.lanes[lane], "measured": busy[lane]} for lane in busy if busy[lane]},
        "rates": {name: getattr(rates, name) for name in ("flops", "down", "up", "memory")},
    }
