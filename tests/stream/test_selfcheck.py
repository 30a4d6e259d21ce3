"""The check at the start catches what would run fine and learn nothing, and leaves the run as it was."""

from dataclasses import replace

import pytest
import torch
from test_streaming import MIXED, PLACEMENTS, everywhere
from toy import Plain, batches, layers

from cgpt.errors import InputError
from cgpt.stream.devices import CpuDevice, Device
from cgpt.stream.executor import Executor
from cgpt.stream.format import Format
from cgpt.stream.optimizer import AdamW
from cgpt.stream.selfcheck import check, picked_layers
from cgpt.stream.store import Store

BATCH = batches((1,))[0]


def toy_store(placement, tmp_path, precision="bf16"):
    model = Plain()
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    store = Store(layers(model), Format(precision), placement=placement, disk=str(tmp_path))
    store.initialise(lambda name, tensor: tensor.copy_(values[name]))
    return store


def test_it_takes_every_kind_of_place():
    assert picked_layers(everywhere("host", "host")) == [0, 1, 2, 4]
    assert picked_layers(MIXED) == [0, 1, 2, 3, 4]
    many = replace(PLACEMENTS["resident"], weights=("device",) * 9, state=("device",) * 6 + ("host",) * 3,
                   recompute=(False,) * 9)  # fmt: skip
    assert picked_layers(many) == [0, 1, 2, 6, 8]


@pytest.mark.parametrize("activations", ["device", "host"])
@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_run_is_the_same_with_and_without_it(name, activations, tmp_path):
    placement = replace(PLACEMENTS[name], activations=activations, boundary=2048)
    rows, states = [], []
    for checked in (False, True):
        store = toy_store(placement, tmp_path)
        executor, optimizer = Executor(store, seed=3), AdamW(store)
        found = []
        for i in range(3):
            if checked and i < 2:
                torch.manual_seed(5)
                before = torch.random.get_rng_state()
                check(store, BATCH)
                assert torch.equal(torch.random.get_rng_state(), before)
            gradients = executor.gradients([batches((3,), seed=i)])
            found.append((gradients.loss, gradients.norm, optimizer.step(gradients, 1e-2)))
        rows.append(found)
        moments = [store.moment(kind, n) for n in store.names() for kind in ("exp_avg", "exp_avg_sq")]
        states.append([*(store.read(n) for n in store.names()), *moments])
        store.lanes.close()
    assert rows[0] == rows[1]
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def copies_nothing(monkeypatch):
    monkeypatch.setattr(CpuDevice, "copy", lambda self, there, here: None)
    monkeypatch.setattr(Device, "copy", lambda self, there, here: None)


def stale_copy(monkeypatch):
    """The kept copy is renewed once, and then taken for the newest."""
    renew = Store._renew

    def once(self, owner):
        if self._copied[owner] == 0:
            renew(self, owner)

    monkeypatch.setattr(Store, "_renew", once)


def lost_update(monkeypatch):
    submit = CpuDevice.submit

    def loses(self, lane, what, work, after=(), nbytes=0):
        return submit(self, lane, what, (lambda: None) if lane == "optimizer" else work, after, nbytes)

    monkeypatch.setattr(CpuDevice, "submit", loses)


def lost_write(monkeypatch):
    monkeypatch.setattr("cgpt.stream.host.DiskTier.writer", lambda self, offset, memory: lambda: None)


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        (copies_nothing, "host"),
        (copies_nothing, "state on the host"),
        (copies_nothing, "disk"),
        (stale_copy, "state on the host"),
        (stale_copy, "kept before the disk"),
        (lost_update, "host"),
        (lost_update, "disk"),
        (lost_write, "disk"),
    ],
)
def test_planted_faults_are_caught(fault, name, tmp_path, monkeypatch):
    store = toy_store(PLACEMENTS[name], tmp_path)
    held = [parameter.data_ptr() for layer in store.layers for parameter in layer.parameters.values()]
    fault(monkeypatch)
    with pytest.raises(InputError, match="self-check: wanted streaming to give the bits of a model in memory, got"):
        check(store, BATCH)
    assert held == [parameter.data_ptr() for layer in store.layers for parameter in layer.parameters.values()]
    monkeypatch.undo()
    check(store, BATCH)
    store.lanes.close()
