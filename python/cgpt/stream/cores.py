"""How many cores this process may use: for threads of our own, which OMP_NUM_THREADS=1 under torchrun must not starve.

affinity                       taskset, cpuset control groups
quota of control groups        version 2 cpu.max, version 1 cpu.cfs_quota_us over cpu.cfs_period_us
LOCAL_WORLD_SIZE               torchrun's processes on this machine share them
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping
from pathlib import Path


def usable_cores(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> int:
    """At least 1. root: where /proc and /sys are."""
    cores = float(len(os.sched_getaffinity(0)))
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            parts = [part for part in path.split("/") if part not in ("", "..")]
            for depth in range(len(parts) + 1):
                if controllers == "":
                    cores = min(cores, _quota(root.joinpath("sys/fs/cgroup", *parts[:depth])))
                elif "cpu" in controllers.split(","):
                    cores = min(cores, _old_quota(root.joinpath("sys/fs/cgroup/cpu", *parts[:depth])))
    ranks = environment.get("LOCAL_WORLD_SIZE", "1")
    return max(1, int(cores / (int(ranks) if ranks.isdigit() and int(ranks) else 1)))


def _quota(group: Path) -> float:
    with contextlib.suppress(OSError, ValueError):
        quota, period = (group / "cpu.max").read_text().split()
        return int(quota) / int(period)  # "max": no quota
    return math.inf


def _old_quota(group: Path) -> float:
    with contextlib.suppress(OSError, ValueError):
        quota = int((group / "cpu.cfs_quota_us").read_text())
        return quota / int((group / "cpu.cfs_period_us").read_text()) if quota > 0 else math.inf
    return math.inf
