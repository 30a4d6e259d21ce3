"""What is chosen for FLOPs, parameters, tokens and losses, alone and together, by every law."""

import itertools
import json
import math

import numpy as np
import pytest

from cgpt.errors import InputError
from cgpt.model.config import GPTConfig
from cgpt.scaling.flops import flops_per_token
from cgpt.scaling.law_files import FittedLaw, read_law
from cgpt.scaling.laws import LAWS, ComputeLaw
from cgpt.scaling.planner import Point, Wanted, beside, choose, interval, of_family, over_life, settle
from cgpt.scaling.published import PUBLISHED
from cgpt.scaling.shapes import Family

GPT2 = Family()
IN_TWO = [name for name, law in LAWS.items() if not isinstance(law, ComputeLaw)]


def chosen(law=None, **given):
    return choose(Wanted(**given), law and LAWS[law], GPT2)


def numbers(point):
    return {"params": point.params, "tokens": point.tokens, "flops": point.flops, "loss": float(point.loss)}


@pytest.mark.parametrize("flops", [1e19, 2.3e22, 1e25])
@pytest.mark.parametrize("law", LAWS)
def test_each_number_alone_asks_for_the_same_best_use(law, flops):
    whole = numbers(chosen(law, flops=flops))
    assert whole["flops"] == pytest.approx(flops, rel=1e-9)
    assert whole["flops"] == pytest.approx(whole["tokens"] * GPT2.flops_per_token(whole["params"]), rel=1e-9)
    for name in whole:
        assert numbers(chosen(law, **{name: whole[name]})) == pytest.approx(whole, rel=2e-4), name


@pytest.mark.parametrize("law", LAWS)
def test_any_two_numbers_of_a_point_give_it_back(law):
    at = of_family(LAWS[law], GPT2)
    over = 15 if law.startswith("cerebras") else 300  # more tokens than is best, so that the smaller model is the one
    whole = numbers(Point(1e9, over * 1.2e9, at))
    for names in itertools.combinations(whole, 2):
        if set(names) == {"flops", "loss"} and law.startswith("cerebras"):
            continue  # all of its ratios have one loss
        assert numbers(chosen(law, **{name: whole[name] for name in names})) == pytest.approx(whole, rel=1e-6), names
    for names in itertools.combinations(whole, 3):
        assert numbers(chosen(law, **{name: whole[name] for name in names})) == pytest.approx(whole, rel=1e-6), names


@pytest.mark.parametrize("name", ["params", "tokens", "flops", "loss"])
def test_one_number_too_many_is_named(name):
    whole = numbers(chosen("chinchilla", flops=1e21))
    wrong = whole | {name: 1.1 * whole[name]}
    with pytest.raises(InputError, match=r"^--\w+: wanted about \S+, what .* come to, got \S+$") as refusal:
        chosen("chinchilla", **wrong)
    assert str(refusal.value).count("--") == 4


def test_without_a_law_the_published_ratio_is_cerebras_and_others_are_the_refit():
    assert chosen(flops=2.3e22).law.name == "cerebras"
    assert chosen(params=1e9, tokens=2e10).law.name == "cerebras"
    assert chosen(params=1e9, tokens=3e11).law.name == "chinchilla-refit"
    assert chosen(flops=1e22, loss=2.2).law.name == "chinchilla-refit"
    assert chosen(loss=2.3, inference_tokens=1e12).law.name == "chinchilla-refit"


def test_2_3e22_flops_are_13b():
    point = chosen(flops=2.3e22)
    assert point.params == pytest.approx(13e9, rel=0.02)
    assert point.tokens == pytest.approx(20 * point.params)


@pytest.mark.parametrize("law", IN_TWO)
def test_flops_and_a_loss_are_the_smaller_of_two_models(law):
    at = of_family(LAWS[law], GPT2)
    best = chosen(law, flops=1e22)
    point = chosen(law, flops=1e22, loss=1.01 * best.loss)
    assert point.loss == pytest.approx(1.01 * best.loss)
    assert point.flops == pytest.approx(1e22)
    assert point.params < best.params
    assert Point(0.9 * point.params, 1e22 / at.flops_per_token(0.9 * point.params), at).loss > point.loss


