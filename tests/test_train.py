import json
import math
import os
import random
import signal
import time

import pytest

from cgpt import checkpoint, opening, placing, train
from cgpt.errors import InputError
from cgpt.metrics import read
from cgpt.recipe import TrainConfig
from nano import NANO, start, write_corpus

KILLS = int(os.environ.get("CGPT_TEST_KILLS", "3"))


def nano(**more):
    return TrainConfig(
        **{"model": "nano", "data": "corpus.txt", "eval_tokens": 64, "eval_every": 50, "checkpoint_every": 3, **more}
    )


def weights(run):
    """Bytes of every tensor of the newest checkpoint."""
    path, _, _ = checkpoint.newest(run / "checkpoints")
    return path.name, {file.name: file.read_bytes() for file in path.glob("*.safetensors")}


def untimed(rows):
    return [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in rows]


def test_a_run_learns_and_leaves_all_there_is_to_read(here, capsys):
    summary = train.train(nano(steps=30, eval_every=10))
    run = here / "runs" / "nano-corpus"
    assert summary.val_loss < 8.0 < 10.7 < read(run)[0]["loss"]
    found = json.loads((run / "summary.json").read_text())
    assert found["parameters"] == NANO.config.n_params
    assert (found["steps"], found["tokens"], found["stopped_by"]) == (30, 30 * 2 * 16, None)
    assert found["val_loss"] == summary.val_loss
    assert found["tokens_per_second"] > 0 < found["model_flops_per_second"]
    rows = read(run)
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second"} <= set(rows[0])
    assert [row["step"] for row in rows if "val_loss" in row] == [10, 20, 30]
    assert rows[-1]["lr"] == pytest.approx(NANO.lr * 0.1)
    assert (run / "loss.png").stat().st_size > 1000
    out = capsys.readouterr().out
    for part in ("0.8", "parameters", "per parameter", "attention", "memory", "unigram", "sample", "--resume --out"):
        assert part in out


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_trains(here, precision):
    summary = train.train(nano(precision=precision, steps=15))
    assert math.isfinite(summary.val_loss)
    assert summary.val_loss < 10.0


def test_accumulating_equals_the_whole_batch_to_rounding(here):
    shared = {"precision": "fp32", "steps": 4, "batch_size": 6}
    whole, pieces = (train.train(nano(micro_batch_size=n, out=here / f"by-{n}", **shared)) for n in (6, 2))
    assert pieces.val_loss == pytest.approx(whole.val_loss, rel=1e-6)
    assert pieces.train_loss == pytest.approx(whole.train_loss, rel=1e-6)


def test_the_batch_grows_by_its_schedule(here):
    train.train(nano(steps=6, batch_schedule="0:1,32:3"))
    assert [row["tokens"] for row in read(here / "runs" / "nano-corpus")] == [16, 32, 80, 128, 176, 224]


class Stop(Exception):
    pass


def train_until(config, step, monkeypatch):
    """Trains until `step` steps are made and dies before anything is written about the last of them."""
    one_step = train.one_step

    def dying(run):
        row = one_step(run)
        if run.step == step:
            raise Stop
        return row

    monkeypatch.setattr(train, "one_step", dying)
    with pytest.raises(Stop):
        train.train(config)
    monkeypatch.setattr(train, "one_step", one_step)


@pytest.mark.parametrize(
    ("precision", "moments"), [("bf16", "fp32"), ("fp16", "fp32"), ("fp32", "fp32"), ("bf16", "bf16")]
)
def test_a_resumed_run_ends_with_the_same_bytes(here, monkeypatch, precision, moments):
    shared = {"steps": 9, "batch_size": 3, "micro_batch_size": 2, "eval_every": 4}
    shared |= {"precision": precision, "moments": moments}
    train.train(nano(out=here / "whole", **shared))
    train_until(nano(out=here / "cut", **shared), 2, monkeypatch)  # before any checkpoint
    train_until(TrainConfig(resume=True, out=here / "cut"), 5, monkeypatch)
    train_until(TrainConfig(resume=True, out=here / "cut"), 8, monkeypatch)
    train.train(TrainConfig(resume=True, out=here / "cut"))
    assert weights(here / "cut") == weights(here / "whole")
    assert untimed(read(here / "cut")) == untimed(read(here / "whole"))


def test_a_damaged_newest_checkpoint_is_skipped_and_made_again(here, monkeypatch, capsys):
    train.train(nano(out=here / "whole", steps=9))
    train_until(nano(out=here / "cut", steps=9), 8, monkeypatch)
    broken = here / "cut" / "checkpoints" / "step-00000006" / "h.1.safetensors"
    os.truncate(broken, 100)
    train.train(TrainConfig(resume=True, out=here / "cut"))
    out = capsys.readouterr().out
    assert f"skipped {broken}: wanted" in out
    assert "resumed  at step 3 of 9" in out
    assert weights(here / "cut") == weights(here / "whole")


