"""Ranks that train one model: the bits of one process, one voice, and one end for all.

Ranks are threads (stream/ranks.py) where a test can do with that, and else processes that torchrun or `Runs` starts.
"""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import pytest
from stream.ranks import on_ranks

from cgpt import checkpoint, opening, placing, train
from cgpt.data.loader import Loader, train_val_split
from cgpt.data.prepare import open_corpus
from cgpt.errors import InputError
from cgpt.evaluate.loss import held_out_loss
from cgpt.metrics import read
from cgpt.model.init import init_parameter
from cgpt.placing import describe, place_run
from cgpt.recipe import TrainConfig, resolve
from cgpt.stream.build import build
from cgpt.stream.cores import Cores
from cgpt.stream.executor import Executor
from cgpt.stream.format import Format
from cgpt.stream.limits import Limits
from cgpt.stream.placement import Placement
from cgpt.world import World
from nano import NANO, Runs

STEP = {"batch_size": 5, "micro_batch_size": 1, "clip": 0.1}  # of 5 micro-batches: some rank has none of the last round
MB = 1 << 20


def nano(**more):
    given = {"model": "nano", "data": "corpus.txt", "steps": 4, "eval_tokens": 128, "eval_every": 2, **STEP}
    return TrainConfig(**{**given, "checkpoint_every": 50, **more})


def flags(config, *names):
    """The command line of what differs from none."""
    given = {name: value for name, value in vars(config).items() if value not in (None, False, ())}
    return [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def left(run):
    """All that a run leaves, but for its times: rows of metrics, and bytes of the newest checkpoint's tensors."""
    rows = [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in read(run)]
    path, manifest, _ = checkpoint.newest(run / "checkpoints")
    tensors = {file.name: file.read_bytes() for file in path.glob("*.safetensors")}
    return rows, manifest["step"], manifest["samples"], manifest["optimizer"], tensors


@pytest.fixture
def threads(monkeypatch):
    """Trains on so many ranks, each a thread: their summaries."""
    monkeypatch.setattr(opening, "take_cores", lambda *_: Cores((0,), (), None))  # not this process's own
    return lambda ranks, config: on_ranks(ranks, lambda world: train.train_job(opening.job_on(world, config)))


def test_torchrun_trains_what_one_process_does(here):
    config = nano(out=here / "one")
    train.train(config)
    assert all(row["grad_norm"] > STEP["clip"] for row in read(here / "one"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, train.__file__.replace("python/cgpt/train.py", "tests/nano.py"), "train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    options = {"env": environment, "capture_output": True, "text": True, "timeout": 60, "cwd": here}
    found = subprocess.run([*command, *flags(replace(config, out=here / "two"))], **options)
    assert found.returncode == 0, found.stderr
    assert left(here / "two") == left(here / "one")
    assert found.stdout.count("model    nano") == found.stdout.count("sample   ") == 1
    assert re.search(r"^ranks    2 on 1 machine: cores [\d,-]+.*, 1 thread; cores", found.stdout, re.MULTILINE)
    one, two = (json.loads((here / name / "summary.json").read_text()) for name in ("one", "two"))
    for name in ("val_loss", "unigram_loss", "train_loss", "bits_per_byte", "val_tokens", "tokens", "skipped_steps"):
        assert one[name] == two[name]
