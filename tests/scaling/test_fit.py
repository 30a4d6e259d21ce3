"""Fits find again the laws that made their points, published or made up, with honest intervals."""

from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import least_squares

from cgpt.errors import InputError
from cgpt.model.presets import PRESETS
from cgpt.scaling.fit import fit, fit_power
from cgpt.scaling.flops import flops_per_token
from cgpt.scaling.laws import LAWS, ParametricLaw
from cgpt.scaling.points import Points, read_points

LOSSES = {"111M": 2.608, "256M": 2.349, "590M": 2.181, "1.3B": 1.997, "2.7B": 1.834, "6.7B": 1.704, "13B": 1.572}
MUP_LOSSES = {"111M": 2.588, "256M": 2.359, "590M": 2.155, "1.3B": 1.984, "2.7B": 1.846}
ROUNDED = [2.6e18, 1.3e19, 6.1e19, 2.8e20, 1.1e21, 6.3e21, 2.3e22]  # FLOPs as the paper prints them
CHINCHILLA = Path(__file__).parent / "chinchilla.csv"
REFIT = LAWS["chinchilla-refit"]
UNEVEN = ParametricLaw(name="uneven", source="", E=1.8, A=400.0, B=3000.0, alpha=0.3, beta=0.4)


def published(losses):
    flops = [flops_per_token(PRESETS[name].config).total * PRESETS[name].tokens for name in losses]
    return Points(loss=np.array(list(losses.values())), flops=np.array(flops), source="published")


def scattered(law, seed, count=240, noise=0.005):
    """Runs of all sizes and ratios, their losses off by `noise`, relative, one sigma."""
    rng = np.random.default_rng(seed)
    params = 10 ** rng.uniform(7.5, 10, count)
    tokens = params * 10 ** rng.uniform(0.3, 2.3, count)
    loss = law.loss(params, tokens) * np.exp(rng.normal(0, noise, count))
    return Points(loss=loss, params=params, tokens=tokens, source="scattered")


def at_equal_flops(law, seed, noise):
    rng = np.random.default_rng(seed)
    flops = np.repeat(np.geomspace(1e18, 1e21, 5), 9)
    params = law.optimal(flops)[0] * np.tile(np.geomspace(0.2, 5, 9), 5)
    loss = law.loss(params, flops / (6 * params)) * np.exp(rng.normal(0, noise, 45))
    return Points(loss=loss, params=params, flops=flops, source="equal")


def curves(law, seed, noise, sizes=10):
    rng = np.random.default_rng(seed)
    params = np.repeat(np.geomspace(3e7, 1e10, sizes), 50)
    tokens = params * np.tile(np.geomspace(1, 300, 50), sizes)
    loss = law.loss(params, tokens) * np.exp(rng.normal(0, noise, len(params)))
    return Points(loss=loss, params=params, tokens=tokens, source="curves")


def huber(law, points):
    """Chinchilla's objective as it is written down (Hoffmann et al. 2022, appendix D.3)."""
    residual = np.abs(np.log(law.loss(points.params, points.tokens)) - np.log(points.loss))
    return np.where(residual <= 1e-3, residual**2 / 2, 1e-3 * (residual - 5e-4)).sum()


@pytest.mark.parametrize(
    ("points", "scale", "exponent", "constant"),
    [
        (published(LOSSES), 5.513e22, 0.0740, 0.5127),
        (Points(loss=np.array(list(LOSSES.values())), flops=np.array(ROUNDED)), 6.471e22, 0.0733, 0.5013),
    ],
    ids=["exact FLOPs", "rounded FLOPs"],
)
def test_power_law_of_the_published_losses(points, scale, exponent, constant):
    """An independent least-squares fit on the loss; the published law, 5.984e22, 0.0737, 0.5066, lies between."""
    found = fit(points, "power", bootstrap=0)
    assert found.coefficients["scale"] == pytest.approx(scale, rel=1e-3)
    assert found.coefficients["exponent"] == pytest.approx(exponent, abs=5e-5)
    assert found.coefficients["constant"] == pytest.approx(constant, abs=5e-5)
    assert found.residual < 0.008
    assert found.intervals == {}


def test_the_mup_law_is_what_its_losses_give():
    found = fit(published(MUP_LOSSES), "power", bootstrap=0).coefficients
    law = LAWS["cerebras-mup"]
    assert (found["exponent"], found["constant"]) == pytest.approx((law.exponent, law.constant), abs=5e-5)
    assert found["scale"] == pytest.approx(law.scale, rel=5e-4)


