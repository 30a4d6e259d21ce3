"""config.json: every field that changes what a model computes is honoured or refused by its name."""

import json
from dataclasses import replace

import pytest

from cgpt.errors import InputError
from cgpt.model.config import GPTConfig
from cgpt.model.huggingface import shape_of, values_of
from cgpt.recipe import read_start

GPT2 = {"model_type": "gpt2", "n_embd": 96, "n_layer": 3, "n_head": 4, "n_positions": 32, "vocab_size": 300}
BTLM = {**GPT2, "model_type": "btlm", "activation_function": "gelu"}


def test_defaults_are_those_of_gpt2():
    shape, kind = shape_of({"model_type": "gpt2"})
    assert kind == "sp"
    assert shape == GPTConfig(
        n_layer=12, n_head=12, d_model=768, d_head=64, d_ff=3072, vocab_size=50257, seq_len=1024, activation="gelu_tanh"
    )


def test_other_names_of_the_sizes():
    names = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 32}
    assert shape_of({"model_type": "gpt2", "vocab_size": 300, **names}) == shape_of(GPT2)


def test_training_options_and_rounding_orders_say_nothing_of_the_model():
    more = {
        "attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1, "reorder_and_upcast_attn": True, "use_cache": False,
        "n_ctx": 32, "gradient_checkpointing": True, "_name_or_path": "x", "n_inner": None, "pruned_heads": {},
        "task_specific_params": {"text-generation": {}}, "torch_dtype": "float32", "tie_word_embeddings": True,
    }  # fmt: skip
    assert shape_of(GPT2 | more) == shape_of(GPT2)


def test_fields_that_are_honoured():
    assert shape_of(GPT2 | {"n_inner": 40})[0].d_ff == 40
    assert shape_of(GPT2 | {"layer_norm_epsilon": 1e-3})[0].layer_norm_eps == 1e-3
    assert shape_of(GPT2 | {"scale_attn_weights": False})[0].attention_scale == 1.0
    assert shape_of(GPT2 | {"activation_function": "gelu"})[0].activation == "gelu"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type: wanted gpt2 or btlm, got 'llama'"),
        ({"model_type": None}, "model_type: wanted gpt2 or btlm, got None"),
        ({"model_type": ["gpt2"]}, r"model_type: wanted gpt2 or btlm, got \['gpt2'\]"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: wanted false, got true"),
        ({"add_cross_attention": True}, "add_cross_attention: wanted false, got true"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder: wanted false"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: wanted none, got"),
        ({"pruned_heads": {"1": [0]}}, "pruned_heads: wanted none, got"),
        ({"activation_function": "relu"}, "activation_function: wanted one of gelu, .*, got 'relu'"),
        ({"activation_function": "swiglu"}, "activation_function: wanted one of gelu, .*, got 'swiglu'"),
        ({"activation_function": ["gelu"]}, "activation_function: wanted one of"),
        ({"n_head": 7}, "n_head: wanted a divisor of n_embd, 96, got 7"),
        ({"n_head": 16}, "d_head must be a multiple of 8 up to 256, got 6"),
        ({"n_embd": 0}, "n_embd: wanted a positive whole number, got 0"),
        ({"n_layer": 10**9}, "n_layer: wanted at most 10000, got 1000000000"),
        ({"n_layer": 2.0}, "n_layer: wanted a positive whole number, got 2.0"),
        ({"n_positions": "32"}, "n_positions: wanted a positive whole number, got '32'"),
        ({"vocab_size": True}, "vocab_size: wanted a positive whole number, got True"),
        ({"n_inner": -1}, "n_inner: wanted a positive whole number, got -1"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon: wanted a positive number, got 0"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon: wanted a positive number, got nan"),
        ({"scale_attn_weights": "no"}, "scale_attn_weights: wanted true or false, got 'no'"),
    ],
)
def test_what_cannot_be_said_exactly_is_refused_by_its_name(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        shape_of(GPT2 | change)
    values = {**GPT2, "architectures": ["GPT2LMHeadModel"], **change}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=f"config.json: .*{message}"):
        read_start(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_embedding_type": "rotary"}, "position_embedding_type: wanted learned or alibi, got 'rotary'"),
        ({"alibi_scaling": {"type": "linear", "factor": 2.0}}, "alibi_scaling: wanted none, got"),
        ({"mup_width_scale": -0.1}, "mup_width_scale: wanted a positive number, got -0.1"),
        ({"mup_embeddings_scale": "10"}, "mup_embeddings_scale: wanted a positive number, got '10'"),
        ({"mup_output_alpha": float("inf")}, "mup_output_alpha: wanted a positive number, got inf"),
        ({"mup_scale_qk_dot_by_d": 1}, "mup_scale_qk_dot_by_d: wanted true or false, got 1"),
    ],
)
def test_what_btlm_may_not_say(change, message):
    with pytest.raises(InputError, match=message):
        shape_of(BTLM | change)


def test_btlm_without_factors_is_plain():
    assert shape_of(BTLM) == shape_of(GPT2 | {"activation_function": "gelu"})


def test_the_first_release_of_111m_lacks_its_width_scale():
    """Its config had neither mup_width_scale nor mup_output_alpha: a third, as 256 / 768 is, and 1."""
    first = {**BTLM, "n_embd": 768, "n_head": 12, "mup_embeddings_scale": 10.0, "mup_scale_qk_dot_by_d": True}
    assert first == {k: v for k, v in first.items() if k not in ("mup_width_scale", "mup_output_alpha")}
    shape, kind = shape_of(first)
    assert (shape.embedding_scale, shape.attention_scale, shape.logits_scale) == (10.0, 1 / 64, 1 / 3)
    assert (shape.hidden_lr_scale, kind) == (1 / 3, "mup")
    mended = shape_of(first | {"mup_width_scale": 1 / 3, "mup_output_alpha": 1.0})
    assert (shape, kind) == mended


def test_out_and_in_again_is_the_same():
    for activation in ("gelu", "gelu_tanh"):
        plain = replace(shape_of(GPT2)[0], activation=activation, layer_norm_eps=3e-6, d_ff=100)
        assert shape_of(json.loads(json.dumps(values_of(plain, "bf16", 299)))) == (plain, "sp")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": "rotary"}, "positions: wanted learned, as GPT-2's layout has no other, got rotary"),
        ({"positions": "none"}, "positions: wanted learned"),
        ({"positions": "alibi"}, "positions: wanted learned"),
        ({"activation": "swiglu"}, "activation: wanted gelu or gelu_tanh, .*, got swiglu"),
        ({"embedding_norm": True}, "embedding_norm: wanted false, .*, got true"),
    ],
)
def test_what_gpt2s_layout_cannot_say(change, message):
    with pytest.raises(InputError, match=message):
        values_of(replace(shape_of(GPT2)[0], **change), "fp32", 299)
