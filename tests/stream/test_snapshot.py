"""Checkpoints beside training: the one of step N holds step N's bits, whatever the steps after it do meanwhile."""

import errno
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from toy import DEPTH, Plain, batches, layers

from cgpt import checkpoint
from cgpt.saving import Saving
from cgpt.stream.devices import CpuDevice
from cgpt.stream.executor import Executor
from cgpt.stream.format import Format
from cgpt.stream.needs import disk_bytes, needs, typical_record
from cgpt.stream.optimizer import AdamW
from cgpt.stream.placement import Placement
from cgpt.stream.snapshot import Snapshot
from cgpt.stream.store import Store, plans_of

N = DEPTH + 2
LIMIT = 60  # seconds in which whatever could hang must have ended
HOMES = {
    "resident": (("device",) * N, ("device",) * N),
    "host": (("host",) * N, ("host",) * N),
    "disk": (("disk",) * N, ("disk",) * N),
    "mixed": (("device", "device", "host", "host", "disk"), ("device", "host", "host", "disk", "disk")),
}


def placed(where, aside):
    weights, state = HOMES[where]
    return Placement(weights=weights, state=state, recompute=(True,) * N, aside=aside)


class Run:
    """A toy in training; every step is a function of its number."""

    def __init__(self, tmp_path, placement, precision="bf16", **device):
        plain = Plain()
        stops = layers(plain)
        wanted = needs(plans_of(stops), placement, Format(precision))
        initial = {name: p.detach().clone() for name, p in plain.named_parameters()}
        self.lanes = CpuDevice(wanted.device + 128 * 64, **device)
        self.store = Store(stops, Format(precision), self.lanes, placement=placement, disk=str(tmp_path))
        self.store.initialise(lambda name, tensor: tensor.copy_(initial[name]))
        self.executor, self.optimizer, self.steps = Executor(self.store), AdamW(self.store), 0

    def train(self, steps):
        for _ in range(steps):
            self.steps += 1
            gradients = self.executor.gradients([batches([3, 3], seed=self.steps)])
            assert self.optimizer.step(gradients, 1e-2)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.lanes.close()


