"""Ranks that train one model: the bits of one process, one voice, and one end for all.

Ranks are threads (stream/ranks.py) where a test can do with that, and else processes that torchrun or `Runs` starts.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

import nano as nano_py
from cgpt import checkpoint, opening, placing, train
from cgpt.data.loader import Loader, train_val_split
from cgpt.data.prepare import open_corpus
from cgpt.errors import InputError
from cgpt.evaluate.loss import held_out_loss
from cgpt.launch import flags_of
from cgpt.metrics import read
from cgpt.model.init import init_parameter
from cgpt.placing import describe, place_run
from cgpt.recipe import TrainConfig, resolve
from cgpt.stream.build import build
from cgpt.stream.cores import Cores
from cgpt.stream.executor import Executor
from cgpt.stream.format import Format
from cgpt.stream.limits import Limits
from cgpt.stream.placement import Placement
from cgpt.stream.selfcheck import check_machine
from nano import NANO, Runs
from stream.ranks import ThreadWorld, on_ranks

STEP = {"batch_size": 5, "micro_batch_size": 1, "clip": 0.1}  # of 5 micro-batches: some rank has none of the last round
MB = 1 << 20


def nano(**more):
    given = {"model": "nano", "data": "corpus.txt", "steps": 4, "eval_tokens": 128, "eval_every": 2, **STEP}
    return TrainConfig(**{**given, "checkpoint_every": 50, **more})


def left(run):
    """All that a run leaves, but for its times: rows of metrics, and bytes of the newest checkpoint's tensors."""
    rows = [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in read(run)]
    path, manifest, _ = checkpoint.newest(run / "checkpoints")
    tensors = {file.name: file.read_bytes() for file in path.glob("*.safetensors")}
    return rows, manifest["step"], manifest["samples"], manifest["optimizer"], tensors


@pytest.fixture
def threads(monkeypatch):
    """Trains on so many ranks, each a thread: their summaries."""
    monkeypatch.setattr(opening, "take_cores", lambda *_: Cores((0,), (), None))  # not this process's own
    return lambda ranks, config: on_ranks(ranks, lambda world: train.train_job(opening.job_on(world, config)))


@pytest.fixture
def runs(here):
    server = Runs(here)
    yield server
    server.close()


