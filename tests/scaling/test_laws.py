"""Laws against published numbers, against each other's closed forms, and their inverses against themselves."""

import math
from pathlib import Path

import numpy as np
import pytest

from cgpt.errors import InputError
from cgpt.model.presets import PRESETS
from cgpt.scaling.flops import PF_DAY, flops_per_token
from cgpt.scaling.inference import break_even, cheapest, compare, lifetime
from cgpt.scaling.laws import LAWS, ComputeLaw, ParametricLaw, law_named
from cgpt.scaling.points import read_points

# Pile test losses of Cerebras-GPT in nats per token (arXiv 2304.03208)
LOSSES = {"111M": 2.608, "256M": 2.349, "590M": 2.181, "1.3B": 1.997, "2.7B": 1.834, "6.7B": 1.704, "13B": 1.572}
MUP_LOSSES = {"111M": 2.588, "256M": 2.359, "590M": 2.155, "1.3B": 1.984, "2.7B": 1.846}
IN_TWO = [law for law in LAWS.values() if not isinstance(law, ComputeLaw)]


def train_flops(name):
    return flops_per_token(PRESETS[name].config).total * PRESETS[name].tokens


def per_token(params):
    """Not proportional to the parameters, as attention and vocabulary make it."""
    return 6 * params + 2e5 * params**0.4


@pytest.mark.parametrize(("law", "losses", "bar"), [("cerebras", LOSSES, 0.008), ("cerebras-mup", MUP_LOSSES, 0.0005)])
def test_published_losses(law, losses, bar):
    errors = [LAWS[law].loss_at_compute(train_flops(name)) / loss - 1 for name, loss in losses.items()]
    found = math.sqrt(np.mean(np.square(errors)))
    assert found < bar
    assert LAWS[law].residual == pytest.approx(found, abs=5e-5)


@pytest.mark.parametrize("law", ["chinchilla", "chinchilla-refit"])
def test_how_far_laws_are_from_chinchillas_runs(law):
    points = read_points([Path(__file__).parent / "chinchilla.csv"])
    errors = LAWS[law].loss(points.params, points.tokens) / points.loss - 1
    assert LAWS[law].residual == pytest.approx(math.sqrt(np.mean(errors**2)), abs=5e-5)


def test_the_exact_count_gives_the_published_losses_from_parameters_and_tokens():
    preset = PRESETS["13B"]
    law = LAWS["cerebras"].counting(lambda params: flops_per_token(preset.config).total)
    assert law.loss(preset.config.n_params, preset.tokens) == pytest.approx(LOSSES["13B"], rel=0.01)
    assert law.compute(preset.config.n_params, preset.tokens) == pytest.approx(2.3e22, rel=0.02)


def test_chinchilla_by_hand():
    law = LAWS["chinchilla"]
    assert law.loss(70e9, 1.4e12) == pytest.approx(1.69 + 406.4 / 70e9**0.34 + 410.7 / 1.4e12**0.28)
    assert law.a == pytest.approx(0.28 / 0.62)
    assert law.a + law.b == pytest.approx(1)
    refit = LAWS["chinchilla-refit"]
    params, tokens = refit.optimal(5.76e23)  # Chinchilla's own budget, which the refit spends as Chinchilla did
    assert 15 < tokens / params < 26
    assert refit.a == pytest.approx(0.513, abs=0.001)  # Besiroglu et al. 2024


def test_kaplan_by_hand():
    law = LAWS["kaplan"]
    params, tokens = law.optimal(100 * PF_DAY)
    assert params == pytest.approx(1.3e9 * 100**0.73)
    assert 6 * params * tokens == pytest.approx(100 * PF_DAY)
    assert law.loss_of_params(8.8e13) == law.loss_of_tokens(5.4e13) == law.loss_of_compute(3.1e8 * PF_DAY) == 1
    assert law.loss(1e9, 1e60) == pytest.approx((6.4e13 / 1e9) ** 0.076)
    assert law.loss(1e60, 1e9) == pytest.approx((1.8e13 / 1e9) ** 0.103)
    for days in (1e-3, 1, 1e3):
        assert law.loss_at_compute(days * PF_DAY) == pytest.approx(law.loss_of_compute(days * PF_DAY), rel=0.15)


@pytest.mark.parametrize("count", [None, per_token])
@pytest.mark.parametrize("name", LAWS)
def test_every_inverse_comes_back(name, count):
    law = LAWS[name] if count is None else LAWS[name].counting(count)
    for flops in (1e17, 3e20, 1e26):
        params, tokens = law.optimal(flops)
        loss = law.loss(params, tokens)
        assert law.compute(params, tokens) == pytest.approx(flops, rel=1e-9)
        assert law.loss_at_compute(flops) == pytest.approx(loss, rel=1e-12)
        assert law.compute_for(loss) == pytest.approx(flops, rel=1e-6)
        assert law.tokens_for(loss, params) == pytest.approx(tokens, rel=1e-6)
        assert law.params_for(loss, tokens) == pytest.approx(params, rel=1e-6)
        assert law.reach(loss, tokens / params) == pytest.approx((params, tokens), rel=1e-6)
        assert law.spend(flops, tokens / params) == pytest.approx((params, tokens), rel=1e-6)