@pytest.mark.parametrize("given", [{"flops": 1e21}, {"tokens": 3e10}, {"loss": 2.4}, {"params": 1e9}])
@pytest.mark.parametrize("law", ["cerebras", "chinchilla-refit", "kaplan"])
def test_what_was_given_goes_on_to_hold_for_the_shape(law, given):
    point = chosen(law, **given)
    layers, heads, width = GPT2.nearest(point.params)
    shape = GPTConfig(layers, heads, width, width // heads, 4 * width, 50257, 2048)
    each = flops_per_token(shape).total
    found = settle(point, Wanted(**given), shape.n_params, each)
    assert found.params == shape.n_params
    assert found.flops == pytest.approx(found.tokens * each, rel=1e-12)
    for name, value in given.items():
        if name != "params":
            assert numbers(found)[name] == pytest.approx(value, rel=1e-9)
    if given == {"params": 1e9}:
        assert found.tokens / found.params == pytest.approx(point.tokens / point.params)


def test_kaplan_counts_parameters_without_the_tables():
    point = chosen("kaplan", flops=1e21)
    inside, _ = LAWS["kaplan"].optimal(1e21)
    assert GPT2.in_blocks(point.params) == pytest.approx(inside)
    assert point.loss == pytest.approx(LAWS["kaplan"].loss(inside, point.tokens))
    assert point.params > 1.02 * inside


@pytest.mark.parametrize(
    ("law", "given", "line"),
    [
        (None, {}, "--flops: wanted it, --budget, --params, --tokens or --loss, got none"),
        (None, {"flops": 0}, "--flops: wanted a number above 0, got 0"),
        (None, {"params": -5}, "--params: wanted a number above 0, got -5"),
        (None, {"tokens": math.nan}, "--tokens: wanted a number above 0, got nan"),
        (None, {"loss": 0.4}, r"--loss: wanted more than 0\.5066, its irreducible term in cerebras, got 0\.4: unreach"),
        ("chinchilla", {"loss": 1.69}, r"--loss: wanted more than 1\.6900"),
        ("cerebras", {"params": 1e9, "tokens": 1e12}, "--tokens: wanted about 20 a parameter, all that cerebras knows"),
        (None, {"params": 1e9, "loss": 2.1}, r"--loss: wanted more than 2\.174., the limit of 1e\+09 parameters"),
        (
            "chinchilla",
            {"flops": 1e22, "loss": 2.0},
            r"--loss: wanted at least 2\.1517, the best of 1e\+22 FLOPs",
        ),
        ("cerebras", {"flops": 1e22, "loss": 2.0}, r"--loss: wanted about 1\.648, what --flops 1e\+22 come to, got 2"),
        ("cerebras", {"loss": 2, "inference_tokens": 1e12}, "--law: wanted one of parameters and tokens, got cerebras"),
        (None, {"loss": 2.2, "inference_tokens": 0}, "--inference-tokens: wanted a number above 0, got 0"),
        (None, {"params": 1e300}, r"--params: wanted a number from .* got 1e\+300: unreachable"),
        (None, {"tokens": 0.1}, r"--tokens: wanted a number from .* got 0\.1: unreachable"),
    ],
)
def test_what_cannot_be_is_one_line(law, given, line):
    with pytest.raises(InputError, match=f"^{line}") as refusal:
        chosen(law, **given)
    assert "\n" not in str(refusal.value)


def test_the_best_beside_is_lower_than_the_usual_ratio():
    options = beside(1e24, LAWS["chinchilla"], GPT2)
    assert list(options) == ["20 tokens a parameter", "optimum of chinchilla", "optimum of chinchilla-refit"]
    assert all(point.flops == pytest.approx(1e24) for point in options.values())
    usual, best, refit = options.values()
    assert usual.tokens / usual.params == pytest.approx(20)
    assert best.loss < usual.loss
    assert refit.loss < usual.loss_by(refit.law)
    assert list(beside(1e21, LAWS["cerebras"], GPT2)) == ["20 tokens a parameter", "optimum of chinchilla-refit"]


def test_a_model_for_use_is_smaller_and_trained_longer():
    point = chosen(flops=1e22)
    law, found = over_life(point, 1e13, LAWS["cerebras"], GPT2)
    assert law.name == "chinchilla-refit"
    assert found.loss == pytest.approx(point.loss_by(law))
    assert found.best.params < point.params / 2
    assert found.best.tokens > 2 * point.tokens
    assert found.best.flops < found.usual.flops
    assert 0 < found.break_even < 1e13
    alone = chosen(loss=found.loss, inference_tokens=1e13)
    assert (alone.params, alone.tokens) == pytest.approx((found.best.params, found.best.tokens))


@pytest.mark.parametrize(("law", "column"), [("cerebras", "loss"), ("cerebras-mup", "mup_loss")])
def test_the_interval_holds_the_published_losses(law, column):
    at = of_family(LAWS[law], GPT2)
    for row in PUBLISHED:
        loss = getattr(row, column)
        if loss is None:
            continue
        own = at.counting(lambda _, row=row: row.flops / row.tokens)
        low, high, basis = interval(Point(row.params, row.tokens, own))
        assert low < loss < high
        assert high - low < 0.1 * loss
        assert str(sum(getattr(row, column) is not None for row in PUBLISHED)) in basis


def test_the_interval_by_hand():
    """Prediction interval by the textbook, with derivatives from differences."""
    law, flops = LAWS["cerebras"], np.array([row.flops for row in PUBLISHED])

    def losses(c, at):
        return (at / (5.984e22 * c[0])) ** -(0.0737 * c[1]) + 0.5066 * c[2]

    def slopes(at):
        steps = 1e-5 * np.eye(3)
        return np.stack([(losses(1 + h, at) - losses(1 - h, at)) / 2e-5 for h in steps], axis=-1)

    residuals = losses(np.ones(3), flops) - [row.loss for row in PUBLISHED]
    spread = slopes(1e24) @ np.linalg.inv(slopes(flops).T @ slopes(flops)) @ slopes(1e24)
    half = 2.7764 * math.sqrt(residuals @ residuals / 4 * (1 + spread))  # Student's t, 4 degrees of freedom
    point = chosen("cerebras", flops=1e24)
    low, high, _ = interval(point)
    assert (high - low) / 2 == pytest.approx(half, rel=1e-3)
    assert (high + low) / 2 == pytest.approx(law.loss_at_compute(1e24))


def test_the_interval_widens_away_from_the_data():
    widths = [np.diff(interval(chosen("cerebras", flops=flops))[:2])[0] for flops in (1e21, 1e23, 1e25)]
    assert widths == sorted(widths)
    assert widths[2] > 2 * widths[0]


@pytest.mark.parametrize("law", IN_TWO)
def test_intervals_of_laws_in_two_hold_their_loss(law):
    point = chosen(law, flops=1e23)
    low, high, basis = interval(point)
    assert low <= point.loss <= high
    assert high - low > 0.05
    assert basis


def fit(tmp_path, **changed):
    rows = [{"flops": f, "loss": 2.0, "intervals": {"loss": [2 - w, 2 + w]}} for f, w in ((1e18, 0.02), (1e22, 0.1))]
    row = {"method": "parametric", "source": "runs", "E": 1.5, "A": 300.0, "B": 500.0, "alpha": 0.33, "beta": 0.3}
    row |= {"residual": 0.01, "predictions": rows} | changed
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(row))
    return path


