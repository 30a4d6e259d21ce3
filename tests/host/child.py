"""Code in a process of its own, for what kills or limits one. It has the classes, and starts without torch, at once."""

import subprocess
import sys
import textwrap

from cgpt_ext import _native

PRELUDE = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("_native", {_native.__file__!r})
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
DiskFile, HostArena = native.DiskFile, native.HostArena
"""


def start(code: str, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", PRELUDE + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def lines(code: str, *arguments) -> list[str]:
    """What it prints. It must end well."""
    done = start(code, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
