"""What N ranks save is what one saves, and M ranks go on from it bit for bit; an error of one is an error of all."""

import errno
import hashlib
import os
import shutil
import threading
import time
from dataclasses import replace

import pytest
import torch
from ranks import ThreadWorld, on_ranks
from torch.multiprocessing.reductions import StorageWeakRef
from toy import DEPTH, Plain, batches, layers

from cgpt import checkpoint
from cgpt.errors import InputError
from cgpt.saving import Checkpoints
from cgpt.sharing import Meeting
from cgpt.stream.devices import CpuDevice
from cgpt.stream.executor import Executor
from cgpt.stream.format import Format
from cgpt.stream.needs import disk_bytes, needs, typical_record
from cgpt.stream.optimizer import AdamW
from cgpt.stream.placement import Placement
from cgpt.stream.store import Store, plans_of

BUILDING = threading.Lock()  # torch has one generator for all threads
COUNT, WIDTH = DEPTH + 2, 48  # wide enough for shards that end within a parameter, and for ranks that have none of one
SIZES = (2, 1, 3)  # of a step's micro-batches
HOMES = {
    "resident": (("device",) * COUNT, ("device",) * COUNT),
    "host": (("host",) * COUNT, ("host",) * COUNT),
    "disk": (("disk",) * COUNT, ("disk",) * COUNT),
    "mixed": (("device", "device", "host", "host", "disk"), ("device", "host", "host", "disk", "disk")),
}


