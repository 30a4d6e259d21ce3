"""What the README says is what was measured and what is there."""

import importlib.util
from pathlib import Path

import pytest

import cgpt_ext
from cgpt_ext import dispatch, nn, optim

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_measurements_come_from_the_results():
    spec = importlib.util.spec_from_file_location("summary", ROOT / "bench" / "summary.py")
    summary = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(summary)
    for device in (summary.DEVICE, summary.OLDER_DEVICE):
        assert summary.table(summary.RESULTS / device) in README
        assert not summary.missing(summary.RESULTS / device)


def test_every_op_has_its_row():
    for op in dispatch.TABLE:
        assert f"| {op}" in README, op
        assert hasattr(cgpt_ext, op) or hasattr(cgpt_ext, op + "_"), op


def test_named_drop_ins_exist():
    for name in (
        "LayerNorm",
        "Embedding",
        "GeluMLP",
        "Linear",
        "CausalSelfAttention",
        "LinearCrossEntropyLoss",
        "clip_grad_norm_",
    ):
        assert f"`.{name}`" in README or f"nn.{name}" in README
        assert hasattr(nn, name)
    assert hasattr(optim, "AdamW")


def test_every_package_is_shipped():
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    with (ROOT / "pyproject.toml").open("rb") as file:
        listed = tomllib.load(file)["tool"]["setuptools"]["packages"]
    folders = {"cgpt_ext": ROOT / "cgpt_ext", "cgpt": ROOT / "python" / "cgpt"}
    there = [
        ".".join((name, *path.parent.relative_to(folder).parts))
        for name, folder in folders.items()
        for path in folder.rglob("__init__.py")
    ]
    assert sorted(listed) == sorted(there)
