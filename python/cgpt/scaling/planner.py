"""From what is given (FLOPs, parameters, tokens, a loss: one or two of them) to a model, its tokens and its loss.

    one given     the law's best use: of these FLOPs, at this size, for so many tokens, to that loss
    two given     the point that they make; a third must agree

Every law is asked with FLOPs per token of the published convention (cgpt.scaling.flops), as a smooth function of the
parameters, so that a plan's numbers agree with each other: FLOPs = tokens x FLOPs per token. Once there is a shape,
whose parameters are not quite those wanted, tokens are taken again from what was given.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import stdtrit

from cgpt.errors import InputError
from cgpt.scaling.inference import USUAL_RATIO, Comparison, cheapest, compare
from cgpt.scaling.law_files import FittedLaw
from cgpt.scaling.laws import LAWS, ComputeLaw, KaplanLaw, Law, check
from cgpt.scaling.published import PUBLISHED
from cgpt.scaling.shapes import Family

NAMES = ("params", "tokens", "flops", "loss")
AGREES = {"params": 0.02, "tokens": 0.02, "flops": 0.02, "loss": 0.005}  # how far a third number may be off
ANY_RATIO = "chinchilla-refit"  # in place of the default law, which knows 20 tokens a parameter alone
E_INTERVAL = 0.051  # half of the 95 % interval of the refit's E, 1.769 to 1.871 (Besiroglu et al. 2024)
KAPLAN_INTERVAL = 0.1  # his L(N, D) is of models trained to the end, and lies up to a tenth under his frontier
WIDEST = 150.0  # logarithm of the most parameters and FLOPs, and of one through the least, that are looked at


@dataclass(frozen=True)
class Wanted:
    """What is given, None for what is not. loss: in nats per token. inference_tokens: of the model's whole life."""

    flops: float | None = None
    params: float | None = None
    tokens: float | None = None
    loss: float | None = None
    inference_tokens: float | None = None

    @property
    def given(self) -> dict[str, float]:
        """The given ones of NAMES, in that order."""
        return {name: getattr(self, name) for name in NAMES if getattr(self, name) is not None}


@dataclass(frozen=True)
class Point:
    """A model of `params` parameters trained on `tokens` tokens, real numbers. law: asked about it, of `of_family`."""

    params: float
    tokens: float
    law: Law

    @property
    def flops(self) -> float:
        """FLOPs of its training."""
        return self.law.compute(self.params, self.tokens)

    @property
    def loss(self) -> float:
        """Nats per token; by a law of one ratio that of the FLOPs, whose shape may be a little off the ratio."""
        if isinstance(self.law, ComputeLaw):
            return self.law.loss_at_compute(self.flops)
        return self.law.loss(self.params, self.tokens)

    def loss_by(self, law: Law) -> float | None:
        """Nats per token by another law of `of_family`; None where it does not know such a point."""
        try:
            return float(law.loss(self.params, self.tokens))
        except InputError:
            return None


@dataclass(frozen=True, kw_only=True)
class _AllParams(Law):
    """Kaplan's law, whose parameters leave out the tables, in all parameters of a family."""

    law: KaplanLaw
    family: Family

    @property
    def irreducible(self) -> float:
        return self.law.irreducible

    def loss(self, params: float, tokens: float) -> float:
        return self.law.loss(self.family.in_blocks(params), tokens)

    def optimal(self, flops: float) -> tuple[float, float]:
        inside, _ = self.law.optimal(flops)
        params = _rises_to(inside, self.family.in_blocks, (-WIDEST, WIDEST))
        return params, flops / self.flops_per_token(params)


def of_family(law: Law, family: Family) -> Law:
    """`law` in all parameters of `family`, with the published convention's FLOPs per token."""
    count = family.flops_per_token
    if isinstance(law, KaplanLaw):
        return _AllParams(name=law.name, source=law.source, flops_per_token=count, law=law, family=family)
    return law.counting(count)


