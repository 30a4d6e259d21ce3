"""Cores from affinity, quotas and ranks; OMP_NUM_THREADS, which torchrun sets to 1, is not among them."""

import os
import subprocess
import sys

import pytest

from cgpt.stream.cores import usable_cores

ALL = len(os.sched_getaffinity(0))


def machine(tmp_path, line, **files):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(line + "\n")
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("line", "files", "wanted"),
    [
        ("0::/a/b", {"a__b__cpu_dot_max": "max 100000"}, ALL),
        ("0::/a/b", {"a__b__cpu_dot_max": "100000 100000"}, 1),
        ("0::/a/b", {"a__cpu_dot_max": "50000 100000", "a__b__cpu_dot_max": "max 100000"}, 1),
        ("0::/a", {"a__cpu_dot_max": f"{(ALL + 1) * 100000} 100000"}, ALL),
        ("4:cpu,cpuacct:/a", {"cpu__a__cpu_dot_cfs_quota_us": "100000", "cpu__a__cpu_dot_cfs_period_us": "100000"}, 1),
        ("4:cpu,cpuacct:/a", {"cpu__a__cpu_dot_cfs_quota_us": "-1", "cpu__a__cpu_dot_cfs_period_us": "100000"}, ALL),
        ("garbage::", {}, ALL),
    ],
)
def test_quotas(tmp_path, line, files, wanted):
    assert usable_cores(machine(tmp_path, line, **files), {}) == wanted


def test_ranks_share_and_each_has_one(tmp_path):
    assert usable_cores(tmp_path, {"LOCAL_WORLD_SIZE": str(ALL)}) == 1
    assert usable_cores(tmp_path, {"LOCAL_WORLD_SIZE": "1000"}) == 1
    assert usable_cores(tmp_path, {"LOCAL_WORLD_SIZE": ""}) == ALL


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
