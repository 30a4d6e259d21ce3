"""Checkpoints that are whole or absent: one safetensors file a layer, and a manifest that is written last.

    checkpoints/step-00000100/embed.safetensors      wte.weight, exp_avg/wte.weight, exp_avg_sq/wte.weight, ...
                             /h.0.safetensors ...    fp32 masters and moments under Hugging Face GPT-2's names
                             /manifest.json          step, tokens, config, sizes and sha256 of every file, of itself,
                                                     and whether there are moments or, as yet, weights alone
    checkpoints/latest                               a link, moved by rename

A save writes `step-N.tmp/`, syncs files and folder, renames, syncs the parent. So a crash or a full disk at any point
leaves the checkpoints before it as they were. An old one is renamed to `step-N.old.tmp/` before it is removed: it is
whole or absent too. Nothing is pickled. Tensors are logical ones: the split master of bf16 is joined to its exact fp32
on the way out and split again, exactly, on the way in. Both directions go layer by layer, tensor by tensor, in little
memory beyond the model's own.

Several ranks save and load together: rank 0 alone sees the files, which are those of one rank, and the others give it
their parts, or get theirs from it (sharing.py). So what N ranks have saved M resume.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cgpt.data.tokenizer import TOKENIZER, Tokenizer, gpt2, read_tokenizer
from cgpt.errors import InputError
from cgpt.files import read_signed_json, sha256_of, sync_folder, write_signed_json
from cgpt.model.gpt import GPT
from cgpt.sharing import Meeting, Source, Whole, WholeRecord
from cgpt.stream.build import build, check_device
from cgpt.stream.format import MOMENTS
from cgpt.stream.record import Record
from cgpt.stream.store import Store
from cgpt.tensor_files import write_tensors

if TYPE_CHECKING:
    from cgpt.placing import Room
    from cgpt.recipe import Recipe

FORMAT = 1
MANIFEST = "manifest.json"
LATEST = "latest"
CHECKPOINTS = "checkpoints"  # in a run folder


def save(folder: Path, source: Source, step: int, state: dict, keep: int = 2) -> Path:
    """Writes `folder`/step-N and removes all but the newest `keep`; returns its path.

    source: the store as it is, a snapshot of it, or another's weights, read as they are written. Records in a format
    that does not train have no moments, and the manifest says so. Every rank of source.world calls it; rank 0 writes.

    state: JSON values to get back on resume (tokens, data cursor, optimizer numbers, config). Raises OSError naming
    the file (full disk, read-only folder), on all ranks: the earlier checkpoints are then untouched and nothing partial
    is left.
    """
    with Meeting(source.world) as ranks:
        whole = Whole(source, ranks)
        if source.world.first:
            return Path(ranks.meet(str(_write(folder, whole, step, state, keep))))
        for index in range(len(whole.layers)):
            with whole.record(index) as record:
                for name, _ in _tensors(record):
                    failpoint(f"{name} sent")
        return Path(ranks.meet())


def _write(folder: Path, source: Whole, step: int, state: dict, keep: int) -> Path:
    """`save`, as far as the files go."""
    final = folder / f"step-{step:08d}"
    partial = final.with_name(final.name + ".tmp")
    path = partial
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_partial(folder)
        partial.mkdir()
        failpoint("folder made")
        files = {}
        for index, layer in enumerate(source.layers):
            path = partial / f"{layer.name}.safetensors"
            with source.record(index) as record:
                files[path.name] = _write_record(path, record)
                moments = record.format.training
            failpoint(f"{layer.name} written")
        path = partial / MANIFEST
        versions = {name: _version(name) for name in ("cgpt-ext", "torch", "safetensors")}
        manifest = {"format": FORMAT, "step": step, "moments": moments, "files": files, "versions": versions, **state}
        write_signed_json(path, manifest)
        failpoint("manifest written")
        path = final
        sync_folder(partial)
        failpoint("folder synced")
        if final.exists():  # a damaged one of this step, which the resumed run has come to again
            _remove(final)
            failpoint("damaged one removed")
        partial.rename(final)
        failpoint("renamed")
        sync_folder(folder)
        path = folder / LATEST
        _point_latest(folder, final.name)
        failpoint("latest moved")
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror or str(error), str(error.filename or path)) from error
        raise
    for old in [name for name in steps(folder) if _step(name) <= step][keep:]:
        with contextlib.suppress(OSError):  # the next save comes to it again
            _remove(folder / old)
        failpoint("old one removed")
    return final


def failpoint(name: str) -> None:
    """Nothing; a place where tests kill the process."""


def newest(folder: Path) -> tuple[Path, dict, list[str]]:
    """The newest checkpoint in `folder` that is whole, its manifest, and why newer ones were skipped."""
    skipped = []
    for name in steps(folder):
        try:
            return folder / name, verify(folder / name), skipped
        except InputError as error:
            skipped.append(f"skipped {error}")
    if skipped:
        raise InputError(f"{folder}: wanted a whole checkpoint, got only damaged ones: {'; '.join(skipped)}")
    raise InputError(f"{folder}: wanted a checkpoint, got none")


def open_trained(
    run: Path,
    room: Room | None = None,
    sequences: int = 1,
    batches: int = 1,
    say: Callable[[str], None] | None = None,
    cache: int = 0,
) -> tuple[Recipe, dict, GPT, Store]:
    """What `open_newest` gives but the manifest."""
    return open_newest(run, room, sequences, batches, say, cache=cache)[:4]


def open_newest(
    run: Path,
    room: Room | None = None,
    sequences: int = 1,
    batches: int = 1,
    say: Callable[[str], None] | None = None,
    precision: str | None = None,
    cache: int = 0,
) -> tuple[Recipe, dict, GPT, Store, dict]:
    """A run's (recipe, identity of its data, model, store, manifest) for reading: weights of its newest whole
    checkpoint.

    They live on the device where they fit in `room` (default: all that a CPU has free) beside the forward of
    `sequences` and `cache` bytes of keys and values, else where there is room; `batches`: the most that a walk then
    takes through a layer; `say` is told where they live; precision: of weights and activations (default: the run's),
    rounded from the fp32 masters. A model that streams is run by an Executor. The caller closes the store. Raises
    InputError, with both numbers, where no placement fits, before the checkpoint is read, which takes a few MB beside
    it.
    """
    from cgpt.placing import (  # which need tyro; saving a model that streams does not
        Room,
        describe_reading,
        place_reading,
    )
    from cgpt.recipe import read_config

    room = room or Room()
    recipe, identity = read_config(run)
    recipe = replace(recipe, precision=precision or recipe.precision)
    check_device(room.device)
    placement = place_reading(recipe, room, sequences, batches, cache).placement
    path, manifest, _ = newest(run / CHECKPOINTS)
    format = replace(recipe.format, training=False)
    model, store = build(recipe.shape, format, room.device, placement=placement, disk=room.disk)
    try:
        if say is not None and placement.streams:
            say(describe_reading(store))
        load(path, store, manifest)
    except BaseException:
        store.close()
        raise
    return recipe, identity, model, store, manifest


def open_tokenizer(run: Path, identity: dict) -> Tokenizer:
    """The vocabulary of a run whose data has this identity: the copy that the run keeps, or GPT-2's."""
    own = identity.get("vocabulary")
    return gpt2() if own is None else read_tokenizer(run / TOKENIZER, own)


def steps(folder: Path) -> list[str]:
    """Names of the checkpoints in `folder`, newest first; partial ones are not among them."""
    if not folder.is_dir():
        return []
    return sorted((p.name for p in folder.iterdir() if re.fullmatch(r"step-\d{8,}", p.name)), key=_step, reverse=True)


def _step(name: str) -> int:
    return int(name.removeprefix("step-"))


def verify(path: Path) -> dict:
    """The manifest of checkpoint `path`, once sizes and checksums of all its files hold. InputError otherwise."""
    manifest = read_signed_json(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise InputError(f"{path / MANIFEST}: wanted format {FORMAT}, got {manifest.get('format')}")
    for name, wanted in manifest["files"].items():
        file = path / name
        size = file.stat().st_size if file.is_file() else "no file"
        if size != wanted["bytes"]:
            raise InputError(f"{file}: wanted {wanted['bytes']} bytes, got {size}")
    for name, wanted in manifest["files"].items():
        found = sha256_of(path / name)
        if found != wanted["sha256"]:
            raise InputError(f"{path / name}: wanted sha256 {wanted['sha256']}, got {found}")
    return manifest


def load(path: Path, store: Store, manifest: dict) -> None:
    """Fills `store` from a verified checkpoint: masters, and moments where the store trains, zero if it has none.

    Every rank of store.world calls it; rank 0 reads. Raises InputError, on all ranks, for another model's.
    """
    with Meeting(store.world) as ranks:
        for index, layer in enumerate(store.layers):
            file = _tensors_in(path, layer.name, manifest) if store.world.first else contextlib.nullcontext()
            with file as read, store.record(index, writing=True) as record:
                for name in record.layout.names:
                    record.set_part(name, ranks.deal(record, name, name, read))
                    for kind in _moments(record):
                        there = record.view(kind, name)
                        if manifest.get("moments", True):
                            there.copy_(ranks.deal(record, name, f"{kind}/{name}", read).view(there.shape))
                        else:
                            there.zero_()
        ranks.meet()


@contextlib.contextmanager
def _tensors_in(path: Path, layer: str, manifest: dict) -> Iterator[Callable[[str], Tensor]]:
    """What reads a layer's tensors by their names in its file."""
    file = path / f"{layer}.safetensors"
    if file.name not in manifest["files"]:
        raise InputError(f"{path}: wanted a checkpoint with layer {layer}, got none")
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors.get_tensor
    except SafetensorError as error:
        raise InputError(f"{file}: wanted the tensors of layer {layer}, got {error}") from error


def remove_partial(folder: Path) -> None:
    """Removes what a killed save left behind."""
    for path in folder.glob("*.tmp"):
        with contextlib.suppress(OSError):
            path.unlink() if path.is_symlink() else shutil.rmtree(path)


def _tensors(record: WholeRecord) -> Iterator[tuple[str, Tensor]]:
    """A layer's logical tensors, fp32 on the CPU, one in memory at a time."""
    for name in record.layout.names:
        yield name, record.master(name)
        for kind in _moments(record):
            yield f"{kind}/{name}", record.moment(kind, name)


def _write_record(path: Path, record: WholeRecord) -> dict:
    """Writes a layer's safetensors file; returns its size and sha256."""

    def on_their_way() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in _tensors(record):
            failpoint(f"{name} on its way")
            yield name, tensor

    shapes = {
        key: shape
        for name, shape in zip(record.layout.names, record.layout.shapes, strict=True)
        for key in (name, *(f"{kind}/{name}" for kind in _moments(record)))
    }
    return write_tensors(path, shapes, on_their_way())


def _moments(record: Record | WholeRecord) -> tuple[str, ...]:
    return MOMENTS if record.format.training else ()


def _point_latest(folder: Path, name: str) -> None:
    link = folder / (LATEST + ".tmp")
    link.unlink(missing_ok=True)
    link.symlink_to(name)
    failpoint("link made")
    link.replace(folder / LATEST)
    sync_folder(folder)


def _remove(path: Path) -> None:
    """Removes a checkpoint: its name at once, then its files."""
    doomed = path.with_name(path.name + ".old.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    failpoint("on its way out")
    shutil.rmtree(doomed)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return torch.__version__ if package == "torch" else None
