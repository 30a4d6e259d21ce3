"""Ranks that differ in a flag, a version or their data refuse in one line, the same on each; none waits in vain."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cgpt import agreement
from cgpt.agreement import agree, data_hash, facts, together
from cgpt.data.shards import TokenDataset, open_dataset
from cgpt.errors import InputError
from cgpt.recipe import resolve
from cgpt.train_flags import TrainConfig
from cgpt.world import World


class Rank(World):
    """A rank whose others have told `told`."""

    def __init__(self, rank, told):
        self.rank, self.count, self.told = rank, len(told), told

    def tell(self, value):
        assert json.loads(json.dumps(value)) == self.told[self.rank]
        return json.loads(json.dumps(self.told))


def lines(told, ask, kind=InputError):
    """What each rank raises, told that the others have `told`."""
    found = []
    for rank, own in enumerate(told):
        with pytest.raises(kind) as caught:
            ask(Rank(rank, told), own)
        assert type(caught.value) is kind
        found.append(str(caught.value))
    return found


def test_the_first_difference_is_named_by_every_rank():
    told = [{"--lr": 0.001, "data": "a", "torch": "2.9"} for _ in range(4)]
    for rank in range(4):
        agree(Rank(rank, told), told[rank])
    told[3] = {"--lr": 0.002, "data": "b", "torch": "2.9"}
    assert lines(told, agree) == ["rank 3: --lr: wanted 0.001, which rank 0 has, got 0.002"] * 4
    told[2] = {"--lr": 0.001, "data": "a"}
    assert lines(told, agree) == ["rank 2: torch: wanted 2.9, which rank 0 has, got none"] * 4
    told[1] = {**told[0], "--resume": True}
    assert lines(told, agree) == ["rank 1: --resume: wanted none, which rank 0 has, got yes"] * 4


def test_one_process_agrees_with_itself():
    agree(World(), {"--lr": 1})


REAL = """
import os, sys
from cgpt.agreement import agree
from cgpt.distributed import open_world
rank = int(not os.fork())  # once all is imported
os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
world = open_world()
agree(world, {"data": "same"})
for again in range(2):
    try:
        agree(world, {"data": "same", "--lr": 1.5 * world.rank})
    except Exception as error:
        sys.stdout.write(f"{type(error).__name__} {error}\\n")
        sys.stdout.flush()
    if world.rank == 1:
        os._exit(9)