@pytest.mark.parametrize(("scale", "exponent", "constant"), [(1e20, 0.05, 0.0), (3e19, 0.18, 1.8), (1e15, 0.9, 2.5)])
def test_power_law_without_noise(scale, exponent, constant):
    flops = np.geomspace(1e17, 1e22, 9)
    found = fit_power(flops, (flops / scale) ** -exponent + constant)
    assert found == pytest.approx((scale, exponent, constant), rel=1e-4, abs=1e-6)


def test_no_loss_below_zero_is_foretold():
    """Losses that bend down: the best constant would be under zero."""
    flops = np.geomspace(1e17, 1e22, 9)
    loss = 3.0 - 0.05 * np.log(flops / 1e17) ** 1.2
    scale, exponent, constant = fit_power(flops, loss)
    assert constant == 0
    best = least_squares(lambda x: np.exp(x[0] - x[1] * np.log(flops / 1e19)) - loss, (1.0, 0.05), xtol=1e-12)
    assert exponent == pytest.approx(best.x[1], rel=1e-5)
    assert (1e19 / scale) ** -exponent == pytest.approx(np.exp(best.x[0]), rel=1e-5)


def test_parametric_lands_on_the_published_refit():
    points = read_points([CHINCHILLA])
    assert len(points) == 240
    found = fit(points, "parametric", bootstrap=200)
    for name, near in {"E": 0.002, "alpha": 0.002, "beta": 0.002, "A": 15, "B": 60}.items():
        assert found.coefficients[name] == pytest.approx(getattr(REFIT, name), abs=near), name
    assert huber(found.law(), points) <= huber(REFIT, points)
    published = {"E": (1.769, 1.871), "alpha": (0.317, 0.373), "beta": (0.331, 0.415)}  # 95 % of 4000 bootstraps
    for name, ends in published.items():
        assert found.intervals[name] == pytest.approx(ends, abs=0.012), name
    assert found.intervals["a"][0] < 0.5 < found.intervals["a"][1]


def test_parametric_finds_the_law_inside_its_intervals():
    """95 % intervals: of all coefficients over all seeds at least nine in ten hold the truth."""
    inside = []
    for seed in range(6):
        found = fit(scattered(REFIT, seed), "parametric", bootstrap=100, seed=seed)
        truth = {name: getattr(REFIT, name) for name in found.coefficients}
        assert found.coefficients["alpha"] == pytest.approx(REFIT.alpha, abs=0.03)
        assert found.coefficients["beta"] == pytest.approx(REFIT.beta, abs=0.03)
        assert found.residual == pytest.approx(0.005, rel=0.15)
        inside += [low <= truth[name] <= high for name, (low, high) in found.intervals.items()]
    assert len(inside) == 6 * 7
    assert np.mean(inside) >= 0.9


@pytest.mark.parametrize("law", [REFIT, LAWS["chinchilla"], UNEVEN], ids=lambda law: law.name)
def test_parametric_without_noise(law):
    found = fit(scattered(law, 0, 40, noise=0), "parametric", bootstrap=0)
    for name in ("E", "A", "B", "alpha", "beta"):
        assert found.coefficients[name] == pytest.approx(getattr(law, name), rel=1e-3), name
    assert found.coefficients["a"] == pytest.approx(law.a, rel=1e-3)
    foretold = found.predict(1e24)
    assert (foretold.params[0, 0], foretold.tokens[0, 0]) == pytest.approx(law.optimal(1e24), rel=0.01)
    assert foretold.loss[0, 0] == pytest.approx(law.loss_at_compute(1e24), rel=1e-4)
    assert found.law().loss_at_compute(1e24) == pytest.approx(foretold.loss[0, 0], rel=1e-12)


def test_nothing_near_a_parametric_fit_is_better():
    points = scattered(REFIT, 3)
    law = fit(points, "parametric", bootstrap=0).law()
    best = huber(law, points)
    for name in ("E", "A", "B", "alpha", "beta"):
        for factor in (0.999, 1.001):
            other = ParametricLaw(**{**vars(law), name: factor * getattr(law, name)})
            assert huber(other, points) > best


