"""Ranks that are processes, on a CPU over gloo and on GPUs over nccl, or sharing one GPU: one rank's bits, and a speed
for each count."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from problems import GPU

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_two_ranks_give_the_bits_of_one(tmp_path, device):
    """bench/scaling.py fails where losses differ, which only the same weights can keep the same."""
    out = tmp_path / "scaling.json"
    flags = ["--device", device, "--model", "tiny", "--seq-len", 64, "--micro-batches", 3, "--steps", 3, "--rounds", 1]
    flags += ["--counts", 1, 2, "--placements", "host", *(["resident"] if device == "cuda" else [])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, ROOT / "bench" / "scaling.py", *flags, "--kinds", "strong", "--out", out]
    done = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for rows in json.loads(out.read_text())["scaling"].values():
        assert [row["ranks"] for row in rows] == [1, 2]
        assert all(row["tokens_per_second"] > 0 for row in rows)
