"""What a training run is asked for, and what it consists of while it runs: opened here, checked in the order of cost.

What can be refused is refused before a new run's folder is made. A resumed run is taken to its newest whole checkpoint.

Of several ranks the first one decides what the run is, has its folder, and speaks; what keeps any of them from training
is raised on all.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TextIO, TypeVar

import torch

from cgpt import checkpoint, console, heap
from cgpt.agreement import agree, data_hash, together
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
from cgpt.stream.build import build, check_device
from cgpt.stream.cores import Cores, settle_threads, take_cores
from cgpt.stream.devices import open_device
from cgpt.stream.executor import Executor
from cgpt.stream.optimizer import AdamW
from cgpt.stream.probe import probe
from cgpt.stream.selfcheck import check_machine
from cgpt.stream.store import Store
from cgpt.stream.timeline import Timeline
from cgpt.tracking import Tracked, tracked
from cgpt.watchdog import patience
from cgpt.world import World
from cgpt_ext import dispatch

Result = TypeVar("Result")


@dataclass(frozen=True)
class Job:
    """A run to be trained. identity: of the data that a run which is resumed was begun on; None begins a new one.
    world: who trains it. patience: seconds without any progress after which they give up, 0 for none."""

    recipe: Recipe
    folder: Path
    identity: dict | None = None
    timeline: bool = False
    tracked: Tracked = field(default_factory=Tracked)
    world: World = field(default_factory=World)
    patience: float = 0.0


def device_of(config: TrainConfig) -> str:
    """Where `config` asks to train, before all else is known: ranks cannot talk without. Raises as `job_of`."""
    if config.device is None and config.resume:
        return read_resumed(resumed_folder(config))[0].device
    return resolve(config).device


def job_on(world: World, config: TrainConfig) -> Job:
    """What rank 0's `config` asks for, on every rank: no other looks at folders of runs, whose number may be taken by
    then. Raises as `job_of`."""
    job = together(world, lambda: job_of(config) if world.first else None)
    told = world.from_first(job and [job.recipe.to_dict(), str(job.folder), job.identity, asdict(job.tracked)])
    if job is None:
        recipe, folder, identity, kept = told
        followed = Tracked(**{**kept, "names": tuple(kept["names"])})
        job = Job(Recipe.from_dict(recipe), Path(folder), identity, config.timeline, followed)
    return replace(job, world=world, patience=patience(config.hang_timeout, world.count))


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

    While rank 0's `lock` is open, no other process can take the run's folder. say: tells people, on rank 0 alone.
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
    say: console.Say
    step: int = 0
    samples: int = 0
    seconds: float = 0.0


def open_run(job: Job) -> Run:
    """Everything a run needs, checked in the order of cost; a new run's folder is made only once all of it holds."""
    recipe, folder, identity, resumed = job.recipe, job.folder, job.identity, job.identity is not None
    world, say = job.world, console.say if job.world.first else console.hush
    implementations = implementations_on(recipe.device)
    placed = place_run(recipe, world)
    if not placed.streams:  # a run that streams counts on freed memory being free
        heap.keep_large_buffers()

    start = None if resumed or recipe.init is None else together(world, lambda: open_weights(recipe.init))
    watched = world.first and console.interactive()
    dataset = first_here(world, lambda: data_of(recipe, start, folder, identity, progress=watched))
    if world.count > 1:
        agree(world, {"data": identity_of(dataset), "hash of the data": data_hash(dataset)})
    train_split, val_split = train_val_split(dataset, recipe.seq_len)
    found = identity_of(dataset)
    if identity not in (None, found):
        raise InputError(f"{recipe.data}: wanted the run's data, {identity}, got {found}")
    if dataset.vocab_size > recipe.shape.vocab_size:
        raise InputError(f"{recipe.data}: wanted ids under {recipe.shape.vocab_size}, got {dataset.vocab_size}")

    cores = settle_down(world, recipe.device)  # only now: text is tokenized on all of the machine's
    if placed.streams or world.count > 1:
        check_machine(recipe.format, recipe.device, placed.placement, recipe.disk, world)
    timeline = Timeline() if job.timeline or placed.streams else None
    device = open_device(recipe.device, placed.account.needs.device, timeline=timeline)
    where = {"placement": placed.placement, "disk": recipe.disk, "world": world}
    model, store = build(recipe.shape, recipe.format, device, **where)
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
    lock = together(world, lambda: take_folder(folder) if world.first else io.StringIO())
    try:
        rates, tokens = probe(store) if placed.streams else None, recipe.micro_batch_size * recipe.seq_len
        lanes = LaneReport(store, rates, job.timeline, recipe.shape.d_model, tokens)
        checkpoints = Checkpoints(folder / checkpoint.CHECKPOINTS, store, recipe.keep)
        parts = model, store, Executor(store), optimizer, lock, lanes, checkpoints, job.tracked, say
        run = Run(recipe, folder, dataset, loader, held_out, *parts)
        if start is not None:
            together(world, lambda: world.first and start_from(start, folder, recipe, optimizer.state()))
        if resumed or start is not None:
            go_on(run)
        if run.checkpoints.newest is None:
            store.initialise(lambda name, tensor: init_parameter(name, tensor, recipe.shape, recipe.seed))
        together(world, lambda: world.first and write_run(run))
        told = f"{dataset.name}: {human(train_split.n_tokens)} tokens to train on, {human(val_split.n_tokens)} held out"
        told += f", vocabulary of {dataset.vocab_size:,}"
        ranks = describe_ranks(world, cores)
        console.report(say, recipe, store.n_parameters, told, implementations, placed.account, folder, ranks)
        if placed.streams:
            say(f"placed   {describe(placed)}")
            say(f"threads  {torch.get_num_threads()} compute, {device.optimizer_threads} AdamW's on the host")
        if resumed:
            say(f"resumed  at step {run.step} of {recipe.steps}, from {run.checkpoints.newest or 'the start'}")
    except BaseException:
        lock.close()
        raise
    return run


