"""The benches of a CPU's training step at tiny sizes: what they count, what they add up, and what they call by which
name."""

import argparse
import importlib.util
import json
import math
import os
import statistics
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import contenders
import profile_step
import summary
import train_step
from cgpt.model.config import GPTConfig, resized
from cgpt.model.presets import PRESETS
from cgpt.scaling.flops import matmul_flops_per_token
from cgpt_ext import _native
from products import Floor

BENCH = Path(summary.__file__).parent
TINY = PRESETS["tiny"].config
SMALL = GPTConfig(n_layer=3, n_head=2, d_model=16, d_head=8, d_ff=64, vocab_size=50, seq_len=8)


@pytest.mark.parametrize(("precision", "bar"), [("bf16", 1e-2), ("fp32", 1e-5)])
def test_the_floor_is_all_products_but_attentions(precision, bar):
    floor = Floor(SMALL, precision, tokens=16)
    floor.step()
    floor.step()
    found = floor.details()
    attention = 6 * SMALL.n_layer * SMALL.seq_len * SMALL.d_model
    assert found["flops"] == 16 * (matmul_flops_per_token(SMALL) - attention)
    assert len(floor.order) == 3 * (4 * SMALL.n_layer + 1) == sum(row["count"] for row in found["products"])
    assert found["seconds"] == pytest.approx(sum(row["count"] * row["seconds"] for row in found["products"]))
    for product in floor.products:
        wanted = product.a.double() @ product.b.double()
        assert (product.out.double() - wanted).norm() <= bar * wanted.norm(), product.name
    sizes = {product.name: product.size for product in floor.products}
    assert sizes["fc y"] == (16, 16, 64)
    assert sizes["fc dx"] == (16, 64, 16)
    assert sizes["fc dw"] == (16, 16, 64)
    assert sizes["head dw"] == (50, 16, 16)


def test_the_floor_of_more_blocks_than_were_run():
    few, many = (Floor(resized(SMALL, n_layer=layers), "fp32", tokens=16) for layers in (1, 3))
    few.step()
    many.step()
    assert few.details(blocks=3)["flops"] == many.details()["flops"]


def test_a_step_against_its_products_on_an_older_machine(tmp_path, monkeypatch, capsys):
    if "avx2" not in _native.cpu_isas():
        pytest.skip("no AVX2 here")
    line = "train_step --model tiny --seq-len 16 --batch-size 1 --precision fp32 --isa avx2 --against plain --steps 3"
    monkeypatch.setattr(sys, "argv", [*line.split(), "--threads", "1", "--out", str(tmp_path)])
    before = dict(os.environ)
    train_step.main()
    assert os.environ == before
    found = json.loads((tmp_path / "train_step-tiny-fp32-avx2.json").read_text())
    assert found["settings"]["isa"] == "avx2"
    assert found["contenders"].keys() == {"cgpt", "plain PyTorch"}
    flops = sum(row["count"] * 2 * math.prod(row["size"]) for row in found["floor_products"])
    assert found["floor_flops_per_second"] == pytest.approx(flops / found["floor_seconds"])
    for row in found["contenders"].values():
        assert row["torch_capability"] == "AVX2"
        assert len(row["seconds"]) == len(row["minor_faults"]) == 3
        assert row["of_floor"] == statistics.median(row["seconds"]) / found["floor_seconds"]
        assert row["tokens_per_second"] == 16 / statistics.median(row["seconds"])
        assert TINY.n_params * 12 < row["resting_memory_bytes"] <= row["peak_memory_bytes"]
        assert row["first_loss"] == pytest.approx(10.82, abs=0.5)  # log of the vocabulary
    assert "x the products" in capsys.readouterr().out


def test_a_contender_that_dies_is_named():
    contender = train_step.Contender("theirs", partial(os._exit, 9), None, 1, 8, 50, 1)
    with pytest.raises(SystemExit, match=r"^theirs: wanted a step, got exit code 9$"):
        contender.turn(1)


def test_a_profile_adds_up_to_the_step(monkeypatch):
    monkeypatch.setattr(contenders, "keep_large_buffers", lambda: None)  # for whole processes, not for a test runner's
    layers = {name: getattr(_native, name) for name in ("layer_norm_fwd", "adamw", "attention_bwd")}
    settings = argparse.Namespace(model="tiny", layers=1, batch_size=2, seq_len=64, precision="bf16", rounds=3)
    found = profile_step.measure(settings)
    assert layers == {name: getattr(_native, name) for name in layers}
    rows = {row["name"]: row for row in found["rows"]}
    assert found["scaled_blocks"] == 2
    # every product of the step is seen, those of the block twice
    products = [row for row in found["rows"] if row["group"] == profile_step.PRODUCTS]
    assert sum(row["flops"] for row in products) == found["floor"]["flops"]
    assert found["floor"]["flops"] == 128 * (matmul_flops_per_token(TINY, 64) - 6 * 2 * 64 * TINY.d_model)
    attention = [row for row in found["rows"] if row["group"] == profile_step.ATTENTION]
    assert sum(row["flops"] for row in attention) == 7 * 2 * TINY.n_head * 64 * 64 * TINY.d_head * 2
    assert [row["calls"] for row in attention] == [2, 2]
    assert rows["layer_norm_fwd"]["calls"] == 2 * 2 + 1  # the head's is not the block's
    assert rows["adamw"]["calls"] > 0
    assert rows[profile_step.OVERHEAD]["group"] == profile_step.OVERHEAD
    assert sum(row["share"] for row in found["rows"]) == pytest.approx(1)
    text = profile_step.table(found)
    assert "attention_bwd 2 x 64 x 2 x 48" in rows  # the text leaves out what took next to nothing
    assert all(group in text for group in profile_step.GROUPS)