def test_a_few_wild_points_change_little():
    points = scattered(REFIT, 1)
    loss = points.loss.copy()
    loss[:5] *= 1.5
    calm = fit(points, "parametric", bootstrap=0).coefficients
    wild = fit(Points(loss=loss, params=points.params, tokens=points.tokens), "parametric", bootstrap=0).coefficients
    assert wild["alpha"] == pytest.approx(calm["alpha"], abs=0.01)
    assert wild["E"] == pytest.approx(calm["E"], abs=0.02)


@pytest.mark.parametrize("law", [REFIT, LAWS["chinchilla"], UNEVEN], ids=lambda law: law.name)
@pytest.mark.parametrize(("method", "noise", "bar"), [("isoflop", 0, 1e-6), ("isoflop", 0.002, 0.01)])
def test_isoflop_finds_the_exponents(law, method, noise, bar):
    found = fit(at_equal_flops(law, 0, noise), method)
    assert found.coefficients["a"] == pytest.approx(law.a, abs=bar)
    assert found.coefficients["a"] + found.coefficients["b"] == pytest.approx(1, abs=1e-9)  # C = 6 N D
    low, high = found.intervals["a"]
    assert low < law.a < high
    assert high - low < 0.03
    params = law.optimal(1e22)[0]
    assert found.predict(1e22).params[0, 0] == pytest.approx(params, rel=0.15)
    assert found.predict(1e22).loss[0, 0] == pytest.approx(law.loss_at_compute(1e22), rel=0.01)


@pytest.mark.parametrize("law", [REFIT, LAWS["chinchilla"], UNEVEN], ids=lambda law: law.name)
@pytest.mark.parametrize(("noise", "bar"), [(0, 0.001), (0.0005, 0.005)])
def test_envelope_finds_the_exponents(law, noise, bar):
    found = fit(curves(law, 0, noise), "envelope", bootstrap=0)
    assert found.coefficients["a"] == pytest.approx(law.a, abs=bar)
    inside = np.sqrt(found.optima.flops[0] * found.optima.flops[-1])
    assert found.predict(inside).params[0, 0] == pytest.approx(law.optimal(inside)[0], rel=0.05)
    assert found.predict(inside).loss[0, 0] == pytest.approx(law.loss_at_compute(inside), rel=0.002)


def test_the_envelopes_intervals_hold_the_truth_where_runs_differ_as_a_whole():
    """What separates runs, such as their seeds, moves whole curves: points drawn one by one would not show it."""
    for seed in range(4):
        points = curves(REFIT, seed, 0.0005)
        of_runs = np.random.default_rng(seed).normal(0, 0.002, 10)
        points = Points(loss=points.loss * np.exp(np.repeat(of_runs, 50)), params=points.params, tokens=points.tokens)
        low, high = fit(points, "envelope", bootstrap=60).intervals["a"]
        assert low < REFIT.a < high
        assert high - low < 0.15


def test_the_rim_of_what_was_tried_is_no_optimum():
    """Budgets whose best size lies beyond all sizes tried are left out, and said to be."""
    points = at_equal_flops(REFIT, 0, 0)
    cut = points.params < 1.2 * REFIT.optimal(1e21)[0]  # leaves the largest budget hardly a size above its best
    cut &= (points.flops < 9e20) | (points.params < 0.9 * REFIT.optimal(1e21)[0])
    found = fit(Points(loss=points.loss[cut], params=points.params[cut], flops=points.flops[cut]), "isoflop")
    assert len(found.optima.flops) == 4
    assert any(note.startswith("1e+21 FLOPs left out") for note in found.notes)
    assert found.coefficients["a"] == pytest.approx(REFIT.a, abs=0.01)
    sizes = np.unique(curves(REFIT, 0, 0).params)
    envelope = fit(curves(REFIT, 0, 0), "envelope", bootstrap=0).optima
    assert sizes[0] < envelope.params.min() <= envelope.params.max() < sizes[-1]


@pytest.mark.parametrize("method", ["power", "isoflop", "envelope", "parametric"])
def test_the_seed_is_all_that_intervals_depend_on(method):
    made = {"isoflop": at_equal_flops, "envelope": curves}.get(method)
    points = made(REFIT, 0, 0.001) if made else scattered(REFIT, 0, 60)
    one, same, other = (fit(points, method, bootstrap=12, seed=seed) for seed in (1, 1, 2))
    assert one.intervals == same.intervals
    assert one.coefficients == other.coefficients
    assert one.intervals != other.intervals
    assert one.bootstraps == 12
    band = one.predict([1e22, 1e24]).loss
    assert band.shape == (3, 2)
    assert (band[1] <= band[0]).all()
    assert (band[0] <= band[2]).all()


