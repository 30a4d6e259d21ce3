"""How every op is measured: against its peers, interleaved round by round in one process, medians compared.

pytest bench -o addopts= --benchmark-only                     prints the tables
pytest bench -o addopts= --benchmark-only --save-results      also writes bench/results/<device>/<op>.json
"""

import math
import statistics
import time
from contextlib import nullcontext
from functools import cache

import pytest
import torch

from cgpt.heap import keep_large_buffers
from cgpt_ext import _native, dispatch
from kinds import TORCH_MULTIPLIES_BF16
from record import device_name, save

ROWS = pytest.StashKey[dict]()  # op -> its rows
GEMM_SIZE = 2048, 768, 3072
GEMM = "torch.mm {} x {} x {}".format(*GEMM_SIZE)


def pytest_addoption(parser):
    parser.addoption(
        "--save-results", action="store_true", help="write bench/results/<device>/<op>.json for each bench that ran"
    )


def pytest_configure(config):
    config.stash[ROWS] = {}
    keep_large_buffers()


@pytest.fixture
def versus(benchmark, request):
    """versus(ours, peers, flops=, bytes=, tokens=, limits={}): times `ours` with each peer run just before every round.

    `peers` maps a name to a callable. Records medians in seconds, the ratio best peer / ours (above 1: we are
    faster), and the rate where `flops`, `bytes` or `tokens` of one call are given. `limits` are timed like the peers
    and count in no ratio: what the machine can do at best. `gemm`, a dtype, has torch's matrix product timed
    before each of them, so that all find caches that are full of something else, and records what share of its rate we
    reach (bf16 where torch has no product of it: fp32's). Where the test has a parameter `isa`, `ours` keeps to that.
    """
    isa = parameters(request).get("isa")

    def measure(ours, peers, *, flops=None, bytes=None, tokens=None, limits=None, gemm=None, seconds=3.0):
        limits = dict(limits or {})
        if gemm is not None:
            limits[GEMM] = product(gemm)
        if isa is not None:
            benchmark.group = f"{benchmark.group}, our {isa} kernels"
            peers = {f"{name} on all of the machine": call for name, call in peers.items()}
        calls = {"ours": ours, **peers, **limits}
        for call in calls.values():
            call()
        once = sum(timed(call) for call in calls.values())
        rounds = max(5, min(200, int(seconds / once)))
        times = {name: [] for name in (*peers, *limits)}

        def run_peers():
            for name in times:
                if name != GEMM:
                    time_gemm()
                    times[name].append(timed(calls[name]))
            time_gemm()

        def time_gemm():
            if gemm is not None:
                times[GEMM].append(timed(calls[GEMM]))

        benchmark.pedantic(ours, setup=run_peers, rounds=rounds, warmup_rounds=0)
        row = {"name": request.node.name, "rounds": rounds, "seconds": benchmark.stats.stats.median}
        medians = {name: statistics.median(values) for name, values in times.items()}
        row["peers"] = {name: medians[name] for name in peers}
        row["ratio"] = min(row["peers"].values()) / row["seconds"]
        if limits:
            row["limits"] = {name: medians[name] for name in limits}
        if isa is not None:
            row["isa"] = isa
        if gemm is not None:
            row["gemm_gflops"] = 2 * math.prod(GEMM_SIZE) / medians[GEMM] / 1e9
            row["gemm_share"] = flops / row["seconds"] / 1e9 / row["gemm_gflops"]
        if flops:
            row["gflops"] = flops / row["seconds"] / 1e9
        if bytes:
            row["gigabytes_per_second"] = bytes / row["seconds"] / 1e9
        if tokens:
            row["tokens_per_second"] = tokens / row["seconds"]
        benchmark.extra_info.update(row)
        op = request.path.stem.removeprefix("bench_")
        request.config.stash[ROWS].setdefault(op, []).append(row)

    return measure


@pytest.fixture(autouse=True)
def instructions(request):
    """Has the kernels of the test's `isa`, where it has one, do the work."""
    isa = parameters(request).get("isa")
    if isa is not None and isa not in _native.cpu_isas():
        pytest.skip(f"no {isa} here")
    if isa == _native.cpu_isas()[-1]:
        pytest.skip(f"{isa} is the best there is here, and has a row already")
    with dispatch.cpu_isa(isa) if isa else nullcontext():
        yield


def parameters(request):
    return request.node.callspec.params if hasattr(request.node, "callspec") else {}


@cache
def product(dtype):
    """torch's product of a projection, as a call; of fp32 ones where it has none of bf16."""
    m, k, n = GEMM_SIZE
    if dtype == torch.bfloat16 and not TORCH_MULTIPLIES_BF16:
        dtype = torch.float32
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    out = torch.empty(m, n, dtype=dtype)
    return lambda: torch.mm(a, b, out=out)


def timed(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def pytest_terminal_summary(terminalreporter, config):
    ops = config.stash[ROWS]
    if not ops:
        return
    terminalreporter.section(f"ours against the best peer, {device_name()}")
    for row in (row for rows in ops.values() for row in rows):
        peer = min(row["peers"], key=row["peers"].get)
        units = {"gflops": "GFLOP/s", "gigabytes_per_second": "GB/s", "tokens_per_second": "tokens/s"}
        rate = "".join(f"{row[k]:9.1f} {unit}" for k, unit in units.items() if k in row)
        terminalreporter.write_line(
            f"{row['name']:58} {row['seconds'] * 1e3:10.3f} ms  {peer:26} {row['peers'][peer] * 1e3:10.3f} ms"
            f"  {row['ratio']:6.2f} x {rate}" + (f" {row['gemm_share']:5.0%} of mm" if "gemm_share" in row else "")
        )
        limits = {name: value for name, value in row.get("limits", {}).items() if name != GEMM}
        if limits:
            others = [f"{value / row['seconds']:.2f} x {name}" for name, value in (row["peers"] | limits).items()]
            terminalreporter.write_line("    " + ", ".join(others))
    if config.getoption("--save-results"):
        for op, rows in ops.items():
            terminalreporter.write_line(f"wrote {save(op, {'rows': rows})}")
