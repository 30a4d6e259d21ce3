"""What bench/gpu_streaming.py does where memory or time is short, or bits differ; test_gpu_bench.py runs the rest."""

import sys
from itertools import count
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import gpu_streaming
import gpu_training
from cgpt.stream.account import account
from cgpt.stream.gpt_plans import gpt_plans
from cgpt.stream.limits import Budgets, Limits
from cgpt.stream.placement import Placement

GIB = 1 << 30


def rows_of(part, bench):
    return [row for row in part(bench) if not isinstance(row, str)]


@pytest.fixture
def bench(tmp_path):
    return gpu_streaming.Bench("cpu", tmp_path, 60.0)


def test_models_that_do_not_fit_together_step_one_after_the_other(bench, monkeypatch):
    plans = gpt_plans(gpu_training.TINY)
    alone = account(plans, Placement.resident(len(plans)), gpu_training.FORMAT, 64, 64, "host").device
    monkeypatch.setattr(gpu_streaming, "PLENTY", Budgets(alone + 4096, 1 << 40))
    monkeypatch.setattr(gpu_streaming, "ROUNDS", {"one visit": 2, "a step of the preset's": 1})
    rows = rows_of(gpu_streaming.against_resident, bench)
    assert [row["case"] for row in rows] == ["1.3B, 1 visit a step", "1.3B, 3 visits a step"]
    assert not any(row["interleaved"] for row in rows)
    assert all(row["equal"] for row in rows)
    assert [len(row["streamed"]["rounds"]) for row in rows] == [2, 1]
    # two of warm-up, two turns of five, one of two
    assert [row["steps_compared"] for row in rows] == [12, 14]


def test_a_model_that_does_not_fit_alone_is_told(bench, monkeypatch):
    monkeypatch.setattr(gpu_streaming, "PLENTY", Budgets(1 << 20, 1 << 40))
    (row,) = rows_of(gpu_streaming.against_resident, bench)
    assert row["skipped"].endswith("bytes of the device's 1,048,576")
    assert gpu_streaming.describe(row).startswith("1.3B ")


def test_the_first_step_that_differs_is_told():
    pair = gpu_streaming.Pair(["resident", "streamed"], True, 3)
    pair.found = {"resident": [(5.0, 1.0), (4.5, 1.0), (4.0, 1.0)], "streamed": [(5.0, 1.0), (4.5, 1.5)]}
    assert pair._compared() == {
        "equal": False,
        "steps_compared": 2,
        "difference": "step 2: (4.5, 1.0), (4.5, 1.5)",
    }


def test_a_step_of_many_visits_is_left_out_where_it_would_take_too_long(bench, monkeypatch):
    pair = gpu_streaming.Pair(["resident", "streamed"], True, 66)
    pair.seconds["one visit"] = {"resident": [0.4, 0.3, 0.3], "streamed": [0.7, 0.7, 0.6]}
    both = dict.fromkeys(pair.names)
    found = []
    for left in (100.0, 40.0, 4.0):
        monkeypatch.setattr(gpu_streaming.Bench, "left", left)
        found.append(pair._visits("a step of the preset's", both, bench, 0.0))
    assert found == [66, 36, 0]
    pair.plan["a step of the preset's"] = 0, 0
    row = pair.row("a step of the preset's", bench, gpu_training.TINY)
    assert row == {"case": "1.3B, a step of the preset's", "skipped": "4 s left"}


@pytest.mark.parametrize("left", [50.0, 20.0])
def test_a_device_that_ran_out_is_asked_for_less(bench, monkeypatch, left):
    shares = []

    def _large(bench, model, share):
        shares.append(share)
        yield "opening"
        if share == gpu_streaming.DEVICE_SHARES[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate 2 GiB.")
        yield {"case": model, "fits": True}

    monkeypatch.setattr(gpu_streaming, "_large", _large)
    monkeypatch.setattr(gpu_streaming.Bench, "left", left)
    error, after = rows_of(gpu_streaming.large("13B"), bench)
    assert error["error"] == "CUDA out of memory. Tried to allocate 2 GiB."
    assert after == ({"case": "13B", "fits": True} if left > 30 else {"case": "13B", "skipped": "20 s left"})
    assert shares == list(gpu_streaming.DEVICE_SHARES[: 1 + (left > 30)])


@pytest.mark.parametrize(("seconds", "host"), [(0.05, 115 * GIB), (0.5, 48 * GIB)])
def test_the_host_gives_what_it_has_or_what_can_be_pinned_in_time(bench, monkeypatch, seconds, host):
    clock = count(0.0, seconds)
    monkeypatch.setattr(gpu_training.Bench, "left", 60.0)
    monkeypatch.setattr(gpu_training.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(gpu_training, "HostMemory", lambda nbytes, device: None)
    monkeypatch.setattr(gpu_training, "limits", lambda: Limits({"free memory": 120 * GIB}))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (78 * GIB, 80 * GIB))
    found = gpu_training.free_memory(bench, 0.5)
    assert found.device == 39 * GIB
    assert found.host == pytest.approx(host)


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989.4e12), ("NVIDIA H100 PCIe", None), ("NVIDIA GeForce RTX 4090", 165.2e12)],
)
def test_a_share_of_the_peak_is_told_where_it_is_known(tmp_path, monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    found = gpu_training.speed(gpu_training.Bench("cuda", tmp_path, 1.0), gpu_training.TINY, 1000, 0.5)
    assert found["tokens_per_second"] == 2000
    assert found["mfu"] == (found["model_flops_per_second"] / peak if peak else None)