def test_intervals_narrow_with_the_root_of_the_number_of_points():
    few, many = (fit(scattered(REFIT, 0, count), "parametric", bootstrap=100).intervals["E"] for count in (120, 1080))
    assert (few[1] - few[0]) / (many[1] - many[0]) == pytest.approx(3, rel=0.4)


def test_an_exponent_that_the_points_leave_open_is_named():
    points = scattered(REFIT, 0, 40)
    of_size_alone = Points(loss=2 + 400 * points.params**-0.34, params=points.params, tokens=points.tokens)
    found = fit(of_size_alone, "parametric", bootstrap=0)
    assert found.coefficients["alpha"] == pytest.approx(0.34, rel=1e-6)
    assert found.notes[-1] == "beta means nothing: the points leave it open"
    assert not any("means nothing" in note for note in fit(points, "parametric", bootstrap=0).notes)


def test_the_order_of_points_does_not_matter():
    points = scattered(REFIT, 0, 60)
    turned = Points(loss=points.loss[::-1], params=points.params[::-1], tokens=points.tokens[::-1])
    one, other = (fit(some, "parametric", bootstrap=0).coefficients for some in (points, turned))
    assert one == pytest.approx(other, rel=1e-4)


def test_an_exact_fit_claims_no_interval():
    points = Points(loss=np.array([3.0, 2.5, 2.3]), flops=np.array([1e18, 1e19, 1e20]))
    found = fit(points, "power")
    assert found.intervals == {}
    assert any("as many points as coefficients" in note for note in found.notes)
    assert np.isnan(found.predict(1e21).loss[1:]).all()


def test_only_a_fit_of_the_loss_is_a_law():
    law = fit(published(LOSSES), "power", bootstrap=0).law()
    assert law.loss_at_compute(2.3e22) == pytest.approx(1.572, rel=0.01)
    with pytest.raises(InputError, match="fitted: wanted a law in parameters and tokens, got one in FLOPs alone"):
        law.optimal(1e20)
    with pytest.raises(InputError, match="--method: wanted power or parametric for a law of the loss, got isoflop"):
        fit(at_equal_flops(REFIT, 0, 0), "isoflop", bootstrap=0).law()


def line(count, **columns):
    return Points(**{"loss": np.linspace(3, 2, count), **columns}, source="points.csv")


TWENTY = np.geomspace(1e8, 1e10, 8)


@pytest.mark.parametrize(
    ("points", "method", "wanted"),
    [
        (line(1, flops=[1e18]), "power", "points.csv: wanted at least 3 points for power, got 1"),
        (line(4, params=[1e8] * 4, tokens=[1e9] * 4), "parametric", "wanted at least 5 points for parametric, got 4"),
        (line(8, params=TWENTY, tokens=[1e9] * 8), "parametric", "tokens: wanted at least 3 different numbers, got 1"),
        (line(8, params=TWENTY, tokens=20 * TWENTY), "parametric", "apart from params, got 20 a parameter throughout"),
        (line(3, flops=[1e18, 1e18, 1e19]), "power", "flops: wanted at least 3 different numbers, got 2"),
        (line(3, flops=[1e20, 1e19, 1e18]), "power", "loss: wanted one that falls as FLOPs grow, got one that does no"),
        (
            line(3, flops=[1e18, 1e19, 1e20]),
            "parametric",
            "wanted params, tokens, loss, or two of params, tokens and f",
        ),
        (line(8, params=TWENTY, flops=np.geomspace(1e18, 2e18, 8)), "isoflop", "wanted budgets with gaps between them"),
        (
            line(8, params=TWENTY, flops=[1e18] * 8),
            "isoflop",
            "at least two budgets of FLOPs, .* got 1 and 0 such",
        ),
        (line(8, params=TWENTY, flops=np.geomspace(1e18, 1e20, 8)), "envelope", "curves of at least four sizes, .* 8"),
        (line(2, params=[1e8, 1e8], flops=[1e18, 1e18]), "envelope", "wanted its FLOPs to differ, got some twice"),
        (line(3, flops=[1e18, 1e19, 1e20]), "guess", "--method: wanted one of power, .*, got guess"),
    ],
)
def test_points_that_cannot_carry_a_law_are_one_line(points, method, wanted):
    with pytest.raises(InputError, match=wanted) as caught:
        fit(points, method)
    assert "\n" not in str(caught.value)
