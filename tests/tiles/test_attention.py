"""bf16 attention on AMX's tiles, at the bars that every instruction set is held to."""

import pytest
import torch

from cgpt_ext import attention, attention_ref, attention_varlen
from cgpt_ext.ops.attention import attention_varlen_ref
from numerics import compare, run
from test_attention import make
from test_attention_masks import WINDOWS, pack, sdpa
from tiles import on_tiles

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def native():
    """Scratch is full of NaN at first, so that what a tile reads beyond what was packed shows."""
    with on_tiles() as module:
        module.poison_scratch(1 << 21)
        yield module
        assert not module.configured(), "a thread was left with its tiles"


# B, Tq, Tk, H, Hkv, D. Blocks are 96 queries by 64 keys, tiles 32 rows by 16 or 32 columns, and 32 values deep.
SHAPES = [
    (1, 5, 5, 1, 1, 8),
    (2, 7, 13, 3, 3, 24),
    (1, 131, 131, 2, 2, 64),
    (1, 192, 192, 1, 1, 80),
    (1, 67, 131, 1, 1, 40),
    (1, 131, 67, 1, 1, 72),
    (1, 33, 17, 1, 1, 16),
    (2, 37, 37, 4, 2, 128),
    (1, 97, 97, 1, 1, 256),
    (2, 3, 200, 2, 1, 40),
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, causal):
    q, k, v, dout = make(*shape, BF16)
    compare(attention, attention_ref, sdpa, (q, k, v, causal), dout)


@pytest.mark.parametrize("case", WINDOWS, ids=str)
def test_windows(case):
    *shape, causal, window = case
    q, k, v, dout = make(*shape, BF16)
    compare(
        lambda *x: attention(*x, causal, window_size=window),
        lambda *x: attention_ref(*x, causal, window_size=window),
        lambda *x: sdpa(*x, causal, window),
        (q, k, v),
        dout,
    )


@pytest.mark.parametrize(
    ("shape", "causal", "window"),
    [
        ((2, 7, 13, 4, 2, 24), False, (-1, -1)),
        ((2, 131, 131, 2, 2, 16), True, (-1, -1)),
        ((2, 97, 200, 2, 1, 16), False, (70, 5)),
    ],
)
def test_alibi(shape, causal, window):
    slopes = 2.0 ** -torch.arange(1, shape[3] + 1)
    q, k, v, dout = make(*shape, BF16)
    compare(
        lambda *x: attention(*x, causal, None, window, slopes),
        lambda *x: attention_ref(*x, causal, None, window, slopes),
        lambda *x: sdpa(*x, causal, window, slopes),
        (q, k, v),
        dout,
    )


def test_packed_sequences():
    lengths = [(5, 5), (0, 7), (100, 131), (1, 0), (131, 70), (0, 0), (17, 1)]
    q, k, v, dout, options = pack(lengths, 2, 1, 24, BF16)
    compare(
        lambda *x: attention_varlen(*x, *options, causal=True),
        lambda *x: attention_varlen_ref(*x, *options, causal=True),
        lambda *x: attention_varlen_ref(*x, *options, causal=True),
        (q, k, v),
        dout,
    )


def test_every_product_is_on_tiles(native):
    """Without a mask: Q K^T and P V, and once more with dout V^T, P^T dout, dS^T Q, dS K; and delta's diagonal."""
    T, D = 192, 64
    q, k, v, dout = make(1, T, T, 1, 1, D, BF16)
    before = native.products()
    out, *_ = run(attention, q, k, v, dout=dout)
    assert out.shape == q.shape
    square, diagonal = T // 16 * T // 16 * D // 32, T // 16 * D // 32
    assert native.products() - before == 7 * square + diagonal


def test_tiles_are_configured_once_a_task(native):
    q, k, v, _ = make(2, 131, 131, 3, 3, 16, BF16)
    before = native.configurations()
    attention(q, k, v, True)
    assert native.configurations() - before == 2 * 3


def test_one_key_has_no_gradient_of_its_score():
    """All the weight is on it, so dP - delta is 0, not a rounding error: both add up in the tiles' order."""
    q, k, v, dout = make(1, 40, 1, 2, 2, 80, BF16)
    _, dq, dk, _ = run(attention, q, k, v, dout=dout)
    assert not dq.any()
    assert not dk.any()


@pytest.mark.parametrize("shape", [(1, 300, 300, 1, 1, 24), (1, 300, 130, 6, 1, 16)], ids=str)
def test_bits_do_not_depend_on_threads(native, shape):
    q, k, v, dout = make(*shape, BF16)
    results = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        results.append(run(attention, q, k, v, True, dout=dout))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_types_have_no_use_for_tiles(native, dtype):
    q, k, v, dout = make(1, 70, 70, 2, 1, 24, dtype)
    before = native.products(), native.configurations()
    compare(attention, attention_ref, sdpa, (q, k, v, True), dout)
    assert (native.products(), native.configurations()) == before


def test_a_few_queries_are_all_fp32(native):
    """As where text is generated: four queries or fewer are not worth packing."""
    q, k, v, dout = make(1, 4, 131, 2, 1, 72, BF16)
    before = native.products()
    compare(attention, attention_ref, sdpa, (q, k, v, True), dout)
    assert native.products() == before


def test_what_is_not_finite_stays_in_its_row(native):
    q, k, v, dout = make(2, 100, 100, 2, 2, 16, BF16)
    q[0, 50, 1, 3] = torch.nan
    out, dq, _, _ = run(attention, q, k, v, True, dout=dout)
    for x in (out, dq):
        assert x[0, 50, 1].isnan().all()
        x[0, 50, 1] = 0
        assert x.isfinite().all()
