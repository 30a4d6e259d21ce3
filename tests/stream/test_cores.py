"""Cores from affinity, quotas and ranks; OMP_NUM_THREADS, which torchrun sets to 1, is not among them."""

import os
import subprocess
import sys

import pytest
import torch

from cgpt.stream.cores import launcher, omp_was_set, ranges, settle_threads, take_cores, usable_cores
from cgpt_ext import _native

ALL = len(os.sched_getaffinity(0))


def machine(tmp_path, line, **files):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(line + "\n")
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


NONE = "max 100000"


def share(cores):
    """cpu.max of a group that is paid so many cores."""
    return f"{int(cores * 100000)} 100000"


def old(cores, folder="a"):
    """The same for version 1."""
    path = f"cpu__{folder}__cpu_dot_cfs_".replace("____", "__")
    return {path + "quota_us": str(int(cores * 100000)), path + "period_us": "100000"}


@pytest.mark.parametrize(
    ("line", "files", "wanted"),
    [
        ("0::/a/b", {"a__b__cpu_dot_max": NONE}, 16),
        ("0::/a/b", {"a__b__cpu_dot_max": share(1)}, 1),
        ("0::/a/b", {"a__b__cpu_dot_max": share(2.5)}, 3),  # two would leave half a core unused
        ("0::/a/b", {"a__b__cpu_dot_max": share(0.1)}, 1),
        ("0::/a/b", {"a__b__cpu_dot_max": "200000"}, 16),  # no period: nothing that is known
        ("0::/a/b", {"a__cpu_dot_max": share(0.5), "a__b__cpu_dot_max": NONE}, 1),
        ("0::/a/b", {"a__cpu_dot_max": share(6), "a__b__cpu_dot_max": share(4)}, 4),
        ("0::/a/b", {"cpu_dot_max": share(5)}, 5),  # a container that is told the outer path, its own group on top
        ("0::/../../a", {"a__cpu_dot_max": share(7)}, 7),
        ("0::/a", {"a__cpu_dot_max": share(17)}, 16),
        ("0::/a", {}, 16),
        ("0::/elsewhere", {"a__cpu_dot_max": share(1)}, 16),
        ("4:cpu,cpuacct:/a", old(1), 1),
        ("4:cpuacct,cpu:/a", old(1.5), 2),  # cpu is a link to the folder of both
        ("4:cpu:/a/b", old(3) | old(6, "a__b"), 3),
        ("4:cpu:/outer", old(2, ""), 2),
        ("4:cpu,cpuacct:/a", old(-0.00001), 16),  # -1: none
        ("4:memory:/a", old(1), 16),
        ("garbage::", {}, 16),
        ("garbage", {}, 16),
    ],
)
def test_quotas(tmp_path, line, files, wanted):
    assert usable_cores(machine(tmp_path, line, **files), {}, Kernel(range(16)).affinity) == wanted


def test_affinity_is_less_than_the_quota(tmp_path):
    root = machine(tmp_path, "0::/a", a__cpu_dot_max=share(4))
    assert usable_cores(root, {}, Kernel([3, 5]).affinity) == 2


@pytest.fixture
def torch_threads():
    before = torch.get_num_threads()
    yield torch
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("begun_with", "environment", "wanted"),
    [(3, {}, 1), (1, {}, 1), (3, {"OMP_NUM_THREADS": "3"}, 3)],
)
def test_threads_are_as_many_as_the_quota_pays_for(tmp_path, torch_threads, begun_with, environment, wanted):
    root = machine(tmp_path, "0::/a", a__cpu_dot_max=share(1))
    torch_threads.set_num_threads(begun_with)
    settle_threads(root, environment)
    assert torch_threads.get_num_threads() == _native.num_threads() == wanted


def test_no_more_threads_than_affinity_allows():
    code = """
import os, torch
from cgpt.stream.cores import settle_threads
torch.set_num_threads(7)
settle_threads()
several = torch.get_num_threads()
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
settle_threads()
print(several, torch.get_num_threads())
"""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    several, one = map(int, done.stdout.split())
    assert several == min(7, usable_cores(environment={}))
    assert one == 1