def test_a_finished_run_resumed_changes_nothing_and_may_go_further(here):
    train.train(nano(steps=6))
    run = here / "runs" / "nano-corpus"
    before, rows = weights(run), read(run)
    train.train(TrainConfig(model="nano", data="corpus.txt", resume=True))
    assert (weights(run), read(run)) == (before, rows)
    assert train.train(TrainConfig(resume=True, out=run, steps=8)).steps == 8


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(here, monkeypatch):
    gradients = opening.Executor.gradients

    def poisoned(self, visits, loss_scale=1.0, **more):
        found = gradients(self, visits, loss_scale, **more)
        poisoned.calls += 1
        if poisoned.calls == 5:
            found.loss = math.nan
        return found

    poisoned.calls = 0
    monkeypatch.setattr(opening.Executor, "gradients", poisoned)
    with pytest.raises(InputError, match=r"loss: wanted a finite number, got nan at step 5 .*step-00000003"):
        train.train(nano())
    run = here / "runs" / "nano-corpus"
    assert checkpoint.newest(run / "checkpoints")[0].name == "step-00000003"
    assert read(run)[-1]["step"] == 4


def test_an_overflowing_step_is_skipped_counted_and_shown(here, monkeypatch, capsys):
    gradients = opening.Executor.gradients

    def overflowing(self, visits, loss_scale=1.0, **more):
        found = gradients(self, visits, loss_scale, **more)
        overflowing.scales.append(loss_scale)
        if len(overflowing.scales) == 1:
            found.norm = math.inf
        return found

    overflowing.scales = []
    monkeypatch.setattr(opening.Executor, "gradients", overflowing)
    summary = train.train(nano(precision="fp16", steps=2))
    assert overflowing.scales[1] == overflowing.scales[0] / 2
    rows = read(here / "runs" / "nano-corpus")
    assert rows[0]["grad_norm"] is None
    assert 0.1 < rows[1]["grad_norm"] < 100  # of the loss, not of the scaled loss
    assert summary.skipped_steps == 1
    assert "skipped: its gradient is not finite" in capsys.readouterr().out


def test_folders_are_never_overwritten(here):
    for _ in range(2):
        train.train(nano(steps=1))
    assert sorted(path.name for path in (here / "runs").iterdir()) == ["nano-corpus", "nano-corpus-2"]
    with pytest.raises(InputError, match="wanted a new or empty folder, got one in use"):
        train.train(nano(out=here / "runs" / "nano-corpus"))
    assert train.train(nano(resume=True, steps=2)).checkpoint.startswith("runs/nano-corpus-2/")


def test_a_resumed_run_keeps_its_recipe_and_its_data(here):
    train.train(nano(steps=2, lr=0.01))
    with pytest.raises(InputError, match=r"--lr: the run in runs/nano-corpus has 0.01, got 0.02"):
        train.train(nano(resume=True, lr=0.02))
    with pytest.raises(InputError, match="--steps: wanted at least the 2 that"):
        train.train(nano(resume=True, steps=1))
    write_corpus(here, words=2000)
    with pytest.raises(InputError, match="wanted the run's data"):
        train.train(nano(resume=True))


def test_a_disk_that_fills_names_what_is_left(here, monkeypatch):
    save = checkpoint.save

    def full(folder, store, step, *rest):
        if step > 3:
            raise OSError(28, "No space left on device", str(folder / "step-00000006.tmp" / "embed.safetensors"))
        return save(folder, store, step, *rest)

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(OSError, match=r"No space left on device; last good checkpoint: .*step-00000003"):
        train.train(nano())
    assert checkpoint.newest(here / "runs" / "nano-corpus" / "checkpoints")[0].name == "step-00000003"


@pytest.fixture
def slow_disk(monkeypatch):
    """Saves that take many steps; the names of the points that they have come to."""
    passed = []

    def wait(name):
        passed.append(name)
        time.sleep(0.1 if name.endswith("written") else 0)

    monkeypatch.setattr(checkpoint, "failpoint", wait)
    monkeypatch.setattr(placing, "ASIDE", 100)
    return passed


