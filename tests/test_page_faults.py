"""A training loop's memory: after its first steps the system is asked for no more of it.

Each 4 KiB that the C library gives back and takes again is zeroed and mapped anew, which costs about 0.25 us to 0.5 us:
as much as writing it. The loop runs in a process of its own, whose heap is as a run's.
"""

import json
import os
import platform
import subprocess
import sys

import pytest

LOOP = """
import json, resource, sys
import torch
from cgpt.model.config import GPTConfig
from cgpt.model.init import init_parameter
from cgpt.heap import keep_large_buffers
from cgpt.stream.build import build
from cgpt.stream.executor import Executor
from cgpt.stream.format import Format
from cgpt.stream.optimizer import AdamW

precision, sequences, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
keep_large_buffers()
# Logits of 37 MiB are more than glibc takes from its heap by itself; most of the rest is 0.25 to 2 MiB.
shape = GPTConfig(vocab_size=9472, seq_len=256, n_layer=2, d_model=64, n_head=2, d_head=32, d_ff=256)
_, store = build(shape, Format(precision), "cpu")
store.initialise(lambda name, tensor: init_parameter(name, tensor, shape, seed=0))
executor, optimizer = Executor(store), AdamW(store)
draw, found = torch.Generator().manual_seed(0), []
for _ in range(steps):
    tokens = torch.randint(shape.vocab_size, (sequences, 257), generator=draw)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    gradients = executor.gradients([[(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())]])
    optimizer.step(gradients, lr=1e-3)
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps(found))
"""
STEPS = 16


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
@pytest.mark.parametrize(("precision", "sequences"), [("fp32", 4), ("bf16", 8)])
def test_a_step_in_the_middle_of_a_run_faults_on_no_page(precision, sequences):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", LOOP, precision, str(sequences), str(STEPS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    faults = json.loads(done.stdout)
    assert faults[0] > 5000  # the step is large enough to show what is given back
    # The heap's last holes are found within some ten steps; a late one is no median. A tensor that is given back costs
    # 64 faults, the logits 9472; what Python and the lists of a step take anew is a page or two.
    assert sorted(faults[STEPS // 2 :])[STEPS // 4] < 24, faults