class Run:
    """A toy in training on one rank; every step is a function of its number."""

    def __init__(self, world, folder, where="resident", aside=None, format=None):
        weights, state = HOMES[where]
        self.world, self.folder, self.rounds = world, folder, -(-len(SIZES) // world.count)
        placement = Placement(weights, state, (True,) * COUNT, aside=aside, ranks=world.count)
        placement = replace(placement, micro_batches=self.rounds)
        with BUILDING:
            torch.manual_seed(0)
            model = Plain(width=WIDTH)
        values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        stops, format = layers(model), format or Format()
        device = CpuDevice(needs(plans_of(stops), placement, format).device)
        disk = str(folder.parent / f"state-{world.rank}-{threading.get_ident()}")
        self.store = Store(stops, format, device, placement=placement, disk=disk, world=world)
        self.store.initialise(lambda name, tensor: tensor.copy_(values[name]))
        self.executor, self.optimizer, self.step = Executor(self.store), AdamW(self.store), 0
        self.checkpoints = Checkpoints(folder, self.store, 2)

    def train(self, until):
        while self.step < until:
            self.step += 1
            mine = batches(SIZES, seed=self.step)[self.world.rank :: self.world.count]
            mine += [None] * (self.rounds - len(mine))
            given = {"micro_batches": len(SIZES), "samples": sum(SIZES)}
            found = self.executor.gradients([mine], self.optimizer.loss_scale, **given)
            assert self.optimizer.step(found, 1e-2)

    def save(self):
        self.checkpoints.save(self.step, {"optimizer": self.optimizer.state(), "samples": self.step * sum(SIZES)})

    def resume(self):
        with Meeting(self.world) as ranks:
            path, manifest, _ = checkpoint.newest(self.folder) if self.world.first else (None, None, None)
            manifest = ranks.meet(manifest)
        checkpoint.load(path, self.store, manifest)
        self.optimizer.load_state(manifest["optimizer"])
        self.step = manifest["step"]

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self.store.close()


def files(path):
    """What tells one checkpoint's bytes from another's, in few words where they differ."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir()}


def at(folder, step):
    return files(folder / f"step-{step:08d}")


@pytest.fixture
def slow(monkeypatch):
    """A disk so slow that training overtakes it wherever it can."""
    monkeypatch.setattr(checkpoint, "failpoint", lambda name: time.sleep(0.001))


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    """Files of steps 2 and 4 of one rank that nothing interrupts."""
    folder = tmp_path_factory.mktemp("wanted") / "checkpoints"
    with on_one(folder) as run:
        for step in (2, 4):
            run.train(step)
            run.save()
    return {step: at(folder, step) for step in (2, 4)}


def on_one(folder, **options):
    return on_ranks(1, lambda world: Run(world, folder, **options))[0]


def save_whole(run):
    run.save()
    run.checkpoints.finish()


def train_and_save(world, folder, where, aside):
    with Run(world, folder, where, aside) as run:
        for step in (2, 4):
            run.train(step)
            save_whole(run)
        return run.checkpoints.newest


def go_on(world, folder, where, aside):
    with Run(world, folder, where, aside) as run:
        run.resume()
        assert run.step == 2
        run.train(4)
        save_whole(run)


@pytest.mark.parametrize(
    ("where", "aside"), [("resident", None), ("resident", 2), ("host", 0), ("disk", None), ("disk", 2), ("mixed", 1)]
)
def test_four_ranks_save_what_one_does_and_any_number_goes_on(tmp_path, slow, wanted, where, aside):
    folder = tmp_path / "checkpoints"
    newest = on_ranks(4, lambda world: train_and_save(world, folder, where, aside))
    assert newest == [folder / "step-00000004"] * 4
    assert (at(folder, 2), at(folder, 4)) == (wanted[2], wanted[4])
    for ranks in (1, 2, 3, 4):
        shutil.rmtree(folder / "step-00000004")
        on_ranks(ranks, lambda world: go_on(world, folder, where, aside))
        assert at(folder, 4) == wanted[4], f"on {ranks}"


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_four_ranks_go_on_from_what_any_number_saved(tmp_path, slow, wanted, ranks):
    folder = tmp_path / "checkpoints"
    on_ranks(ranks, lambda world: train_and_save(world, folder, "mixed", 2))
    shutil.rmtree(folder / "step-00000004")
    on_ranks(4, lambda world: go_on(world, folder, "host", 0))
    assert at(folder, 4) == wanted[4]


@pytest.mark.parametrize("format", [Format("bf16", "bf16"), Format("fp16"), Format("fp32")])
def test_every_format_goes_from_four_ranks_to_three_and_back(tmp_path, format):
    """What has been loaded on three is what four had, to the bit."""

    def four(world):
        with Run(world, tmp_path / "a", format=format) as run:
            run.optimizer.loss_scale = 1.0
            run.train(2)
            run.save()

    def three(world, start, end):
        with Run(world, start, format=format) as run:
            run.resume()
            run.checkpoints.folder = end
            run.save()

    on_ranks(4, four)
    on_ranks(3, lambda world: three(world, tmp_path / "a", tmp_path / "b"))
    on_ranks(4, lambda world: three(world, tmp_path / "b", tmp_path / "c"))
    assert at(tmp_path / "a", 2) == at(tmp_path / "b", 2) == at(tmp_path / "c", 2)


@pytest.mark.parametrize(
    ("point", "aside"),
    [("folder made", 2), ("h.1.0.weight on its way", None), ("h.1.0.weight on its way", 0), ("head written", 2)],
)
def test_a_full_disk_is_told_to_all_ranks_at_one_step(tmp_path, monkeypatch, wanted, point, aside):
    folder, armed = tmp_path / "checkpoints", threading.Event()

    def full(name):
        if name == point and armed.is_set():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "failpoint", full)

    def until_noticed(run):
        run.save()
        while run.step < 40:
            run.train(run.step + 1)
            time.sleep(0.003 * run.world.rank)
            run.checkpoints.notice()

    def work(world):
        with Run(world, folder, "mixed", aside) as run:
            run.train(2)
            save_whole(run)
            assert world.from_first() is None
            armed.set()
            run.train(3)
            with pytest.raises(OSError, match="No space left") as failed:
                until_noticed(run)
            assert run.store.snapshot is None
            found = failed.value.errno, str(failed.value), failed.value.filename, run.step
            assert world.from_first() is None
            armed.clear()
            save_whole(run)
            return found, run.checkpoints.newest

    told = on_ranks(3, work)
    assert told[1:] == told[:1] * 2
    (number, text, file, step), newest = told[0]
    assert number == errno.ENOSPC
    assert f"last good checkpoint: {folder / 'step-00000002'}" in text
    assert file.startswith(str(folder))
    assert step < 40
    assert newest == folder / f"step-{step:08d}"
    assert sorted(os.listdir(folder)) == ["latest", "step-00000002", newest.name]
    assert at(folder, 2) == wanted[2]


@pytest.mark.parametrize("aside", [None, 0])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_cannot_read_its_part_tells_the_others(tmp_path, monkeypatch, rank, aside):
    folder = tmp_path / "checkpoints"

    def work(world):
        with Run(world, folder, "disk", aside) as run:
            run.train(1)
            if world.rank == rank:
                reader = run.store.disk.reader

                def broken(offset, memory):
                    if offset:
                        raise OSError(errno.EIO, os.strerror(errno.EIO), "state")
                    return reader(offset, memory)

                run.store.settle()
                run.store.disk_records.tier.reader = broken
            with pytest.raises(OSError, match="Input/output error") as failed:
                save_whole(run)
            run.store.disk_records.tier.__dict__.pop("reader", None)
            return failed.value.errno, str(failed.value)

    told = on_ranks(3, work)
    assert {number for number, _ in told} == {errno.EIO}
    assert len({text for _, text in told}) == 1
    assert not checkpoint.steps(folder)
    assert not list(folder.glob("*.tmp"))


def test_an_error_that_is_neither_file_nor_input_names_its_rank(tmp_path):
    def work(world):
        with Run(world, tmp_path / "checkpoints") as run:
            if world.rank == 1:
                run.store.records[2].master = lambda name: 1 // 0
            with pytest.raises((ZeroDivisionError, RuntimeError)) as failed:
                run.save()
            return str(failed.value)

    told = on_ranks(3, work)
    assert told[1] == "integer division or modulo by zero"
    assert told[0] == told[2] == f"rank 1: {told[1]}"


@pytest.mark.parametrize("where", ["resident", "host"])
def test_a_rank_that_is_gone_ends_the_save_and_nobody_waits_at_the_gate(tmp_path, monkeypatch, where):
    held = threading.Event()
    monkeypatch.setattr(checkpoint, "failpoint", lambda name: name != "h.0 written" or held.wait(60))
    ended = []

    def work(world):
        run = Run(world, tmp_path / "checkpoints", where, 0)
        run.train(1)
        run.save()
        if world.rank == 2:
            held.set()
            raise KeyError("gone")
        try:
            run.train(3)
            run.store.settle()
        finally:
            with pytest.raises(threading.BrokenBarrierError):
                run.checkpoints.finish()
            assert run.store.snapshot is None
            ended.append(world.rank)

    with pytest.raises(KeyError, match="gone"):
        on_ranks(3, work)
    assert sorted(ended) == [0, 1]
    assert not checkpoint.steps(tmp_path / "checkpoints")


def test_ranks_take_note_of_a_checkpoint_at_one_step(tmp_path, slow):
    def work(world):
        with Run(world, tmp_path / "checkpoints", "host", 2 * COUNT) as run:
            run.train(1)
            run.save()
            while run.checkpoints.newest is None:
                run.train(run.step + 1)
                time.sleep(0.002 * world.rank)
                run.checkpoints.notice()
            return run.step

    assert len(set(on_ranks(3, work))) == 1


def test_damaged_and_foreign_checkpoints_are_refused_on_all_ranks(tmp_path):
    folder = tmp_path / "checkpoints"

    def refused(world, change):
        with Run(world, folder) as run:
            change(run)
            with pytest.raises(InputError) as failed:
                run.resume()
            return str(failed.value)

    def shallower(run):
        run.store.layers[3] = replace(run.store.layers[3], name="h.9")

    def empty(run):
        assert not folder.exists()

    def wider(run):
        layout = run.store.plans[1].owned
        run.store.records[1].layout = replace(layout, shapes=((48, 47), *layout.shapes[1:]))

    cases = [(empty, "wanted a checkpoint, got none"), (shallower, "with layer h.9, got none")]
    for change, text in [*cases, (wider, r"h.0.1.weight: wanted float32 (48, 47), got torch.float32 (48, 48)")]:
        told = on_ranks(3, lambda world, change=change: refused(world, change))
        assert len(set(told)) == 1
        assert text in told[0]
        with on_one(folder) as run:
            run.save()
    os.truncate(folder / "step-00000000" / "head.safetensors", 40)
    told = on_ranks(3, lambda world: refused(world, lambda run: None))
    assert len(set(told)) == 1
    assert "only damaged ones" in told[0]


def test_rank_0_has_one_whole_tensor_at_a_time(tmp_path, monkeypatch):
    gather, made = ThreadWorld.gather_parts, []

    def watched(self, part, sizes):
        assert all(storage.expired() for storage in made)
        whole = gather(self, part, sizes)
        if self.first:
            made.append(StorageWeakRef(whole.untyped_storage()))
        return whole

    monkeypatch.setattr(ThreadWorld, "gather_parts", watched)

    def work(world):
        with Run(world, tmp_path / "checkpoints") as run:
            run.save()
            return len(run.store.names())

    names, _ = on_ranks(2, work)
    assert len(made) == 3 * names


@pytest.mark.parametrize("where", HOMES)
@pytest.mark.parametrize("aside", [None, 0, 2])
def test_memory_aside_is_counted_by_shards_to_the_byte(tmp_path, where, aside):
    def work(world):
        with Run(world, tmp_path, where, aside) as run:
            store = run.store
            assert store.host.taken == store.host.nbytes
            without = needs(store.plans, replace(store.placement, aside=None), Format())
            records = [size * 12 for size in store.sizes]
            on_disk = [disk_bytes(r) for r, home in zip(records, store.placement.state, strict=True) if home == "disk"]
            extra = 0 if aside is None else aside * sorted(records)[COUNT // 2] + max(on_disk, default=0)
            assert typical_record(store.sizes, 12) == sorted(records)[COUNT // 2]
            assert store.host.nbytes == without.host + extra
            return store.sizes

    assert on_ranks(3, work)[0] == [1024, 2048, 2048, 2048, 1024]
