"""The tensors of a Hugging Face folder, whichever way they were saved: by name, one in memory at a time.

    model.safetensors           or model.safetensors.index.json and the shards that it names
    pytorch_model.bin           or pytorch_model.bin.index.json and its shards: pickles, of which tensors alone are read

The first that is there is taken, in that order. A pickle can ask for any function to be called: torch's reader of
tensors alone refuses that before anything is called. A .bin is mapped, and let go by `forget`, as all of it that has
been read counts as this process' memory. Source: transformers' loading of sharded checkpoints.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cgpt.errors import InputError
from cgpt.tensor_files import FLOATS, PIECE, TensorFile, open_regular

SINGLE = ("model.safetensors", "pytorch_model.bin")
INDEX = ".index.json"
PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16"}


class OneFile(Protocol):
    """shapes, precisions ("fp32", "bf16" or "fp16", the nearest that holds it): of its tensors, by name.

    read: one as fp32. pieces: the same in flat stretches of tensor_files.PIECE elements. forget: gives back what
    reading took.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    precisions: dict[str, str]

    def read(self, name: str) -> Tensor: ...
    def pieces(self, name: str) -> Iterator[Tensor]: ...
    def forget(self) -> None: ...


class Tensors:
    """All tensors of `folder`, under the names that `own` makes of theirs; those it has no name for are left out.

    shapes: by name. Raises InputError, naming the file, for what is missing, damaged, no tensor, or there twice.
    """

    def __init__(self, folder: Path, own: Callable[[str], str | None] = lambda name: name):
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, tuple[OneFile, str]] = {}
        for path, wanted in _files(folder).items():
            file = _open(path)
            for name in wanted or ():
                if name not in file.shapes:
                    raise InputError(f"{path}: wanted {name}, which the index says is there, got none")
            for name in file.shapes:
                self._add(file, name, own(name))

    def _add(self, file: OneFile, theirs: str, name: str | None) -> None:
        if name is None:
            return
        if name in self._places:
            raise InputError(f"{file.path}: wanted {name} once, got it from {self._places[name][0].path.name} as well")
        self._places[name] = file, theirs
        self.shapes[name] = file.shapes[theirs]

    def read(self, name: str) -> Tensor:
        """A tensor as fp32, to be looked at only: it may be the file itself. Raises InputError for a type that is no
        float's."""
        file, theirs = self._places[name]
        return file.read(theirs)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The same in flat stretches, one in memory at a time."""
        file, theirs = self._places[name]
        return file.pieces(theirs)

    def precision(self, name: str) -> str:
        """Of "fp32", "bf16" and "fp16" the one that it is stored in, or nearest to."""
        file, theirs = self._places[name]
        return file.precisions[theirs]

    def path(self, name: str) -> Path:
        """The file that holds it."""
        return self._places[name][0].path

    def forget(self) -> None:
        """Gives back the memory that reading has taken; tensors that `read` gave out keep theirs."""
        for file, _ in self._places.values():
            file.forget()


class Safetensors:
    """One safetensors file."""

    def __init__(self, path: Path):
        self.path, self._file = path, TensorFile(path)
        entries = self._file.entries.items()
        self.shapes = {name: entry.shape for name, entry in entries}
        self.precisions = {name: PRECISIONS.get(FLOATS.get(entry.dtype), "fp32") for name, entry in entries}

    def read(self, name: str) -> Tensor:
        return self._file.read(name)

    def pieces(self, name: str) -> Iterator[Tensor]:
        return self._file.pieces(name)

    def forget(self) -> None:
        pass


class Pickled:
    """One file of torch.save: a dictionary of tensors."""

    def __init__(self, path: Path):
        self.path = path
        self._content: dict[str, Tensor] | None = None
        with open_regular(path) as file:
            self._mapped = zipfile.is_zipfile(file)  # what torch before 1.6 wrote cannot be, and is held in memory
        tensors = self._tensors().items()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors}
        self.precisions = {name: PRECISIONS.get(tensor.dtype, "fp32") for name, tensor in tensors}
        self.forget()

    def read(self, name: str) -> Tensor:
        tensor = self._tensors()[name]
        if not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
            raise InputError(f"{self.path}: wanted {name} in fp64, fp32, fp16 or bf16, got {tensor.dtype}")
        return tensor.to(torch.float32).contiguous()

    def pieces(self, name: str) -> Iterator[Tensor]:
        yield from self.read(name).view(-1).split(PIECE)

    def forget(self) -> None:
        if self._mapped:
            self._content = None

    def _tensors(self) -> dict[str, Tensor]:
        if self._content is None:
            self._content = self._load()
        return self._content

    def _load(self) -> dict[str, Tensor]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of pickles newer than torch's own, which it reads or refuses
                content = torch.load(self.path, map_location="cpu", weights_only=True, mmap=self._mapped)
        except MemoryError:
            raise
        except Exception as error:  # of many types: the bytes decide what goes wrong, and none of it is ours
            raise InputError(f"{self.path}: {_why(error)}") from error
        if not isinstance(content, dict):
            raise InputError(f"{self.path}: wanted a dictionary of tensors, got {type(content).__name__}")
        for name, value in content.items():
            plain = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
            if not isinstance(name, str) or not plain or value.is_quantized:
                got = type(value).__name__
                raise InputError(f"{self.path}: wanted a dictionary of tensors, got {got} for {str(name)[:80]!r}")
        return {name: value.detach() for name, value in content.items()}


def _why(error: Exception) -> str:
    """One line: torch's own also says how to have the file's functions called after all."""
    said = str(error).strip() or type(error).__name__
    asked = re.search(r"(?:Unsupported (?:global|class)|GLOBAL)[:\s]+(?:GLOBAL )?([\w.]+)", said)
    if isinstance(error, pickle.UnpicklingError):
        reason = (said.rpartition("WeightsUnpickler error:")[2].strip() or said).splitlines()[0][:120]
        got = f"one that asks for {asked[1]}" if asked else f"another ({reason})"
        return f"wanted a pickle of tensors alone, got {got}; nothing of it was run"
    return f"wanted tensors that torch saved, got a damaged file ({said.splitlines()[0][:120]})"


def _open(path: Path) -> OneFile:
    return Safetensors(path) if path.suffix == ".safetensors" else Pickled(path)


def _files(folder: Path) -> dict[Path, list[str] | None]:
    """The files that hold tensors, and what the index says that each holds; None where there is none."""
    for name in SINGLE:
        if (folder / name).exists() or (folder / name).is_symlink():
            return {folder / name: None}
        if (folder / (name + INDEX)).exists():
            return _shards(folder, folder / (name + INDEX), Path(name).suffix)
    wanted = ", ".join(f"{name} or {name}{INDEX}" for name in SINGLE)
    raise InputError(f"{folder}: wanted weights ({wanted}), got none")


def _shards(folder: Path, index: Path, suffix: str) -> dict[Path, list[str] | None]:
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise InputError(f"{index}: wanted a weight_map of tensors to files, got {type(placed).__name__}")
    found: dict[Path, list[str] | None] = {}
    for tensor, file in placed.items():
        if not isinstance(file, str) or Path(file).name != file or Path(file).suffix != suffix:
            raise InputError(f"{index}: wanted {tensor} in a {suffix} file beside the index, got {file!r}")
        found.setdefault(folder / file, []).append(tensor)
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object. Raises InputError where it is missing, damaged or none."""
    with open_regular(path) as file:
        try:
            content = json.load(file)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: wanted JSON, got a damaged file ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: wanted a JSON object, got {type(content).__name__}")
    return content
