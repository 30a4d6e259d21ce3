"""Jobs one of whose ranks is killed start again, and end with the bytes that one process comes to undisturbed."""

import os
import random
import shutil
import time

import pytest

from cgpt import checkpoint
from jobs import Jobs
from nano import write_corpus
from test_crash import outcome, whole_ones

KILLS = int(os.environ.get("CGPT_TEST_KILLS", "1"))
AT_ONCE = 5  # at most, of a job
EVERY = 2
COMMON = "--model nano --data corpus.txt --steps 6 --keep 1 --eval-every 50 --eval-tokens 32".split()
COMMON += ["--checkpoint-every", str(EVERY), "--batch-size", "3", "--micro-batch-size", "1"]
# ranks, where, memory aside; the first is a save that training waits for
MODES = {"at once": (3, "host", None), "resident": (2, "resident", 2), "mixed": (2, "mixed", 1)}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crash")
    write_corpus(folder)
    return folder


@pytest.fixture(scope="module")
def jobs(here):
    server = Jobs(here)
    yield server
    server.close()


@pytest.fixture(scope="module")
def whole(here, jobs):
    """What one process comes to that nobody kills, and in how many seconds."""
    begun = time.monotonic()
    code, said, _ = jobs.run("train", *COMMON, "--out", "whole", ranks=1)
    assert code == 0, said
    return outcome(here / "whole"), time.monotonic() - begun


@pytest.fixture
def cut(here):
    yield here / "cut"
    shutil.rmtree(here / "cut", ignore_errors=True)


@pytest.mark.parametrize("mode", ["at once", "mixed"] if KILLS > 1 else ["mixed"])
def test_killed_in_the_second_save_on_either_side(jobs, whole, cut, mode):
    ranks, where, aside = MODES[mode]
    kills = [(0, "h.1.mlp.c_fc.weight on its way", 2), (1, "exp_avg/h.0.mlp.c_fc.weight sent", 1)]
    code, said, starts = jobs.run("train", *COMMON, "--out", "cut", ranks=ranks, where=where, aside=aside, kills=kills)
    assert (code, starts) == (0, 3), said
    assert said.count(f"resumed  at step {EVERY} ") == 2
    assert outcome(cut) == whole[0]
    assert sorted(os.listdir(cut / checkpoint.CHECKPOINTS)) == ["latest", "step-00000006"]


@pytest.mark.parametrize("mode", MODES if KILLS > 1 else ["resident"])
def test_killed_at_random_moments(jobs, whole, cut, mode):
    ranks, where, aside = MODES[mode]
    draw, options = random.Random(mode), {"ranks": ranks, "where": where, "aside": aside}
    wanted, seconds = whole
    deaths = 0
    while deaths < KILLS:
        shutil.rmtree(cut, ignore_errors=True)
        kills = [(draw.randrange(ranks), draw.random() * seconds) for _ in range(min(AT_ONCE, KILLS - deaths))]
        code, said, starts = jobs.run("train", *COMMON, "--out", "cut", kills=kills, **options)
        assert code == 0, said
        assert outcome(cut) == wanted
        assert whole_ones(cut / checkpoint.CHECKPOINTS) == [6]
        deaths += starts - 1
