"""What a training run is asked for, and what it consists of while it runs: opened here, checked in the order of cost.

What can be refused is refused before a new run's folder is made. A resumed run is taken to its newest whole checkpoint.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import torch

from cgpt import checkpoint, console
from cgpt.data.loader import Loader, train_val_split
from cgpt.data.prepare import own_vocab_size
from cgpt.data.shards import TokenDataset
from cgpt.data.tokenizer import TOKENIZER
from cgpt.errors import InputError
from cgpt.evaluate.loss import identity_of
from cgpt.files import lock_folder, write_atomically
from cgpt.interchange.importing import data_of, start_from
from cgpt.interchange.weights import open_weights
from cgpt.lanes import LaneReport
from cgpt.metrics import human
from cgpt.model.gpt import GPT
from cgpt.model.init import init_parameter
from cgpt.placing import describe, place_run
from cgpt.recipe import (
    Recipe,
    TrainConfig,
    new_folder,
    read_resumed,
    resolve,
    resolve_resumed,
    resumed_folder,
    write_config,
)
from cgpt.saving import Checkpoints
from cgpt.sharing import Together
from cgpt.stream.build import build, check_device
from cgpt.stream.devices import open_device
from cgpt.stream.executor import Executor
from cgpt.stream.optimizer import AdamW
from cgpt.stream.probe import probe
from cgpt.stream.selfcheck import check_machine
from cgpt.stream.store import Store
from cgpt.stream.timeline import Timeline
from cgpt.tracking import Tracked, tracked
from cgpt_ext import dispatch


@dataclass(frozen=True)
class Job:
    """A run to be trained. identity: of the data that a run which is resumed was begun on; None begins a new one."""

    recipe: Recipe
    folder: Path
    identity: dict | None = None
    timeline: bool = False
    tracked: Tracked = field(default_factory=Tracked)


def job_of(config: TrainConfig) -> Job:
    """What `config` asks for. Raises InputError, naming the flag, where it makes no run."""
    if not config.resume:
        recipe = resolve(config, config.data and own_vocab_size(config.data))
        return Job(recipe, new_folder(config, recipe), None, config.timeline, tracked(config.track, config.project))
    folder = resumed_folder(config)
    saved, identity = read_resumed(folder)
    recipe, trackers = resolve_resumed(config, saved, folder), tracked(config.track, config.project, folder)
    return Job(recipe, folder, identity, config.timeline, trackers)


@dataclass
class Run:
    """A run in progress. `samples`, the sequences consumed so far, is the data cursor; `seconds` is past sessions'.

    While `lock` is open, no other process can take the run's folder.
    """

    recipe: Recipe
    folder: Path
    dataset: TokenDataset
    loader: Loader
    held_out: Loader
    model: GPT
    store: Store
    executor: Executor
    optimizer: AdamW
    lock: TextIO
    lanes: LaneReport
    checkpoints: Checkpoints
    tracked: Tracked
    step: int = 0
    samples: int = 0
    seconds: float = 0.0


def open_run(job: Job) -> Run:
    """Everything a run needs, checked in the order of cost; a new run's folder is made only once all of it holds."""
    recipe, folder, identity, resumed = job.recipe, job.folder, job.identity, job.identity is not None
    implementations = implementations_on(recipe.device)
    placed = place_run(recipe)
    if not placed.streams:  # a run that streams counts on freed memory being free
        keep_large_buffers()

    start = None if resumed or recipe.init is None else open_weights(recipe.init)
    dataset = data_of(recipe, start, folder, identity, progress=console.interactive())
    train_split, val_split = train_val_split(dataset, recipe.seq_len)
    found = identity_of(dataset)
    if identity not in (None, found):
        raise InputError(f"{recipe.data}: wanted the run's data, {identity}, got {found}")
    if dataset.vocab_size > recipe.shape.vocab_size:
        raise InputError(f"{recipe.data}: wanted ids under {recipe.shape.vocab_size}, got {dataset.vocab_size}")

    if placed.streams:
        check_machine(recipe.format, recipe.device, placed.placement, recipe.disk)
    timeline = Timeline() if job.timeline or placed.streams else None
    device = open_device(recipe.device, placed.account.needs.device, timeline=timeline)
    model, store = build(recipe.shape, recipe.format, device, placement=placed.placement, disk=recipe.disk)
    optimizer = AdamW(
        store,
        beta1=recipe.beta1,
        beta2=recipe.beta2,
        eps=recipe.eps,
        weight_decay=recipe.weight_decay,
        clip=recipe.clip,
        seed=recipe.seed,
        scales=recipe.shape,
    )
    loader = Loader(train_split, recipe.seq_len, recipe.seed)
    held_out = Loader(val_split, recipe.seq_len)
    folder.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(folder)
    try:
        lanes = LaneReport(store, probe(store) if placed.streams else None, job.timeline, recipe.shape.d_model)
        checkpoints = Checkpoints(folder / checkpoint.CHECKPOINTS, store, recipe.keep)
        parts = model, store, Executor(store), optimizer, lock, lanes, checkpoints, job.tracked
        run = Run(recipe, folder, dataset, loader, held_out, *parts)
        if start is not None:
            start_from(start, folder, recipe, optimizer.state(), store.world)
        if resumed or start is not None:
            go_on(run)
        if run.checkpoints.newest is None:
            store.initialise(lambda name, tensor: init_parameter(name, tensor, recipe.shape, recipe.seed))
        if dataset.vocabulary is not None:  # so that the run can be read without its data
            write_atomically(folder / TOKENIZER, dataset.tokenizer.file)
        write_config(folder, recipe, found)
        told = f"{dataset.name}: {human(train_split.n_tokens)} tokens to train on, {human(val_split.n_tokens)} held out"
        told += f", vocabulary of {dataset.vocab_size:,}"
        console.report(recipe, store.n_parameters, told, implementations, placed.account, folder)
        if placed.streams:
            console.say(f"placed   {describe(placed)}")
            console.say(f"threads  {torch.get_num_threads()} compute, {device.optimizer_threads} AdamW's on the host")
        if resumed:
            console.say(f"resumed  at step {run.step} of {recipe.steps}, from {run.checkpoints.newest or 'the start'}")
    except BaseException:
        lock.close()
        raise
    return run


