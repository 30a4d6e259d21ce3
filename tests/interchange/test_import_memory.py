"""Import and export hold a tensor or two: their peak memory is bounded by the largest tensor, not by the model."""

import json
import os
import subprocess
import sys

import pytest
import torch

from cgpt.model.huggingface import shape_of
from cgpt.stream.gpt_plans import gpt_plans
from cgpt.tensor_files import write_tensors

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

with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts anew
before = memory("VmRSS")
importing.import_("hf", "run")
middle = memory("VmHWM")
exporting.export("run", "out", dtype="bf16", shard_size="50MB")
print(before, middle, memory("VmHWM"))
"""


@pytest.fixture
def folder(tmp_path):
    """hf/, in 4 shards, and a vocabulary of single bytes."""
    from hub import tokenizer_of

    config, _ = shape_of(CONFIG)
    shapes = {n: s for plan in gpt_plans(config) for n, s in zip(plan.owned.names, plan.owned.shapes, strict=True)}
    values = torch.randn(4 * 768 * 768, generator=torch.Generator().manual_seed(0)) * 0.02
    folder = tmp_path / "hf"
    folder.mkdir()
    names, placed = list(shapes), {}

    def tensors(part):
        for name in part:
            shape = shapes[name]
            yield f"transformer.{name}", values[: torch.Size(shape).numel()].view(shape)

    for number in range(4):
        part = names[number::4]
        wanted = {f"transformer.{name}": shapes[name] for name in part}
        file = f"model-{number + 1:05d}-of-00004.safetensors"
        write_tensors(folder / file, wanted, tensors(part), "BF16", {"format": "pt"})
        placed |= dict.fromkeys(wanted, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_bytes(tokenizer_of(257).file)
    return folder


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_peak_memory_is_a_few_tensors(folder, tmp_path, form):
    if form == "bin":
        from safetensors.torch import load_file

        index = {}
        for file in sorted(folder.glob("*.safetensors")):
            state = load_file(file)
            torch.save(state, file.with_suffix(".bin"))
            index |= dict.fromkeys(state, file.with_suffix(".bin").name)
            file.unlink()
        (folder / "model.safetensors.index.json").unlink()
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", MEASURED]
    told = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    before, imported, exported = map(int, told.split())
    largest, layer = 4 * 4 * 768**2, 2 * 12 * 768**2
    bound = 5 * largest + (16 << 20) + (layer if form == "bin" else 0)  # a .bin is mapped, and let go by layers
    assert bound < 43e6 * 4 / 2  # else this says nothing
    print("import", imported - before, "export", exported - before, "bound", bound)
    assert imported - before < bound
    assert exported - before < bound
    assert sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) > 80e6
