"""The config: exact counts, validation at the border, JSON round trip."""

import json
import math
from dataclasses import replace

import pytest

from cgpt.errors import InputError
from cgpt.model.config import GPTConfig, resized, variant

SHAPE = {
    "n_layer": 3,
    "n_head": 4,
    "d_model": 64,
    "d_head": 16,
    "d_ff": 256,
    "vocab_size": 1000,
    "seq_len": 128,
}


def test_parameters_follow_the_formula_with_a_standard_mlp():
    config = GPTConfig(**SHAPE)
    v, s, layers, d = 1000, 128, 3, 64
    assert config.n_params == v * d + s * d + layers * (12 * d * d + 13 * d) + 2 * d


def test_breakdown_by_hand_with_an_odd_mlp():
    config = GPTConfig(**SHAPE | {"n_layer": 1, "d_ff": 40})
    assert config.param_breakdown() == {
        "token_embedding": 1000 * 64,
        "position_embedding": 128 * 64,
        "attention": 64 * 192 + 192 + 64 * 64 + 64,
        "mlp": 64 * 40 + 40 + 40 * 64 + 64,
        "layer_norm": 3 * 2 * 64,
    }
    assert config.n_params == sum(config.param_breakdown().values())


def test_residual_std_is_the_formula_unless_given():
    assert GPTConfig(**SHAPE).residual_std == 0.02 / math.sqrt(6)
    assert GPTConfig(**SHAPE, hidden_init_std=0.08).residual_std == 0.08 / math.sqrt(6)
    assert GPTConfig(**SHAPE, residual_init_std=0.0025).residual_std == 0.0025


def test_json_round_trip_gives_an_equal_config():
    config = GPTConfig(**SHAPE, activation="gelu_tanh", residual_init_std=0.0025)
    again = GPTConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": 0}, "n_layer must be a positive integer, got 0"),
        ({"vocab_size": -1}, "vocab_size must be a positive integer, got -1"),
        ({"seq_len": 12.0}, "seq_len must be a positive integer, got 12.0"),
        ({"d_ff": True}, "d_ff must be a positive integer, got True"),
        ({"d_ff": "40"}, "d_ff must be a positive integer, got '40'"),
        ({"n_head": 3}, "n_head x d_head must be d_model = 64, got 3 x 16 = 48"),
        ({"n_head": 16, "d_head": 4}, "d_head must be a multiple of 8 up to 256, got 4"),
        ({"n_head": 1, "d_model": 264, "d_head": 264}, "d_head must be a multiple of 8 up to 256, got 264"),
        ({"activation": "relu"}, "activation must be one of gelu, gelu_tanh, swiglu, got 'relu'"),
        ({"positions": "sinus"}, "positions must be one of learned, none, rotary, alibi, got 'sinus'"),
        ({"embedding_norm": 1}, "embedding_norm must be true or false, got 1"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps must be a positive number, got 0.0"),
        ({"embedding_init_std": -0.1}, "embedding_init_std must be a positive number, got -0.1"),
        ({"hidden_init_std": float("nan")}, "hidden_init_std must be a positive number, got nan"),
        ({"hidden_init_std": None}, "hidden_init_std must be a positive number, got None"),
        ({"residual_init_std": "small"}, "residual_init_std must be a positive number, got 'small'"),
        ({"embedding_scale": 0}, "embedding_scale must be a positive number, got 0"),
        ({"softmax_scale": float("inf")}, "softmax_scale must be a positive number, got inf"),
        ({"residual_scale": True}, "residual_scale must be a positive number, got True"),
        ({"logits_scale": None}, "logits_scale must be a positive number, got None"),
        ({"hidden_lr_scale": -1.0}, "hidden_lr_scale must be a positive number, got -1.0"),
    ],
)
def test_bad_values_are_named(change, message):
    with pytest.raises(InputError) as error:
        GPTConfig(**SHAPE | change)
    assert str(error.value) == f"GPTConfig: {message}"