def test_ranks_share_and_each_has_one(tmp_path):
    assert usable_cores(tmp_path, {"LOCAL_WORLD_SIZE": str(ALL)}) == 1
    assert usable_cores(tmp_path, {"LOCAL_WORLD_SIZE": "1000"}) == 1
    assert usable_cores(tmp_path, {"LOCAL_WORLD_SIZE": ""}) == ALL


class Kernel:
    """Who may run where: this process, and the parent that all ranks have."""

    def __init__(self, cpus, own=None):
        self.parent, self.own, self.taken = list(cpus), list(own or cpus), None

    def affinity(self, process):
        return self.parent if process else self.own

    def take(self, cpus):
        self.own = self.taken = list(cpus)


def numa(root, nodes, threads=1, gpus=()):
    """/sys of a machine: `nodes` lists of CPUs, physical cores of `threads` neighbours, GPUs by their nodes."""
    for node, cpus in enumerate(nodes):
        folder = root / f"sys/devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(ranges(cpus) + "\n")
        for cpu in cpus:
            folder = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
            folder.mkdir(parents=True)
            first = cpu - cpu % threads
            (folder / "thread_siblings_list").write_text(ranges(range(first, first + threads)) + "\n")
    for gpu, node in enumerate(gpus):
        folder = root / f"sys/bus/pci/devices/{bus(gpu)}"
        folder.mkdir(parents=True)
        (folder / "numa_node").write_text(f"{node}\n")
    (root / "sys/devices/system/node/possible").write_text("0-63\n")
    return root


def bus(rank):
    return f"0000:{rank:02x}:00.0"


def taken(root, cpus, ranks, gpus=False):
    """What each of `ranks` takes: [(its CPUs, what is said, its threads)]."""
    found = []
    for rank in range(ranks):
        kernel = Kernel(cpus)
        cores = take_cores(rank, ranks, rank if gpus else None, root, kernel.affinity, kernel.take, bus, {})
        assert list(cores.cpus) == kernel.own
        found.append((list(cores.cpus), str(cores), cores.threads))
    return found