def files(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def in_time(work):
    """work's result or error, within LIMIT: a wait that never ends fails the test instead of hanging it."""
    found = []

    def run():
        try:
            found.append((work(), None))
        except BaseException as error:
            found.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(LIMIT)
    assert not thread.is_alive(), "hangs"
    result, error = found[0]
    if error is not None:
        raise error
    return result


@pytest.fixture
def slow(monkeypatch):
    """A disk so slow that training overtakes it wherever it can; counts the layers written when asked."""
    passed = []

    def wait(name):
        passed.append(name)
        if name.endswith(("on its way", "written", "folder made")):
            time.sleep(0.002)

    monkeypatch.setattr(checkpoint, "failpoint", wait)
    return passed


@pytest.mark.parametrize("hunt", [None, 1])
@pytest.mark.parametrize("aside", [0, 1, 2 * N])
@pytest.mark.parametrize("where", HOMES)
def test_it_equals_a_synchronous_save_of_that_step(tmp_path, slow, where, aside, hunt):
    placement = placed(where, aside)
    with Run(tmp_path, placement, hunt=hunt) as run, Run(tmp_path, placed("resident", None), serial=True) as other:
        other.train(2)
        wanted = files(checkpoint.save(tmp_path / "wanted", other.store, 2, {"tokens": 7}))
        run.train(2)
        saving = Saving(tmp_path / "found", Snapshot(run.store), 2, {"tokens": 7}, 2)
        in_time(lambda: run.train(3))
        assert files(in_time(saving.wait)) == wanted
        assert run.store.snapshot is None
        # and training came to what it comes to without a checkpoint beside it
        other.train(3)
        after = files(checkpoint.save(tmp_path / "wanted", other.store, 5, {}))
        assert files(checkpoint.save(tmp_path / "found", run.store, 5, {})) == after


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_in_every_precision(tmp_path, slow, precision):
    with (
        Run(tmp_path, placed("mixed", 2), precision) as run,
        Run(tmp_path, placed("resident", None), precision, serial=True) as other,
    ):
        for each in (run, other):
            each.optimizer.loss_scale = 1.0
        other.train(1)
        wanted = files(checkpoint.save(tmp_path / "wanted", other.store, 1, {}))
        run.train(1)
        saving = Saving(tmp_path / "found", Snapshot(run.store), 1, {}, 2)
        in_time(lambda: run.train(2))
        assert files(in_time(saving.wait)) == wanted


def test_one_after_another_while_training_never_stops(tmp_path, slow):
    with Run(tmp_path, placed("mixed", 1)) as run, Run(tmp_path, placed("resident", None), serial=True) as other:
        for step in range(1, 5):
            other.train(1)
            wanted = files(checkpoint.save(tmp_path / "wanted", other.store, step, {}))
            in_time(lambda: run.train(1))
            if step > 1:
                in_time(saving.wait)  # noqa: F821 -- of the turn before
            saving = Saving(tmp_path / "found", Snapshot(run.store), step, {}, 2)
            last = wanted
        assert files(in_time(saving.wait)) == last


def test_with_room_for_all_training_goes_on_while_nothing_is_written(tmp_path, monkeypatch):
    held = threading.Event()
    monkeypatch.setattr(checkpoint, "failpoint", lambda name: name != "folder made" or held.wait(LIMIT))
    with Run(tmp_path, placed("mixed", 2 * N)) as run:
        run.train(1)
        saving = Saving(tmp_path / "found", Snapshot(run.store), 1, {}, 2)
        in_time(lambda: (run.train(3), run.store.settle()))
        assert not saving.done
        held.set()
        in_time(saving.wait)


@pytest.mark.parametrize("where", ["resident", "host"])
def test_without_room_adamw_waits_for_the_disk(tmp_path, monkeypatch, where):
    held = threading.Event()
    monkeypatch.setattr(checkpoint, "failpoint", lambda name: name != "folder made" or held.wait(LIMIT))
    with Run(tmp_path, placed(where, 0)) as run:
        run.train(1)
        run.store.settle()
        before = [record.memory.clone() for record in run.store.records]
        saving = Saving(tmp_path / "found", Snapshot(run.store), 1, {}, 2)
        training = threading.Thread(target=run.train, args=(2,), daemon=True)
        training.start()
        time.sleep(0.3)
        assert all(a.equal(b.memory) for a, b in zip(before, run.store.records, strict=True))
        held.set()
        training.join(LIMIT)
        assert not training.is_alive()
        in_time(saving.wait)
        run.store.settle()
        assert not any(a.equal(b.memory) for a, b in zip(before, run.store.records, strict=True))


@pytest.mark.parametrize("where", HOMES)
@pytest.mark.parametrize("aside", [0, 2])
@pytest.mark.parametrize("at", ["h.1 written", "latest moved"])
def test_a_save_that_fails_lets_training_go_on_and_leaves_the_one_before(tmp_path, monkeypatch, where, aside, at):
    def full(name):
        time.sleep(0.002)
        if name == at and armed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    armed = []
    monkeypatch.setattr(checkpoint, "failpoint", full)
    with Run(tmp_path, placed(where, aside)) as run, Run(tmp_path, placed("resident", None), serial=True) as other:
        run.train(1)
        good = in_time(Saving(tmp_path / "found", Snapshot(run.store), 1, {}, 2).wait)
        before = files(good)
        armed.append(True)
        run.train(1)
        saving = Saving(tmp_path / "found", Snapshot(run.store), 2, {}, 2)
        in_time(lambda: run.train(2))
        with pytest.raises(OSError, match="No space left") as failed:
            in_time(saving.wait)
        assert str(tmp_path / "found") in failed.value.filename
        assert files(good) == before
        assert not list((tmp_path / "found").glob("*.tmp"))
        armed.clear()
        assert run.store.snapshot is None
        other.train(4)
        wanted = files(checkpoint.save(tmp_path / "wanted", other.store, 4, {}))
        assert files(in_time(Saving(tmp_path / "found", Snapshot(run.store), 4, {}, 2).wait)) == wanted


def test_lanes_that_stop_end_the_save_and_nobody_hangs(tmp_path, slow):
    with Run(tmp_path, placed("host", 0)) as run:
        run.train(1)
        saving = Saving(tmp_path / "good", Snapshot(run.store), 1, {}, 2)
        in_time(saving.wait)
        started = threading.Event()

        def broken():
            started.wait(LIMIT)
            raise ArithmeticError("of a lane")

        run.lanes.submit("optimizer", "defect", broken)
        run.train(1)  # its updates stand behind the defect
        saving = Saving(tmp_path / "found", Snapshot(run.store), 2, {}, 2)
        started.set()
        with pytest.raises(ArithmeticError, match="of a lane"):
            in_time(saving.wait)
        assert not list((tmp_path / "found").iterdir())


def test_a_store_has_one_snapshot_at_a_time_and_memory_for_it(tmp_path):
    with Run(tmp_path, placed("host", 1)) as run:
        first = Snapshot(run.store)
        with pytest.raises(RuntimeError, match="wanted a store without one"):
            Snapshot(run.store)
        first.drop()
        Snapshot(run.store).drop()
    with Run(tmp_path, placed("host", None)) as run, pytest.raises(RuntimeError, match="wanted a placement with mem"):
        Snapshot(run.store)


def test_writing_by_name_stops_at_the_gate_too(tmp_path):
    with Run(tmp_path, placed("mixed", 2 * N)) as run:
        name = run.store.owned[0][0]
        before = run.store.read(name)
        snapshot = Snapshot(run.store)
        run.store.write(name, before + 1)
        with snapshot.record(0) as record:
            assert record.master(name).equal(before)
        snapshot.drop()
        assert run.store.read(name).equal(before + 1)


@pytest.mark.parametrize("where", HOMES)
@pytest.mark.parametrize("aside", [None, 0, 2])
def test_the_memory_is_counted_to_the_byte(tmp_path, where, aside):
    with Run(tmp_path, placed(where, aside)) as run:
        store, plans = run.store, run.store.plans
        assert store.host.taken == store.host.nbytes
        without = needs(plans, replace(store.placement, aside=None), Format())
        records = [plan.owned.size * 12 for plan in plans]
        extra = 0
        if aside is not None:
            on_disk = [disk_bytes(r) for r, home in zip(records, store.placement.state, strict=True) if home == "disk"]
            extra = aside * sorted(records)[N // 2] + max(on_disk, default=0)
            assert typical_record(store.sizes, 12) == sorted(records)[N // 2]
        assert store.host.nbytes == without.host + extra
        assert needs(plans, store.placement, Format(training=False)).aside == 0


LIMITED = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {here!r})
from test_snapshot import *
folder = Path({folder!r})
with Run(folder, placed("host", 1)) as run:
    run.train(1)
    good = Saving(folder / "found", Snapshot(run.store), 1, {{}}, 2).wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
    run.train(1)
    saving = Saving(folder / "found", Snapshot(run.store), 2, {{}}, 2)
    run.train(2)
    try:
        saving.wait()
    except OSError as error:
        print(error.filename)
    run.store.settle()
    print(checkpoint.newest(folder / "found")[0].name)
"""


def test_a_file_that_may_not_grow(tmp_path):
    script = LIMITED.format(here=str(Path(__file__).parent), folder=str(tmp_path))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    options = {"env": environment, "capture_output": True, "text": True, "timeout": LIMIT, "check": True}
    lines = subprocess.run([sys.executable, "-c", script], **options).stdout.split()
    assert lines == [str(tmp_path / "found" / "step-00000002.tmp" / "embed.safetensors"), "step-00000001"]
