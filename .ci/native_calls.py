"""A pytest plugin for .ci/sanitize.

Draws one case in `--every` of each test on each instruction set, by its name and so always the same ones, and the first
one in any event; all of tests/ops/test_tasks.py. Fails where a native function was not called on every instruction set.
"""

import functools
import zlib

import pytest

from cgpt_ext import _native

# What does the same on every instruction set, or has its kernel on a GPU alone: to be called once.
SAME = set("cpu_isa cpu_isas set_cpu_isa num_threads set_thread_count use_python_attributes attention_check".split())
CALLED = set()


def counted(name, function):
    @functools.wraps(function)
    def call(*args):
        CALLED.add((name, isa()))
        return function(*args)

    return call


isa = _native.cpu_isa
NAMES = [name for name, value in vars(_native).items() if callable(value) and not isinstance(value, type)]
for name in NAMES:
    setattr(_native, name, counted(name, getattr(_native, name)))


def pytest_addoption(parser):
    parser.addoption("--every", type=int, default=1, help="run one case in so many of a test and instruction set")


def pytest_collection_modifyitems(config, items):
    seen, kept = set(), []
    for item in items:
        test = item.nodeid.split("[")[0]
        kind = test, getattr(item, "callspec", None) and item.callspec.params.get("isa")
        drawn = zlib.crc32(item.nodeid.encode()) % config.getoption("--every") == 0
        if drawn or kind not in seen or "test_tasks.py" in test:
            kept.append(item)
        seen.add(kind)
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    from border_calls import ONLY_ON_GPU  # tests/ops is on the path by now

    once = SAME | ONLY_ON_GPU
    wanted = [(name, at) for name in NAMES if name not in once for at in _native.cpu_isas()]
    missing = [f"{name} ({at})" for name, at in wanted if (name, at) not in CALLED]
    missing += [name for name in NAMES if name in once and name not in {name for name, _ in CALLED}]
    print(f"\n{len(NAMES)} functions on {', '.join(_native.cpu_isas())}; not called: {', '.join(missing) or 'none'}")
    if missing and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