def test_ranks_are_spread_over_nodes_in_whole_cores(tmp_path):
    root = numa(tmp_path, [range(8), range(8, 16)], threads=2)
    assert taken(root, range(16), 4) == [
        ([0, 1, 2, 3], "cores 0-3, NUMA node 0", 2),
        ([4, 5, 6, 7], "cores 4-7, NUMA node 0", 2),
        ([8, 9, 10, 11], "cores 8-11, NUMA node 1", 2),
        ([12, 13, 14, 15], "cores 12-15, NUMA node 1", 2),
    ]
    assert [cpus for cpus, *_ in taken(root, range(16), 3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [10, 11, 12, 13]]


def test_one_rank_may_have_several_nodes(tmp_path):
    root = numa(tmp_path, [range(2), range(2, 4), range(4, 6), range(6, 8)])
    assert [told for _, told, _ in taken(root, range(8), 2)] == [
        "cores 0-3, NUMA node 0, 1",
        "cores 4-7, NUMA node 2, 3",
    ]


@pytest.mark.parametrize(("ranks", "wanted"), [(2, [[0, 1], [2, 3]]), (3, [[0], [1], [2]]), (4, [[0], [1], [2], [3]])])
def test_whole_cores_where_there_are_enough(tmp_path, ranks, wanted):
    root = numa(tmp_path, [range(4)], threads=2)
    assert [cpus for cpus, *_ in taken(root, range(4), ranks)] == wanted


def test_only_what_this_process_may_use_is_given_out(tmp_path):
    root = numa(tmp_path, [range(8), range(8, 16)], threads=2)
    assert [cpus for cpus, *_ in taken(root, [1, 2, 3, 9, 12, 13], 2)] == [[1, 2, 3], [9, 12, 13]]


def test_a_rank_goes_to_its_gpu(tmp_path):
    root = numa(tmp_path, [range(4), range(4, 8)], gpus=[1, 0, 1, 0])
    assert [cpus for cpus, *_ in taken(root, range(8), 4, gpus=True)] == [[4, 5], [0, 1], [6, 7], [2, 3]]


def test_all_have_as_many_though_gpus_are_at_one_node_more(tmp_path):
    root = numa(tmp_path, [range(6), range(6, 12)], gpus=[0, 0, 1])
    assert [cpus for cpus, *_ in taken(root, range(12), 3, gpus=True)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


@pytest.mark.parametrize("gpus", [[-1, 0], [0, 7], []])
def test_gpus_of_no_known_node(tmp_path, gpus):
    root = numa(tmp_path, [range(4), range(4, 8)], gpus=gpus)
    assert [cpus for cpus, *_ in taken(root, range(8), 2, gpus=True)] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_left_alone(tmp_path):
    root = numa(tmp_path, [range(4)])
    for kernel, ranks in ((Kernel([0, 1]), 3), (Kernel(range(4), own=[2]), 2), (Kernel(range(4)), 1)):
        before = list(kernel.own)
        cores = take_cores(0, ranks, None, root, kernel.affinity, kernel.take, bus, {})
        assert (kernel.taken, list(cores.cpus)) == (None, before)
        assert cores.threads == (None if ranks == 1 else 1)


def test_no_sys_at_all(tmp_path):
    assert taken(tmp_path, range(5), 2) == [([0, 1], "cores 0-1", 2), ([2, 3], "cores 2-3", 2)]


def test_what_is_taken_is_not_divided_again(tmp_path):
    kernel, ranks = Kernel(range(8)), {"LOCAL_WORLD_SIZE": "2"}
    assert usable_cores(tmp_path, ranks, kernel.affinity) == 4
    take_cores(1, 2, None, tmp_path, kernel.affinity, kernel.take, bus, {})
    assert kernel.taken == [4, 5, 6, 7]
    assert usable_cores(tmp_path, ranks, kernel.affinity) == 4
    bound = Kernel(range(8), own=range(6))  # by somebody, and not for this rank alone
    assert usable_cores(tmp_path, ranks, bound.affinity) == 4


def test_a_quota_is_shared_by_ranks_that_have_taken_cores(tmp_path):
    root = machine(tmp_path, "0::/a", a__cpu_dot_max="400000 100000")
    kernel = Kernel(range(8))
    cores = take_cores(0, 2, None, root, kernel.affinity, kernel.take, bus, {})
    assert (len(kernel.taken), cores.threads) == (4, 2)
    assert usable_cores(root, {"LOCAL_WORLD_SIZE": "2"}, kernel.affinity) == 2


def test_threads_that_the_user_has_set_are_kept(tmp_path):
    folder = tmp_path / f"proc/{launcher()}"
    folder.mkdir(parents=True)
    (folder / "environ").write_bytes(b"A=1\0OMP_NUM_THREADS=3\0")
    told, kernel = {"OMP_NUM_THREADS": "3"}, Kernel(range(4))
    assert omp_was_set(tmp_path, told)
    assert take_cores(0, 2, None, tmp_path, kernel.affinity, kernel.take, bus, told).threads is None
    (folder / "environ").write_bytes(b"A=1\0MY_OMP_NUM_THREADS=3\0")  # torchrun's own doing
    kernel = Kernel(range(4))
    assert not omp_was_set(tmp_path, {"OMP_NUM_THREADS": "1"})
    assert take_cores(0, 2, None, tmp_path, kernel.affinity, kernel.take, bus, {"OMP_NUM_THREADS": "1"}).threads == 2
    assert not omp_was_set(tmp_path, {})


SEEN = """
from cgpt.stream.devices import CpuDevice
from cgpt_ext import _native
device = CpuDevice(128, optimizer_threads=2)
seen = []
device.submit("optimizer", "look", lambda: seen.append(_native.set_thread_count(2))).wait()
print(seen[0], CpuDevice(128).optimizer_threads)
device.close()
"""


def test_omp_num_threads_of_one_does_not_starve_the_optimizer():
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    done = subprocess.run([sys.executable, "-c", SEEN], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["2", str(max(1, ALL // 2))]


@pytest.mark.skipif(ALL < 2, reason="one core has no part")
def test_threads_that_run_already_move_too():
    code = """
import os, threading
from cgpt.stream.cores import take_cores
hold, there = threading.Event(), threading.Event()
def old():
    there.set(); hold.wait(); print(sorted(os.sched_getaffinity(0)))
thread = threading.Thread(target=old); thread.start(); there.wait()
print(list(take_cores(1, 2).cpus)); hold.set(); thread.join()
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    taken, moved = done.stdout.splitlines()
    assert taken == moved
    assert 0 < len(taken.split(",")) < ALL
