"""Initial weights: statistics, bounds, and independence of everything but (seed, name)."""

import math
from statistics import NormalDist

import pytest
import torch

from cgpt.model.config import GPTConfig
from cgpt.model.gpt import GPT
from cgpt.model.init import counter_rng, init_parameter, init_std

CONFIG = GPTConfig(
    n_layer=3,
    n_head=4,
    d_model=128,
    d_head=32,
    d_ff=512,
    vocab_size=2000,
    seq_len=256,
    residual_init_std=0.0025,
)


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("wte.weight", 0.03),
        ("wpe.weight", 0.03),
        ("h.0.attn.c_attn.weight", 0.02),
        ("h.2.mlp.c_fc.weight", 0.02),
        ("h.0.attn.c_proj.weight", 0.02 / math.sqrt(6)),
        ("h.2.mlp.c_proj.weight", 0.02 / math.sqrt(6)),
    ],
)
def test_matrices_are_truncated_normals_of_their_own_std(name, std):
    config = GPTConfig.from_dict(CONFIG.to_dict() | {"residual_init_std": None, "embedding_init_std": 0.03})
    assert init_std(name, config) == std
    weight = torch.empty(300, 400)
    init_parameter(name, weight, config, seed=7)
    assert weight.abs().max() <= 2 * std
    assert weight.abs().max() > 1.99 * std
    assert weight.std().item() == pytest.approx(0.8796256610 * std, rel=0.01)
    normal = torch.special.ndtr(weight.double().ravel() / std).sort().values
    tail = NormalDist().cdf(-2)
    uniform = (normal - tail) / (1 - 2 * tail)
    n = uniform.numel()
    kolmogorov_smirnov = (uniform - (torch.arange(n) + 0.5) / n).abs().max()
    assert kolmogorov_smirnov < 1.95 / math.sqrt(n)  # 0.1 % level


def test_vectors_are_zeros_and_ones():
    state = GPT(CONFIG).state_dict()
    for name, value in state.items():
        if name.endswith("bias"):
            assert torch.equal(value, torch.zeros_like(value)), name
        elif ".ln_" in name or name.startswith("ln_f"):
            assert torch.equal(value, torch.ones_like(value)), name


def test_one_parameter_alone_equals_the_one_in_the_model():
    state = GPT(CONFIG, seed=3).state_dict()
    for name in reversed(list(state)):
        alone = torch.empty_like(state[name])
        init_parameter(name, alone, CONFIG, seed=3)
        assert torch.equal(alone, state[name]), name


def test_seed_and_name_both_matter():
    first = GPT(CONFIG, seed=0).state_dict()
    second = GPT(CONFIG, seed=1).state_dict()
    assert not torch.equal(first["wte.weight"], second["wte.weight"])
    assert not torch.equal(first["h.0.mlp.c_fc.weight"], first["h.1.mlp.c_fc.weight"])
    shared = torch.stack([first[f"h.{layer}.attn.c_attn.weight"].view(-1) for layer in range(3)])
    off_diagonal = torch.corrcoef(shared) - torch.eye(3)
    assert off_diagonal.abs().max() < 5 / math.sqrt(shared.shape[1])


def test_global_generators_are_neither_read_nor_moved():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = GPT(CONFIG).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(GPT(CONFIG).state_dict()["wte.weight"], first["wte.weight"])


def test_half_precision_weights_are_the_rounded_fp32_ones():
    wide, narrow = torch.empty(64, 96), torch.empty(64, 96, dtype=torch.bfloat16)
    init_parameter("h.0.mlp.c_fc.weight", wide, CONFIG, seed=0)
    init_parameter("h.0.mlp.c_fc.weight", narrow, CONFIG, seed=0)
    assert torch.equal(narrow, wide.bfloat16())


def test_drawing_in_chunks_changes_nothing(monkeypatch):
    whole, pieces = torch.empty(100, 96), torch.empty(100, 96)
    init_parameter("wte.weight", whole, CONFIG, seed=0)
    monkeypatch.setattr("cgpt.model.init._CHUNK", 1024)
    init_parameter("wte.weight", pieces, CONFIG, seed=0)
    assert torch.equal(pieces, whole)


def test_the_stream_is_pinned():
    assert counter_rng(0, "wte.weight").random() == 0.2585218720189353
    weight = torch.empty(2, 2)
    init_parameter("wte.weight", weight, CONFIG, seed=0)
    torch.testing.assert_close(
        weight, torch.tensor([[0.005924587, -0.012285961], [-0.028936932, -0.0020159164]]), rtol=1e-6, atol=0
    )


def test_meta_model_gets_its_values_later():
    with torch.device("meta"):
        model = GPT(CONFIG, seed=5)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    model.init_weights(5)
    for name, value in GPT(CONFIG, seed=5).state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
