"""Import and export hold a tensor or two: their peak memory is bounded by the largest tensor, not by the model."""

import os
import subprocess
import sys

import pytest
import torch
from hub import tokenizer_of, write

from cgpt.model.huggingface import shape_of
from cgpt.stream.gpt_plans import gpt_plans

# 7M parameters a layer, 6 of them: 43M, 170 MB in fp32. The largest tensor, a layer's c_fc, has 2.4M: 9 MB.
CONFIG = {
    "model_type": "gpt2", "n_embd": 768, "n_layer": 6, "n_head": 12, "n_positions": 64, "vocab_size": 257,
    "activation_function": "gelu", "dtype": "bfloat16",
}  # fmt: skip
MEASURED = """
import re
from cgpt.interchange import exporting, importing

def memory(kind):  # VmHWM: the peak since exec; getrusage's also knows what the parent had
    return int(re.search(kind + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

before = memory("VmRSS")  # once: what one work leaves behind, freed or not, counts for the next too

def peak(work, *arguments):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    work(*arguments)
    print(memory("VmHWM") - before)

for form in ("safetensors", "bin"):
    peak(importing.import_, form, form + "-run")
    peak(exporting.export, form + "-run", form + "-out", "bf16", "50MB")
"""


@pytest.fixture
def folders(tmp_path):
    """safetensors/ and bin/, each in 4 shards, with a vocabulary of single bytes."""
    config, _ = shape_of(CONFIG)
    shapes = {n: s for plan in gpt_plans(config) for n, s in zip(plan.owned.names, plan.owned.shapes, strict=True)}
    values = (torch.randn(4 * 768 * 768, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    state = {f"transformer.{n}": values[: torch.Size(s).numel()].view(s) for n, s in shapes.items()}
    for form in ("safetensors", "bin"):
        copies = ((name, value.clone()) for name, value in state.items())  # else a .bin would hold the values once
        write(tmp_path / form, CONFIG, dict(copies), form, 4)
        (tmp_path / form / "tokenizer.json").write_bytes(tokenizer_of(257).file)
    return tmp_path


def test_peak_memory_is_a_few_tensors(folders):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", MEASURED]
    told = subprocess.run(command, cwd=folders, env=environment, capture_output=True, text=True, check=True).stdout
    safetensors, exported, pickled, again = map(int, told.split())
    largest, layer = 4 * 4 * 768**2, 2 * 12 * 768**2
    bound = 5 * largest + (16 << 20)
    assert bound < 43e6 * 4 / 2  # half of the model; else this says nothing
    assert 0 < safetensors < bound
    assert 0 < exported < bound
    assert 0 < pickled < bound + layer  # a .bin is mapped, and let go layer by layer
    assert 0 < again < bound
    for form in ("safetensors", "bin"):
        assert sum(path.stat().st_size for path in (folders / f"{form}-out").glob("*.safetensors")) > 80e6
