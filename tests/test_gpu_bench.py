"""bench/gpu.py from end to end at tiny sizes, and what it does where a case crashes or computes something else."""

import json
import math
import os
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


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """(folder, what gpu.json holds, lines of the table) of a dry run where there is no tyro: a machine that is lent
    for an hour has torch and little else."""
    out, bare = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("bare")
    (bare / "tyro.py").write_text("raise ModuleNotFoundError(\"No module named 'tyro'\")\n")
    environment = {**os.environ, "PYTHONPATH": f"{bare}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "bench/gpu.py", "--out", out, "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, json.loads((out / "gpu.json").read_text()), done.stdout.splitlines()


def test_a_dry_run_times_every_op_and_leaves_its_results(dry_run):
    _, content, table = dry_run
    assert content["environment"].keys() >= {"device", "torch", "triton", "commit"}
    assert content["tests"]["found"] > 50
    assert content["parts"].keys() == {*gpu.PARTS, *gpu.STREAMING}
    for name in gpu.PARTS:
        part = content["parts"][name]
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
    assert table[-1] == "a dry run on the CPU: these times mean nothing"
    assert sum(line.startswith("attention backward") for line in table) == 2


def test_a_dry_run_streams(dry_run):
    out, content, table = dry_run
    rows = {row["case"]: row for name in gpu.STREAMING for row in content["parts"][name]["rows"]}
    assert all(content["parts"][name]["state"] == "complete" for name in gpu.STREAMING)
    equal = {case for case, row in rows.items() if row.get("equal")}
    places = ("host", "host, activations too", "device and host", "disk")
    turns = {"1.3B, 1 visit a step", "1.3B, 3 visits a step"}
    proofs = {*(f"self-check, {place}" for place in places), "hunting for races, 2 seeds", "checkpoint beside training"}
    assert equal == proofs | turns
    for case in turns:
        row = rows[case]
        assert row["interleaved"]
        assert row["ratio"] == row["resident"]["seconds"] / row["streamed"]["seconds"]
        assert row["streamed"]["tokens_per_second"] * row["streamed"]["seconds"] == pytest.approx(row["tokens"])
        assert len(row["resident"]["rounds"]) == len(row["streamed"]["rounds"]) > 0
    assert rows["6.7B"]["layers"] == rows["6.7B"]["layers_of_model"]
    assert "refused" not in rows["6.7B"]
    assert rows["13B"]["layers"] == rows["13B"]["layers_of_model"] - 2
    assert rows["13B"]["refused"].startswith("host memory: wanted at least")
    for model in ("6.7B", "13B"):
        assert len(rows[model]["steps"]) == 5
        assert {"compute", "down", "up"} <= rows[model]["lanes"].keys()
        assert rows[model]["placement"]["host"]["state"] == rows[model]["layers"] + 2
        assert rows[model]["losses"][0] == pytest.approx(math.log(256), abs=0.5)
        spans = [event for event in json.loads((out / f"streamed-{model}.json").read_text())["traceEvents"]]
        assert sum("backward" in event["name"] for event in spans) >= 5 * rows[model]["layers"]
        assert (out / f"streamed-{model}.png").read_bytes().startswith(b"\x89PNG")
    assert sum(line.startswith(("1.3B,", "6.7B ", "13B ")) for line in table) == 4


def test_what_computes_something_else_fails_the_run():
    row = {"case": "self-check, disk", "equal": False, "difference": "wte.weight differs", "seconds": 1.0}
    content = {"parts": {"streaming checks": {"rows": [row], "state": "complete"}}, "dry_run": False}
    assert gpu.failed(content)
    assert "self-check, disk                             WRONG: wte.weight differs, 1.0 s" in gpu.summary(content)
    content["parts"]["streaming checks"]["rows"] = [row | {"equal": True}]
    assert not gpu.failed(content)


def test_streaming_that_has_no_time_is_left_out_from_the_last_on(tmp_path, monkeypatch):
    ran, now = [], iter((100.0, 100.0, 180.0, 180.0))
    monkeypatch.setattr(gpu, "bench", lambda report, device, budgets: ran.append(budgets))
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(now))
    report = gpu.Report(tmp_path)
    gpu.streaming(report, "cuda", 275.0)
    checks = 50 * (175 - 3 * gpu.START) / (50 + 145 + 85)
    assert ran == [{"streaming checks": pytest.approx(checks)}, {"streaming 1.3B": pytest.approx(95 - gpu.START)}]
    told = {name: part["state"] for name, part in json.loads(report.path.read_text())["parts"].items()}
    assert told == {"streaming 13B": "skipped: 151 s left", "streaming 6.7B": "skipped: 83 s left"}


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
