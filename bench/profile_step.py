"""Where one training step's time goes: a table by op, and how fast the arithmetic in it is beside torch's own products.

    python bench/profile_step.py --model 111M --batch-size 2 --seq-len 1024
    python bench/profile_step.py --model 1.3B --layers 2 --batch-size 1 --seq-len 2048

Each round does three things in turn: a step as it is, a step under torch.profiler with every native call an event of
its own, and the step's matrix products alone by torch.mm (bench/products.py). An event's time is its own, without that
of events inside it, so the rows add up to the profiled step; what profiling costs is that step over the other. Rows are
medians over the rounds.

With --layers the model has fewer blocks, and what happens within blocks, their AdamW included, is multiplied up to all
of them. The table says so: it is a forecast of the whole model's step then, not a measurement.

Results go to bench/results/<device>/profile_step-<model>[-fp32].json.
"""

import argparse
import math
import re
import statistics
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from cgpt.model.config import resized
from cgpt.model.presets import PRESETS
from cgpt_ext import _native
from contenders import Ours
from products import Floor
from record import save

NATIVE, STEP = "native ", "the whole step"  # what events of ours begin with, or are called
PRODUCTS, ATTENTION, OURS, TORCH, OVERHEAD = GROUPS = (
    "matrix products",
    "attention",
    "other native ops",
    "other ops of torch",
    "Python, autograd, dispatch",
)
NATIVE_PRODUCT = re.compile("(linear|product)(?!_check)")
TORCH_PRODUCTS = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1}  # which argument is the left operand
IN_BLOCK = re.compile(r"h\.\d+ ")  # what the walk calls its work on a block begins so
SMALL = 1e-3  # of a step; rows below share a line of the table


@contextmanager
def native_events():
    """Every function of the native module makes an event of its name and the shapes of its tensors."""
    there = {name: getattr(_native, name) for name in dir(_native) if not name.startswith("_")}
    functions = {name: thing for name, thing in there.items() if callable(thing) and not isinstance(thing, type)}

    def recorded(name, function):
        def call(*arguments):
            shapes = ["x".join(map(str, x.shape)) for x in arguments if isinstance(x, torch.Tensor)]
            with record_function(" ".join([NATIVE + name, *shapes])):
                return function(*arguments)

        return call

    for name, function in functions.items():
        setattr(_native, name, recorded(name, function))
    try:
        yield
    finally:
        for name, function in functions.items():
            setattr(_native, name, function)


def place_of(name: str, shapes: list) -> tuple[str, str, int]:
    """(group, row, FLOPs) of an event; shapes: of its arguments, where torch records them."""
    if name.startswith(NATIVE):
        function, *texts = name.removeprefix(NATIVE).split()
        shapes = [tuple(map(int, text.split("x"))) for text in texts if text]
        if NATIVE_PRODUCT.search(function):  # of the first two, the right operand lying either way
            left, right = [shape for shape in shapes if len(shape) == 2][:2]
            return product(function, left, right)
        if function in ("attention_fwd", "attention_bwd"):
            B, T, H, D = shapes[0]
            row = f"{function} {B} x {T} x {H} x {D}"
            return ATTENTION, row, (2 if function == "attention_fwd" else 5) * B * H * T * T * D  # the causal half
        return OURS, function, 0
    if name in TORCH_PRODUCTS:
        return product("torch.mm", *shapes[TORCH_PRODUCTS[name] :][:2])
    return (TORCH, name.removeprefix("aten::"), 0) if name.startswith("aten::") else (OVERHEAD, OVERHEAD, 0)


def product(who: str, left, right) -> tuple[str, str, int]:
    m, k = left
    n = math.prod(right) // k
    return PRODUCTS, f"{who} {m} x {k} x {n}", 2 * m * k * n


def walk_recorded(trainer: Ours) -> None:
    """Has the walk over the layers make an event of each piece of its work, for `within_block`."""
    lanes = trainer.store.lanes
    compute = lanes.compute

    def recorded(what, *rest, **options):
        with record_function(what):
            return compute(what, *rest, **options)

    lanes.compute = recorded


def within_block(event) -> bool:
    while event is not None and not IN_BLOCK.match(event.name):
        event = event.cpu_parent
    return event is not None


def profiled_step(step, blocks: float) -> tuple[float, dict]:
    """Seconds of a step by the clock, and (group, row) -> [calls, seconds, FLOPs], those within blocks times
    `blocks`."""
    with native_events(), profile(activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True) as profiler:
        begin = time.perf_counter()
        with record_function(STEP):
            step()
        seconds = time.perf_counter() - begin
    rows = defaultdict(lambda: [0, 0.0, 0])
    events = profiler.events()
    thread = next(event.thread for event in events if event.name == STEP)
    for event in events:
        if event.thread != thread:  # beside the step, so no part of its time
            continue
        group, row, flops = place_of(event.name, event.input_shapes)
        times, found = blocks if within_block(event) else 1, rows[group, row]
        found[0] += times
        found[1] += times * event.self_cpu_time_total * 1e-6
        found[2] += times * flops
    return seconds, dict(rows)


