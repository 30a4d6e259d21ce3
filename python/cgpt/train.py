"""A training run from top to bottom: open it, step through it, sum it up.

    for each step: micro-batches -> executor.gradients -> optimizer.step -> metrics, held-out loss, checkpoint

Everything a step depends on is a pure function of the recipe and one integer, the samples consumed: which text, the
learning rate, the batch size. No generator has state. So a run killed at any moment and resumed from its newest whole
checkpoint ends with the same bytes of weights as one that was left alone (on the same machine and thread count).
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import torch

from cgpt import checkpoint, console
from cgpt.data.loader import Loader, train_val_split, unigram_loss
from cgpt.data.prepare import own_vocab_size
from cgpt.data.shards import TokenDataset
from cgpt.data.tokenizer import TOKENIZER
from cgpt.errors import Diverged, InputError
from cgpt.evaluate.generate import generate
from cgpt.evaluate.loss import HeldOut, held_out_loss, identity_of, to_device, windows_within
from cgpt.files import lock_folder, write_atomically
from cgpt.interchange.importing import data_of, start_from
from cgpt.interchange.weights import open_weights
from cgpt.lanes import LaneReport
from cgpt.metrics import Metrics, Summary, human, peak_memory_bytes
from cgpt.model.gpt import GPT
from cgpt.model.init import init_parameter
from cgpt.placing import describe, place_run
from cgpt.plots import plot_loss
from cgpt.recipe import (
    Recipe,
    TrainConfig,
    batch_at,
    new_folder,
    read_resumed,
    resolve,
    resolve_resumed,
    resumed_folder,
    write_config,
)
from cgpt.saving import Checkpoints
from cgpt.scaling.flops import matmul_flops_per_token
from cgpt.schedule import learning_rate
from cgpt.stream.build import build, check_device
from cgpt.stream.devices import open_device
from cgpt.stream.executor import Batch, Executor
from cgpt.stream.optimizer import AdamW
from cgpt.stream.probe import probe
from cgpt.stream.selfcheck import check_machine
from cgpt.stream.store import Store
from cgpt.stream.timeline import Timeline
from cgpt.tracking import Tracked, Tracking, tracked
from cgpt_ext import dispatch

SAMPLE_PROMPT = 16  # tokens of held-out text that the sample at the end continues
SAMPLE_TOKENS = 64


def train(config: TrainConfig) -> Summary:
    """Trains as `config` asks; returns what also stands in the run folder's summary.json.

    SIGINT and SIGTERM finish the step, save, and return with `stopped_by`. Raises InputError for what a user can
    mend, a loss that is not finite among it, and OSError for files; the newest whole checkpoint then stays.
    """
    return train_job(job_of(config))


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


def train_job(job: Job) -> Summary:
    """`train`, of a recipe that need not have come from the command line."""
    run = open_run(job)
    with closing(run.lock), closing(run.store):
        return to_the_end(run)


def to_the_end(run: Run) -> Summary:
    """Takes the steps that are left, or as many as a signal lets it, and sums up."""
    recipe = run.recipe
    windows = windows_within(run.held_out, recipe.eval_tokens)
    unigram = unigram_loss(run.loader, run.held_out, windows)
    told = f"{unigram:.4f} nats a token on {human(windows * recipe.seq_len)} held-out tokens"
    console.say(f"unigram  {told}: the baseline")

    flops = matmul_flops_per_token(recipe.shape, recipe.seq_len)
    metrics = Metrics(run.folder, run.step)
    tracking = Tracking(run.tracked, run.folder, recipe.to_dict(), run.step, metrics.furthest, console.say)
    live = console.Live(recipe.steps, run.step, flops)
    began = time.monotonic()
    evaluation: HeldOut | None = None
    saving = run.checkpoints.to_the_end(console.say)
    with closing(metrics), closing(tracking), closing(live), stop_signals() as stop, saving:
        while run.step < recipe.steps:
            row = one_step(run)
            if run.step % recipe.eval_every == 0 or run.step == recipe.steps:
                evaluation = evaluate(run)
                row |= {"val_loss": evaluation.loss, "val_bits_per_byte": evaluation.bits_per_byte}
            metrics.append(row)
            tracking.log(row)
            live.step(row)
            stopping = bool(stop)  # looked at once: a signal from here on is the next step's
            run.checkpoints.notice()
            if run.step % recipe.checkpoint_every == 0 or run.step == recipe.steps or stopping:
                save(run, run.seconds + time.monotonic() - began)
            if stopping:
                break
        run.checkpoints.finish()

    finished = run.step == recipe.steps
    if finished and evaluation is None:  # resumed at its end
        evaluation = evaluate(run)
    speed = metrics.tokens_per_second()
    summary = Summary(
        model=recipe.model,
        data=recipe.data,
        parameters=run.store.n_parameters,
        steps=run.step,
        tokens=run.samples * recipe.seq_len,
        seconds=run.seconds + time.monotonic() - began,
        train_loss=metrics.train_loss(),
        val_loss=evaluation and evaluation.loss,
        unigram_loss=unigram,
        bits_per_byte=evaluation and evaluation.bits_per_byte,
        val_tokens=windows * recipe.seq_len,
        tokens_per_second=speed,
        model_flops_per_second=speed and speed * flops,
        peak_memory_bytes=peak_memory_bytes(recipe.device),
        skipped_steps=run.optimizer.skipped,
        stopped_by=None if finished else stop[0],
        checkpoint=run.checkpoints.newest and str(run.checkpoints.newest),
    )
    summary.write(run.folder)
    picture = plot_loss(run.folder, metrics.rows, unigram, f"{recipe.model} on {recipe.data}")
    if summary.stopped_by:
        console.say(f"stopped after step {run.step}, saved; go on with: {resume_command(run.folder)}")
        return summary
    console.show_summary(summary)
    console.say(f"sample   {sample(run)}")
    for line in run.lanes.lines():
        console.say(line)
    if run.lanes.wanted:
        console.say(f"lanes    {', '.join(map(str, run.lanes.write(run.folder)))}")
    console.say(f"{picture}; checkpoint {run.checkpoints.newest}; resume with: {resume_command(run.folder)}")
    return summary


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
            start_from(start, folder, recipe, optimizer.state())
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
    """Takes the run to its newest whole checkpoint, saying which were skipped; to step 0 if there is none at all."""
    folder = run.folder / checkpoint.CHECKPOINTS
    checkpoint.remove_partial(folder)
    if not checkpoint.steps(folder) and run.recipe.init is None:
        return
    path, manifest, skipped = checkpoint.newest(folder)
    for line in skipped:
        console.say(line)
    checkpoint.load(path, run.store, manifest)
    run.optimizer.load_state(manifest["optimizer"])
    run.step, run.samples, run.seconds = manifest["step"], manifest["samples"], manifest["seconds"]
    run.checkpoints.newest = path
    if run.step > run.recipe.steps:
        raise InputError(f"--steps: wanted at least the {run.step} that {path} has made, got {run.recipe.steps}")


def one_step(run: Run) -> dict:
    """Moves the run one optimizer step on; returns its row of metrics. Raises Diverged for a loss not finite."""
    recipe, began = run.recipe, time.perf_counter()
    size = batch_at(recipe, run.samples * recipe.seq_len)
    tokens = (run.samples + size) * recipe.seq_len
    lr = learning_rate(
        tokens,
        peak=recipe.lr,
        total_tokens=recipe.tokens,
        warmup_tokens=recipe.warmup_tokens,
        decay=recipe.decay,
        min_ratio=recipe.min_lr_ratio,
    )
    scale = run.optimizer.loss_scale
    gradients = run.executor.gradients(visits(run, size), scale)
    if not math.isfinite(gradients.loss):
        run.checkpoints.finish()
        raise Diverged(
            f"loss: wanted a finite number, got {gradients.loss} at step {run.step + 1} (lr {lr:.3g}); "
            f"last good checkpoint: {run.checkpoints.newest or 'none'}"
        )
    applied = run.optimizer.step(gradients, lr)
    run.step += 1
    run.lanes.mark(run.step, began, time.perf_counter(), size * recipe.seq_len)
    run.samples += size
    return {
        "step": run.step,
        "tokens": tokens,
        "loss": gradients.loss,
        "lr": lr,
        "grad_norm": gradients.norm / scale if applied else None,
        "tokens_per_second": size * recipe.seq_len / (time.perf_counter() - began),
    }


def visits(run: Run, size: int) -> list[list[Batch]]:
    """The step's `size` samples in micro-batches of at most micro_batch_size, as many a visit as the placement has."""
    ids, targets = to_device(run.loader.batch(run.samples, size), run.store.device)
    pieces, rows = run.recipe.micro_batch_size, run.store.placement.micro_batches
    batches = list(zip(ids.split(pieces), targets.split(pieces), strict=True))
    return [batches[start : start + rows] for start in range(0, len(batches), rows)]