def test_a_config_saved_before_there_were_variants_still_opens():
    saved = SHAPE | {"activation": "gelu", "layer_norm_eps": 1e-5, "embedding_init_std": 0.02}
    saved |= {"hidden_init_std": 0.02, "residual_init_std": None}
    assert GPTConfig.from_dict(saved) == GPTConfig(**SHAPE)


def test_breakdown_by_hand_of_a_gated_model_without_a_position_table():
    other = {"activation": "swiglu", "positions": "rotary", "embedding_norm": True}
    config = GPTConfig(**SHAPE | {"n_layer": 1, "d_ff": 40} | other)
    assert config.param_breakdown() == {
        "token_embedding": 1000 * 64,
        "position_embedding": 0,
        "attention": 64 * 192 + 192 + 64 * 64 + 64,
        "mlp": 64 * 80 + 80 + 40 * 64 + 64,
        "layer_norm": 4 * 2 * 64,
    }


@pytest.mark.parametrize(
    ("name", "lr", "decay", "eps"),
    [
        ("wte.weight", 2, 1, 7),
        ("wpe.weight", 2, 1, 7),
        ("ln_emb.weight", 5, 1, 7),
        ("h.0.ln_1.weight", 5, 1, 11),
        ("h.11.attn.c_attn.weight", 3, 13, 11),
        ("h.11.attn.c_attn.bias", 5, 1, 11),
        ("h.2.mlp.c_proj.weight", 3, 13, 11),
        ("ln_f.bias", 5, 1, 7),
    ],
)
def test_each_kind_of_parameter_has_its_own_scales(name, lr, decay, eps):
    rates = {"embedding_lr_scale": 2, "hidden_lr_scale": 3, "vector_lr_scale": 5, "hidden_decay_scale": 13}
    config = GPTConfig(**SHAPE, **rates, embedding_eps_scale=7, hidden_eps_scale=11)
    assert (config.lr_scale(name), config.decay_scale(name), config.eps_scale(name)) == (lr, decay, eps)
    plain = GPTConfig(**SHAPE)
    assert (plain.lr_scale(name), plain.decay_scale(name), plain.eps_scale(name)) == (1, 1, 1)


def test_a_gate_costs_no_parameters_to_speak_of():
    gelu = GPTConfig(**SHAPE)
    gated = variant(gelu, activation="swiglu")
    assert gated.d_ff == 168  # 2/3 of 256 is 170.7
    assert gated.n_params == pytest.approx(gelu.n_params, rel=0.02)
    assert variant(gated, activation="gelu") == gelu
    assert variant(gated, positions="alibi", activation="swiglu") == replace(gated, positions="alibi")
    assert variant(gelu) == gelu
    assert variant(gelu, embedding_norm=True) == replace(gelu, embedding_norm=True)
    with pytest.raises(InputError, match="positions must be one of"):
        variant(gelu, positions="sinus")


def test_from_dict_names_what_is_missing_or_unknown():
    lacking = {name: value for name, value in SHAPE.items() if name not in ("d_ff", "n_head")}
    with pytest.raises(InputError, match="lacks d_ff, n_head"):
        GPTConfig.from_dict(lacking)
    with pytest.raises(InputError, match="has unknown n_embd"):
        GPTConfig.from_dict(SHAPE | {"n_embd": 64})


def test_resized_keeps_heads_of_a_kind_and_the_mlps_proportion():
    config = GPTConfig(**SHAPE)
    wide = resized(config, width=4 * config.d_model, n_layer=7)
    assert wide == replace(
        config, d_model=4 * config.d_model, n_head=4 * config.n_head, d_ff=4 * config.d_ff, n_layer=7
    )
    assert resized(config) == config
    odd = replace(config, d_ff=20)  # no multiple of 8: kept at its own width
    assert resized(odd, width=odd.d_model) == odd
    assert resized(odd, width=3 * odd.d_model).d_ff == 64
    for width in (0, config.d_head + 1):
        with pytest.raises(InputError, match=f"width: wanted a multiple of the heads' {config.d_head}, got {width}"):
            resized(config, width=width)
