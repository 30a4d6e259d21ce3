"""Trains a tiny model by `litgpt pretrain`, run after run, in the environment of test_litgpt.py."""

import json
import os
import sys
from importlib import metadata
from pathlib import Path

import litgpt.pretrain
import torch
from litgpt.__main__ import main
from litgpt.data import DataModule
from torch.utils.data import DataLoader

import cgpt_ext.integrations.litgpt as ours
from tiny import HEADS, LAYERS, TIME, VOCAB, WIDTH, batches, counted

STEPS, ACCUMULATED, SIZE = 10, 2, 4
MODEL = {
    "name": "tiny", "block_size": TIME, "n_layer": LAYERS, "n_embd": WIDTH, "n_head": HEADS, "vocab_size": VOCAB,
    "padded_vocab_size": 40, "bias": True, "rotary_percentage": 0.25, "intermediate_size": 4 * WIDTH,
}  # fmt: skip
TRAIN = {
    "global_batch_size": ACCUMULATED * SIZE, "micro_batch_size": SIZE, "max_seq_length": TIME, "max_norm": 0.5,
    "max_tokens": STEPS * ACCUMULATED * SIZE * TIME, "lr_warmup_steps": 2, "log_interval": 1, "save_interval": 5,
}  # fmt: skip
RUNS = {
    "theirs": ("torch", {}),
    "mine": ("ours", {}),
    "theirs, by us": ("ours", {"resume": "theirs/step-00000005/lit_model.pth"}),
    "mine, by us": ("ours", {"resume": "mine/step-00000005/lit_model.pth"}),
    "theirs in bf16": ("torch", {"precision": "bf16-mixed"}),
    "mine in bf16": ("ours", {"precision": "bf16-mixed"}),
    "mine, by them": ("torch", {"resume": "mine/step-00000005/lit_model.pth"}),
}


class Resumable(DataLoader):
    """LitGPT saves its loader: by its state, where it has one, and goes on where that says."""

    seen = 0

    def __iter__(self):
        first = self.seen
        for i, batch in enumerate(super().__iter__()):
            if i >= first:
                self.seen = i + 1
                yield batch

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


class Tiny(DataModule):
    def connect(self, tokenizer=None, batch_size=1, max_seq_length=None, **_):
        self.batch_size = batch_size

    def train_dataloader(self):
        return Resumable(torch.cat(batches(STEPS * ACCUMULATED)), batch_size=self.batch_size)

    def val_dataloader(self):
        return DataLoader(torch.cat(batches(2)), batch_size=self.batch_size)


def run(name, who, options):
    losses, measure = [], litgpt.pretrain.chunked_cross_entropy

    def listening(logits, targets, *rest, **others):
        loss = measure(logits, targets, *rest, **others)
        if torch.is_grad_enabled() and not loss.is_meta:
            losses.append(loss.item())
        return loss

    litgpt.pretrain.chunked_cross_entropy = listening
    optimizer = {"class_path": f"{'cgpt_ext' if who == 'ours' else 'torch'}.optim.AdamW", "init_args": {"lr": 0.02}}
    config = {
        "model_name": "tiny", "model_config": MODEL, "out_dir": name, "precision": "32-true", "data": "litgpt_run.Tiny",
        "train": TRAIN, "eval": {"interval": 5, "max_iters": 2}, "optimizer": optimizer, "devices": 1,
        "logger_name": "csv", **options,
    }  # fmt: skip
    Path("config.json").write_text(json.dumps(config))  # YAML, too
    sys.argv = ["litgpt", "pretrain", "--config", "config.json"]
    with counted() as calls:
        (ours.main if who == "ours" else main)()
    Path(f"{name}.json").write_text(json.dumps({"losses": losses, "calls": calls}))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    for name, (who, options) in RUNS.items():
        if not os.fork():
            run(name, who, options)
            sys.exit(0)
        if os.wait()[1]:
            sys.exit(f"{name} failed")
    found = {name: json.loads(Path(f"{name}.json").read_text()) for name in RUNS}
    Path("found.json").write_text(json.dumps({**found, "version": metadata.version("litgpt")}))
