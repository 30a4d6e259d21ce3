"""Flags of `cgpt import` and `cgpt export`. Imports no torch, so that --help is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

Dtype = Literal["fp32", "bf16", "fp16"]
Out = Annotated[Path, tyro.conf.arg(metavar="DIR")]


@dataclass(frozen=True)
class Import:
    """Make a run of a Hugging Face model, for eval, generate, export and train --init.

    Models are gpt2 (Cerebras-GPT among them) and btlm (its muP models), in safetensors or .bin files, sharded or not.
    Nothing in a .bin is executed. Memory holds a tensor or two at a time.
    """

    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="HF_DIR")]
    """The folder with config.json, weights and tokenizer."""
    out: Out
    """Run folder to write, new or empty."""
    precision: Annotated[Dtype | None, tyro.conf.arg(metavar="{fp32,bf16,fp16}", help_behavior_hint="")] = None
    """What the run computes in; its checkpoint is fp32 always (default: the type of the weights)."""


@dataclass(frozen=True)
class Export:
    """Write a run as a Hugging Face model, the way save_pretrained does, for AutoModelForCausalLM and AutoTokenizer.

    The factors of muP and CompleteP are folded into the weights, for a plain GPT-2 with the same logits. GPT-2 has no
    other positions than learned ones, no SwiGLU and no embedding norm.
    """

    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run folder, or a Hugging Face folder to be folded, sharded or rounded anew."""
    out: Out
    """Folder to write, new or empty."""
    dtype: Annotated[Dtype, tyro.conf.arg(metavar="{fp32,bf16,fp16}")] = "fp32"
    """Of the weights."""
    shard_size: Annotated[str, tyro.conf.arg(metavar="TEXT")] = "5GB"
    """Of a weights file, at most."""
