"""What a call costs before any arithmetic, and what importing the package costs."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from cgpt_ext import layer_norm


@pytest.mark.benchmark(group="one eager call on a tiny tensor, no grad")
def test_tiny_layer_norm(versus):
    x, weight, bias = torch.randn(2, 8), torch.ones(8), torch.zeros(8)

    def hundred(function):
        with torch.no_grad():
            for _ in range(100):
                function()

    versus(
        lambda: hundred(lambda: layer_norm(x, weight, bias)),
        {"torch": lambda: hundred(lambda: F.layer_norm(x, (8,), weight, bias))},
        seconds=1.0,
    )


@pytest.mark.benchmark(group="import")
def test_import(versus):
    def run(code):
        subprocess.run([sys.executable, "-c", code], check=True)

    versus(lambda: run("import torch, cgpt_ext"), {"import torch": lambda: run("import torch")}, seconds=15.0)
