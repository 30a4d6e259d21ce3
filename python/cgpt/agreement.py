"""Ranks that would not train the same model refuse to start, each with the same line that names what differs.

    agree(world, facts(config, recipe) | {"data hash": data_hash(dataset)})
    dataset = together(world, lambda: open_corpus(...))       where one rank fails, all do, and none waits for it

Compared are versions, what the native module is built of and runs as, every flag that is not of the machine alone, and
what presets and files made of them. Nothing here is exchanged once training has begun.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

import cgpt_ext
from cgpt.data.shards import TokenDataset
from cgpt.errors import InputError
from cgpt.world import World
from cgpt_ext import _native

if TYPE_CHECKING:
    from cgpt.recipe import Recipe
    from cgpt.train_flags import TrainConfig

OF_THE_MACHINE = (  # flags that may be others on another machine; launch.py sees to the last two, rank 0 to --resume
    "device_memory", "host_memory", "disk", "hang_timeout", "resume", "devices", "max_restarts",
)  # fmt: skip
BLOCK, BLOCKS = 4096, 1024  # elements that are hashed in a row, and how often at most

Result = TypeVar("Result")


def agree(world: World, own: dict[str, Any]) -> None:
    """Compares `own`, JSON by name, with rank 0's. Where any rank's differs, every rank raises the same InputError, of
    the first difference of the first rank that has one."""
    first, *others = world.tell(own)
    for rank, theirs in enumerate(others, start=1):
        for name in dict.fromkeys([*first, *theirs]):
            wanted, got = first.get(name), theirs.get(name)
            if wanted != got:
                raise InputError(f"rank {rank}: {name}: wanted {_said(wanted)}, which rank 0 has, got {_said(got)}")


def together(world: World, work: Callable[[], Result]) -> Result:
    """What `work` returns, once it has come to an end on every rank. Where it has raised InputError or OSError on one,
    all raise it, of the first rank that did: with that rank's number in front where there are several."""
    result, raised = None, None
    try:
        result = work()
    except (InputError, OSError) as error:
        raised = error
    if world.count == 1:
        if raised is not None:
            raise raised
        return result
    told = world.tell(raised and [isinstance(raised, InputError), _line(raised)])
    for rank, said in enumerate(told):
        if said is not None:
            ours, line = said
            raise (InputError if ours else OSError)(f"rank {rank}: {line}") from raised
    return result


def facts(config: TrainConfig, recipe: Recipe | None = None) -> dict[str, Any]:
    """What has to be equal on all ranks, JSON by name: versions, flags, and the recipe that they come to, if given."""
    found = {
        "cgpt-ext": _version("cgpt-ext"),
        "torch": str(torch.__version__),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "files of cgpt-ext": sources(),
        "instruction set": _native.cpu_isa(),
    }
    if (recipe or config).device == "cuda" and torch.cuda.is_available():
        found["GPU"] = torch.cuda.get_device_name()
    asked = {field.name: getattr(config, field.name) for field in fields(config)}
    found |= {f"--{name.replace('_', '-')}": _plain(asked[name]) for name in asked if name not in OF_THE_MACHINE}
    if recipe is not None:
        values = recipe.to_dict()
        shape = values.pop("shape")
        found |= {f"recipe's {name}": values[name] for name in values if name not in OF_THE_MACHINE}
        found |= {f"model's {name}": value for name, value in shape.items()}
    return found


def data_hash(dataset: TokenDataset) -> str:
    """16 hexadecimal digits of a sha256 over what a dataset is: counts, vocabulary, ids and ends of documents.

    Of up to BLOCK * BLOCKS ids (4 Mi), and as many documents, every one is read, of more BLOCKS blocks of BLOCK, evenly
    spread from the first id to the last: a second at most, however large it is. So another corpus, another order,
    another cut or tokenizer is seen, but not a few ids altered in the midst of a larger file. A prepared dataset is
    safe from that too: the sha256 of its files, which were compared when it was opened, are hashed with it.
    """
    files = dataset.info.get("files", {})
    what = {
        "tokens": dataset.n_tokens,
        "documents": dataset.n_documents,
        "vocabulary": [dataset.vocab_size, dataset.eot, dataset.info.get("vocabulary_hash")],
        "validation": dataset.validation_start and int(dataset.validation_start),
        "files": sorted(file["sha256"] for file in files.values()),
    }
    digest = hashlib.sha256(json.dumps(what).encode())
    for start, stop in _blocks(dataset.n_tokens):
        digest.update(dataset.tokens(start, stop).astype("<u4").tobytes())
    for start, stop in _blocks(dataset.n_documents):
        digest.update(np.asarray(dataset.document_ends[start:stop]).astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def sources() -> str:
    """12 hexadecimal digits of a sha256 over the files of both packages, by which two states of one version differ."""
    digest = hashlib.sha256()
    native = Path(_native.__file__)
    for package in (Path(__file__).parent, Path(cgpt_ext.__file__).parent):
        for path in sorted({*package.rglob("*.py"), *package.glob(native.name)}):
            digest.update(f"{path.relative_to(package).as_posix()}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def _blocks(n: int) -> Iterator[tuple[int, int]]:
    """Ranges of [0, n): all of it, or BLOCKS evenly spread, the first and the last block among them."""
    spread = (i * (n - BLOCK) // (BLOCKS - 1) for i in range(BLOCKS))
    starts = range(0, n, BLOCK) if n <= BLOCK * BLOCKS else spread
    return ((start, min(start + BLOCK, n)) for start in starts)


def _line(error: BaseException) -> str:
    """An error on one line, as the command line shows it."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _said(value: Any) -> str:
    words = {None: "none", True: "yes", False: "no"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def _plain(value: Any) -> Any:
    """As JSON brings it back."""
    return json.loads(json.dumps(value, default=str))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # run from its source tree
        return None