def test_training_goes_on_while_a_checkpoint_is_written(here, monkeypatch, slow_disk):
    saved = {}
    one_step = train.one_step

    def noting(run):
        saved[run.step] = run.checkpoints.saving is not None, run.checkpoints.newest and run.checkpoints.newest.name
        return one_step(run)

    monkeypatch.setattr(train, "one_step", noting)
    summary = train.train(nano(steps=7))
    assert saved[2] == (False, None)
    assert saved[4] == saved[5] == (True, None)  # of step 3, and not whole yet
    assert saved[6] == (True, "step-00000003")  # the one of step 6 has waited for it
    assert summary.checkpoint.endswith("step-00000007")
    monkeypatch.setattr(placing, "ASIDE", None)
    train.train(nano(steps=7, out=here / "at once"))
    assert weights(here / "at once") == weights(here / "runs" / "nano-corpus")
    for name in ("step-00000006", "step-00000007"):
        assert checkpoint.verify(here / "runs" / "nano-corpus" / "checkpoints" / name)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_leaves_only_once_the_checkpoint_is_whole(here, monkeypatch, slow_disk, error):
    one_step = train.one_step

    def failing(run):
        if run.step == 4:
            assert run.checkpoints.saving is not None
            raise error
        return one_step(run)

    monkeypatch.setattr(train, "one_step", failing)
    with pytest.raises(error):
        train.train(nano())
    assert slow_disk[-1] == "latest moved"
    _, manifest, skipped = checkpoint.newest(here / "runs" / "nano-corpus" / "checkpoints")
    assert (manifest["step"], skipped) == (3, [])


def test_an_error_and_a_save_that_fails_are_both_told(here, monkeypatch, slow_disk, capsys):
    def full(name):
        time.sleep(0.1)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "failpoint", full)
    one_step = train.one_step

    def failing(run):
        if run.step == 3:
            raise ValueError("of its own")
        return one_step(run)

    monkeypatch.setattr(train, "one_step", failing)
    with pytest.raises(ValueError, match="of its own"):
        train.train(nano())
    assert "checkpoint not saved: [Errno 28] No space left on device; last good" in capsys.readouterr().out


COMMON = "--model nano --data corpus.txt --steps 40 --checkpoint-every 4 --eval-every 20 --eval-tokens 64".split()


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)


def test_killed_at_random_moments_a_run_ends_with_the_same_bytes(here):
    whole = start("train", *COMMON, "--out", "whole", cwd=here)
    assert whole.communicate()[1] == ""
    assert whole.returncode == 0
    draw = random.Random(5)
    process = start("train", *COMMON, "--out", "cut", cwd=here)
    for step in sorted(draw.sample(range(1, 36), KILLS)):
        wait_for(lambda step=step: len(read(here / "cut")) >= step, process)
        time.sleep(draw.random() * 0.02)  # in the middle of a step, or of a checkpoint
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        process = start("train", "--resume", "--out", "cut", cwd=here)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert weights(here / "cut") == weights(here / "whole")
    assert untimed(read(here / "cut")) == untimed(read(here / "whole"))


def test_one_process_has_a_run_until_it_ends(here):
    process = start("train", *COMMON, "--steps", "100000", "--out", "run", cwd=here)
    wait_for((here / "run" / "checkpoints" / "latest").exists, process)
    before = read(here / "run")
    for config in (nano(resume=True, out=here / "run"), nano(resume=True, out=here / "run", steps=200_000)):
        with pytest.raises(InputError) as refused:
            train.train(config)
        wanted = f"wanted a run that nobody is training, got one that process {process.pid} has"
        assert str(refused.value) == f"{here / 'run'}: {wanted}"
    process.kill()
    process.communicate()
    assert read(here / "run")[: len(before)] == before  # nothing of the run was touched
    steps = checkpoint.newest(here / "run" / "checkpoints")[1]["step"]
    assert train.train(TrainConfig(resume=True, out=here / "run", steps=steps + 1)).steps == steps + 1


def test_a_run_that_could_not_be_opened_is_nobodys(here):
    train.train(nano(steps=2))
    with pytest.raises(InputError, match="--steps: wanted at least the 2 that") as kept:  # its traceback holds frames
        train.train(nano(resume=True, steps=1))
    assert train.train(nano(resume=True, steps=3)).steps == 3
    assert kept


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(here, number):
    process = start("train", *COMMON, "--steps", "100000", "--out", "run", cwd=here)
    wait_for((here / "run" / "checkpoints" / "latest").exists, process)
    process.send_signal(number)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (128 + number, "")
    _, manifest, _ = checkpoint.newest(here / "run" / "checkpoints")
    assert read(here / "run")[-1]["step"] == manifest["step"]
    assert f"stopped after step {manifest['step']}, saved; go on with: cgpt train --resume --out run" in out
    assert json.loads((here / "run" / "summary.json").read_text())["stopped_by"] == number


def test_a_signal_during_a_save_is_not_lost(here, monkeypatch):
    save = train.save

    def interrupted(run, seconds):
        save(run, seconds)
        if run.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train, "save", interrupted)
    summary = train.train(nano(steps=9))
    assert (summary.steps, summary.stopped_by, summary.val_loss) == (4, signal.SIGTERM, None)
    assert checkpoint.newest(here / "runs" / "nano-corpus" / "checkpoints")[0].name == "step-00000004"
