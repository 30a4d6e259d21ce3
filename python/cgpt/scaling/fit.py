"""Laws from points, with intervals by bootstrap.

    power         loss = (flops / scale)^-exponent + constant        least squares on the loss
    envelope      N = params_scale · C^a, D = tokens_scale · C^b     Chinchilla's approach 1, of training curves
    isoflop       the same                                           approach 2, of sizes at equal FLOPs
    parametric    loss = E + A / N^alpha + B / D^beta                approach 3

Points are drawn with replacement, fitted again as often as asked, and 2.5 % of the answers cut off at either end. For
the envelope whole curves are drawn: with runs that differ by 0.2 %, drawing points of curves gave intervals that held
the truth in 12 % of trials. Sources: Hoffmann et al. 2022 (arXiv 2203.15556), section 3; Efron 1979 for the bootstrap.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar

from cgpt.errors import InputError
from cgpt.scaling.frontiers import Envelope, IsoFlop, Optima
from cgpt.scaling.laws import RATIO_SLACK, ComputeLaw, Law, ParametricLaw
from cgpt.scaling.parametric import NAMES, fit_parametric, left_open
from cgpt.scaling.points import Points

COEFFICIENTS = {  # method: what it finds, the first column of its table
    "power": ("scale", "exponent", "constant"),
    "envelope": ("a", "b", "params_scale", "tokens_scale"),
    "isoflop": ("a", "b", "params_scale", "tokens_scale"),
    "parametric": NAMES,
}
METHODS = tuple(COEFFICIENTS)
NEEDS = {
    "power": ("flops", "loss"),
    "envelope": ("params", "flops", "loss"),
    "isoflop": ("params", "flops", "loss"),
    "parametric": ("params", "tokens", "loss"),
}
INTERVAL = (2.5, 97.5)  # percentiles
EXPONENTS = np.geomspace(1e-3, 5, 150)  # of the power law, from which the search starts
LEAST_OPTIMA = 4  # for a power law of the loss along a frontier: one more than its coefficients
ONE_RATIO = 1.01  # tokens per parameter that vary by less cannot tell alpha from beta


@dataclass(frozen=True)
class Prediction:
    """At budgets `flops` (k,): the best params, tokens and loss, each (3, k): the value, its interval's low and high.

    None for what the method does not tell; low and high are NaN where there was no bootstrap.
    """

    flops: np.ndarray
    params: np.ndarray | None
    tokens: np.ndarray | None
    loss: np.ndarray | None


@dataclass(frozen=True)
class Fitted:
    """What `fit` found.

    coefficients: by name, with `a` and `b` (best N ~ C^a, D ~ C^b) where the method tells. samples: each coefficient of
    every bootstrap, (bootstraps,). optima: of envelope and isoflop. residual: r.m.s. of the loss's relative error, of a
    frontier's optima along it; None where there were too few. notes: what was assumed or left out.
    """

    method: str
    points: Points
    coefficients: dict[str, float]
    samples: dict[str, np.ndarray]
    optima: Optima | None
    residual: float | None
    notes: tuple[str, ...]

    @property
    def bootstraps(self) -> int:
        return len(next(iter(self.samples.values()), ()))

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % of the bootstrap's answers lie from low to high; empty without a bootstrap."""
        bounds = {name: np.percentile(values, INTERVAL) for name, values in self.samples.items()}
        return {name: (float(low), float(high)) for name, (low, high) in bounds.items()}

    def law(self) -> Law:
        """The law as the planner takes it. Raises InputError for envelope and isoflop, which give exponents alone."""
        found = {name: self.coefficients[name] for name in COEFFICIENTS[self.method]}
        found |= {"residual": self.residual}
        source = f"{self.method} fit to {len(self.points)} points of {self.points.source}"
        if self.method == "power":
            return ComputeLaw(name="fitted", source=source, tokens_per_param=_ratio(self.points), **found)
        if self.method == "parametric":
            return ParametricLaw(name="fitted", source=source, **found)
        raise InputError(f"--method: wanted power or parametric for a law of the loss, got {self.method}")

    def predict(self, flops: np.ndarray) -> Prediction:
        """The best use of budgets (k,) in FLOPs, where C = 6·N·D for `parametric`."""
        flops = np.atleast_1d(np.asarray(flops, dtype=np.float64))
        value = _predict(self.method, self.coefficients, flops)
        drawn = _predict(self.method, {name: row[:, None] for name, row in self.samples.items()}, flops)

        def rows(name: str) -> np.ndarray | None:
            if name not in value:
                return None
            ends = np.percentile(drawn[name], INTERVAL, axis=0) if drawn else np.full((2, len(flops)), np.nan)
            return np.vstack((value[name], ends))

        return Prediction(flops, *(rows(name) for name in ("params", "tokens", "loss")))


