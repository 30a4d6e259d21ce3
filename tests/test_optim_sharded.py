"""AdamW on sharded parameters: two processes with FSDP2 are one process without, and their checkpoint reshards.

Run as a file it is both processes, forked once everything is imported: `python test_optim_sharded.py STORE OUT`.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from cgpt_ext.optim import AdamW

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CASES = [("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "split")]  # dtype, master


def model(dtype):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 1)).to(dtype)  # 5 rows and 1 divide by no 2


def grads(net, step):
    """Gradients that are functions of the step, whole, in the parameters' order."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator).to(p.dtype) for p in net.parameters()]


def one_process(dtype, master, steps):
    net = model(DTYPES[dtype])
    optimizer = AdamW(net.parameters(), lr=0.02, weight_decay=0.1, master=master)
    for step in range(steps):
        for param, grad in zip(net.parameters(), grads(net, step), strict=True):
            param.grad = grad
        optimizer.step()
    return net, optimizer


def worker(rank, store, out):
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    mesh = dist.init_device_mesh("cpu", (2,))

    def step_all(net, optimizer, first, last):
        for step in range(first, last):
            for param, grad in zip(net.parameters(), grads(net, step), strict=True):
                # Every other gradient comes replicated, as no framework promises that it comes as its parameter is.
                placements = param.placements if step % 2 else [Replicate()]
                param.grad = distribute_tensor(grad, mesh, placements)
            optimizer.step()

    found = {}
    for dtype, master in CASES:
        net = fully_shard(model(DTYPES[dtype]), mesh=mesh)
        optimizer = AdamW(net.parameters(), lr=0.02, weight_decay=0.1, master=master)
        step_all(net, optimizer, 0, 3)
        saved = copy.deepcopy(get_optimizer_state_dict(net, optimizer))
        again = AdamW(net.parameters(), lr=0.5, master=master)
        set_optimizer_state_dict(net, again, saved)
        step_all(net, again, 3, 6)
        found[dtype, master] = {"weights": [param.full_tensor().detach() for param in net.parameters()], "state": {}}
        for name, state in get_optimizer_state_dict(net, again)["state"].items():
            assert all(isinstance(value, DTensor) for key, value in state.items() if key != "step"), state
            # Not gathered here: gloo sends no int16, which a split master's low halves are.
            found[dtype, master]["state"][name] = {
                key: value if key == "step" else value.to_local() for key, value in state.items()
            }
    net = fully_shard(model(torch.float32), mesh=mesh)
    optimizer = AdamW(net.parameters(), lr=0.02)
    net(torch.ones(2, 6)).sum().backward()  # FSDP2's own gradients
    norm = nn.utils.clip_grad_norm_(net.parameters(), 0.1)
    optimizer.step()
    found["own"] = {"weights": [param.full_tensor().detach() for param in net.parameters()], "norm": norm.full_tensor()}
    torch.save(found, f"{out}.{rank}")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    if not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    folder = tmp_path_factory.mktemp("sharded")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *(path for path in sys.path if path)])
    command = [sys.executable, __file__, str(folder / "store"), str(folder / "found")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(folder / f"found.{rank}", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_shards_are_the_whole_to_the_bit(found, case):
    net, optimizer = one_process(*case, steps=6)
    for rank in found:
        for got, want in zip(rank[case]["weights"], net.parameters(), strict=True):
            assert torch.equal(got, want)
    first, second = (rank[case]["state"] for rank in found)
    assert [shard["0.weight"]["exp_avg"].shape[0] for shard in (first, second)] == [3, 2]
    for name, param in net.named_parameters():
        assert set(first[name]) == set(optimizer.state[param])
        for key, want in optimizer.state[param].items():
            got = first[name][key] if key == "step" else torch.cat([first[name][key], second[name][key]])
            assert torch.equal(got, want), (name, key)


def test_fsdps_own_gradients_and_clipping(found):
    net = model(torch.float32)
    optimizer = AdamW(net.parameters(), lr=0.02)
    net(torch.ones(2, 6)).sum().backward()
    norm = nn.utils.clip_grad_norm_(net.parameters(), 0.1)
    optimizer.step()
    for rank in found:
        torch.testing.assert_close(rank["own"]["norm"], norm)
        for got, want in zip(rank["own"]["weights"], net.parameters(), strict=True):
            torch.testing.assert_close(got, want.detach(), rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    import torch._dynamo  # which the first step imports
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    second = os.fork()
    worker(0 if second else 1, *sys.argv[1:])
    if second:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(second, 0)[1]))
