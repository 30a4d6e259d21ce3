"""FLOPs per token and per run against the published table."""

from types import SimpleNamespace

import pytest

from cgpt.model.config import GPTConfig
from cgpt.model.presets import PRESETS
from cgpt.scaling.flops import flops_per_token, matmul_flops_per_token, six_n

# name: FLOPs per token, FLOPs of the run as the paper prints them (arXiv 2304.03208, table 1)
PUBLISHED = {
    "111M": (1190346240, "2.6e+18"),
    "256M": (2493080192, "1.3e+19"),
    "590M": (5192530944, "6.1e+19"),
    "1.3B": (10700017664, "2.8e+20"),
    "2.7B": (20431479808, "1.1e+21"),
    "6.7B": (47174557696, "6.3e+21"),
    "13B": (88166451200, "2.3e+22"),
}
SMALL = GPTConfig(n_layer=2, n_head=4, d_model=32, d_head=8, d_ff=100, vocab_size=1000, seq_len=64)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_figure_to_two_digits(name):
    per_token, whole_run = PUBLISHED[name]
    preset = PRESETS[name]
    flops = flops_per_token(preset.config).total
    assert flops == per_token
    assert f"{flops * preset.tokens:.1e}" == whole_run


def test_breakdown_by_hand():
    flops = flops_per_token(SMALL)
    assert flops.projections == 6 * 2 * 4 * 32**2
    assert flops.mlp == 6 * 2 * 2 * 32 * 100
    assert flops.attention == 24 * 2 * 64 * 32
    assert flops.vocabulary == 10 * 1000 * 32
    assert flops.softmax == 9 * 4 * 64 * 2
    parts = flops.to_dict()
    assert parts.pop("six_n") == 6 * SMALL.n_params
    assert parts.pop("total") == sum(parts.values()) == flops.total
    assert flops.forward == flops.total / 3


def test_a_gated_mlp_has_three_matrices():
    """SwiGLU of two thirds of the width costs what two matrices of the whole width do."""
    gated = SimpleNamespace(**{**SMALL.to_dict(), "d_ff": 96, "activation": "swiglu", "n_params": 0})
    plain = SimpleNamespace(**{**SMALL.to_dict(), "d_ff": 144, "n_params": 0})
    assert flops_per_token(gated).mlp == 6 * 2 * 3 * 32 * 96
    assert flops_per_token(gated).total == flops_per_token(plain).total
    assert matmul_flops_per_token(gated) == matmul_flops_per_token(plain)


def test_matrix_products_counted_one_by_one():
    # a product (m x k)(k x n) costs 2mkn forward, twice that backward; causal attention does half of its two
    t, d, f, v, layers = 16, 32, 100, 1000, 2
    forward = layers * (2 * t * d * 3 * d + 2 * t * d * d + 2 * 2 * t * d * f) + 2 * t * d * v
    forward += layers * (2 * t * t * d + 2 * t * t * d) // 2
    assert matmul_flops_per_token(SMALL, seq_len=t) * t == 3 * forward
    assert matmul_flops_per_token(SMALL) == matmul_flops_per_token(SMALL, seq_len=SMALL.seq_len)


def test_six_n():
    assert six_n(PRESETS["111M"].config.n_params) == 6 * 111050496
