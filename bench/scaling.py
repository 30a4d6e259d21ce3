"""Tokens per second of one job on 1, 2, 4, ... ranks: strong scaling (one batch, shared) and weak (a batch a rank).

    python bench/scaling.py --device cuda --model 1.3B --seq-len 2048 --micro-batches 8 --micro-batch-size 4
    python bench/scaling.py --device cpu --model tiny --seq-len 256 --counts 1 2

Every point is a job of its own, started by torchrun; points take turns, round after round, so that a machine whose
speed drifts slows all of them. In strong scaling the losses of all counts must be the same to the bit, or the bench
fails. Ranks share a GPU where there are fewer of them: that proves the bits, and says nothing of speed.
Medians go to bench/results/<device>/scaling-<model>.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from cgpt.distributed import open_world
from cgpt.model.init import init_parameter
from cgpt.model.presets import PRESETS
from cgpt.stream.build import build
from cgpt.stream.executor import Executor
from cgpt.stream.format import Format
from cgpt.stream.gpt_plans import gpt_plans
from cgpt.stream.optimizer import AdamW
from cgpt.stream.placement import Placement
from record import save


def placement_of(kind: str, layers: int, ranks: int, rounds: int) -> Placement:
    """resident: a visit a micro-batch. host: every layer streamed, all micro-batches in one visit."""
    if kind == "resident":
        return Placement.resident(layers, ranks)
    there = ("host",) * layers
    return Placement(there, there, (True,) * layers, micro_batches=rounds, ranks=ranks)


def work(asked: argparse.Namespace) -> None:
    """One rank of one job: times `steps` steps behind two that warm up; rank 0 writes what it saw."""
    world = open_world(asked.device)
    config, count, size = PRESETS[asked.model].config, asked.micro_batches, asked.micro_batch_size
    rounds = -(-count // world.count)
    placement = placement_of(asked.placement, len(gpt_plans(config)), world.count, rounds)
    device = f"cuda:{torch.cuda.current_device()}" if asked.device == "cuda" else "cpu"
    _, store = build(config, Format(asked.precision), device, placement=placement, world=world)
    store.initialise(lambda name, tensor: init_parameter(name, tensor, config, seed=0))
    executor, optimizer = Executor(store), AdamW(store)
    generator = torch.Generator().manual_seed(0)
    seconds, losses = [], []
    for _ in range(2 + asked.steps):
        tokens = torch.randint(config.vocab_size, (count, size, asked.seq_len + 1), generator=generator).to(device)
        mine = [(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in tokens[world.rank :: world.count]]
        mine += [None] * (rounds - len(mine))
        rows = placement.micro_batches
        world.tell(None)  # all begin together
        begin = time.perf_counter()
        found = executor.gradients(
            [mine[i : i + rows] for i in range(0, rounds, rows)], micro_batches=count, samples=count * size
        )
        optimizer.step(found, lr=1e-4)
        seconds.append(time.perf_counter() - begin)
        losses.append(found.loss)
    store.close()
    if world.first:
        Path(asked.worker).write_text(json.dumps({"seconds": seconds[2:], "losses": losses, "sent": world.sent}))
    world.close()


def job(asked: argparse.Namespace, ranks: int, micro_batches: int, placement: str) -> dict:
    """Runs one job of `ranks` processes; returns what rank 0 saw."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "told.json"
        flags = {**vars(asked), "worker": told, "micro_batches": micro_batches, "placement": placement}
        argv = [part for name, value in flags.items() if name not in ("counts", "placements", "rounds", "kinds", "out")
                for part in (f"--{name.replace('_', '-')}", str(value))]  # fmt: skip
        environment = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // ranks)), **os.environ}
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        subprocess.run([sys.executable, *start, __file__, *argv], check=True, env=environment)
        return json.loads(told.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=PRESETS, default="111M")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--micro-batches", type=int, default=4, help="of a step; of a rank in weak scaling")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--counts", type=int, nargs="+", default=None, help="of ranks (default: 1, 2, 4, ... devices)")
    parser.add_argument("--placements", nargs="+", choices=["resident", "host"], default=["resident", "host"])
    parser.add_argument("--kinds", nargs="+", choices=["strong", "weak"], default=["strong", "weak"])
    parser.add_argument("--out", type=Path, help="a file for the results, instead of bench/results")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--placement", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        work(asked)
        return

    del asked.placement
    devices = torch.cuda.device_count() if asked.device == "cuda" else len(os.sched_getaffinity(0))
    asked.counts = asked.counts or [2**i for i in range(devices.bit_length())]
    found = {}
    for placement in asked.placements:
        for kind in asked.kinds:
            seen: dict[int, list[dict]] = {count: [] for count in asked.counts}
            for _ in range(asked.rounds):
                for count in asked.counts:
                    batches = asked.micro_batches * (count if kind == "weak" else 1)
                    seen[count].append(job(asked, count, batches, placement))
            if kind == "strong" and len({json.dumps(row["losses"]) for rows in seen.values() for row in rows}) > 1:
                raise SystemExit(f"{placement}: wanted the same losses on every count of ranks, got {seen}")
            found[f"{placement}, {kind}"] = summed_up(asked, seen, kind)
    shared = asked.device == "cuda" and max(asked.counts) > devices
    told = {
        "asked": {k: v for k, v in vars(asked).items() if k not in ("worker", "out")},
        "devices": devices,
        "shared": shared,
    }
    print(json.dumps(found, indent=1))
    if asked.out is not None:
        asked.out.write_text(json.dumps({**told, "scaling": found}, default=str, indent=1) + "\n")
        return
    print(save(f"scaling-{asked.model}", {**told, "scaling": found}))


def summed_up(asked: argparse.Namespace, seen: dict[int, list[dict]], kind: str) -> list[dict]:
    """A row a count: median seconds, tokens/s of the job, and efficiency against the smallest count."""
    rows = []
    for count, jobs in seen.items():
        seconds = statistics.median(second for row in jobs for second in row["seconds"])
        batches = asked.micro_batches * (count if kind == "weak" else 1)
        speed = batches * asked.micro_batch_size * asked.seq_len / seconds
        least = rows[0] if rows else {"ranks": count, "tokens_per_second": speed}
        efficiency = speed / count / (least["tokens_per_second"] / least["ranks"])
        rows.append({"ranks": count, "seconds": seconds, "tokens_per_second": speed, "efficiency": efficiency})
    return rows


if __name__ == "__main__":
    main()