def go_on(run: Run) -> None:
    """Takes the run to its newest whole checkpoint, saying which were skipped; to step 0 if there is none at all.

    Rank 0 looks for it, for all.
    """
    world = run.store.world
    found = world.from_first(together(world, lambda: find_newest(run) if world.first else None))
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
        run.say(line)
    return {"path": str(path), "manifest": manifest}


def settle_down(world: World, device: str) -> Cores:
    """Takes the cores that are this rank's, and starts no more threads for arithmetic than they carry."""
    cores = take_cores(world.local_rank, world.local_count, None if device == "cpu" else world.local_rank)
    if cores.threads is not None:
        torch.set_num_threads(cores.threads)
    elif world.local_count == 1:
        settle_threads()
    return cores


def describe_ranks(world: World, cores: Cores) -> str | None:
    """How many there are, and where they work; all of them call it. None for one."""
    told = world.tell([world.local_rank, str(cores), torch.get_num_threads()])
    if len(told) == 1:
        return None
    machines = sum(local_rank == 0 for local_rank, _, _ in told)
    where = "; ".join(f"{place}, {threads} thread{'s' * (threads > 1)}" for _, place, threads in told)
    return f"{len(told)} on {machines} machine{'s' * (machines > 1)}: {where}"


def first_here(world: World, work: Callable[[], Result]) -> Result:
    """What `work` returns: each machine's first rank does it before its others, who find in caches what it has made."""
    found = together(world, lambda: work() if world.local_rank == 0 else None)
    return together(world, lambda: found if world.local_rank == 0 else work())


def take_folder(folder: Path) -> TextIO:
    """Makes a run's folder, if need be, and locks it."""
    folder.mkdir(parents=True, exist_ok=True)
    return lock_folder(folder)


def write_run(run: Run) -> None:
    """What the run can be read by, without its data too."""
    if run.dataset.vocabulary is not None:
        write_atomically(run.folder / TOKENIZER, run.dataset.tokenizer.file)
    write_config(run.folder, run.recipe, identity_of(run.dataset))


def implementations_on(device: str) -> dict[str, str]:
    """op -> implementation that serves it on `device`. Raises InputError where there is no device or no kernel."""
    check_device(device)
    try:
        return {op: dispatch.implementation(op, device) for op in dispatch.TABLE}
    except ValueError as error:
        raise InputError(f"--device: {error}") from error