def choose(wanted: Wanted, law: Law | None, family: Family) -> Point:
    """The point that `wanted` asks for. law: None for cerebras, or ANY_RATIO where cerebras does not know the point.

    A loss alone with inference_tokens gives the point that is cheapest over training and inference together. Raises
    InputError, naming the flag, for numbers that make no point, an unreachable loss, and a third that disagrees.
    """
    given = wanted.given
    if not given:
        raise InputError("--flops: wanted it, --budget, --params, --tokens or --loss, got none")
    with naming_flags():
        for name, value in given.items():
            check(name, value)
        if wanted.inference_tokens is not None:
            check("inference_tokens", wanted.inference_tokens)
        whole_life = wanted.inference_tokens is not None and list(given) == ["loss"]
        if law is not None:
            if whole_life and isinstance(law, ComputeLaw):
                raise InputError(f"--law: wanted one of parameters and tokens, got {law.name}, which knows one ratio")
            return _choose(wanted, of_family(law, family))
        cerebras = of_family(LAWS["cerebras"], family)
        if len(given) == 1 and not whole_life:
            return _choose(wanted, cerebras)
        if not whole_life:
            with contextlib.suppress(InputError):
                return _choose(wanted, cerebras)
        return _choose(wanted, of_family(LAWS[ANY_RATIO], family))


def settle(point: Point, wanted: Wanted, params: int, flops_per_token: float) -> Point:
    """`point` for a shape of `params` parameters whose FLOPs per token are these: what was given goes on to hold.

    Raises InputError where `params` parameters cannot reach the loss.
    """
    law = point.law.counting(lambda _: flops_per_token)
    if wanted.flops is not None:
        tokens = wanted.flops / flops_per_token
    elif wanted.tokens is not None:
        tokens = wanted.tokens
    elif wanted.loss is None:
        tokens = point.tokens / point.params * params
    elif isinstance(law, ComputeLaw):
        tokens = law.compute_for(wanted.loss) / flops_per_token
    else:
        with naming_flags():
            tokens = law.tokens_for(wanted.loss, params)
    return Point(params, tokens, law)


def beside(flops: float, law: Law, family: Family) -> dict[str, Point]:
    """What else `flops` FLOPs could be spent on: the usual ratio, the law's optimum, and ANY_RATIO's."""
    laws = {of.name: of for of in (law, LAWS[ANY_RATIO])}
    usual = Point(*of_family(law, family).spend(flops, USUAL_RATIO), of_family(law, family))
    found = {f"{USUAL_RATIO:g} tokens a parameter": usual}
    for name, one in laws.items():
        if isinstance(one, ComputeLaw) and one.tokens_per_param == USUAL_RATIO:
            continue  # its optimum is the usual ratio by definition
        counted = of_family(one, family)
        found[f"optimum of {name}"] = Point(*counted.optimal(flops), counted)
    return found


def over_life(point: Point, inference_tokens: float, law: Law, family: Family) -> tuple[Law, Comparison]:
    """The cheapest model of the point's quality over training and inference, beside the one at the usual ratio.

    Returns the law that was asked, ANY_RATIO where `law` knows one ratio alone, and its comparison. The quality is that
    law's loss at the point.
    """
    asked = of_family(LAWS[ANY_RATIO] if isinstance(law, ComputeLaw) else law, family)
    return asked, compare(asked, asked.loss(point.params, point.tokens), inference_tokens)


def interval(point: Point) -> tuple[float, float, str]:
    """(low, high, what they rest on) of the point's loss.

    cerebras, cerebras-mup: 95 % prediction interval of the least-squares fit to the published losses, which widens
    beyond them. chinchilla and its refit: both fits, and E's published 95 % interval; the terms' errors were published
    without their correlations. kaplan: from one of his trends to the other. A law of a file: its own. Raises InputError
    for any other.
    """
    law, loss = point.law, float(point.loss)
    if isinstance(law, FittedLaw):
        half = loss * law.half_width(point.flops)
        return loss - half, loss + half, "95 % interval of its bootstraps, and twice its residual"
    if isinstance(law, ComputeLaw) and law.name in ("cerebras", "cerebras-mup"):
        half, count = _prediction_half(law, point.flops)
        return loss - half, loss + half, f"95 % prediction interval of the fit to {count} published losses"
    if law.name in ("chinchilla", "chinchilla-refit"):
        refit = float(LAWS["chinchilla-refit"].loss(point.params, point.tokens))
        ends = (loss, refit - E_INTERVAL, refit + E_INTERVAL)
        return min(ends), max(ends), "both fits to Hoffmann's runs, and the refit's 95 % interval of E"
    if law.name == "kaplan":
        return loss, loss * (1 + KAPLAN_INTERVAL), "his two trends, of converged and of compute-efficient models"
    raise InputError(f"{law.name}: wanted a published law, whose errors are known, got another")


@contextlib.contextmanager
def naming_flags() -> Iterator[None]:
    """Turns `loss: wanted ...` of a law's InputError into `--loss: wanted ...`, as the number came from a flag."""
    try:
        yield
    except InputError as error:
        names = "|".join((*NAMES, "inference_tokens"))
        line = re.sub(rf"^({names}): ", lambda match: f"--{match[1].replace('_', '-')}: ", str(error))
        raise InputError(line) from error


