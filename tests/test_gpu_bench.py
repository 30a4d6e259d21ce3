"""bench/gpu.py from end to end at tiny sizes, and what it does where a case crashes or computes something else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import gpu

ROOT = gpu.ROOT

NOT_HERE = (
    "No module named 'liger_kernel'",
    "No module named 'flash_attn'",
    "FlexAttention does not support backward on CPU",
)


def test_a_dry_run_times_every_op_and_leaves_its_results(tmp_path):
    command = [sys.executable, "bench/gpu.py", "--out", tmp_path / "out", "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert content["environment"].keys() >= {"device", "torch", "triton", "commit"}
    assert content["tests"]["found"] > 50
    assert content["parts"].keys() == gpu.PARTS.keys()
    for name, part in content["parts"].items():
        assert part["state"] == "complete", part
        assert part["rows"], name
        for row in part["rows"]:
            for who, found in row["contenders"].items():
                if "error" in found:
                    assert found["error"].startswith(NOT_HERE), (row["group"], who, found)
                else:
                    assert found["cold"] > 0, who
                    assert not gpu.wrong(found), (row["group"], who, found)
            assert any("cold" in found for who, found in row["contenders"].items() if who.startswith("cgpt_ext "))
    table = done.stdout.splitlines()
    assert table[-1] == "a dry run on the CPU: these times mean nothing"
    assert sum(line.startswith("attention backward") for line in table) == 2


CHILD = """
import json, sys
for part in json.loads(sys.argv[2])["parts"]:
    print(json.dumps({"event": "part", "part": part}), flush=True)
    print("a library's own words", flush=True)
    print(json.dumps({"event": "case", "case": part + " T512"}), flush=True)
    if part == "adamw":
        sys.exit("CUDA error: an illegal memory access was encountered")
    print(json.dumps({"event": "row", "row": {"case": "T512"}}), flush=True)
    print(json.dumps({"event": "end", "values": {"state": "complete"}}), flush=True)
"""


def test_a_crash_costs_its_part_alone_and_is_named(tmp_path, monkeypatch):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    monkeypatch.setattr(gpu, "__file__", str(script))
    report = gpu.Report(tmp_path)
    gpu.bench(report, "cpu", {"layer_norm": 1, "adamw": 1, "attention": 1})
    content = json.loads(report.path.read_text())
    wanted = "exit code 1 at adamw T512: CUDA error: an illegal memory access was encountered"
    assert content["parts"]["adamw"] == {"rows": [], "died": wanted}
    for name in ("layer_norm", "attention"):
        assert content["parts"][name] == {"rows": [{"case": "T512"}], "state": "complete"}


def test_a_part_that_hangs_is_ended(tmp_path, monkeypatch):
    script = tmp_path / "child.py"
    script.write_text('import time\nprint(\'{"event": "part", "part": "adamw"}\', flush=True)\ntime.sleep(60)\n')
    monkeypatch.setattr(gpu, "__file__", str(script))
    monkeypatch.setattr(gpu, "GRACE", 0.1)
    report = gpu.Report(tmp_path)
    gpu.bench(report, "cpu", {"adamw": 0.1})
    assert report.content["parts"]["adamw"]["died"].startswith("exit code -9 at its start")


def contenders(**changes):
    row = {"cold": 2e-3, "hot": 1e-3, "rounds": 5, "difference": 0.0}
    return {"torch": {**row, "cold": 3e-3}, "cgpt_ext native": row, "cgpt_ext triton": {**row, **changes}}


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"cold": 1e-3}, "triton         1.000"),
        ({"cold": 1e-3, "difference": 0.3}, "triton     WRONG: differs by 0.3"),
        ({"cold": 1e-3, "difference": float("nan")}, "triton     WRONG: differs by nan"),
        ({}, "native         2.000"),
    ],
)
def test_the_table_takes_the_fastest_that_is_right(changes, wanted):
    row = {"group": "adamw", "case": "590M", "flops": 0, "bytes": 3e9, "contenders": contenders(**changes)}
    part = {"rows": [row], "state": "complete"}
    text = gpu.summary({"dry_run": False, "ceilings": {"copy_bytes_per_second": 3e12}, "parts": {"adamw": part}})
    assert wanted in text
    ratio = "3.00" if wanted.startswith("triton         1") else "1.50"
    assert f"adamw: {ratio} to {ratio} times the best rival, cold, aim 1.20" in text
    assert ("3 TB/s 100 %" in text) == (ratio == "3.00")


def test_an_implementation_that_fails_is_in_the_table():
    row = {"group": "adamw", "case": "590M", "flops": 0, "bytes": 3e9, "contenders": contenders()}
    row["contenders"]["cgpt_ext triton"] = {"error": "out of memory"}
    text = gpu.summary({"dry_run": False, "parts": {"adamw": {"rows": [row], "died": "exit code 1"}}})
    assert "triton     failed: out of memory" in text
    assert "adamw: exit code 1" in text


PYTEST = """
tests/gpu/test_values.py::test_values[a-cuda] PASSED     [ 10%]
tests/gpu/test_values.py::test_values[b-cuda] FAILED     [ 20%]
tests/gpu/test_values.py::test_values[c-cuda] SKIPPED (needs a CUDA device) [ 20%]
"""
XDIST = """
tests/gpu/test_values.py::test_values[a-cuda]
tests/gpu/test_values.py::test_values[b-cuda]
[gw1] [ 10%] PASSED tests/gpu/test_values.py::test_values[a-cuda]
[gw0] [ 20%] FAILED tests/gpu/test_values.py::test_values[b-cuda]
[gw0] [ 20%] SKIPPED tests/gpu/test_values.py::test_values[c-cuda]
=========================== short test summary info ============================
ERROR tests/test_cli.py - ModuleNotFoundError: No module named 'tyro'
"""


@pytest.mark.parametrize("text", [PYTEST, XDIST])
def test_reads_what_pytest_said(text):
    found = gpu.read_results(text)
    bad = ["tests/gpu/test_values.py::test_values[b-cuda]"] + ["tests/test_cli.py"] * (text is XDIST)
    assert found == {"found": 3, "passed": 1, "failed": 1, "skipped": 1, "bad": bad}
