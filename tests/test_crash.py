"""Runs killed at every point of a checkpoint, and at random moments, end with the bytes of a run left alone."""

import os
import random
import shutil
import signal
import time

import pytest

from cgpt import checkpoint
from cgpt.metrics import read
from nano import Runs, write_corpus

KILLS = int(os.environ.get("CGPT_TEST_KILLS", "3"))
EVERY = 3
COMMON = "--model nano --data corpus.txt --steps 12 --keep 1 --eval-every 50 --eval-tokens 32".split()
COMMON += ["--checkpoint-every", str(EVERY)]
TENSORS = ("wte.weight", "exp_avg_sq/h.0.mlp.c_fc.weight", "exp_avg/ln_f.bias")
BEFORE = (
    "folder made",
    *(f"{name} on its way" for name in TENSORS),
    *(f"{layer} written" for layer in ("embed", "h.0", "h.1", "head")),
    "manifest written",
    "folder synced",
)
AFTER = ("renamed", "link made", "latest moved", "on its way out", "old one removed")
REMOVES = {point: point in ("on its way out", "old one removed") for point in (*BEFORE, *AFTER)}  # saves' second on
# where, memory aside; the first is a save that training waits for
MODES = {
    "at once": ("resident", None),
    "resident": ("resident", 2),
    "host": ("host", 1),
    "disk": ("disk", 0),
    "mixed": ("mixed", 1),
}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crash")
    write_corpus(folder)
    return folder


@pytest.fixture(scope="module")
def runs(here):
    server = Runs(here)
    yield server
    server.close()


@pytest.fixture(scope="module")
def whole(here, runs):
    """What a run that nobody killed comes to."""
    code, said = runs.run("train", *COMMON, "--out", "whole")
    assert code == 0, said
    return outcome(here / "whole")


def outcome(run):
    path, manifest, skipped = checkpoint.newest(run / checkpoint.CHECKPOINTS)
    rows = [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in read(run)]
    return manifest["step"], {file.name: file.read_bytes() for file in path.glob("*.safetensors")}, rows, skipped


def whole_ones(folder):
    """Steps of the checkpoints in `folder`, every one of which must be whole."""
    return [checkpoint.verify(folder / name)["step"] for name in checkpoint.steps(folder)]


@pytest.fixture
def cut(here):
    yield here / "cut"
    shutil.rmtree(here / "cut", ignore_errors=True)


@pytest.mark.parametrize(
    ("mode", "point"),
    [(mode, point) for mode in ("at once", "mixed") for point in (*BEFORE, *AFTER)]
    + [(mode, point) for mode in ("resident", "host", "disk") for point in (BEFORE[2], "renamed")],
)
def test_killed_at_a_point_of_the_second_save(here, runs, whole, cut, mode, point):
    where, aside = MODES[mode]
    code, said = runs.run("train", *COMMON, "--out", "cut", where=where, aside=aside, kill=(point, 2 - REMOVES[point]))
    assert code == -signal.SIGKILL, said
    left = whole_ones(cut / checkpoint.CHECKPOINTS)
    assert (cut / checkpoint.CHECKPOINTS / checkpoint.LATEST).resolve().is_dir()
    if point in BEFORE:
        assert left == [EVERY]
    else:
        assert left == ([2 * EVERY] if REMOVES[point] else [2 * EVERY, EVERY])
    code, said = runs.run("train", "--resume", "--out", "cut", where=where, aside=aside)
    assert (code, "skipped" in said) == (0, False), said
    assert f"resumed  at step {left[0]} " in said
    assert outcome(cut) == whole
    assert sorted(os.listdir(cut / checkpoint.CHECKPOINTS)) == ["latest", "step-00000012"]


@pytest.mark.parametrize("point", ["damaged one removed", "on its way out", "renamed"])
def test_killed_while_a_damaged_checkpoint_is_replaced(here, runs, whole, cut, point):
    folder = cut / checkpoint.CHECKPOINTS
    code, said = runs.run("train", *COMMON, "--out", "cut", aside=2, kill=("latest moved", 2))
    assert code == -signal.SIGKILL, said
    os.truncate(folder / "step-00000006" / "h.0.safetensors", 5)
    code, said = runs.run("train", "--resume", "--out", "cut", aside=2, kill=(point, 1))
    assert code == -signal.SIGKILL, said
    assert "skipped" in said
    assert whole_ones(folder) == ([6, 3] if point == "renamed" else [3])
    code, said = runs.run("train", "--resume", "--out", "cut", aside=2)
    assert (code, "skipped" in said) == (0, False), said
    assert outcome(cut) == whole


@pytest.mark.parametrize("mode", MODES)
def test_killed_at_random_moments(here, runs, whole, cut, mode):
    where, aside = MODES[mode]
    draw = random.Random(mode)
    options = {"where": where, "aside": aside}
    begun = time.monotonic()
    assert runs.run("train", *COMMON, "--out", "cut", **options)[0] == 0
    seconds = time.monotonic() - begun
    assert outcome(cut) == whole
    shutil.rmtree(cut)
    kills = 0
    while kills < KILLS:
        before = whole_ones(cut / checkpoint.CHECKPOINTS)
        going_on = (cut / "config.json").exists()
        options["kill"] = draw.random() * seconds
        code, said = runs.run("train", *(["--resume"] if going_on else COMMON), "--out", "cut", **options)
        if code == 0:  # it was over before: another one
            assert outcome(cut) == whole
            shutil.rmtree(cut)
            continue
        assert code == -signal.SIGKILL, said
        kills += 1
        assert (whole_ones(cut / checkpoint.CHECKPOINTS) or [0])[0] >= (before or [0])[0]
    going_on, options["kill"] = (cut / "config.json").exists(), None
    code, said = runs.run("train", *(["--resume"] if going_on else COMMON), "--out", "cut", **options)
    assert code == 0, said
    assert outcome(cut) == whole