def _choose(wanted: Wanted, law: Law) -> Point:
    given = wanted.given
    if len(given) == 1:
        ((name, value),) = given.items()
        if name == "loss" and wanted.inference_tokens is not None:
            best = cheapest(law, value, wanted.inference_tokens)
            return Point(best.params, best.tokens, law)
        flops = {"flops": lambda: value, "loss": lambda: law.compute_for(value)}.get(name, lambda: None)()
        if flops is None:
            index = ("params", "tokens").index(name)
            try:
                flops = _rises_to(value, lambda flops: law.optimal(flops)[index], (0.0, WIDEST))
            except InputError as error:
                raise InputError(f"{name}: {error}") from error
        return Point(*law.optimal(flops), law)
    point = _of_two(given, law)
    found = {"params": point.params, "tokens": point.tokens, "flops": point.flops}
    found["loss"] = law.loss(point.params, point.tokens)  # which refuses another ratio than the law's
    for name, value in given.items():
        if abs(value / found[name] - 1) > AGREES[name]:
            others = " and ".join(f"--{other} {given[other]:.4g}" for other in given if other != name)
            raise InputError(f"--{name}: wanted about {found[name]:.4g}, what {others} come to, got {value:.4g}")
    return point


def _of_two(given: dict[str, float], law: Law) -> Point:
    """Of the first two of NAMES that are given."""
    values = list(given.values())
    match list(given)[:2]:
        case ["params", "tokens"]:
            return Point(values[0], values[1], law)
        case ["params", "flops"]:
            return Point(values[0], values[1] / law.flops_per_token(values[0]), law)
        case ["params", "loss"]:
            return Point(values[0], law.tokens_for(values[1], values[0]), law)
        case ["tokens", "flops"]:
            per_token = values[1] / values[0]
            params = _rises_to(per_token, law.flops_per_token, (-WIDEST, WIDEST))
            return Point(params, values[0], law)
        case ["tokens", "loss"]:
            return Point(law.params_for(values[1], values[0]), values[0], law)
    return _smallest(values[0], values[1], law)


def _smallest(flops: float, loss: float, law: Law) -> Point:
    """The smallest model that `flops` FLOPs train to `loss`: of two, the one that is cheaper to use."""
    best = Point(*law.optimal(flops), law)
    if isinstance(law, ComputeLaw):
        return best
    if loss < best.loss:
        raise InputError(
            f"loss: wanted at least {best.loss:.4f}, the best of {flops:.4g} FLOPs in {law.name}, got {loss:g}"
        )

    def rises(params: float) -> float:
        return -law.loss(params, flops / law.flops_per_token(params))

    params = _rises_to(-loss, rises, (math.log(best.params) - 20, math.log(best.params)))
    return Point(params, flops / law.flops_per_token(params), law)


def _rises_to(wanted: float, rising: Callable[[float], float], logs: tuple[float, float]) -> float:
    """Where a rising function of a number, whose logarithm is searched between `logs`, comes to `wanted`."""
    low, high = (rising(math.exp(x)) for x in logs)
    if not low <= wanted <= high:
        raise InputError(f"wanted a number from {low:.4g} to {high:.4g}, got {wanted:g}: unreachable")
    return math.exp(brentq(lambda x: rising(math.exp(x)) - wanted, *logs, xtol=1e-12, rtol=1e-14))


def _prediction_half(law: ComputeLaw, flops: float) -> tuple[float, int]:
    """Half the 95 % prediction interval at `flops`, and the number of published losses that the law was fitted to.

    Least squares with three parameters: s² (1 + g' (J'J)^-1 g), J and g the law's derivatives at the points and here.
    """
    rows = [(row.flops, row.mup_loss if law.name.endswith("mup") else row.loss) for row in PUBLISHED]
    at, losses = np.array([row for row in rows if row[1] is not None]).T

    def slopes(flops: np.ndarray) -> np.ndarray:
        x = np.log(flops / law.scale)
        power = np.exp(-law.exponent * x)
        return np.stack((law.exponent * power, -x * power, np.ones_like(x)), axis=-1)

    free = len(losses) - 3
    variance = np.sum((law.loss_at_compute(at) - losses) ** 2) / free
    jacobian, here = slopes(at), slopes(np.array(flops))
    spread = here @ np.linalg.solve(jacobian.T @ jacobian, here)
    return float(stdtrit(free, 0.975) * math.sqrt(variance * (1 + spread))), len(losses)
