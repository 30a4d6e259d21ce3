"""`cgpt train --devices`: what is started, with which flags; deaths, refusals and signals, by stand-ins for ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from cgpt import distributed, launch
from cgpt.cli import main, parse
from cgpt.errors import InputError
from cgpt.train import stop_signals
from cgpt.train_flags import TrainConfig

RANK = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "TORCHELASTIC_MAX_RESTARTS": "3"}


def test_flags_come_back_as_they_were():
    asked = TrainConfig(
        model="111M", data="-odd name.txt", lr=1e-4, clip=0.0, seed=0, embedding_norm=True, out=Path("a b/run"),
        track=("tensorboard", "wandb"), devices=4, hang_timeout=0.5, max_restarts=0, device_memory="4GiB",
    )  # fmt: skip
    assert parse(["train", *launch.flags_of(asked)]) == asked
    assert launch.flags_of(TrainConfig()) == []


def test_one_device_starts_nothing():
    for devices in (None, 1):
        assert not launch.starts(TrainConfig(devices=devices), {})
    assert launch.starts(TrainConfig(devices=2, max_restarts=0), {})
    for name in ("RANK", "WORLD_SIZE"):
        assert not launch.starts(TrainConfig(devices=2), {name: "1"})
    with pytest.raises(InputError, match="--max-restarts: wanted --devices with it, got none"):
        launch.starts(TrainConfig(max_restarts=2), {})


def test_a_rank_trains_what_torchrun_was_asked_for(tmp_path):
    config = TrainConfig(out=tmp_path / "run")
    assert launch.joined(config, {}) is config
    for same in (config, replace(config, devices=4, max_restarts=3)):
        assert launch.joined(same, RANK) == same
    with pytest.raises(InputError, match="--devices: wanted none, or 4 as torchrun was asked for, got 2"):
        launch.joined(replace(config, devices=2), RANK)
    with pytest.raises(InputError, match="--max-restarts: wanted none, or 3 as torchrun was asked for, got 0"):
        launch.joined(replace(config, max_restarts=0), RANK)
    with pytest.raises(InputError, match="--out: wanted a folder, so that torchrun's restarts find the run, got none"):
        launch.joined(TrainConfig(), RANK)
    assert launch.joined(TrainConfig(resume=True), RANK).resume
    assert launch.joined(TrainConfig(), {**RANK, "TORCHELASTIC_MAX_RESTARTS": "0"}) == TrainConfig()


def test_only_a_run_that_this_job_began_is_gone_on_with(tmp_path):
    config, rank = TrainConfig(out=tmp_path), {**RANK, "TORCHELASTIC_RUN_ID": "x"}
    assert not launch.joined(config, rank).resume
    run = tmp_path / "config.json"
    run.write_text("{}")
    assert launch.joined(config, rank) == replace(config, resume=True)
    assert not launch.joined(config, RANK).resume  # nobody starts such a rank again
    assert not launch.joined(config, {}).resume
    os.utime(run, (1e9, 1e9))  # older than whoever started this session
    assert not launch.joined(config, rank).resume


def test_restarts_are_counted_by_torchrun():
    assert [launch.restarted(RANK | more) for more in ({}, {"TORCHELASTIC_RESTART_COUNT": "2"})] == [0, 2]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("--devices 0", "--devices: wanted a number above 0, got 0"),
        ("--devices 2 --lr -1", "--lr: wanted a number above 0, got -1.0"),
        ("--devices 2 --hang-timeout -1", "--hang-timeout: wanted a number of at least 0, got -1.0"),
        ("--devices 2 --max-restarts -1", "--max-restarts: wanted a number of at least 0, got -1"),
        ("--devices 2 --out corpus.txt", "corpus.txt: wanted a folder for the run, got a file"),
        ("--devices 2 --resume", "runs/tiny-moby-dick: wanted a run to resume, got none"),
    ],
)
def test_flags_are_refused_before_anything_is_started(here, capsys, words, wanted):
    assert main(["train", *words.split()]) == 2
    assert capsys.readouterr().err == f"cgpt: {wanted}\n"


def test_several_ranks_may_share_a_gpu_and_say_so(capsys):
    launch._count_gpus(2, 2)
    assert capsys.readouterr().out == ""
    launch._count_gpus(2, 1)
    assert capsys.readouterr().out == "devices  2 processes share 1 GPU, and exchange through host memory\n"
    with pytest.raises(InputError, match="--devices: wanted GPUs for 2, got a machine where torch finds none"):
        launch._count_gpus(2, 0)


@pytest.mark.parametrize(("ranks", "wanted"), [("1", [signal.SIGINT, "interrupted"]), ("2", [signal.SIGINT])])
def test_the_same_signal_twice_is_one_on_a_rank(monkeypatch, ranks, wanted):
    monkeypatch.setenv("WORLD_SIZE", ranks)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    seen = []
    try:
        with stop_signals() as got:
            os.kill(os.getpid(), signal.SIGINT)
            seen += got
            os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        seen.append("interrupted")
    finally:
        assert signal.signal(signal.SIGINT, before) is signal.default_int_handler
    assert seen == wanted


def test_another_signal_is_heeded_on_a_rank(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("now"))
    try:
        with stop_signals() as got:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (got, heard) == ([signal.SIGINT], ["now"])


def test_ranks_that_are_started_again_do_not_meet_their_predecessors(monkeypatch):
    monkeypatch.setattr(distributed, "ANSWER", timedelta(seconds=0.2))
    store, names = dist.HashStore(), []

    def start(rank):
        time.sleep(0.3 * (rank == 0))  # the others find what the last rank 0 has left
        met = distributed.own_store(store, rank, 3)
        met.set(f"address of {rank}", f"{turn}")
        names.append([met.get(f"address of {other}").decode() for other in range(3)])

    for turn in range(3):
        names.clear()
        with ThreadPoolExecutor() as ranks:
            list(ranks.map(start, range(3)))
        assert names == [[f"{turn}"] * 3] * 3


STAND_IN = """#!{python}
import json, os, signal, sys, time
from pathlib import Path
from cgpt import cli, launch
config = launch.joined(cli.parse(sys.argv[sys.argv.index("train"):]))
rank, attempt = os.environ["RANK"], launch.restarted()
said = {{"pid": os.getpid(), "agent": launch.launcher(), "resume": config.resume, "out": str(config.out),
        "omp": os.environ["OMP_NUM_THREADS"], "words": sys.argv[1:4]}}
