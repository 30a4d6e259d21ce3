"""`cgpt export`: a model as transformers' save_pretrained writes it, which needs neither transformers nor the memory.

    config.json  generation_config.json  tokenizer.json  tokenizer_config.json
    model.safetensors, or model-00001-of-00003.safetensors ... and model.safetensors.index.json

The head is tied, so it is not written. Factors of muP and CompleteP are folded into the weights (model/folding.py), so
that any GPT-2 code computes the same logits. Shards are filled in the order of the model's state_dict; within a file
tensors lie in the order of their names, as safetensors writes them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from cgpt.errors import InputError
from cgpt.files import write_atomically
from cgpt.interchange.folder import whole_folder
from cgpt.interchange.vocabulary import vocabulary_files
from cgpt.interchange.weights import Weights, open_weights
from cgpt.model.folding import fold_tensor, folded
from cgpt.model.huggingface import PREFIX, values_of
from cgpt.stream.limits import parse_bytes
from cgpt.tensor_files import BYTES, FLOATS, write_tensors

DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}  # safetensors' names
SHARD = "5GB"


@dataclass(frozen=True)
class Exported:
    """What has been written. folded: whether factors were."""

    folder: Path
    parameters: int
    files: tuple[str, ...]
    folded: bool


def export(
    path: str | os.PathLike, out: str | os.PathLike, dtype: str = "fp32", shard_size: int | str = SHARD
) -> Exported:
    """Writes the Hugging Face folder `out` from a run, or from another such folder.

    dtype: "fp32", "bf16" or "fp16", of the weights, rounded to nearest. shard_size: bytes, or a text such as "5GB"; of
    tensors in a file, unless one alone is larger. Takes a tensor or two at a time. Raises InputError, one line, for
    what `open_weights` refuses, a model that GPT-2's layout cannot express, weights past the range of fp16, and an
    `out` in use, and OSError; nothing is then left in `out`.
    """
    path, out = Path(path), Path(out)
    if dtype not in DTYPES:
        raise InputError(f"--dtype: wanted one of {', '.join(DTYPES)}, got {dtype}")
    limit = parse_bytes(shard_size, "--shard-size") if isinstance(shard_size, str) else shard_size
    if limit < 1:
        raise InputError(f"--shard-size: wanted at least 1 byte, got {limit}")
    weights = open_weights(path)
    plain, tokenizer = folded(weights.recipe.shape), weights.tokenizer
    try:
        config = values_of(plain, dtype, tokenizer.eot)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    generation = {
        "_from_model_config": True,
        "bos_token_id": tokenizer.eot,
        "eos_token_id": tokenizer.eot,
        "output_attentions": False,
        "output_hidden_states": False,
        "use_cache": True,
    }
    with whole_folder(out, "the model") as folder:
        names = _write_weights(folder, weights, DTYPES[dtype], limit)
        for name, content in {"config.json": config, "generation_config.json": generation}.items():
            write_atomically(folder / name, _json(content))
        for name, data in vocabulary_files(tokenizer, plain.seq_len).items():
            write_atomically(folder / name, data)
    return Exported(out, plain.n_params, names, plain != weights.recipe.shape)


def shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in files of at most `limit` bytes; a larger one has a file of its own. In the manner of huggingface_hub,
    whose every file but these is filled until the next name would be too much."""
    found: list[list[str]] = []
    current: list[str] = []
    filled = 0
    for name, size in sizes.items():
        if size > limit:
            found.append([name])
            continue
        if current and filled + size > limit:
            found.append(current)
            current, filled = [], 0
        current.append(name)
        filled += size
    return [*found, current] if current else found


def _write_weights(folder: Path, weights: Weights, dtype: str, limit: int) -> tuple[str, ...]:
    """Writes all tensors and, for more than one file, the index; the files' names."""
    sizes = {name: prod(weights.shapes[name]) * BYTES[dtype] for name in _order(weights)}
    parts = shards(sizes, limit)
    names = [f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    names = names if len(parts) > 1 else ["model.safetensors"]
    placed = {}
    for file, part in zip(names, parts, strict=True):
        shapes = {PREFIX + name: weights.shapes[name] for name in sorted(part)}
        write_tensors(folder / file, shapes, _tensors(weights, sorted(part), dtype), dtype, {"format": "pt"})
        placed |= dict.fromkeys(shapes, file)
    if len(parts) > 1:
        total = {"total_parameters": sum(map(prod, weights.shapes.values())), "total_size": sum(sizes.values())}
        index = {"metadata": total, "weight_map": dict(sorted(placed.items()))}
        write_atomically(folder / "model.safetensors.index.json", _json(index))
    return tuple(names)


def _order(weights: Weights) -> list[str]:
    """Names as they come in transformers' state_dict: as in ours, but for the vectors' places within a block."""
    parts = "ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"
    blocks = [f"h.{i}.{part}" for i in range(weights.recipe.shape.n_layer) for part in parts]
    pairs = [f"{part}.{kind}" for part in [*blocks, "ln_f"] for kind in ("weight", "bias")]
    return ["wte.weight", "wpe.weight", *pairs]


def _tensors(weights: Weights, names: list[str], dtype: str) -> Iterator[tuple[str, Tensor]]:
    """The plain model's, one in memory at a time."""
    for name in names:
        value = fold_tensor(name, weights.read(name), weights.recipe.shape)
        value = value.to(FLOATS[dtype])
        if not all(bound.isfinite() for bound in torch.aminmax(value)):
            raise InputError(f"--dtype: wanted one that {name} fits in, got {dtype}, which it overflows")
        weights.forget()
        yield PREFIX + name, value


def _json(content: dict) -> bytes:
    return json.dumps(content, indent=2, sort_keys=True).encode() + b"\n"
