"""Trainers whose requirements clash with the others' run in environments of their own, when a variable names one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_in(variable: str, made_by: str, script: Path, folder: Path, **environment: str) -> dict:
    """What `script` leaves in found.json, run in `folder` by the interpreter that the environment variable names.

    Skips the test, saying how to make such an environment, where the variable is not set.
    """
    python = os.environ.get(variable)
    if not python:
        version = "{}.{}".format(*sys.version_info)  # the native module in this tree was built for it
        pytest.skip(f"{variable} must name the interpreter of a Python {version} environment made by: {made_by}")
    # This tree and tests/integrations, but not tests, whose folder triton would pass for the package.
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    ours = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    environment = {**os.environ, **ours, **environment}
    done = subprocess.run(
        [python, str(script)], cwd=folder, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "found.json").read_text())
