"""A model's weights where they lie, in a run's newest checkpoint or in a Hugging Face folder, tensor by tensor.

    open_weights(PATH)   which of the two it is, its shape and vocabulary, and `read(name)`: fp32 under GPT-2's names
    load(PATH)           all of it as a GPT

Everything that can be told without the numbers is checked on opening; numbers must be finite when they are read.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from cgpt import checkpoint
from cgpt.data.tokenizer import Tokenizer
from cgpt.errors import InputError
from cgpt.interchange.files import Tensors, read_json
from cgpt.interchange.vocabulary import read_vocabulary
from cgpt.model.gpt import GPT
from cgpt.model.huggingface import HEAD, own_name, sources_of
from cgpt.recipe import CONFIG, Recipe, check_start, is_huggingface, read_config, read_start
from cgpt.stream.build import check_device
from cgpt.stream.format import Format
from cgpt.stream.gpt_plans import gpt_plans
from cgpt.stream.layout import LayerPlan, Layout
from cgpt.tensor_files import TensorFile
from cgpt.world import World

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Weights:
    """What `checkpoint.save` saves. path: where they lie. recipe: of the run that made them, or that importing makes.

    layers: of the walk, in numbers. world: whoever reads them has all of them.
    """

    world = World()

    def __init__(self, path: Path, recipe: Recipe):
        self.path, self.recipe = path, recipe
        self.layers: list[LayerPlan] = gpt_plans(recipe.shape)
        self.owner = {name: layer for layer in self.layers for name in layer.owned.names}
        self.shapes = {
            name: shape
            for layer in self.layers
            for name, shape in zip(layer.owned.names, layer.owned.shapes, strict=True)
        }

    @property
    def tokenizer(self) -> Tokenizer:
        """The vocabulary. Raises InputError where there is none, or one that cannot be read here."""
        raise NotImplementedError

    def read(self, name: str) -> Tensor:
        """A parameter as fp32, to be looked at only. Raises InputError where it is damaged or not finite."""
        value = self._read(name)
        if not all(bound.isfinite() for bound in torch.aminmax(value)):
            raise InputError(f"{self.path}: wanted finite numbers in {name}, got NaN or Inf")
        return value

    @contextlib.contextmanager
    def record(self, index: int) -> Iterator[_Record]:
        """Layer `index`'s masters, read as they are asked for."""
        try:
            yield _Record(self.layers[index].owned, self)
        finally:
            self.forget()

    def forget(self) -> None:
        """Gives back the memory that reading has taken."""

    def _read(self, name: str) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class _Record:
    """A layer's record as far as saving its weights asks."""

    layout: Layout
    weights: Weights
    format: Format = Format("fp32", training=False)  # noqa: RUF009 (frozen)
    ranks: int = 1

    def master(self, name: str) -> Tensor:
        return self.weights.read(name)


class RunWeights(Weights):
    """Those of a run's newest whole checkpoint, whose checksums have been compared."""

    def __init__(self, run: Path):
        recipe, self._identity = read_config(run)
        super().__init__(run, recipe)
        self._folder, _, _ = checkpoint.newest(run / checkpoint.CHECKPOINTS)
        self._files: dict[str, TensorFile] = {}

    @property
    def tokenizer(self) -> Tokenizer:
        return checkpoint.open_tokenizer(self.path, self._identity)

    def _read(self, name: str) -> Tensor:
        path = self._folder / f"{self.owner[name].name}.safetensors"
        file = self._files.get(path.name) or self._files.setdefault(path.name, TensorFile(path))
        got = file.entries[name].shape if name in file.entries else "none"
        if got != self.shapes[name]:
            raise InputError(f"{path}: wanted {name} {self.shapes[name]}, got {got}")
        return file.read(name)


class HuggingFaceWeights(Weights):
    """Those of a folder in GPT-2's layout. A head of its own must hold what wte does."""

    def __init__(self, folder: Path):
        super().__init__(folder, read_start(folder))
        self._tensors = Tensors(folder, own_name)
        self._check()
        self.recipe = replace(self.recipe, precision=self._tensors.precision("wte.weight"))

    @property
    def tokenizer(self) -> Tokenizer:
        return read_vocabulary(self.path, self.recipe.shape.vocab_size)

    def forget(self) -> None:
        self._tensors.forget()

    def _check(self) -> None:
        found, shape = dict(self._tensors.shapes), self.recipe.shape
        head = found.pop(HEAD, None)
        for name, wanted in self.shapes.items():
            sources = sources_of(name, shape)
            for source in sources:
                part = (*wanted[:-1], wanted[-1] // len(sources))
                got = found.pop(source, None)
                if got != part:
                    where = self._tensors.path(source) if got is not None else self.path
                    raise InputError(f"{where}: wanted {source} {part}, got {got or 'none'}")
        if found:
            name = min(found)
            raise InputError(f"{self._tensors.path(name)}: wanted the tensors of its config.json, got {name} as well")
        if head is not None:
            self._check_head(head)
        elif read_json(self.path / CONFIG).get("tie_word_embeddings") is False:
            raise InputError(f"{self.path}: wanted {HEAD}, as tie_word_embeddings is false, got none")

    def _check_head(self, shape: tuple[int, ...]) -> None:
        where, table = self._tensors.path(HEAD), self.shapes["wte.weight"]
        if shape != table:
            raise InputError(f"{where}: wanted {HEAD} {table}, as wte.weight is, got {shape}")
        pairs = zip(self._tensors.pieces(HEAD), self._tensors.pieces("wte.weight"), strict=True)
        same = all(torch.equal(ours, theirs) for ours, theirs in pairs)
        self.forget()
        if not same:
            raise InputError(f"{where}: wanted {HEAD} to hold what wte.weight does, for heads are tied, got another")

    def _read(self, name: str) -> Tensor:
        parts = [self._tensors.read(source) for source in sources_of(name, self.recipe.shape)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def open_weights(path: str | Path) -> Weights:
    """The weights in `path`, a run's folder or a Hugging Face folder of a GPT-2 or btlm model.

    Raises InputError, one line that names file and field or tensor, for what is neither, or is damaged, incomplete, or
    of a model that is none of ours; OSError for a file that cannot be read.
    """
    path = Path(path)
    check_start(path)
    return HuggingFaceWeights(path) if is_huggingface(path) else RunWeights(path)


def load(path: str | os.PathLike, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> GPT:
    """The model in `path`, a run's folder or a Hugging Face folder, as a module: (B, T) int64 -> (B, T, V) logits.

    dtype: float32, bfloat16 or float16, of weights, arithmetic and logits; weights are rounded to nearest, ties to
    even. T is at most the model's `config.seq_len`. Takes one tensor in fp32 beside the model. Raises as `open_weights`
    does, and InputError for another dtype and for a device that is not there.
    """
    if dtype not in DTYPES:
        raise InputError(f"load: dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    try:
        check_device(torch.device(device).type)
    except RuntimeError as error:  # torch's own, of many lines
        raise InputError(f"load: device must be one that torch knows, such as cpu or cuda, got {device}") from error
    weights = open_weights(path)
    with torch.device("meta"):
        model = GPT(weights.recipe.shape).to(dtype)
    model.to_empty(device=device)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for index, layer in enumerate(weights.layers):
            with weights.record(index) as record:
                for name in layer.owned.names:
                    parameters[name].copy_(record.master(name))
    return model