def test_a_profiled_steps_events_are_all_of_it():
    a, b = torch.randn(256, 256), torch.randn(256, 256)

    def step():
        for _ in range(30):
            torch.mm(a, b)

    seen = []
    for _ in range(6):
        seconds, rows = profile_step.profiled_step(step, 1)
        calls, spent, flops = rows[profile_step.PRODUCTS, "torch.mm 256 x 256 x 256"]
        assert (calls, flops) == (30, 30 * 2 * 256**3)
        assert spent <= sum(row[1] for row in rows.values()) <= seconds
        seen.append(sum(row[1] for row in rows.values()) / seconds)
    assert max(seen) >= 0.95  # a busy machine may stop this process between the clock and the first event


@pytest.mark.parametrize(
    ("name", "shapes", "wanted"),
    [
        ("native linear 6x4 5x4 6x5", [], (profile_step.PRODUCTS, "linear 6 x 4 x 5", 240)),
        ("native linear 6x4 5x4 5 6x5", [], (profile_step.PRODUCTS, "linear 6 x 4 x 5", 240)),
        ("native gelu_mlp_linear_bwd 6x4 4x5 6x5", [], (profile_step.PRODUCTS, "gelu_mlp_linear_bwd 6 x 4 x 5", 240)),
        ("native gelu_mlp_fwd 6x4 6x4", [], (profile_step.OURS, "gelu_mlp_fwd", 0)),
        ("aten::addmm", [[5], [6, 4], [4, 5], [], []], (profile_step.PRODUCTS, "torch.mm 6 x 4 x 5", 240)),
        ("aten::add", [[5], [5]], (profile_step.TORCH, "add", 0)),
        ("_GeluMLPBackward", [], (profile_step.OVERHEAD, profile_step.OVERHEAD, 0)),
    ],
)
def test_where_an_event_belongs(name, shapes, wanted):
    assert profile_step.place_of(name, shapes) == wanted


OP_BENCH = """
import torch
from cgpt_ext import _native
from kinds import KINDS

@KINDS
def test_product(versus, dtype, isa):
    assert _native.cpu_isa() == (isa or _native.cpu_isas()[-1])
    a = torch.randn(64, 64).to(dtype)
    versus(lambda: a @ a, {"torch": lambda: a @ a}, flops=2 * 64**3, gemm=dtype, seconds=0.1)
"""


def test_an_ops_share_of_the_products_rate(tmp_path, monkeypatch, capfd):
    if "avx2" not in _native.cpu_isas():
        pytest.skip("no AVX2 here")
    spec = importlib.util.spec_from_file_location("conftest_of_bench", BENCH / "conftest.py")
    plugin = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plugin)
    monkeypatch.setattr(plugin, "keep_large_buffers", lambda: None)  # for whole processes, not for a test runner's
    monkeypatch.setattr(plugin, "GEMM_SIZE", (64, 96, 128))
    bench, out = tmp_path / "bench_product.py", tmp_path / "out.json"
    bench.write_text(OP_BENCH)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # in whose processes nothing may be timed
    options = ["-p", "no:cacheprovider", "-o", "python_files=bench_*.py", f"--rootdir={tmp_path}", "--benchmark-only"]
    assert pytest.main([*options, f"--benchmark-json={out}", str(bench)], plugins=[plugin]) == 0
    rows = [found["extra_info"] for found in json.loads(out.read_text())["benchmarks"]]
    kinds = {"bf16": (None, "torch"), "fp32": (None, "torch"), "fp32-avx2": ("avx2", "torch on all of the machine")}
    if _native.cpu_isas()[-1] == "avx2":
        del kinds["fp32-avx2"]  # the row before it
    assert [row["name"] for row in rows] == [f"test_product[{kind}]" for kind in kinds]
    assert [(row.get("isa"), *row["peers"]) for row in rows] == list(kinds.values())
    printed = capfd.readouterr().out
    for row in rows:
        (product,) = row["limits"].values()
        assert row["gemm_gflops"] == pytest.approx(2 * 64 * 96 * 128 / product / 1e9)
        assert row["gemm_share"] == pytest.approx(row["gflops"] / row["gemm_gflops"])
        assert f"{row['gemm_share']:5.0%} of mm" in printed


def test_the_readmes_table_shows_what_there_is(tmp_path):
    name = "test_attention[backward-2x1024x12x128-bf16-attention]"
    row = {"name": name, "seconds": 0.05, "peers": {"sdpa": 0.2}, "ratio": 4.0, "gemm_share": 0.806}
    (tmp_path / "attention.json").write_text(json.dumps({"rows": [row, {"name": "of a profile"}]}))
    settings = {"model": "111M", "batch_size": 2, "seq_len": 1024, "precision": "fp32", "isa": "avx2"}
    step = {"cgpt": {"tokens_per_second": 200.0}, "plain PyTorch": {"tokens_per_second": 80.0}}
    results = {"settings": settings, "contenders": step, "floor_seconds": 8.192}
    (tmp_path / "train_step-111M-fp32-avx2.json").write_text(json.dumps(results))
    what = "training step, 111M, 2 x 1024 fp32, both held to AVX2, against"
    assert summary.table(tmp_path).splitlines()[2:] == [
        "| attention backward, same at head dim 128 | 50 ms (81% of GEMM) | 200 ms | 4.00 |",
        f"| {what} plain PyTorch | 200 tokens/s | 80 tokens/s | 2.50 |",
        f"| {what} its matrix products alone | 200 tokens/s | 250 tokens/s | 0.80 |",
    ]
    missing = summary.missing(tmp_path)
    assert len(missing) == len(summary.ROWS) + len(summary.STEPS) - 2
    assert name not in missing