def fit(points: Points, method: str, bootstrap: int = 200, seed: int = 0) -> Fitted:
    """Fits `points` by `method`, one of METHODS.

    bootstrap: samples for the intervals, 0 for none. seed: of the draws. Raises InputError where the points do not
    carry the method: columns or points missing, or a loss that does not fall.
    """
    if method not in METHODS:
        raise InputError(f"--method: wanted one of {', '.join(METHODS)}, got {method}")
    if bootstrap < 0 or seed < 0:
        raise InputError(f"--bootstrap and --seed: wanted numbers of at least 0, got {bootstrap} and {seed}")
    points = points.completed().needing(*NEEDS[method])
    rng = np.random.default_rng(seed)
    if method in ("envelope", "isoflop"):
        return _fit_frontier(points, method, bootstrap, rng)
    return _fit_loss(points, method, bootstrap, rng)


def fit_power(flops: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """scale (FLOPs), exponent, constant (nats per token, at least 0) as an array (3,), of points (n,).

    For a given exponent the other two follow in closed form, so one number is searched: over a grid, then within it.
    """
    x = np.log(flops)
    middle = x.mean()

    def solve(exponents: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        fall = np.exp(-np.atleast_1d(exponents)[:, None] * (x - middle))
        from_mean = fall - fall.mean(1, keepdims=True)
        height = np.maximum((from_mean @ (loss - loss.mean())) / (from_mean**2).sum(1), 0)
        constant = loss.mean() - height * fall.mean(1)
        below = constant < 0
        height = np.where(below, (fall @ loss) / (fall**2).sum(1), height)
        constant = np.where(below, 0, constant)
        error = ((height[:, None] * fall + constant[:, None] - loss) ** 2).sum(1)
        return error, height, constant

    best = int(solve(EXPONENTS)[0].argmin())
    ends = EXPONENTS[max(best - 1, 0)], EXPONENTS[min(best + 1, len(EXPONENTS) - 1)]
    found = minimize_scalar(
        lambda log: solve(np.exp(log))[0][0], bounds=tuple(np.log(ends)), method="bounded", options={"xatol": 1e-10}
    )
    exponent = float(np.exp(found.x))
    _, height, constant = solve(exponent)
    with np.errstate(divide="ignore"):
        log_scale = middle + np.log(height[0]) / exponent
    return np.array((np.exp(np.clip(log_scale, -700, 700)), exponent, constant[0]))


def _fit_loss(points: Points, method: str, bootstrap: int, rng: np.random.Generator) -> Fitted:
    """power and parametric: a formula for the loss, points drawn one by one."""
    names = COEFFICIENTS[method]
    columns = [getattr(points, name) for name in NEEDS[method]]
    _check_enough(points, method)
    notes = list(points.notes)
    if method == "power":
        found, again = fit_power(*columns), fit_power
        model = (points.flops / found[0]) ** -found[1] + found[2]
    else:
        found = fit_parametric(*columns)
        again = lambda *drawn: fit_parametric(*drawn, start=found)  # noqa: E731
        model = found[0] + found[1] * points.params ** -found[3] + found[2] * points.tokens ** -found[4]
        notes += [f"{name} means nothing: the points leave it open" for name in left_open(found, *columns)]
    drawn = []
    if bootstrap and len(points) <= len(names):
        notes.append(f"no intervals: as many points as coefficients, {len(names)}")
    elif bootstrap:
        drawn = [again(*_drawn(columns, method, rng)) for _ in range(bootstrap)]
    coefficients = dict(zip(names, map(float, found), strict=True))
    samples = {name: np.array(column) for name, column in zip(names, zip(*drawn, strict=True), strict=False)}
    if method == "parametric":
        coefficients |= _exponents(coefficients)
        samples |= _exponents(samples) if samples else {}
    residual = float(np.sqrt(np.mean((model / points.loss - 1) ** 2)))
    return Fitted(method, points, coefficients, samples, None, residual, tuple(notes))


def _fit_frontier(points: Points, method: str, bootstrap: int, rng: np.random.Generator) -> Fitted:
    """envelope and isoflop: optima first, lines through them second."""
    search = Envelope(points) if method == "envelope" else IsoFlop(points)
    notes = points.notes + tuple(search.left_out if isinstance(search, IsoFlop) else ())
    optima = search.optima()
    with_loss = method == "envelope" or len(optima.flops) >= LEAST_OPTIMA
    coefficients = _of_optima(optima, with_loss)
    draws = (search.optima(rng) for _ in range(bootstrap))
    drawn = [_of_optima(sample, with_loss) for sample in draws if sample is not None]
    if len(drawn) < bootstrap:
        drawn, notes = [], (*notes, "no intervals: too few points to draw a part of them")
    samples = {name: np.array([row[name] for row in drawn]) for name in coefficients} if drawn else {}
    residual = None
    if with_loss:
        model = _predict(method, coefficients, optima.flops)["loss"]
        residual = float(np.sqrt(np.mean((model / optima.loss - 1) ** 2)))
    return Fitted(method, points, coefficients, samples, optima, residual, notes)


def _of_optima(optima: Optima, with_loss: bool) -> dict[str, float]:
    found = optima.coefficients()
    if with_loss:
        some = np.unique(np.linspace(0, len(optima.flops) - 1, 60).astype(int))  # of the envelope's many
        found |= dict(
            zip(("scale", "exponent", "constant"), fit_power(optima.flops[some], optima.loss[some]), strict=True)
        )
    return {name: float(value) for name, value in found.items()}


def _predict(method: str, c: dict, flops: np.ndarray) -> dict[str, np.ndarray]:
    """params, tokens and loss at `flops`, as far as the coefficients, numbers or (bootstraps, 1), tell."""
    found = {}
    if method == "parametric" and c:
        log_ratio = (np.log(c["alpha"] * c["A"]) - np.log(c["beta"] * c["B"])) / (c["alpha"] + c["beta"])
        found["params"] = np.exp(log_ratio + c["a"] * np.log(flops / 6))
        found["tokens"] = flops / (6 * found["params"])
        found["loss"] = c["E"] + c["A"] * found["params"] ** -c["alpha"] + c["B"] * found["tokens"] ** -c["beta"]
    if "params_scale" in c:
        found["params"] = c["params_scale"] * flops ** c["a"]
        found["tokens"] = c["tokens_scale"] * flops ** c["b"]
    if "scale" in c:
        found["loss"] = (flops / c["scale"]) ** -c["exponent"] + c["constant"]
    return found


def _exponents(c: dict) -> dict:
    """a and b of a parametric law, numbers or arrays (Hoffmann et al. 2022, equation 4)."""
    return {"a": c["beta"] / (c["alpha"] + c["beta"]), "b": c["alpha"] / (c["alpha"] + c["beta"])}


def _check_enough(points: Points, method: str) -> None:
    wanted = len(COEFFICIENTS[method])
    if len(points) < wanted:
        raise InputError(f"{points.source}: wanted at least {wanted} points for {method}, got {len(points)}")
    if method == "power":
        sizes = len(set(points.flops))
        if sizes < 3:
            raise InputError(f"{points.source}: flops: wanted at least 3 different numbers, got {sizes}")
        if np.polyfit(np.log(points.flops), points.loss, 1)[0] > -1e-9:
            raise InputError(f"{points.source}: loss: wanted one that falls as FLOPs grow, got one that does not")
        return
    for name in ("params", "tokens"):
        sizes = len(set(getattr(points, name)))
        if sizes < 3:
            raise InputError(f"{points.source}: {name}: wanted at least 3 different numbers, got {sizes}")
    ratio = points.tokens / points.params
    if ratio.max() < ONE_RATIO * ratio.min():
        raise InputError(
            f"{points.source}: wanted tokens that vary apart from params, got {ratio.mean():.4g} a parameter throughout"
        )


def _drawn(columns: list[np.ndarray], method: str, rng: np.random.Generator) -> list[np.ndarray]:
    """The columns of as many points drawn with replacement, again until there are enough different ones."""
    count = len(columns[0])
    least = len(COEFFICIENTS[method])
    while True:
        rows = rng.integers(count, size=count)
        some = [column[rows] for column in columns]
        if len(set(rows)) >= least and all(len(set(column)) >= 3 for column in some[:-1]):
            return some


def _ratio(points: Points) -> float | None:
    """Tokens per parameter where the points have one, within a law's slack."""
    if points.params is None or points.tokens is None:
        return None
    ratio = points.tokens / points.params
    return float(np.exp(np.log(ratio).mean())) if ratio.max() <= RATIO_SLACK * ratio.min() else None
