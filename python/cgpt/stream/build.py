"""A GPT as the walk sees it, and a store around it."""

from __future__ import annotations

import torch
from torch import nn

from cgpt.errors import InputError
from cgpt.model.config import GPTConfig
from cgpt.model.gpt import GPT
from cgpt.stream.devices import Device
from cgpt.stream.format import Format
from cgpt.stream.store import Layer, Store


def layers_of(model: GPT) -> list[Layer]:
    """embed, h.0, ..., head: the stops of a GPT, with its parameters under Hugging Face GPT-2's names."""

    def reads(*prefixes: str) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in model.named_parameters() if name.startswith(prefixes)}

    blocks = [Layer(f"h.{i}", block, reads(f"h.{i}.")) for i, block in enumerate(model.h)]
    head = Layer("head", model.head, reads("ln_f.") | reads("wte."))
    return [Layer("embed", model.embed, reads("wte.", "wpe.", "ln_emb.")), *blocks, head]


def check_device(device: str) -> None:
    """Raises InputError where torch finds no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device: wanted cuda, got a machine where torch {torch.__version__} finds no CUDA device")


def build(shape: GPTConfig, format: Format, device: str | Device, **where) -> tuple[GPT, Store]:
    """A GPT with its parameters in a store, all zero; `where` is Store's placement, disk and world. Raises InputError
    where there is no such device."""
    if isinstance(device, str):
        check_device(device.partition(":")[0])
    with torch.device("meta"):
        model = GPT(shape)
    return model, Store(layers_of(model), format, device, **where)