Path(f"said-{{rank}}-{{attempt}}").write_text(json.dumps(said))
"""

DIES_ONCE_THEN_WAITS = """
got = []
signal.signal(signal.SIGINT, lambda number, _: got.append(number))
if attempt == 0 and rank == "0":
    config.out.mkdir(parents=True)
    (config.out / "config.json").write_text("{}")
if attempt == 0 and rank == "1":
    while not (config.out / "config.json").exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
Path(f"ready-{rank}-{attempt}").touch()
while not got:
    time.sleep(0.01)
time.sleep(0.5)  # a step to finish
Path(f"saved-{rank}").touch()
sys.exit(130)
"""

REFUSES = """
sys.stderr.write(f"cgpt: rank {rank} refuses\\n")
launch.give_up()
time.sleep(0 if rank == "0" else 0.3)
sys.exit(2)
"""


def begin(folder: Path, does: str, *words: str) -> subprocess.Popen:
    """`cgpt train --devices 2` whose ranks do as `does` says."""
    stand_in = folder / "stand_in"
    stand_in.write_text(STAND_IN.format(python=sys.executable) + does)
    stand_in.chmod(0o755)
    environment = {**os.environ, "PYTHON_EXEC": str(stand_in)}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    environment.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, "-m", "cgpt", "train", "--devices", "2", *words]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def until(done, process, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not done():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_death_brings_the_job_back_and_ctrl_c_lets_it_save(tmp_path):
    process = begin(tmp_path, DIES_ONCE_THEN_WAITS)
    try:
        until(lambda: all((tmp_path / f"ready-{rank}-1").exists() for rank in (0, 1)), process)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGINT, errors
    assert "Traceback" not in errors
    assert all((tmp_path / f"saved-{rank}").exists() for rank in (0, 1))
    for attempt, resumes in ((0, False), (1, True)):
        said = json.loads((tmp_path / f"said-0-{attempt}").read_text())
        assert (said["resume"], said["out"]) == (resumes, "runs/tiny-moby-dick")
        assert (said["agent"], said["words"]) == (process.pid, ["-u", "-m", "cgpt"])
        assert int(said["omp"]) == max(1, len(os.sched_getaffinity(0)) // 2)


def test_what_a_rank_refuses_is_not_tried_again(tmp_path):
    process = begin(tmp_path, REFUSES, "--out", "run")
    out, errors = process.communicate(timeout=30)
    assert (process.returncode, out) == (2, ""), errors
    said = sorted(line for line in errors.splitlines() if line.startswith("cgpt: "))
    assert said == ["cgpt: rank 0 refuses", "cgpt: rank 1 refuses"]
    assert "Traceback" not in errors
    assert not list(tmp_path.glob("said-*-1"))
