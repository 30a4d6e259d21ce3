"""A model small enough for tests: `python nano.py train --model nano ...` is `cgpt` with that preset added.

The vocabulary is GPT-2's, as every corpus needs; all else is as narrow as it goes: 0.8M parameters.
"""

import os
import random
import subprocess
import sys
from pathlib import Path

from cgpt.cli import main
from cgpt.model.config import GPTConfig
from cgpt.model.presets import PRESETS, Preset

NANO = Preset(
    name="nano",
    config=GPTConfig(n_layer=2, n_head=2, d_model=16, d_head=8, d_ff=32, vocab_size=50257, seq_len=16),
    batch_schedule=((0, 2),),
    steps=12,
    lr=1e-2,
    warmup_tokens=64,
    decay="linear",
    adam_eps=1e-8,
)


def write_corpus(folder: Path, words: int = 3000) -> Path:
    """A text file whose words are drawn with uneven odds: something to learn."""
    draw = random.Random(0)
    known = "the whale sea ship captain of and a to in white old sailor deck harpoon".split()
    path = folder / "corpus.txt"
    path.write_text(" ".join(known[int(len(known) * draw.random() ** 2)] for _ in range(words)))
    return path


def start(*arguments: str, cwd: Path, **options) -> subprocess.Popen:
    """This file as a process of its own, its caches under `cwd`, one thread, so that several share two cores."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cwd / "cache"), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, __file__, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=environment, **pipes, **options)


if __name__ == "__main__":
    PRESETS["nano"] = NANO
    sys.exit(main())
