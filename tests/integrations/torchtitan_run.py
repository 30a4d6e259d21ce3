"""Trains a tiny LLaMA by torchtitan's Trainer, run after run, in the environment of test_torchtitan.py.

torchtitan is told that this machine's accelerator is its CPU. None of its attentions trains there, so where ours is not
asked for, torch's SDPA stands in, document by document.
"""

# ruff: noqa: E402 (what torchtitan finds when it is imported is set before)

import json
import os
import sys
from collections import namedtuple
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import torch
import torch._utils
from torch.nn import functional as F

torch._utils._get_available_device_type = lambda: "cpu"

from torchtitan.components import metrics
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import ConfigManager, derive, override
from torchtitan.distributed import utils
from torchtitan.models.common.attention import VarlenAttention
from torchtitan.trainer import Trainer

from tiny import TIME, batches, counted

STEPS, ACCUMULATED, SIZE = 10, 2, 4
DOCUMENT = 6  # every sequence is several, the last shorter
OURS = [f"cgpt_ext.integrations.torchtitan.{name}" for name in ("attention", "adamw")]
RUNS = {
    "theirs": (["torchtitan_run.sdpa"], None),
    "mine": (OURS, None),
    "theirs, by us": (OURS, "theirs"),
    "mine, by us": (OURS, "mine"),
    "mine, by them": (["torchtitan_run.sdpa"], "mine"),
}


class SDPA(VarlenAttention):
    @dataclass(kw_only=True, slots=True)
    class Config(VarlenAttention.Config):
        pass

    def forward(self, q_BLNH, k_BLNH, v_BLNH, *, attention_masks, scale=None, **_):
        lengths = attention_masks.cu_seq_q.diff().tolist()
        documents = zip(
            *(x.flatten(0, 1).transpose(0, 1).split(lengths, 1) for x in (q_BLNH, k_BLNH, v_BLNH)), strict=True
        )
        outs = [F.scaled_dot_product_attention(*document, scale=scale, is_causal=True) for document in documents]
        return torch.cat(outs, 1).transpose(0, 1).unflatten(0, q_BLNH.shape[:2])


@override(target=VarlenAttention.Config)
def sdpa(config):
    return derive(config, SDPA.Config)


class Batches(BaseDataLoader):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(self, config, **_):
        self.seen = 0

    def __iter__(self):
        for batch in batches(STEPS * ACCUMULATED, SIZE)[self.seen :]:
            self.seen += 1
            positions = (torch.arange(TIME) % DOCUMENT).expand(SIZE, -1)
            yield {"input": batch[:, :-1], "positions": positions}, batch[:, 1:]

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


class NoTokenizer(BaseTokenizer):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config, **_):
        super().__init__()

    def encode(self, *_, **__):
        raise NotImplementedError

    decode = get_vocab_size = encode


def no_memory_monitor():
    nothing = namedtuple("Stats", metrics.DeviceMemStats._fields)(*[0] * 6)
    return SimpleNamespace(device_name="cpu", get_peak_stats=lambda: nothing, reset_peak_stats=lambda: None)


def run(name, overrides, resumed):
    metrics.build_device_memory_monitor = no_memory_monitor
    utils.set_pg_timeouts = lambda **_: None  # numbers the devices, which CPUs are not
    flags = ["--module", "llama3", "--config", "llama3_debugmodel_varlen_attn", "--override.imports", *overrides]
    config = ConfigManager().parse_args(flags)
    config.model_spec.model.layers = config.model_spec.model.layers[:2]
    config.loss = CrossEntropyLoss.Config(global_vocab_size=config.model_spec.model.vocab_size)
    config.dataloader, config.tokenizer = Batches.Config(), NoTokenizer.Config()
    config.validator.enable = False
    config.training.steps, config.training.seq_len, config.training.max_norm = STEPS, TIME, 0.5
    config.training.mixed_precision_param = "float32"
    config.training.local_batch_size, config.training.global_batch_size = SIZE, SIZE * ACCUMULATED
    config.optimizer.implementation = "for-loop"
    config.debug.seed = 1
    config.dump_folder = name
    config.checkpoint.enable, config.checkpoint.interval, config.checkpoint.folder = True, 5, "checkpoint"
    if resumed:
        config.checkpoint.load_step = 5
        Path(name).mkdir()
        Path(name, "checkpoint").symlink_to(Path(resumed, "checkpoint").resolve())
    losses, log = [], metrics.MetricsProcessor.log
    norms = []

    def listening(self, step, loss, worst, norm, **options):
        losses.append(float(loss))
        norms.append(norm)
        log(self, step, loss, worst, norm, **options)

    metrics.MetricsProcessor.log = listening
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="0")
    with counted() as calls:
        trainer = Trainer(config)
        trainer.train()
        trainer.close()
    Path(f"{name}.json").write_text(json.dumps({"losses": losses, "norms": norms, "calls": calls}))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    for name, (overrides, resumed) in RUNS.items():
        if not os.fork():
            run(name, overrides, resumed)
            sys.stdout.flush()
            os._exit(0)
        if os.wait()[1]:
            sys.exit(f"{name} failed")
    found = {name: json.loads(Path(f"{name}.json").read_text()) for name in RUNS}
    Path("found.json").write_text(json.dumps({**found, "version": metadata.version("torchtitan")}))
