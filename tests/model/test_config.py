"""The config: exact counts, validation at the border, JSON round trip."""

import json
import math

import pytest

from cgpt.errors import InputError
from cgpt.model.config import GPTConfig

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
        ({"activation": "relu"}, "activation must be one of gelu, gelu_tanh, got 'relu'"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps must be a positive number, got 0.0"),
        ({"embedding_init_std": -0.1}, "embedding_init_std must be a positive number, got -0.1"),
        ({"hidden_init_std": float("nan")}, "hidden_init_std must be a positive number, got nan"),
        ({"hidden_init_std": None}, "hidden_init_std must be a positive number, got None"),
        ({"residual_init_std": "small"}, "residual_init_std must be a positive number, got 'small'"),
    ],
)
def test_bad_values_are_named(change, message):
    with pytest.raises(InputError) as error:
        GPTConfig(**SHAPE | change)
    assert str(error.value) == f"GPTConfig: {message}"


def test_from_dict_names_what_is_missing_or_unknown():
    lacking = {name: value for name, value in SHAPE.items() if name not in ("d_ff", "n_head")}
    with pytest.raises(InputError, match="lacks d_ff, n_head"):
        GPTConfig.from_dict(lacking)
    with pytest.raises(InputError, match="has unknown n_embd"):
        GPTConfig.from_dict(SHAPE | {"n_embd": 64})