def test_a_law_of_ones_own(tmp_path):
    law = read_law(fit(tmp_path))
    assert (law.name, law.source) == ("mine.json", "fitted to runs")
    assert law.loss(1e9, 1e10) == pytest.approx(1.5 + 300 / 1e9**0.33 + 500 / 1e10**0.3)
    assert law.half_width(1e10) == pytest.approx(math.hypot(0.01, 0.02))
    assert law.half_width(1e20) == pytest.approx(math.hypot(0.03, 0.02))
    assert law.half_width(1e30) == pytest.approx(math.hypot(0.05, 0.02))
    point = choose(Wanted(flops=1e20), law, GPT2)
    assert isinstance(point.law, FittedLaw)
    low, high, _ = interval(point)
    half = math.hypot(0.03, 0.02)
    assert (low, high) == pytest.approx(((1 - half) * point.loss, (1 + half) * point.loss))
    assert "optimum of mine.json" in beside(1e20, law, GPT2)
    assert read_law(fit(tmp_path, predictions=[])).half_width(1e20) == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"method": "power"}, r"wanted a fit of parameters and tokens \(--method parametric\), got power"),
        ({"alpha": -1}, "wanted alpha above 0, got -1"),
        ({"E": "x"}, "a damaged one"),
        ({"predictions": None}, "a damaged one"),
    ],
)
def test_files_that_are_no_law(tmp_path, changed, line):
    with pytest.raises(InputError, match=f"^--law: .*{line}"):
        read_law(fit(tmp_path, **changed))


def test_no_file_is_no_law(tmp_path):
    with pytest.raises(InputError, match="--law: wanted the JSON of `cgpt fit`, got no file"):
        read_law(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(InputError, match="--law: wanted the JSON of `cgpt fit`, got "):
        read_law(tmp_path / "text.json")
