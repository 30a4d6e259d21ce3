"""The table of exponents against published numbers, at the base, and against the papers' rules written out."""

import math
from dataclasses import replace

import pytest
from definition import tokens

from cgpt.errors import InputError
from cgpt.model.config import GPTConfig
from cgpt.model.init import init_parameter
from cgpt.model.parametrization import CEREBRAS, EXPONENTS, KINDS, Base, parametrize
from cgpt.model.presets import PRESETS
from cgpt.stream.build import build
from cgpt.stream.executor import Executor
from cgpt.stream.format import Format
from cgpt.stream.optimizer import AdamW
from cgpt.stream.placement import Placement

# fmt: off
# name: init std of c_attn and c_fc, of c_proj, learning rate's and logits' factor (released configurations), head dim
PUBLISHED = {
    "111M": (0.0461880215, 0.0103279556, 0.3333333333333333, 64),
    "256M": (0.0388057000, 0.0073335880, 0.23529411764705882, 64),
    "590M": (0.0326598632, 0.0054433105, 0.16666666666666666, 128),
    "1.3B": (0.0282842712, 0.0040824829, 0.125, 128),
    "2.7B": (0.0252982213, 0.0031622777, 0.1, 80),
}
# fmt: on
BASE = Base(
    GPTConfig(
        n_layer=3,
        n_head=2,
        d_model=32,
        d_head=16,
        d_ff=128,
        vocab_size=97,
        seq_len=16,
        embedding_init_std=0.3,
        hidden_init_std=0.11,
        embedding_scale=4.0,
        residual_scale=0.7,
        logits_scale=1.3,
        hidden_lr_scale=0.9,
        vector_lr_scale=0.6,
        hidden_eps_scale=0.2,
    ),
    lr=0.01,
)  # fmt: skip
WIDER = GPTConfig(n_layer=6, n_head=4, d_model=128, d_head=32, d_ff=512, vocab_size=97, seq_len=16)  # m 4, k 2, l 2


@pytest.mark.parametrize("name", PUBLISHED)
def test_mup_presets_have_the_published_numbers(name):
    hidden, residual, factor, d_head = PUBLISHED[name]
    preset, plain = PRESETS[f"{name}-mup"], PRESETS[name]
    config = preset.config
    assert config.hidden_init_std == pytest.approx(hidden, abs=1e-10)
    assert config.residual_std == pytest.approx(residual, abs=1e-9)
    assert (config.hidden_lr_scale, config.logits_scale) == pytest.approx((factor, factor), rel=1e-15)
    assert config.softmax_scale == pytest.approx(1 / d_head, rel=1e-15)
    assert (config.embedding_init_std, config.embedding_scale, preset.lr) == (0.08, 10, 6e-3)
    assert (config.embedding_lr_scale, config.vector_lr_scale, config.residual_scale) == (1, 1, 1)
    assert (config.hidden_decay_scale, config.embedding_eps_scale, config.hidden_eps_scale) == (1, 1, 1)
    assert (preset.decay, preset.tokens, preset.steps) == ("linear", plain.tokens, plain.steps)
    assert (preset.warmup_tokens, preset.batch_schedule) == (plain.warmup_tokens, plain.batch_schedule)
    assert config.n_params == plain.config.n_params


@pytest.mark.parametrize(("name", "m"), [("6.7B", 16), ("13B", 20)])
def test_the_two_that_were_not_published_follow_the_rule(name, m):
    config, layers = PRESETS[f"{name}-mup"].config, PRESETS[name].config.n_layer
    assert config.hidden_init_std == pytest.approx(0.08 / math.sqrt(m))
    assert config.residual_std == pytest.approx(0.08 / math.sqrt(2 * m * layers))
    assert (config.hidden_lr_scale, config.logits_scale, config.softmax_scale) == pytest.approx((1 / m, 1 / m, 1 / 128))
    assert PRESETS[f"{name}-mup"].adam_eps == 1e-9


@pytest.mark.parametrize("base", [BASE, CEREBRAS])
def test_at_the_base_all_kinds_are_the_base(base):
    found = {parametrize(base.config, kind, base) for kind in KINDS}
    assert len(found) == 1
    numbers = {"residual_init_std": base.config.residual_std, "softmax_scale": base.config.attention_scale}
    assert found == {replace(base.config, **numbers)}


def numbers(config):
    return {name: getattr(config, name) for name in EXPONENTS}


def test_each_kind_away_from_the_base():
    root = math.sqrt(2)
    at_base = numbers(BASE.config) | {"residual_init_std": 0.11 / math.sqrt(6), "softmax_scale": 0.25}
    factors = {
        "sp": {"residual_init_std": 1 / root, "softmax_scale": 1 / root},
        "mup": {
            "hidden_init_std": 1 / 2,
            "residual_init_std": 1 / 2 / root,
            "softmax_scale": 1 / 2,
            "logits_scale": 1 / 4,
            "hidden_lr_scale": 1 / 4,
        },
        "completep": {
            "hidden_init_std": 1 / 2,
            "residual_init_std": 1 / 2,
            "softmax_scale": 1 / 2,
            "residual_scale": 1 / 2,
            "logits_scale": 1 / 4,
            "hidden_lr_scale": 1 / 4,
            "hidden_decay_scale": 4,
            "embedding_eps_scale": 1 / 4,
            "hidden_eps_scale": 1 / 8,
        },
    }
    for kind, factor in factors.items():
        found = parametrize(WIDER, kind, BASE)
        want = {name: value * factor.get(name, 1) for name, value in at_base.items()}
        assert numbers(found) == pytest.approx(want, rel=1e-14), kind
        assert found == replace(WIDER, **numbers(found))


def test_rules_compose():
    """From the base to a wider model in one step or two."""
    half = replace(WIDER, n_layer=3, n_head=2, d_model=64, d_head=32, d_ff=256)
    for kind in KINDS:
        between = Base(parametrize(half, kind, BASE), BASE.lr)
        direct = numbers(parametrize(WIDER, kind, BASE))
        assert numbers(parametrize(WIDER, kind, between)) == pytest.approx(direct, rel=1e-14)


def losses(config, steps=10):
    _, store = build(config, Format("bf16"), "cpu", placement=Placement.resident(config.n_layer + 2))
    store.initialise(lambda name, tensor: init_parameter(name, tensor, config, 0))
    executor, optimizer = Executor(store), AdamW(store)
    found = []
    for seed in range(steps):
        step = executor.gradients([[tokens(config, 2, 16, seed)]], optimizer.loss_scale)
        assert optimizer.step(step, 1e-2)
        found.append(step.loss)
    store.lanes.close()
    return found


def test_ten_losses_at_base_width_are_sps_to_the_bit_and_not_beyond_it():
    deeper = replace(BASE.config, n_layer=5, residual_scale=1.0)
    runs = {kind: losses(parametrize(deeper, kind, BASE)) for kind in KINDS}
    assert runs["mup"] == runs["sp"]
    assert runs["completep"] != runs["sp"]  # the depth is not the base's
    assert losses(parametrize(WIDER, "mup", BASE)) != losses(parametrize(WIDER, "sp", BASE))


def test_an_unknown_kind_is_named():
    with pytest.raises(InputError, match="parametrization: wanted one of sp, mup, completep, got ntk"):
        parametrize(WIDER, "ntk", BASE)