@pytest.mark.parametrize("count", [None, per_token])
def test_the_optimum_is_the_lowest_of_its_neighbours(count):
    law = LAWS["chinchilla-refit"] if count is None else LAWS["chinchilla-refit"].counting(count)
    params, tokens = law.optimal(1e21)
    for factor in (0.9, 0.99, 1.01, 1.1):
        other = factor * params
        assert law.loss(other, 1e21 / law.flops_per_token(other)) > law.loss(params, tokens)


def test_search_and_closed_form_agree():
    law = LAWS["chinchilla"]
    searched = law.counting(lambda params: 6 * params)
    assert searched.optimal(1e22) == pytest.approx(law.optimal(1e22), rel=1e-5)


def test_arrays_go_through():
    budgets = np.array([1e18, 1e20, 1e22])
    for law in LAWS.values():
        each = [law.loss_at_compute(flops) for flops in budgets]
        assert law.loss_at_compute(budgets) == pytest.approx(each, rel=1e-14)
        assert all(np.diff(each) < 0)


@pytest.mark.parametrize(
    ("ask", "line"),
    [
        (lambda: LAWS["chinchilla"].compute_for(1.69), r"loss: wanted more than 1\.6900, its irreducible term in chin"),
        (lambda: LAWS["cerebras"].compute_for(0.5), r"loss: wanted more than 0\.5066, its .* got 0\.5: unreachable"),
        (lambda: LAWS["chinchilla"].tokens_for(2.0, 1e8), r"wanted more than 2\.46.*the limit of 1e\+08 parameters in"),
        (lambda: LAWS["chinchilla"].params_for(2.0, 1e8), r"wanted more than 4\.05.*the limit of 1e\+08 tokens in chi"),
        (lambda: LAWS["kaplan"].tokens_for(1.0, 1e9), r"the limit of 1e\+09 parameters in kaplan, got 1: unreachable"),
        (lambda: LAWS["chinchilla"].optimal(0), "^flops: wanted a number above 0, got 0$"),
        (lambda: LAWS["kaplan"].loss(1e9, -1), "^tokens: wanted a number above 0, got -1$"),
        (lambda: LAWS["kaplan"].compute_for(-1), "^loss: wanted a number above 0, got -1$"),
        (lambda: LAWS["chinchilla"].loss(math.nan, 1), "^params: wanted a number above 0, got nan$"),
        (lambda: LAWS["cerebras"].loss(1e9, 1e12), "^tokens: wanted about 20 a parameter, .* cerebras .* got 1e\\+03$"),
        (lambda: LAWS["cerebras"].tokens_for(2.0, 1e12), "^tokens: wanted about 20 a parameter"),
        (lambda: law_named("moore"), "^--law: wanted one of cerebras, .*, kaplan, got moore$"),
        (lambda: cheapest(LAWS["chinchilla"], 1.5, 0), "loss: wanted more than 1.69"),
        (lambda: cheapest(LAWS["cerebras"], 2.5, 0), "cerebras: wanted a law in parameters and tokens, got one in FL"),
        (lambda: compare(LAWS["kaplan"], 2.5, -1), "inference_tokens: wanted a number of at least 0, got -1"),
    ],
)
def test_what_cannot_be_is_one_line(ask, line):
    with pytest.raises(InputError, match=line) as caught:
        ask()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("law", IN_TWO[:2], ids=lambda law: law.name)
def test_with_no_inference_the_cheapest_is_compute_optimal(law):
    found = cheapest(law, 2.2, 0)
    flops = law.compute_for(2.2)
    assert found.flops == pytest.approx(flops, rel=1e-9)
    assert (found.params, found.tokens) == pytest.approx(law.optimal(flops), rel=1e-4)


@pytest.mark.parametrize("law", IN_TWO, ids=lambda law: law.name)
def test_the_cheapest_beats_its_neighbours_on_the_contour(law):
    found = cheapest(law, 2.4, 1e12)
    assert law.loss(found.params, found.tokens) == pytest.approx(2.4, rel=1e-9)
    assert found.inference_flops == pytest.approx(2 * found.params * 1e12)
    for factor in (0.98, 1.02):
        params = factor * found.params
        assert lifetime(law, params, law.tokens_for(2.4, params), 1e12).flops > found.flops


def test_the_more_is_inferred_the_smaller_the_model():
    sizes = [cheapest(LAWS["chinchilla-refit"], 2.1, tokens).params for tokens in (0, 1e10, 1e12, 1e14)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4


@pytest.mark.parametrize("count", [None, per_token])
def test_both_cost_the_same_at_the_break_even(count):
    law = LAWS["chinchilla-refit"] if count is None else LAWS["chinchilla-refit"].counting(count)
    found = compare(law, 2.1, 1e13)
    assert found.best.params < found.usual.params
    assert 0 < found.break_even < 1e13
    best, usual = (lifetime(law, at.params, at.tokens, found.break_even) for at in (found.best, found.usual))
    assert best.flops == pytest.approx(usual.flops, rel=1e-12)
    assert found.usual.tokens == pytest.approx(20 * found.usual.params)
    assert found.to_dict()["best"]["flops"] == found.best.flops < found.usual.flops


def test_a_smaller_model_that_is_cheaper_to_train_breaks_even_at_once():
    law = ParametricLaw(name="x", source="", E=1.0, A=10.0, B=1e4, alpha=0.3, beta=0.3)  # far more tokens than 20
    found = compare(law, 2.0, 0)
    assert found.best.params < found.usual.params
    assert found.break_even == 0
    assert break_even(law, found.best, found.best) == 0