"""


def test_real_ranks_and_one_that_dies():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    where |= {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    command = [sys.executable, "-c", REAL]
    said = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=True, env={**os.environ, **where}
    ).stdout.splitlines()
    assert said[:2] == ["InputError rank 1: --lr: wanted 0.0, which rank 0 has, got 1.5"] * 2
    assert said[2].startswith("ConnectionError rank 0: wanted an answer of every rank, got none: ")
    assert len(said) == 3


def test_what_fails_on_one_rank_fails_on_all():
    def ask(world, own):
        return together(world, lambda: failing(own))

    def failing(own):
        if own is None:
            return "fine"
        raise InputError(own[1]) if own[0] else FileNotFoundError(2, "No such file", "x")

    assert together(Rank(0, [None, None]), lambda: "fine") == "fine"
    wanted = "rank 1: data: wanted tokens, got none"
    assert lines([None, [True, "data: wanted tokens, got none"], [False, "x: No such file"]], ask) == [wanted] * 3
    assert lines([[False, "x: No such file"], None], ask, OSError) == ["rank 0: x: No such file"] * 2
    with pytest.raises(FileNotFoundError):  # alone: as it is
        together(World(), lambda: failing([False]))
    with pytest.raises(ZeroDivisionError):  # a fault of ours is not told, but shown
        together(World(), lambda: 1 // 0)


def differing(one, other):
    assert list(one) == list(other)
    assert json.loads(json.dumps(one)) == one
    return {name for name in one if one[name] != other[name]}


def test_every_flag_is_told_but_those_of_a_machine():
    config = TrainConfig(data="text", lr=0.1, out=Path("run"))
    told = facts(config)
    assert {"cgpt-ext", "torch", "python", "files of cgpt-ext", "instruction set"} < set(told)
    assert (told["--lr"], told["--out"], told["--timeline"]) == (0.1, "run", False)
    assert differing(told, facts(replace(config, lr=0.2))) == {"--lr"}
    assert differing(told, facts(replace(config, track=("wandb",)))) == {"--track"}
    other = replace(config, device_memory="1GiB", host_memory="2GiB", disk=Path("d"), hang_timeout=9.0, devices=2)
    assert differing(told, facts(replace(other, max_restarts=1, resume=True))) == set()


def test_what_files_made_of_the_same_flags_is_told():
    config = TrainConfig()
    recipe = resolve(config)
    told = facts(config, recipe)
    assert differing(told, facts(config, replace(recipe, lr=0.5))) == {"recipe's lr"}
    assert differing(told, facts(config, replace(recipe, shape=replace(recipe.shape, n_layer=9)))) == {
        "model's n_layer"
    }
    assert differing(told, facts(config, replace(recipe, device_memory=5, disk="d"))) == set()


def test_another_state_of_the_same_version_is_seen(tmp_path, monkeypatch):
    for name in ("__init__.py", "a/b.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1")
    before = agreement.sources()
    monkeypatch.setattr(agreement, "__file__", str(tmp_path / "agreement.py"))
    one = agreement.sources()
    (tmp_path / "a/b.py").write_text("x = 2")
    two = agreement.sources()
    (tmp_path / "a/b.py").rename(tmp_path / "a/c.py")
    assert len({before, one, two, agreement.sources()}) == 4


def dataset(tokens, ends, **more):
    pieces = more.pop("pieces", 1)
    return TokenDataset("t", np.array_split(np.asarray(tokens, dtype="<u2"), pieces), np.asarray(ends), **more)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(agreement, "BLOCK", 10)
    monkeypatch.setattr(agreement, "BLOCKS", 5)


def test_data_that_differ_anywhere_have_another_hash(few):
    tokens = np.arange(50)
    told = data_hash(dataset(tokens, [20, 50]))
    assert told == data_hash(dataset(tokens, [20, 50], pieces=3)) == data_hash(dataset(tokens.astype("<u4"), [20, 50]))
    others = [dataset(np.where(tokens == i, 99, tokens), [20, 50]) for i in range(50)]
    others += [dataset(tokens, [21, 50]), dataset(tokens[:49], [20, 49]), dataset(tokens, [20, 50], vocab_size=60)]
    others += [dataset(tokens, [20, 50], eot=0), dataset(tokens, [20, 50], validation_start=np.int64(20))]
    others += [dataset(tokens, [20, 50], info={"vocabulary_hash": "x"})]
    assert len({told, *map(data_hash, others)}) == 1 + len(others)


def test_blocks_of_large_data_reach_from_end_to_end(few):
    assert list(agreement._blocks(0)) == []
    assert list(agreement._blocks(23)) == [(0, 10), (10, 20), (20, 23)]
    assert list(agreement._blocks(1000)) == [(0, 10), (247, 257), (495, 505), (742, 752), (990, 1000)]
    tokens = np.arange(1000)
    told = data_hash(dataset(tokens, [1000]))
    seen = {i for i in range(1000) if data_hash(dataset(np.where(tokens == i, 1001, tokens), [1000])) != told}
    assert seen == {i for start, stop in agreement._blocks(1000) for i in range(start, stop)}


def test_prepared_data_are_told_by_their_checksums_too(here, few):
    from cgpt.data.prepare import prepare

    prepare("corpus.txt", here / "one")
    opened = open_dataset(here / "one")
    told = data_hash(opened)
    assert told == data_hash(open_dataset(here / "one"))
    shard = opened.info["files"]["shard-00000.bin"]
    shard["sha256"] = "0" * 64
    assert data_hash(opened) != told
