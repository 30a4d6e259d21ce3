"""Sizes as people write them, and what a machine's rules leave, read from files made up for it."""

import resource

import pytest

from cgpt.errors import InputError
from cgpt.stream.limits import Limits, bytes_text, limits, parse_bytes

GIB = 1 << 30


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("4GiB", 4 * GIB), ("80GB", 80 * 10**9), ("1.5 TB", 1_500_000_000_000), ("4096", 4096), ("0.5kib", 512)],
)
def test_sizes(text, nbytes):
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "4G", "GiB", "-1GB", "4 GiB GiB", "nan", "1e9", "four GB"])
def test_what_is_no_size(text):
    with pytest.raises(InputError, match="--host-memory: wanted a size such as 4GiB or 80GB, got "):
        parse_bytes(text, "--host-memory")


def test_sizes_printed_can_be_granted():
    for nbytes in (0, 1, 1023, 1024, 1025, GIB - 1, GIB + 1, 127 * GIB + 12345, 3 << 40):
        assert parse_bytes(bytes_text(nbytes)) <= nbytes <= parse_bytes(bytes_text(nbytes, up=True))
    assert bytes_text(GIB + GIB // 2) == "1.50 GiB"


def unlimited(kind):
    return resource.RLIM_INFINITY, resource.RLIM_INFINITY


def write(root, files):
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


MEMINFO = {"proc/meminfo": "MemTotal:  9 kB\nMemAvailable:   8388608 kB\n"}


def test_no_rules(tmp_path):
    assert limits(tmp_path, unlimited) == Limits({})
    assert limits(tmp_path, unlimited).host is None
    assert limits(tmp_path, unlimited).binding is None


def test_free_memory(tmp_path):
    write(tmp_path, MEMINFO)
    assert limits(tmp_path, unlimited).host == 8 * GIB


def test_control_groups_version_2(tmp_path):
    group = "sys/fs/cgroup/a/b/"
    write(
        tmp_path,
        MEMINFO
        | {
            "proc/self/cgroup": "0::/a/b\n",
            group + "memory.max": "max\n",
            group + "memory.current": "100\n",
            "sys/fs/cgroup/a/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/a/memory.current": f"{3 * GIB}\n",
            "sys/fs/cgroup/a/memory.stat": f"anon 1\ninactive_file {GIB}\n",
        },
    )
    found = limits(tmp_path, unlimited)
    assert (found.host, found.binding) == (2 * GIB, "control group /a")  # page cache can be dropped
    write(tmp_path, {group + "memory.max": f"{GIB}\n"})
    assert limits(tmp_path, unlimited).binding == "control group /a/b"
    write(tmp_path, {group + "memory.current": f"{2 * GIB}\n"})
    assert limits(tmp_path, unlimited).host == 0


def test_a_container_that_is_told_the_outer_path(tmp_path):
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/machine/box\n",
            "sys/fs/cgroup/memory.max": f"{GIB}\n",
            "sys/fs/cgroup/memory.current": "0\n",
        },
    )
    assert limits(tmp_path, unlimited).found == {"control group /": GIB}


def test_control_groups_version_1(tmp_path):
    group = "sys/fs/cgroup/memory/box/"
    write(
        tmp_path,
        MEMINFO
        | {
            "proc/self/cgroup": "5:cpu,cpuacct:/box\n4:memory:/box\n",
            group + "memory.limit_in_bytes": f"{2 * GIB}\n",
            group + "memory.usage_in_bytes": f"{GIB}\n",
            group + "memory.stat": f"total_inactive_file {GIB // 2}\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "5\n",
        },
    )
    found = limits(tmp_path, unlimited)
    assert found.found == {"free memory": 8 * GIB, "control group /box": GIB + GIB // 2}


def test_resource_limits(tmp_path):
    page = resource.getpagesize()
    write(tmp_path, MEMINFO | {"proc/self/statm": "1000 500 100 1 0 300 0\n"})
    soft = {resource.RLIMIT_AS: 5000 * page, resource.RLIMIT_DATA: 200 * page, resource.RLIMIT_MEMLOCK: 65536}
    found = limits(tmp_path, lambda kind: (soft[kind], resource.RLIM_INFINITY))
    assert found.found == {"free memory": 8 * GIB, "RLIMIT_AS": 4000 * page, "RLIMIT_DATA": 0}
    assert (found.binding, found.pinned) == ("RLIMIT_DATA", 65536)


def test_this_process():
    assert limits().host > 0