def go_on(run: Run) -> None:
    """Takes the run to its newest whole checkpoint, saying which were skipped; to step 0 if there is none at all.

    Rank 0 looks for it, for all.
    """
    with Together(run.store.world) as ranks:
        found = ranks.meet(find_newest(run) if run.store.world.first else None)
    if found is None:
        return
    path, manifest = Path(found["path"]), found["manifest"]
    checkpoint.load(path, run.store, manifest)
    run.optimizer.load_state(manifest["optimizer"])
    run.step, run.samples, run.seconds = manifest["step"], manifest["samples"], manifest["seconds"]
    run.checkpoints.newest = path
    if run.step > run.recipe.steps:
        raise InputError(f"--steps: wanted at least the {run.step} that {path} has made, got {run.recipe.steps}")


def find_newest(run: Run) -> dict | None:
    """The path and manifest of the newest whole checkpoint, where there is any."""
    folder = run.folder / checkpoint.CHECKPOINTS
    checkpoint.remove_partial(folder)
    if not checkpoint.steps(folder) and run.recipe.init is None:
        return None
    path, manifest, skipped = checkpoint.newest(folder)
    for line in skipped:
        console.say(line)
    return {"path": str(path), "manifest": manifest}


def implementations_on(device: str) -> dict[str, str]:
    """op -> implementation that serves it on `device`. Raises InputError where there is no device or no kernel."""
    check_device(device)
    try:
        return {op: dispatch.implementation(op, device) for op in dispatch.TABLE}
    except ValueError as error:
        raise InputError(f"--device: {error}") from error


def keep_large_buffers() -> None:
    """Keeps glibc from giving freed buffers back to the kernel, which would zero and map them anew at every step.

    Page faults of fresh large tensors are a third of a step on a CPU: 1.36 x measured on a 2-core Zen 4. Other C
    libraries have no mallopt and are left alone.
    """
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX in malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_threshold, 32 << 20)  # the largest that glibc takes; fixes it where it else adapts
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)