def test_torchrun_trains_what_one_process_does(here):
    train.train(nano(out=here / "one"))
    assert all(row["grad_norm"] > STEP["clip"] for row in read(here / "one"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, nano_py.__file__, "train", *flags_of(nano(out=here / "two"))]
    path = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 0, found.stderr
    assert left(here / "two") == left(here / "one")
    assert found.stdout.count("model    nano") == found.stdout.count("sample   ") == 1
    assert re.search(r"^ranks    2 on 1 machine: cores [\d,-]+.*, 1 thread; cores", found.stdout, re.MULTILINE)
    one, two = (json.loads((here / name / "summary.json").read_text()) for name in ("one", "two"))
    same = "val_loss", "unigram_loss", "train_loss", "bits_per_byte", "val_tokens", "tokens", "skipped_steps"
    assert {name: one[name] for name in same} == {name: two[name] for name in same}


@pytest.mark.parametrize(("ranks", "where", "more"), [(2, None, {"device_memory": "12MB"}), (4, "mixed", {})])
def test_processes_that_stream_train_what_one_does_that_does_not(here, runs, ranks, where, more):
    train.train(nano(out=here / "one"))
    code, said = runs.run("train", *flags_of(nano(out=here / "several", **more)), where=where, ranks=ranks)
    assert code == 0, said
    assert re.search(rf"^ranks    {ranks} on 1 machine: ", said, re.MULTILINE)
    assert re.search(r"^placed   .*host: weights of \d layers", said, re.MULTILINE)
    assert re.search(r"^seconds  predicted / measured: step .*, wire [\d.e-]*[1-9]", said, re.MULTILINE)
    assert left(here / "several") == left(here / "one")


@pytest.mark.parametrize(
    ("ranks", "more"), [(2, {"precision": "fp16"}), (3, {"moments": "bf16", "device_memory": "24MB"})]
)
def test_ranks_that_early_steps_leave_idle_train_the_same(here, threads, ranks, more):
    more = {**more, "steps": 6, "batch_size": None, "batch_schedule": "0:1,32:4,100:7"}
    train.train(nano(out=here / "one", **{**more, "device_memory": None}))
    summaries = threads(ranks, nano(out=here / "several", **more))
    assert summaries == summaries[:1] * ranks
    assert left(here / "several") == left(here / "one")


def test_another_number_of_ranks_goes_on(here, threads):
    train.train(nano(out=here / "left", decay="constant"))
    threads(3, nano(out=here / "moved", steps=2, decay="constant"))
    threads(2, TrainConfig(out=here / "moved", resume=True, steps=4, device_memory="12MB"))
    assert left(here / "moved") == left(here / "left")


def test_a_signal_to_one_rank_stops_all_after_the_same_step(here, runs):
    config = nano(out=here / "run", steps=9)
    code, said = runs.run("train", *flags_of(config), where=None, ranks=2, kill=(1, 3))
    assert code == 128 + signal.SIGTERM, said
    assert said.count("stopped after step 3, saved; go on with: cgpt train --resume --out") == 1
    assert json.loads((here / "run" / "summary.json").read_text())["stopped_by"] == signal.SIGTERM
    assert left(here / "run")[1:3] == (3, 15)


def test_held_out_batches_are_dealt_out_and_added_in_their_order(here):
    loader = Loader(train_val_split(open_corpus("corpus.txt", progress=False), 16)[1], 16)

    def evaluate(world, at_once):
        placement = replace(Placement.resident(4, world.count), micro_batches=at_once)
        _, store = build(NANO.config, Format(), "cpu", placement=placement, world=world)
        store.initialise(lambda name, tensor: init_parameter(name, tensor, NANO.config, 0))
        found = held_out_loss(Executor(store), loader, 2)
        store.close()
        return found

    want = on_ranks(1, lambda world: evaluate(world, 1))
    assert -(-loader.n_windows // 2) == 5
    for ranks, at_once in ((2, 1), (3, 2), (4, 5), (6, 1)):  # of the last, one has no batch at all
        assert on_ranks(ranks, lambda world, n=at_once: evaluate(world, n)) == want * ranks


def exchanges_late(world, received, sent, *sizes, work=ThreadWorld.exchange):
    before = received.clone()
    work(world, received, sent, *sizes)
    if world.rank == 1:
        received.copy_(before)


def gathers_itself(world, whole, part, work=ThreadWorld.all_gather):
    work(world, whole, part.clone())
    if world.rank == 1:
        whole[: part.numel()] = part


@pytest.mark.parametrize("home", ["device", "host"])
def test_the_check_at_the_start_sees_what_is_lost_between_ranks(monkeypatch, home):
    placement = replace(Placement.resident(6, 3), state=(home,) * 6, recompute=(home == "host",) * 6)

    def check(world):
        check_machine(Format(), "cpu", placement, None, world)

    on_ranks(3, check)
    for name, fault in {"exchange": exchanges_late, "all_gather": gathers_itself}.items():
        with monkeypatch.context() as lost:
            lost.setattr(ThreadWorld, name, fault)
            with pytest.raises(
                InputError, match="self-check: wanted 3 ranks to give the bits of a model in memory, got"
            ):
                on_ranks(3, check)


def test_the_least_that_any_rank_has_places_all(here, monkeypatch):
    free = threading.local()
    monkeypatch.setattr(placing, "limits", lambda: Limits({"memory": free.bytes}))
    monkeypatch.setattr(placing, "own_memory", lambda: 0)

    def placed(world, sizes, **more):
        free.bytes = sizes[world.rank]
        return place_run(resolve(nano(placement="auto", **more)), world)

    one, *others = on_ranks(3, lambda world: placed(world, (3000 * MB, 900 * MB, 6000 * MB)))
    assert others == [one, one]
    assert (one.placement.ranks, one.placement.visits * one.placement.micro_batches) == (3, 2)
    assert one.budgets.host + one.budgets.device == 300 * MB  # a machine's memory is shared
    for found in on_ranks(2, lambda world: placed(world, (900 * MB,) * 2, host_memory="400MiB")):
        assert found.budgets.host + found.budgets.device == 200 * MB
    assert "device: weights of 4 layers" in describe(one)
    for rank, sizes in enumerate([(300 * MB, 900 * MB), (900 * MB, 300 * MB)]):
        wanted = f"rank {rank}: --host-memory: wanted at most the 300.00 MiB that are free, got 400.00 MiB"
        with pytest.raises(InputError, match=wanted):
            on_ranks(2, lambda world, sizes=sizes: placed(world, sizes, host_memory="400MiB"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "--devices: wanted at most the 5 micro-batches of a step, got 6; a larger --batch-size makes more"),
        (
            {"batch_size": 13, "micro_batch_size": 4},
            "--devices: wanted at most the 4 micro-batches of a step, got 6; --micro-batch-size 2 or less makes more",
        ),
        ({"batch_size": 6, "data": "nothing.txt"}, "rank 0: nothing.txt: "),
        ({"out": Path("corpus.txt")}, "rank 0: corpus.txt: wanted a folder for the run, got a file"),
        ({"batch_size": 6, "lr": 1e30}, "loss: wanted a finite number, got nan at step 2"),
    ],
)
def test_what_one_rank_refuses_all_refuse(here, threads, flags, message):
    heard = []

    def ask(world):
        with pytest.raises(InputError) as caught:
            train.train_job(opening.job_on(world, nano(**{"out": here / "run", **flags})))
        heard.append(str(caught.value))

    on_ranks(6, ask)
    assert heard == heard[:1] * 6
    assert message in heard[0]


def test_caches_are_made_by_one_rank_of_a_machine_before_the_others(here):
    order = []

    def work(world):
        world.local_rank, world.local_count = world.rank % 2, 2
        return opening.first_here(world, lambda: order.append(world.local_rank) or world.rank)

    assert on_ranks(4, work) == [0, 1, 2, 3]
    assert order == [0, 0, 1, 1]


def test_ranks_start_from_the_weights_of_a_run(here, threads):
    train.train(nano(out=here / "tuned"))
    start = {"model": None, "init": here / "tuned", "steps": 2}
    train.train(nano(out=here / "one", **start))
    threads(2, nano(out=here / "two", **start))
    assert left(here / "two") == left(here / "one")
