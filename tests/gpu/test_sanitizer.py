"""NVIDIA's compute-sanitizer over every op at small sizes: memory, shared-memory races, barriers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from problems import GPU

HERE = Path(__file__).parent
TOOL = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


def run_small(*command, device):
    paths = [HERE, HERE.parent, *(path for path in sys.path if path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [*command, sys.executable, HERE / "small.py", device]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_small_script_runs():
    done = run_small(device="cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") >= 6


@pytest.mark.parametrize("check", [pytest.param(name, marks=GPU) for name in ("memcheck", "racecheck", "synccheck")])
def test_no_findings(check):
    if TOOL is None:
        pytest.skip("no compute-sanitizer on PATH or in /usr/local/cuda/bin")
    done = run_small(TOOL, f"--tool={check}", "--error-exitcode=9", device="cuda")
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not support this device")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
