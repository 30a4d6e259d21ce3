"""Tokens per second of one training step, against the same model in plain PyTorch and its matrix products alone.

    python bench/train_step.py --model 111M --batch-size 2 --seq-len 1024 --precision bf16
    python bench/train_step.py --model 590M --batch-size 1 --seq-len 2048 --against plain
    python bench/train_step.py --model 1.3B --batch-size 1 --seq-len 2048 --against none
    python bench/train_step.py --precision fp32 --isa avx2

Each contender lives in a process of its own, so that neither's allocator, thread pool or settings touch the other's,
and they take turns, so that a machine whose speed drifts slows all; the matrix products alone (bench/products.py) take
turns with them. Who does not step holds its model and nothing else: gradients are dropped and freed memory goes back to
the kernel, which is why a turn begins with steps that are not timed. Peers: bench/twin.py and, where transformers is
installed, Hugging Face's GPT2LMHeadModel. Medians go to bench/results/<device>/train_step-<model>[-fp32][-<isa>].json.

--isa holds everybody to the instructions of an older machine, torch, oneDNN and MKL as well as our kernels.
"""

import argparse
import ctypes
import importlib.util
import multiprocessing
import os
import resource
import statistics
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import torch

from cgpt.model.presets import PRESETS
from cgpt.scaling.flops import matmul_flops_per_token
from cgpt_ext import _native
from contenders import HuggingFace, Ours
from products import Floor
from record import save
from twin import TwinTrainer

FLOOR = "its matrix products"
WARM_UP, TIMED = 2, 2  # steps a turn; a heap that was trimmed takes pages anew in the first, and a few after it

# What the libraries are told before they are loaded; they read it once. On AMD's processors MKL takes a kernel for Zen,
# of AVX2, whatever it is told.
LIMITS = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
    "avx512bf16": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
}


def worker(pipe, contender, isa, batch_size, seq_len, vocab_size, threads):
    """Answers a number of timed steps with the (seconds, minor page faults, loss) of each and of those before them, and
    None with what there is to say at the end."""
    torch.set_num_threads(threads)
    if isa:
        _native.set_cpu_isa(isa)
    trainer = contender()
    generator = torch.Generator().manual_seed(0)
    resting = 0
    while timed := pipe.recv():
        measured = []
        for _ in range(WARM_UP + timed):
            tokens = torch.randint(vocab_size, (batch_size, seq_len + 1), generator=generator)
            ids, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
            faults, start = usage().ru_minflt, time.perf_counter()
            loss = trainer.step(ids, targets)
            seconds = time.perf_counter() - start
            measured.append((seconds, usage().ru_minflt - faults, loss))
        trainer.rest()
        give_back()
        resting = max(resting, resident())
        pipe.send(measured)
    told = {"peak_memory_bytes": usage().ru_maxrss * 1024, "resting_memory_bytes": resting}
    told["torch_capability"] = torch.backends.cpu.get_cpu_capability()
    if isinstance(trainer, Floor):
        told["floor"] = trainer.details()
    pipe.send(told)


def usage():
    return resource.getrusage(resource.RUSAGE_SELF)


def give_back():
    """Has glibc hand freed memory to the kernel; elsewhere there is no such call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resident() -> int:
    """Bytes, where the kernel tells."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


class Contender:
    """A worker's process, seen from here."""

    def __init__(self, name, make, *given):
        spawn = multiprocessing.get_context("spawn")
        self.name, self.seconds, self.faults, self.losses = name, [], [], []
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=worker, args=(theirs, make, *given), daemon=True)
        self.process.start()
        theirs.close()  # so that its death is noticed

    def ask(self, message):
        try:
            self.pipe.send(message)
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            sys.exit(f"{self.name}: wanted a step, got exit code {self.process.exitcode}")

    def turn(self, timed):
        measured = self.ask(timed)
        self.losses += [loss for _, _, loss in measured]
        self.seconds += [seconds for seconds, _, _ in measured[WARM_UP:]]
        self.faults += [faults for _, faults, _ in measured[WARM_UP:]]

    def row(self, tokens, flops_per_token):
        rate = tokens / statistics.median(self.seconds)
        return {
            "seconds": self.seconds,
            "tokens_per_second": rate,
            "model_flops_per_second": rate * flops_per_token,
            "first_loss": self.losses[0],
            "minor_faults": self.faults,
            **self.ask(None),
        }


