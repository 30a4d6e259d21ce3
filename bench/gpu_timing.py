"""Times calls on one device, each beside its rivals, round by round.

On a GPU: CUDA events around one call, after a pause on the stream that lets the CPU run ahead, so that launching is
not timed unless it takes longer than the pause. Cold: a buffer of several L2 caches is written just before. Hot: the
same call has just run. On a CPU, for dry runs: a clock, cold and hot alike.
"""

import statistics
import time
from collections.abc import Callable

import torch

FLUSH_BYTES = 256 << 20  # an H100's L2 holds 50 MB
PAUSE_CYCLES = 500_000  # about 0.3 ms
WARMUP = 3
ROUNDS = 5, 30  # at least, at most
TINY_ROUNDS = 1, 3  # on a CPU


class DeviceLost(Exception):
    """The CUDA context is of no more use to this process."""


class Clock:
    """Times calls on "cuda" or "cpu"."""

    def __init__(self, device: str):
        self.device = device
        self.flush = torch.empty(FLUSH_BYTES if device == "cuda" else 0, dtype=torch.uint8, device=device)

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def start(self, call: Callable, cold: bool) -> Callable[[], float]:
        """Runs `call`; the result gives its seconds once the device is done."""
        if self.device == "cpu":
            began = time.perf_counter()
            call()
            seconds = time.perf_counter() - began
            return lambda: seconds
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if cold:
            self.flush.zero_()
        else:
            call()
        torch.cuda._sleep(PAUSE_CYCLES)
        before.record()
        call()
        after.record()
        return lambda: before.elapsed_time(after) / 1e3

    def once(self, call: Callable) -> float:
        """Seconds of one call by the wall's clock."""
        self.synchronize()
        began = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - began


def measure(builders: dict[str, Callable[[], Callable]], clock: Clock, seconds: float) -> dict[str, dict]:
    """Name -> {"cold", "hot"} median seconds, "rounds", and "difference" from the result of the first that ran.

    builders: name -> what makes the call. One that cannot be made or run has {"error"}, one line, instead.
    """
    calls, found, results = {}, {}, {}
    for name, build in builders.items():
        try:
            calls[name] = build()
            for _ in range(WARMUP):
                results[name] = calls[name]()
            clock.synchronize()
        except Exception as error:
            found[name] = {"error": one_line(error)}
            calls.pop(name, None)
            results.pop(name, None)
            refuse_a_lost_device(clock, error)
    if not calls:
        return found
    truth = next(iter(results.values()))
    differences = {name: difference(result, truth) for name, result in results.items()}
    results.clear()
    each_round = 2 * sum(clock.once(call) for call in calls.values()) + 1e-3 * len(calls)
    least, most = ROUNDS if clock.device == "cuda" else TINY_ROUNDS
    rounds = max(least, min(most, int(seconds / each_round)))
    times: dict[tuple[str, bool], list[float]] = {(name, cold): [] for name in calls for cold in (True, False)}
    for _ in range(rounds):
        pending = {key: clock.start(calls[key[0]], key[1]) for key in times}
        clock.synchronize()
        for key, read in pending.items():
            times[key].append(read())
    for name in calls:
        cold, hot = (statistics.median(times[name, key]) for key in (True, False))
        found[name] = {"cold": cold, "hot": hot, "rounds": rounds, "difference": differences[name]}
    return found


def difference(result, truth) -> float | None:
    """The largest ||a - b|| / ||b|| among the tensors of two results; None where there are none."""
    mine, theirs = (x if isinstance(x, (tuple, list)) else [x] for x in (result, truth))
    pairs = [(a, b) for a, b in zip(mine, theirs, strict=False) if isinstance(a, torch.Tensor)]
    if not pairs:
        return None
    parts = []
    for a, b in pairs:
        a, b = a.detach().float(), b.detach().float()
        parts.append(float((a - b).norm() / b.norm().clamp_min(1e-30)))
    return max(parts, key=lambda part: (part != part, part))  # a NaN stands out


def refuse_a_lost_device(clock: Clock, error: Exception) -> None:
    """Raises DeviceLost where the error was not only this call's."""
    try:
        clock.synchronize()
        torch.zeros(1, device=clock.device).item()
    except Exception as worse:
        raise DeviceLost(one_line(error)) from worse


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:240]


def ceilings(clock: Clock) -> dict[str, float]:
    """What the device does at its best here: bytes a second of a copy, operations a second of a bf16 product."""
    big = clock.device == "cuda"
    source = torch.randn((1 << 28) if big else (1 << 18), device=clock.device)
    target = torch.empty_like(source)
    n = 8192 if big else 128
    a, b = (torch.randn(n, n, device=clock.device, dtype=torch.bfloat16) for _ in range(2))
    copy = measure({"copy": lambda: lambda: target.copy_(source)}, clock, 0.5)["copy"]
    gemm = measure({"gemm": lambda: lambda: a @ b}, clock, 0.5)["gemm"]
    return {
        "copy_bytes_per_second": 2 * source.nbytes / copy["cold"],
        "gemm_flops_per_second": 2 * n**3 / gemm["cold"],
    }
