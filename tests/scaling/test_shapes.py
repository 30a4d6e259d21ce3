"""Shapes and hyperparameters: the published models' own come back, and what lies between and beyond them is sound."""

import math

import pytest

from cgpt.errors import InputError
from cgpt.model.config import GPTConfig
from cgpt.model.presets import PRESETS
from cgpt.scaling.flops import flops_per_token
from cgpt.scaling.hyperparameters import LEAST_STEPS, hyperparameters
from cgpt.scaling.published import PUBLISHED, between
from cgpt.scaling.shapes import Family
from cgpt.schedule import tokens_after

GPT2 = Family()
NAMES = [row.name for row in PUBLISHED]


def config(layers, heads, width, family=GPT2):
    return GPTConfig(layers, heads, width, width // heads, 4 * width, family.vocab_size, family.seq_len)


@pytest.mark.parametrize("row", PUBLISHED, ids=NAMES)
def test_the_table_is_the_presets(row):
    preset = PRESETS[row.name]
    shape = preset.config
    assert (row.n_layer, row.d_model, row.params) == (shape.n_layer, shape.d_model, shape.n_params)
    assert (row.tokens, row.lr) == (preset.tokens, preset.lr)
    assert row.batch == preset.batch_schedule[-1][1] * shape.seq_len
    assert row.flops == pytest.approx(flops_per_token(shape).total * preset.tokens, rel=1e-5)


@pytest.mark.parametrize("row", PUBLISHED, ids=NAMES)
def test_published_sizes_have_the_published_shapes(row):
    layers, heads, width = GPT2.nearest(row.params)
    shape = PRESETS[row.name].config
    assert (layers, width) == (shape.n_layer, shape.d_model)
    assert heads == (20 if row.name == "2.7B" else shape.n_head)
    assert GPT2.params(layers, width) == shape.n_params
    assert GPT2.width(row.params) == pytest.approx(width, rel=1e-12)
    total = flops_per_token(config(layers, heads, width)).total
    assert GPT2.flops_per_token(row.params) == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize("params", [2e7, 5e7, 3e8, 9e8, 2e9, 4.5e9, 9e9, 2e10, 7e10, 1.75e11, 1e12])
def test_any_other_size_has_a_shape_close_by_that_tensor_cores_like(params):
    layers, heads, width = GPT2.nearest(params)
    assert config(layers, heads, width).n_params == pytest.approx(params, rel=0.03)
    assert width % (128 if width >= 1536 else 64) == 0
    assert 64 <= width // heads <= 128
    assert width / layers == pytest.approx(between(params, lambda r: r.d_model / r.n_layer, beyond=False), rel=0.4)


@pytest.mark.parametrize("family", [GPT2, Family(256, 128), Family(8000, 512)])
@pytest.mark.parametrize("params", [4.3e5, 1e6, 2e6, 5e6, 2e7])
def test_small_ones_are_within_a_quarter_and_are_models(family, params):
    shape = config(*family.nearest(params), family)  # which checks the numbers
    assert abs(math.log(shape.n_params / params)) < math.log(1.25)
    assert shape.n_layer >= 2
    assert shape.d_head >= 16 or shape.d_model <= 32


@pytest.mark.parametrize(
    ("params", "line"),
    [
        (
            2e5,
            r"parameters: wanted at least 420,200 with a vocabulary of 50257 and 2048 positions, got 2e\+05; --",
        ),
        (6e5, r"parameters: wanted about 843,472, of the nearest shape with a vocabulary of 50257 and 2048"),
        (1e15, r"parameters: wanted at most 1e\+14, got 1e\+15"),
        (0, "params: wanted a number above 0, got 0"),
    ],
)
def test_no_shape_is_one_line(params, line):
    with pytest.raises(InputError, match=line):
        GPT2.nearest(params)


def test_parameters_in_blocks_are_what_tables_leave():
    layers, width = 40, 5120
    params = GPT2.params(layers, width)
    assert GPT2.in_blocks(params) == pytest.approx(params - (50257 + 2048 + 2) * width, rel=1e-12)
    assert GPT2.in_blocks(1e5) < GPT2.in_blocks(1e6)


@pytest.mark.parametrize("row", PUBLISHED, ids=NAMES)
def test_published_models_have_their_published_recipe(row):
    found, preset = hyperparameters(row.params, row.tokens), PRESETS[row.name]
    assert found.batch_schedule == preset.batch_schedule
    assert (found.steps, found.tokens) == (preset.steps, preset.tokens)
    assert (found.lr, found.warmup_tokens, found.adam_eps) == (preset.lr, preset.warmup_tokens, preset.adam_eps)


@pytest.mark.parametrize("params", [1e6, 2e7, 3e8, 3e9, 9e10])
@pytest.mark.parametrize("ratio", [2, 20, 300])
def test_a_recipe_is_whole_steps_of_about_the_tokens(params, ratio):
    tokens = ratio * params
    found = hyperparameters(params, tokens, 512)
    assert found.tokens == tokens_after(found.steps, found.batch_schedule, 512)
    assert found.tokens == pytest.approx(tokens, rel=0.002)
    assert found.warmup_tokens <= min(375e6, found.tokens / 5)
    assert found.warmup_tokens % (found.batch_schedule[0][1] * 512) == 0
    assert found.steps >= 0.95 * LEAST_STEPS


def test_larger_models_learn_more_slowly_from_larger_batches():
    sizes = [3e6, 5e7, 4e8, 2e9, 2e10, 2e11]
    found = [hyperparameters(params, 20 * params) for params in sizes]
    assert [row.lr for row in found] == sorted((row.lr for row in found), reverse=True)
    assert [row.batch_schedule[-1][1] for row in found] == sorted(row.batch_schedule[-1][1] for row in found)


def test_beyond_the_table_the_trend_goes_on_from_its_end():
    last = PUBLISHED[-1]
    assert between(last.params, lambda row: row.lr) == pytest.approx(last.lr)
    slope = math.log(between(1e12, lambda r: r.lr) / between(1e11, lambda r: r.lr)) / math.log(10)
    assert slope == pytest.approx(-0.364, abs=0.001)  # least squares through all seven
    assert between(1e12, lambda row: row.lr, beyond=False) == pytest.approx(last.lr)


def test_a_run_of_a_single_sequence():
    found = hyperparameters(1e6, 100, 128)
    assert (found.batch_schedule, found.steps, found.tokens, found.warmup_tokens) == (((0, 1),), 1, 128, 0)
