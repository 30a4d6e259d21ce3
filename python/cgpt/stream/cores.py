"""Which cores this process may use, and how many threads: OMP_NUM_THREADS=1 of torchrun must starve nobody.

affinity                       taskset, cpuset control groups
quota of control groups        what a container is given of a larger machine; OpenMP does not look at it
LOCAL_WORLD_SIZE               torchrun's processes on this machine share both, until each has taken cores of its own
OMP_NUM_THREADS                what the user has said stays

A rank takes its part of the affinity before its threads start:

    core    the CPUs that are one physical core (topology/thread_siblings_list); single CPUs where cores are too few
    line    all cores, NUMA node by node; rank r of R takes cores/R of them from r * cores/R on
    GPUs    a line for each node that has some, for the ranks whose GPU is there (/sys/bus/pci/devices/*/numa_node)

All ranks take as many, for on the number of threads may hang the order in which numbers are added.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Affinity = Callable[[int], Collection[int]]  # of a process, by its number; 0 is this one
PER_CORE = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


@dataclass(frozen=True)
class Cores:
    """Where a rank works. cpus: numbers that the kernel gives them. nodes: of NUMA; none known, none told. threads: for
    arithmetic, one a physical core; None where the user has said it with OMP_NUM_THREADS, or there is one rank."""

    cpus: tuple[int, ...]
    nodes: tuple[int, ...]
    threads: int | None

    def __str__(self) -> str:
        where = f", NUMA node {', '.join(map(str, self.nodes))}" if self.nodes else ""
        return f"cores {ranges(self.cpus)}{where}"


def take_cores(
    local_rank: int,
    local_count: int,
    gpu: int | None = None,
    root: Path = Path("/"),
    affinity: Affinity = os.sched_getaffinity,
    take: Callable[[Collection[int]], None] | None = None,
    bus: Callable[[int], str | None] | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Cores:
    """Gives this rank its own of the cores that the ranks of this machine share, and says which.

    gpu: of this rank, None on CPUs; rank r is taken to have GPU r modulo their number. Where there are fewer cores than
    ranks, or the rank has been bound already (its affinity is not its parent's), all stays as it is. root: where /proc
    and /sys are; affinity, take, bus: how cores are read and taken, and a rank's GPU found, for tests.
    """
    own = sorted(affinity(0))
    if local_count > 1 and set(own) == _parents(affinity):
        nodes = _nodes(root)
        homes = None
        if gpu is not None:
            homes = [_home(root, (bus or bus_of_rank)(rank)) for rank in range(local_count)]
        if shares := split(own, nodes, [_siblings(root, cpu) for cpu in own], local_count, homes):
            own = shares[local_rank]
            (take or _bind)(own)
    threads = None
    if local_count > 1 and not omp_was_set(root, environment):
        cores = len({min(_siblings(root, cpu) & set(own)) for cpu in own})
        threads = max(1, min(cores, usable_cores(root, {"LOCAL_WORLD_SIZE": str(local_count)}, affinity)))
    return Cores(tuple(own), tuple(node for node, cpus in _nodes(root).items() if cpus & set(own)), threads)


def split(
    cpus: Sequence[int],
    nodes: Mapping[int, Collection[int]],
    siblings: Sequence[Collection[int]],
    ranks: int,
    homes: Sequence[int | None] | None = None,
) -> list[list[int]] | None:
    """CPUs of each of `ranks`, disjoint and as many for each; None where there are fewer than ranks.

    siblings: of each of `cpus`, the CPUs of its physical core. homes: the node that each rank should be at.
    """
    node_of = {cpu: node for node, members in nodes.items() for cpu in members}
    whole = {frozenset(threads) & frozenset(cpus) for threads in siblings}
    for units in (whole, {frozenset([cpu]) for cpu in cpus}):
        line = sorted(units, key=lambda unit: (node_of.get(min(unit), -1), min(unit)))
        groups = [(line, list(range(ranks)))]
        if homes is not None and None not in homes:
            here = {home: [unit for unit in line if node_of.get(min(unit)) == home] for home in sorted(set(homes))}
            apart = [(here[home], [rank for rank in range(ranks) if homes[rank] == home]) for home in here]
            if all(len(cores) >= len(members) for cores, members in apart):
                groups = apart
        each = min(len(cores) // len(members) for cores, members in groups)
        if each:
            found: list[list[int]] = [[] for _ in range(ranks)]
            for cores, members in groups:
                for place, rank in enumerate(members):
                    start = place * len(cores) // len(members)
                    found[rank] = sorted(cpu for unit in cores[start : start + each] for cpu in unit)
            return found
    return None


def usable_cores(
    root: Path = Path("/"), environment: Mapping[str, str] = os.environ, affinity: Affinity = os.sched_getaffinity
) -> int:
    """At least 1. root: where /proc and /sys are."""
    from cgpt_ext import machine  # which brings torch; `cgpt train` refuses what makes no run before that

    text = environment.get("LOCAL_WORLD_SIZE", "1")
    ranks = int(text) if text.isdigit() and int(text) else 1
    own, quota = len(affinity(0)), machine.cores(root)["quota"]
    shared = len(_parents(affinity)) if ranks > 1 else own  # what is bound to a node may be several ranks'
    return max(1, min(own, machine.usable(shared, quota) // ranks))


def settle_threads(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> None:
    """Leaves torch, and so our kernels, no more threads than this process's cores carry; for a process that is alone.

    What the user has said with OMP_NUM_THREADS stays, and so does a smaller count, such as of torch.set_num_threads.
    """
    import torch

    most = usable_cores(root, environment)
    if torch.get_num_threads() > most and "OMP_NUM_THREADS" not in environment:
        torch.set_num_threads(most)


def omp_was_set(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the user has set OMP_NUM_THREADS. torchrun does where nobody has, for the ranks that it starts: what it
    was started with itself tells."""
    if "OMP_NUM_THREADS" not in environment:
        return False
    with contextlib.suppress(OSError):
        began_with = (root / f"proc/{launcher()}/environ").read_bytes()
        return any(item.startswith(b"OMP_NUM_THREADS=") for item in began_with.split(b"\0"))
    return True


def launcher() -> int:
    """The number of the process that is torchrun, on a rank: each is the first of a session, or a script that it was
    started by is."""
    with contextlib.suppress(OSError, IndexError):
        return int(Path(f"/proc/{os.getsid(0)}/stat").read_text().rpartition(")")[2].split()[1])
    return os.getppid()


def bus_of_rank(local_rank: int) -> str | None:
    """The PCI address of the GPU that a rank has, as /sys spells it; None where torch does not say."""
    import torch

    found = torch.cuda.get_device_properties(local_rank % torch.cuda.device_count())
    numbers = [getattr(found, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    return None if None in numbers else "{:04x}:{:02x}:{:02x}.0".format(*numbers)


def ranges(cpus: Collection[int]) -> str:
    """0-3,8 for 0, 1, 2, 3 and 8, as the kernel writes its lists."""
    ordered, told = sorted(cpus), []
    for i, cpu in enumerate(ordered):
        if i and cpu == ordered[i - 1] + 1:
            told[-1][1] = cpu
        else:
            told.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in told)


def _parse(text: str) -> set[int]:
    """What `ranges` writes."""
    bounds = [[int(end) for end in part.split("-")] for part in text.strip().split(",") if part]
    return {cpu for part in bounds for cpu in range(part[0], part[-1] + 1)}


def _parents(affinity: Affinity) -> set[int]:
    """What torchrun may use, and so all its ranks together."""
    with contextlib.suppress(OSError):
        return set(affinity(launcher()))
    return set(affinity(0))


def _nodes(root: Path) -> dict[int, set[int]]:
    found = {}
    with contextlib.suppress(OSError, ValueError):
        for folder in sorted((root / "sys/devices/system/node").iterdir()):
            if folder.name.startswith("node") and folder.name[4:].isdigit():
                found[int(folder.name[4:])] = _parse((folder / "cpulist").read_text())
    return dict(sorted(found.items()))


def _siblings(root: Path, cpu: int) -> set[int]:
    with contextlib.suppress(OSError, ValueError):
        return _parse((root / PER_CORE.format(cpu)).read_text()) | {cpu}
    return {cpu}


def _home(root: Path, bus: str | None) -> int | None:
    """The NUMA node of a GPU; None where nobody knows, which the kernel writes as -1."""
    with contextlib.suppress(OSError, ValueError):
        node = int((root / "sys/bus/pci/devices" / (bus or "none") / "numa_node").read_text())
        return node if node >= 0 else None
    return None


def _bind(cpus: Collection[int]) -> None:
    """Every thread there is by now, such as a library's pool; those that start later have their starter's."""
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # one that has just ended
            os.sched_setaffinity(int(task), cpus)