def peers(wanted) -> dict[str, type]:
    """Name -> class of those to measure against; of all that are installed where none is named."""
    if wanted is None:
        wanted = ["plain", "transformers"] if importlib.util.find_spec("transformers") else ["plain"]
    found = {"plain PyTorch": TwinTrainer} if "plain" in wanted else {}
    if "transformers" in wanted:
        found[f"transformers {version('transformers')}"] = HuggingFace
    return found


def measure(args) -> dict:
    """The floor and everybody's rows."""
    config = PRESETS[args.model].config
    tokens = args.batch_size * args.seq_len
    makers = {FLOOR: partial(Floor, tokens=tokens), "cgpt": Ours, **peers(args.against)}
    given = args.isa, args.batch_size, args.seq_len, config.vocab_size, args.threads
    with patch.dict(os.environ, LIMITS.get(args.isa, {})):  # for the workers; this process has loaded its libraries
        everybody = [Contender(name, partial(make, config, args.precision), *given) for name, make in makers.items()]
    for begin in range(0, args.steps, TIMED):
        for contender in everybody:
            contender.turn(min(TIMED, args.steps - begin))
    rows = {c.name: c.row(tokens, matmul_flops_per_token(config, args.seq_len)) for c in everybody}
    floor = rows.pop(FLOOR)
    seconds = statistics.median(floor["seconds"])
    for row in rows.values():
        row["of_floor"] = statistics.median(row["seconds"]) / seconds
    return {
        "floor_seconds": seconds,
        "floor_flops_per_second": floor["floor"]["flops"] / seconds,
        "floor_products": floor["floor"]["products"],
        "contenders": rows,
    }


def report(measured: dict):
    print(
        f"{FLOOR:22} {measured['floor_seconds']:9.3f} s a step"
        f"  {measured['floor_flops_per_second'] / 1e9:7.1f} GFLOP/s by torch.mm"
    )
    ours = measured["contenders"]["cgpt"]["tokens_per_second"]
    for name, row in measured["contenders"].items():
        rate, faults = row["tokens_per_second"], statistics.median(row["minor_faults"])
        print(
            f"{name:22} {rate:9.1f} tokens/s  {row['model_flops_per_second'] / 1e9:7.1f} model GFLOP/s"
            f"  {row['of_floor']:5.2f} x the products  {row['peak_memory_bytes'] / 2**30:5.2f} GiB,"
            f" {row['resting_memory_bytes'] / 2**30:5.2f} at rest  {faults:8.0f} faults a step"
            f"  cgpt is {ours / rate:5.2f} x"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="111M", choices=PRESETS)
    parser.add_argument("--batch-size", type=int, default=2, help="sequences a step")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--against", nargs="+", choices=["plain", "transformers", "none"], help="default: both")
    parser.add_argument("--isa", choices=LIMITS, help="an older machine's instructions, for everybody")
    parser.add_argument("--steps", type=int, default=8, help=f"timed steps each, {TIMED} a turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-save", action="store_true", help="print only")
    parser.add_argument("--out", type=Path, help="a folder for the results instead of bench/results/<device>")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps: wanted 1 or more, got {args.steps}")
    if args.isa and args.isa not in _native.cpu_isas():
        parser.error(f"--isa: wanted one of {', '.join(_native.cpu_isas())}, got {args.isa}")
    measured = measure(args)
    report(measured)
    if not args.no_save:
        name = "-".join(filter(None, ["train_step", args.model, args.precision * (args.precision != "bf16"), args.isa]))
        settings = {key: value for key, value in vars(args).items() if key not in ("no_save", "out")}
        print("wrote", save(name, {"settings": settings, **measured}, args.out))


if __name__ == "__main__":
    main()
