"""A training run from top to bottom: open it, step through it, sum it up.

    for each step: micro-batches -> executor.gradients -> optimizer.step -> metrics, held-out loss, checkpoint

Everything a step depends on is a pure function of the recipe and one integer, the samples consumed: which text, the
learning rate, the batch size. No generator has state. So a run killed at any moment and resumed from its newest whole
checkpoint ends with the same bytes of weights as one that was left alone (on the same machine and thread count).

Of N ranks, rank r computes micro-batches r, r + N, r + 2N, ... of a step. Loss and norm come to the same bits on all of
them, for any N, so they take every turn alike: they stop, evaluate and save after the same step.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from cgpt import console
from cgpt.agreement import agree, facts, together
from cgpt.data.loader import unigram_loss
from cgpt.distributed import open_world
from cgpt.errors import Diverged
from cgpt.evaluate.generate import generate
from cgpt.evaluate.loss import HeldOut, held_out_loss, to_device, windows_within
from cgpt.logbook import open_logbook
from cgpt.metrics import Summary, human, peak_memory_bytes
from cgpt.opening import Job, Run, device_of, job_on, open_run
from cgpt.plots import plot_loss
from cgpt.recipe import (
    TrainConfig,
    batch_at,
)
from cgpt.scaling.flops import matmul_flops_per_token
from cgpt.schedule import learning_rate
from cgpt.stream.executor import Batch
from cgpt.watchdog import Watchdog

SAMPLE_PROMPT = 16  # tokens of held-out text that the sample at the end continues
SAMPLE_TOKENS = 64


def train(config: TrainConfig) -> Summary:
    """Trains as `config` asks; returns what also stands in the run folder's summary.json.

    As one of torchrun's processes, takes part in the job that they are. SIGINT and SIGTERM finish the step, save, and
    return with `stopped_by`. Raises InputError for what a user can mend, a loss that is not finite among it, and
    OSError for files; the newest whole checkpoint then stays.
    """
    with closing(open_world(device_of(config))) as world:
        job = job_on(world, config)
        if world.count > 1:
            agree(world, facts(config, job.recipe))
        return train_job(job)


def train_job(job: Job) -> Summary:
    """`train`, of a recipe that need not have come from the command line."""
    run = open_run(job)
    watchdog = Watchdog(run.store.lanes, job.patience, run.folder, job.world.rank)
    with closing(run.lock), closing(run.store), watchdog:
        return to_the_end(run)


def to_the_end(run: Run) -> Summary:
    """Takes the steps that are left, or as many as a signal lets it, and sums up."""
    recipe, world = run.recipe, run.store.world
    windows = windows_within(run.held_out, recipe.eval_tokens)
    unigram = world.from_first(unigram_loss(run.loader, run.held_out, windows) if world.first else None)
    told = f"{unigram:.4f} nats a token on {human(windows * recipe.seq_len)} held-out tokens"
    run.say(f"unigram  {told}: the baseline")

    began = time.monotonic()
    evaluation: HeldOut | None = None
    stops: list[int] = []
    logbook = together(world, lambda: open_logbook(run))
    with closing(logbook), stop_signals() as stop, run.checkpoints.to_the_end(run.say):
        while run.step < recipe.steps:
            row = one_step(run)
            if run.step % recipe.eval_every == 0 or run.step == recipe.steps:
                evaluation = evaluate(run)
                row |= {"val_loss": evaluation.loss, "val_bits_per_byte": evaluation.bits_per_byte}
            logbook.note(row)
            stops = [number for rank in world.tell(stop) for number in rank]  # one from here on is the next step's
            run.checkpoints.notice()
            if run.step % recipe.checkpoint_every == 0 or run.step == recipe.steps or stops:
                save(run, run.seconds + time.monotonic() - began)
            if stops:
                break
        run.checkpoints.finish()

    finished = run.step == recipe.steps
    if finished and evaluation is None:  # resumed at its end
        evaluation = evaluate(run)
    peak = max(world.tell(peak_memory_bytes(recipe.device)))

    def sum_up() -> tuple[dict, str]:
        """On rank 0, which has the metrics."""
        speed = logbook.metrics.tokens_per_second()
        summary = Summary(
            model=recipe.model,
            data=recipe.data,
            parameters=run.store.n_parameters,
            steps=run.step,
            tokens=run.samples * recipe.seq_len,
            seconds=run.seconds + time.monotonic() - began,
            train_loss=logbook.metrics.train_loss(),
            val_loss=evaluation and evaluation.loss,
            unigram_loss=unigram,
            bits_per_byte=evaluation and evaluation.bits_per_byte,
            val_tokens=windows * recipe.seq_len,
            tokens_per_second=speed,
            model_flops_per_second=speed and speed * matmul_flops_per_token(recipe.shape, recipe.seq_len),
            peak_memory_bytes=peak,
            skipped_steps=run.optimizer.skipped,
            stopped_by=None if finished else stops[0],
            checkpoint=run.checkpoints.newest and str(run.checkpoints.newest),
        )
        summary.write(run.folder)
        title = f"{recipe.model} on {recipe.data}"
        return asdict(summary), str(plot_loss(run.folder, logbook.metrics.rows, unigram, title))

    told, picture = world.from_first(together(world, lambda: sum_up() if world.first else None))
    summary = Summary(**told)
    if summary.stopped_by:
        run.say(f"stopped after step {run.step}, saved; go on with: {resume_command(run.folder)}")
        return summary
    console.show_summary(run.say, summary)
    run.say(f"sample   {sample(run)}")
    for line in run.lanes.lines():
        run.say(line)
    if run.lanes.wanted and world.first:
        run.say(f"lanes    {', '.join(map(str, run.lanes.write(run.folder)))}")
    run.say(f"{picture}; checkpoint {run.checkpoints.newest}; resume with: {resume_command(run.folder)}")
    return summary


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
    scale, count = run.optimizer.loss_scale, -(-size // recipe.micro_batch_size)
    gradients = run.executor.gradients(visits(run, size), scale, micro_batches=count, samples=size)
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


def visits(run: Run, size: int) -> list[list[Batch | None]]:
    """This rank's of the micro-batches, of at most micro_batch_size, that the step's `size` samples are cut into, as
    many a visit as the placement has. None: in the last round, where only others have one."""
    world, rows = run.store.world, run.store.placement.micro_batches
    starts = list(range(0, size, run.recipe.micro_batch_size))
    batches: list[Batch | None] = []
    for i in range(world.rank, -(-len(starts) // world.count) * world.count, world.count):
        if i >= len(starts):
            batches.append(None)
            continue
        samples = run.loader.batch(run.samples + starts[i], min(run.recipe.micro_batch_size, size - starts[i]))
        batches.append(to_device(samples, run.store.device))
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


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that is empty until SIGINT or SIGTERM arrives; the second signal acts as if nobody listened.

    On one of several ranks the same signal may come twice, from whoever ends the job and from torchrun, which passes it
    on: the second is then none.
    """
    got: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield got
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1

    def note(number, _frame) -> None:
        got.append(number)
        restore(number if several else None)

    def restore(but: int | None = None) -> None:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if number == but else handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield got
    finally:
        restore()
