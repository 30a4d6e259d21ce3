"""Presets against the published table, to the unit."""

import pytest

from cgpt.model.presets import PRESETS
from cgpt.schedule import DECAYS, batch_size, tokens_after

# fmt: off
# name: parameters, layers, width, heads, head dim, first and last batch, tokens, lr, warm-up, decay, eps
PUBLISHED = {
    "111M": (111050496, 10, 768, 12, 64, 120, 120, 2220933120, 6e-4, 374784000, "linear", 1e-8),
    "256M": (255977024, 14, 1088, 17, 64, 264, 264, 5119082496, 6e-4, 374685696, "linear", 1e-8),
    "590M": (590310912, 18, 1536, 12, 128, 264, 264, 11806113792, 2e-4, 374685696, "linear", 1e-8),
    "1.3B": (1315723264, 24, 2048, 16, 128, 528, 528, 26313424896, 2e-4, 374145024, "cosine", 1e-8),
    "2.7B": (2651553280, 32, 2560, 32, 80, 528, 528, 53030191104, 2e-4, 374145024, "cosine", 1e-8),
    "6.7B": (6658404352, 32, 4096, 32, 128, 1040, 1040, 133166858240, 1.2e-4, 374865920, "linear", 1e-9),
    "13B": (12853386240, 40, 5120, 40, 128, 720, 1080, 257066680320, 1.2e-4, 374538240, "cosine", 1e-9),
}
# fmt: on
RESIDUAL_STD = {
    "111M": 0.004472135955,
    "256M": 0.0037796447301,
    "590M": 0.0033333333333,
    "1.3B": 0.0025,
    "2.7B": 0.0025,
    "6.7B": 0.0025,
    "13B": 0.0025,
}


def test_every_published_size_is_there_in_both_forms_and_two_for_cpus():
    assert set(PRESETS) == {"tiny", "mini", *PUBLISHED, *(f"{name}-mup" for name in PUBLISHED)}
    assert all(name == preset.name for name, preset in PRESETS.items())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_rows_equal_the_table(name):
    params, layers, width, heads, head, first, last, tokens, lr, warmup, decay, eps = PUBLISHED[name]
    preset, config = PRESETS[name], PRESETS[name].config
    assert config.n_params == params
    assert (config.n_layer, config.d_model, config.n_head) == (layers, width, heads)
    assert (config.d_head, config.d_ff) == (head, 4 * width)
    assert (config.vocab_size, config.seq_len) == (50257, 2048)
    assert (config.activation, config.layer_norm_eps) == ("gelu", 1e-5)
    assert (config.embedding_init_std, config.hidden_init_std) == (0.02, 0.02)
    assert config.residual_std == pytest.approx(RESIDUAL_STD[name], abs=1e-13)
    assert preset.tokens == tokens
    assert (preset.lr, preset.warmup_tokens, preset.decay, preset.adam_eps) == (lr, warmup, decay, eps)
    assert (batch_size(0, preset.batch_schedule), batch_size(tokens, preset.batch_schedule)) == (first, last)
    assert (preset.beta1, preset.beta2, preset.weight_decay) == (0.9, 0.95, 0.1)
    assert (preset.grad_clip, preset.min_lr_ratio) == (1.0, 0.1)
    assert 19.998 <= tokens / params <= 20.0


def test_13b_changes_batch_after_57000_steps():
    schedule = PRESETS["13B"].batch_schedule
    switch = tokens_after(57_000, schedule, 2048)
    assert switch == 57_000 * 720 * 2048
    assert batch_size(switch - 1, schedule) == 720
    assert batch_size(switch, schedule) == 1080


@pytest.mark.parametrize("name", ["tiny", "mini"])
def test_cpu_rows_are_runnable_recipes(name):
    preset = PRESETS[name]
    assert preset.config.vocab_size == 50257
    assert preset.decay in DECAYS
    assert 0 < preset.warmup_tokens < preset.tokens
