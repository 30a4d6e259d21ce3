"""The CUDA kernels of embedding: lookup, and gradients from sorted ids in segments of 32."""

import pytest
import torch

from cgpt_ext import embedding, embedding_ref
from emulator import emulated, native
from numerics import DTYPES, compare, error, run
from test_embedding import make, torch_embedding  # tests/ops/test_embedding.py

# B, T, V, D: 1, primes, one id for many segments, every id once, more columns than one block
SHAPES = [(1, 1, 1, 1), (2, 3, 7, 5), (1, 192, 3, 127), (5, 61, 5000, 33), (1, 100, 2, 16), (2, 17, 9, 2056)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, dtype):
    ids, wte, wpe, dout = make(*shape, dtype)
    with emulated():
        compare(embedding, embedding_ref, torch_embedding, (ids, wte, wpe), dout)


@pytest.mark.parametrize("lengths", [[32, 32], [31, 33], [33, 31], [1, 64, 1], [96], [97], [5, 27, 40, 24], [64, 1]])
def test_runs_at_the_borders_of_segments(lengths):
    ids = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[torch.randperm(sum(lengths))]
    dout = torch.randn(len(ids), 24)
    wte = torch.zeros(len(lengths) + 1, 24, requires_grad=True)
    with emulated(1):
        embedding(ids, wte).backward(dout)
    want = torch.zeros(wte.shape, dtype=torch.float64).index_add_(0, ids, dout.double())
    assert error(wte.grad, want) < 1e-5
    assert not wte.grad[-1].any()


def test_lookup_alone_copies_bits():
    ids, wte, _, _ = make(3, 7, 40, 21, torch.float32)
    wte[3], wte[4] = float("nan"), -0.0
    ids[0, :2] = torch.tensor([3, 4])
    with emulated():
        out = embedding(ids, wte)
        strided = embedding(ids, torch.cat([wte, wte], 1)[:, :21])
    assert torch.equal(out.view(torch.int32), wte[ids].view(torch.int32))
    assert torch.equal(strided.view(torch.int32), out.view(torch.int32))


def test_an_id_out_of_range_is_nan_and_has_no_gradient():
    ids, wte, wpe, dout = make(2, 40, 5, 12, torch.float32)
    for bad in (-1, 5, 2**62, -(2**63)):
        spoilt = ids.clone()
        spoilt[0] = bad
        with emulated():
            out, dwte, dwpe = run(embedding, spoilt, wte, wpe, dout=dout)
        assert out[0].isnan().all()
        assert torch.equal(out[1], wte[ids[1]] + wpe[:40])
        want = torch.zeros(5, 12, dtype=torch.float64).index_add_(0, ids[1], dout[1].double())
        assert error(dwte, want) < 1e-5
        assert error(dwpe[:40], dout.double().sum(0)) < 1e-6


def test_padding_and_one_gradient_alone():
    ids, wte, wpe, dout = make(2, 60, 5, 12, torch.float32)
    with emulated():
        _, dwte, dwpe = run(embedding, ids, wte, wpe, 2, dout=dout)
        leaf = wpe.clone().requires_grad_()
        embedding(ids, wte, leaf).backward(dout)
    assert torch.equal(leaf.grad, dwpe)
    assert not dwte[2].any()
    others = torch.tensor([0, 1, 3, 4])
    want = torch.zeros(5, 12, dtype=torch.float64).index_add_(0, ids.view(-1), dout.view(-1, 12).double())
    assert error(dwte[others], want[others]) < 1e-5


def test_an_order_that_no_sort_gives_stays_inside():
    dout, sorted_ids = torch.randn(40, 8), torch.zeros(40, dtype=torch.int64)
    dwte, order = torch.zeros(1, 8), torch.full((40,), 2**40)
    with emulated():
        native().embedding_bwd(dout, sorted_ids, dwte, None, -1, sorted_ids, order, torch.empty(2, 2, 8))
    assert not dwte.any()


def test_empty_and_bits_do_not_depend_on_the_order_of_threads():
    ids, wte, wpe, dout = make(4, 40, 6, 40, torch.bfloat16)
    results = []
    for seed in range(3):
        with emulated(seed):
            results.append(run(embedding, ids, wte, wpe, dout=dout))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    with emulated():
        out, dwte, dwpe = run(embedding, ids[:0], wte, wpe, dout=dout[:0])
    assert out.shape == (0, 40, 40)
    assert not dwte.any()
    assert not dwpe.any()