def evaluate(run: Run) -> HeldOut:
    """Loss on the first eval_tokens of the held-out split."""
    return held_out_loss(run.executor, run.held_out, run.recipe.micro_batch_size, run.recipe.eval_tokens)


def save(run: Run, seconds: float) -> None:
    """Begins a checkpoint of this moment. Raises OSError."""
    state = {
        "samples": run.samples,
        "tokens": run.samples * run.recipe.seq_len,
        "seconds": seconds,
        "optimizer": run.optimizer.state(),
        "recipe": run.recipe.to_dict(),
    }
    run.checkpoints.save(run.step, state)


def sample(run: Run) -> str:
    """Held-out text's first tokens and, after a bar, how the model goes on."""
    tokenizer, seed = run.dataset.tokenizer, run.recipe.seed
    if tokenizer is None:
        return "not shown: the tokens' vocabulary is not known"
    eot, prompt = tokenizer.eot, run.held_out.split.tokens(0, min(SAMPLE_PROMPT, run.recipe.seq_len)).tolist()
    prompt = [token for token in prompt if token != eot] or [eot]
    ids = generate(run.model, prompt, SAMPLE_TOKENS, temperature=0.8, top_k=50, seed=seed, eot=eot, walk=run.executor)
    return f"{tokenizer.decode(prompt)}|{tokenizer.decode(ids)}"


def resume_command(folder: Path) -> str:
    return f"cgpt train --resume --out {folder}"


def implementations_on(device: str) -> dict[str, str]:
    """op -> implementation that serves it on `device`. Raises InputError where there is no device or no kernel."""
    check_device(device)
    try:
        return {op: dispatch.implementation(op, device) for op in dispatch.TABLE}
    except ValueError as error:
        raise InputError(f"--device: {error}") from error


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that is empty until SIGINT or SIGTERM arrives; the second signal acts as if nobody listened."""
    got: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield got
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number, _frame) -> None:
        got.append(number)
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield got
    finally:
        restore()


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
