"""bench/triton_table.py: the committed table against the kernels. One row a kernel is compiled again, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent.parent
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
ENVIRONMENT["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])

# One row a kernel; the tensor cores' in the family's head dims.
SAMPLE = [
    "attention_fwd bf16 d64 causal m128 n128",
    "attention_fwd bf16 d80 all m128 n64",
    "attention_dkdv bf16 d64 causal m64 n128",
    "attention_dq bf16 d128 causal m64 n64",
    "attention_delta bf16 d128",
    "gelu_mlp_fwd bf16 gelu_tanh m128 n128 k64",
    "gelu_mlp_bwd bf16 gelu n64 k64",
    "gelu_mlp_bias",
    "layer_norm_fwd bf16 D1024 rows4",
    "layer_norm_bwd bf16 D1024 rows4 w4",
    "_wide bf16",
    "layer_norm_sum",
    "cross_entropy bf16 v4096",
    "adamw bf16",
]


def in_triton(code_or_script, *arguments):
    """Runs Python where Triton compiles, which this process has told it not to."""
    command = [sys.executable, *code_or_script, *arguments]
    return subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_sample_compiles_as_committed():
    done = in_triton(["bench/triton_table.py"], "--check", *SAMPLE)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    for name in SAMPLE:
        assert any(name in line for line in lines), f"{name} names no kernel"


def test_no_committed_row_spills():
    table = json.loads((ROOT / "bench/results/compiler/triton.json").read_text())
    rows = table["kernels"]
    assert len(rows) > 300
    assert all(set(row) == {"kernel", "arch", "registers", "spills", "shared"} for row in rows)
    assert [row for row in rows if row["spills"]] == []
    assert {row["arch"] for row in rows} == {"sm_80", "sm_90"}
    # What an H100 offers a block. Other cards have less, and there tuning passes over what does not fit.
    assert all(row["registers"] <= 255 and row["shared"] <= 227 << 10 for row in rows)


def test_what_the_check_says():
    code = """
import sys
sys.path.insert(0, "bench")
from triton_table import differences, not_covered, problems, read_table
rows = read_table()["kernels"]
assert not_covered(rows) == []
gone, old = rows[0], rows[1]
assert not_covered(rows[1:]) == [f"{gone['arch']} {gone['kernel']}: not in the committed table"]
assert not_covered([*rows, old | {"kernel": "k"}]) == [f"{old['arch']} k: in the table, but no such config"]
assert differences(rows, rows) == problems(rows) == []
changed = old | {"registers": old["registers"] + 1, "spills": 8}
where = f"{old['arch']} {old['kernel']}: "
moved = f"registers {old['registers']} -> {changed['registers']}, spills 0 -> 8"
assert differences(rows, [changed]) == [where + moved]
assert problems([changed]) == [where + "spills 8 bytes"]
"""
    done = in_triton(["-c", code])
    assert done.returncode == 0, done.stderr
