"""Nothing that Python passes to the native module can crash it.

Every native function is called with each of its arguments replaced by every hostile value in turn, in a child process:
it must return, or raise TypeError or ValueError in one line; a signal would show as the child's exit code.
"""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from border_calls import CALLS, ONLY_ON_GPU
from cgpt_ext import _native

NOT_OPS = {"cpu_isa", "cpu_isas", "set_cpu_isa", "num_threads", "use_python_attributes"}
CLASSES = {"HostArena", "DiskFile"}  # tests/host gives them their own hostile arguments


def test_every_native_function_is_covered():
    functions = {n for n in dir(_native) if callable(getattr(_native, n)) and not n.startswith("_")}
    assert functions - NOT_OPS - CLASSES == {name for name, _ in CALLS}


def test_valid_calls_are_valid():
    for name, make in CALLS:
        if name in ONLY_ON_GPU:
            with pytest.raises(ValueError, match="no kernel in this build for device cpu"):
                getattr(_native, name)(*make())
        else:
            getattr(_native, name)(*make())


def test_hostile_arguments():
    code = textwrap.dedent("""
        import faulthandler, sys
        faulthandler.enable()
        from border_calls import CALLS, hostile
        from cgpt_ext import _native
        tried = refused = 0
        for name, make in CALLS:
            for i in range(len(make())):
                for value in hostile(make()[i]):
                    arguments = list(make())
                    arguments[i] = value
                    tried += 1
                    try:
                        getattr(_native, name)(*arguments)
                    except (TypeError, ValueError) as error:
                        refused += 1
                        first = str(error).splitlines()[0]
                        assert first, name
                    except Exception as error:
                        sys.exit(f"{name} argument {i}: {type(error).__name__} {error}")
        print(tried, refused)
    """)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    tried, refused = map(int, done.stdout.split())
    assert tried > 100 * len(CALLS) / 2
    assert refused > tried / 2


def test_python_attributes_path(request):
    """The same border without torch's DLPack table, as an older torch would be read."""
    _native.use_python_attributes(True)
    request.addfinalizer(lambda: _native.use_python_attributes(False))
    for name, make in CALLS:
        if name in ONLY_ON_GPU:
            continue
        torch.manual_seed(0)
        slow = make()
        getattr(_native, name)(*slow)
        _native.use_python_attributes(False)
        torch.manual_seed(0)
        fast = make()
        getattr(_native, name)(*fast)
        _native.use_python_attributes(True)
        for a, b in zip(slow, fast, strict=True):
            if isinstance(a, torch.Tensor):
                assert torch.equal(a, b), name