def measure(args) -> dict:
    whole = PRESETS[args.model].config
    config = whole if args.layers is None else resized(whole, n_layer=args.layers)
    blocks = whole.n_layer / config.n_layer
    torch.manual_seed(0)
    trainer, floor = Ours(config, args.precision), Floor(config, args.precision, args.batch_size * args.seq_len)
    walk_recorded(trainer)

    def step():
        tokens = torch.randint(config.vocab_size, (args.batch_size, args.seq_len + 1))
        trainer.step(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def timed(call) -> float:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    step()
    profiled_step(step, blocks)
    floor.step()
    floor.seconds.clear()  # that was the warm-up
    plain, profiled, tables = [], [], []
    for _ in range(args.rounds):
        plain.append(timed(step))
        seconds, rows = profiled_step(step, blocks)
        profiled.append(seconds)
        tables.append(rows)
        floor.step()
    return summed_up(tables, plain, profiled, floor, blocks)


def summed_up(tables: list[dict], plain: list[float], profiled: list[float], floor: Floor, blocks: float) -> dict:
    """The rows' medians, and what they are beside the floor's products, as a file of results has them."""
    rows = []
    for group, name in dict.fromkeys(key for table in tables for key in table):
        found = [table.get((group, name), [0, 0.0, 0]) for table in tables]
        calls, seconds, flops = (statistics.median(column) for column in zip(*found, strict=True))
        rows.append({"group": group, "name": name, "calls": calls, "seconds": seconds, "flops": flops})
    rows.sort(key=lambda row: -row["seconds"])
    products = floor.details(blocks)
    total, rate = sum(row["seconds"] for row in rows), products["flops"] / products["seconds"]
    for row in rows:
        row["share"] = row["seconds"] / total
        if row["flops"]:
            row["of_gemm"] = row["flops"] / row["seconds"] / rate
    return {
        "scaled_blocks": blocks,
        "step_seconds": plain,
        "profiled_step_seconds": profiled,
        "profiling_costs": statistics.median(profiled) / statistics.median(plain),
        "rows_seconds": total,
        "floor": products,
        "rows": rows,
    }


def table(measured: dict) -> str:
    lines = []
    floor, rows = measured["floor"], measured["rows"]

    def line(name, calls, seconds, share, flops=0, of_gemm=None):
        rate = f"{flops / seconds / 1e9:9.1f} {of_gemm:7.0%}" if flops else ""
        lines.append(f"{name:44} {calls:7.0f} {seconds * 1e3:10.1f} {share:7.1%} {rate}".rstrip())

    lines.append(f"{'':44} {'calls':>7} {'ms':>10} {'share':>7} {'GFLOP/s':>9} {'of mm':>7}")
    for group in GROUPS:
        mine = [row for row in rows if row["group"] == group]
        seconds, flops = sum(row["seconds"] for row in mine), sum(row["flops"] for row in mine)
        rate = flops / seconds / (floor["flops"] / floor["seconds"]) if flops else None
        share = seconds / measured["rows_seconds"]
        line(group, sum(row["calls"] for row in mine), seconds, share, flops, rate)
        if group == OVERHEAD:  # has no parts
            continue
        for row in mine:
            if row["share"] >= SMALL:
                line("  " + row["name"], row["calls"], row["seconds"], row["share"], row["flops"], row.get("of_gemm"))
        small = [row for row in mine if row["share"] < SMALL]
        if small:
            calls, seconds, share = (sum(row[key] for row in small) for key in ("calls", "seconds", "share"))
            line(f"  {len(small)} more", calls, seconds, share)
    lines.append(
        f"the rows {measured['rows_seconds']:.3f} s; the products alone by torch.mm {floor['seconds']:.3f} s,"
        f" {floor['flops'] / floor['seconds'] / 1e9:.1f} GFLOP/s: {measured['rows_seconds'] / floor['seconds']:.2f} x"
    )
    lines.append(
        f"the step that was run {statistics.median(measured['step_seconds']):.3f} s,"
        f" profiled {measured['profiling_costs']:.3f} x that"
    )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="111M", choices=PRESETS)
    parser.add_argument("--layers", type=int, help="blocks of the model's, where all do not fit")
    parser.add_argument("--batch-size", type=int, default=2, help="sequences a step")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-save", action="store_true", help="print only")
    parser.add_argument("--out", type=Path, help="a folder for the results instead of bench/results/<device>")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds: wanted 1 or more, got {args.rounds}")
    measured = measure(args)
    whole = PRESETS[args.model].config.n_layer
    print(f"{args.model}, {args.batch_size} x {args.seq_len} tokens, {args.precision}")
    if args.layers not in (None, whole):
        print(f"a forecast: {args.layers} of {whole} blocks were run, their rows times {whole / args.layers:g}")
    print(table(measured))
    if not args.no_save:
        name = f"profile_step-{args.model}" + "-fp32" * (args.precision == "fp32")
        settings = {key: value for key, value in vars(args).items() if key not in ("no_save", "out")}
        print("wrote", save(name, {"settings": settings, **measured}, args.out))


if __name__ == "__main__":
    main()
