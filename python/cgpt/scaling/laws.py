"""Scaling laws: the loss that a model of N parameters reaches on D tokens, and what is best for a budget of C FLOPs.

    ParametricLaw   L(N, D) = E + A / N^alpha + B / D^beta                    Hoffmann et al. 2022, equation 2
    ComputeLaw      L(C) = (C / scale)^-exponent + constant, at D = 20 N      Dey et al. 2023, equation 1
    KaplanLaw       L(N, D) = [(N_c / N)^(alpha_N / alpha_D) + D_c / D]^alpha_D, N ~ C^0.73     Kaplan et al. 2020

N counts parameters, D tokens seen in training, C FLOPs of training; L is in nats per token, of the law's own data and
tokenizer. C = D · flops_per_token(N), which is 6·N·D unless a law is given another count.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import brentq, minimize_scalar

from cgpt.errors import InputError
from cgpt.scaling.flops import PF_DAY, six_n

WIDEST = math.log(1e60)  # no number of parameters, tokens or FLOPs is looked for beyond
RATIO_SLACK = 1.25  # how far from its tokens per parameter a ComputeLaw still answers: losses are flat there


@dataclass(frozen=True, kw_only=True)
class Law(ABC):
    """What every law answers. Numbers are floats; `loss` and `loss_at_compute` take arrays too.

    name, source: for people. flops_per_token: FLOPs of training on one token, given the parameters. residual: r.m.s.
    relative error of the loss over the runs that the law was fitted to, None where these are not known; what it
    foretells outside their range is less sure.

    All methods raise InputError for what is not above 0, and, asked for a loss, for one that cannot be reached.
    """

    name: str
    source: str
    flops_per_token: Callable[[float], float] = six_n
    residual: float | None = None

    def counting(self, flops_per_token: Callable[[float], float]) -> Law:
        """This law with another count of FLOPs per token, such as a family's exact one."""
        return replace(self, flops_per_token=flops_per_token)

    @property
    @abstractmethod
    def irreducible(self) -> float:
        """The loss in nats per token that no budget gets below; 0 where the law has no such term."""

    @abstractmethod
    def loss(self, params: float, tokens: float) -> float:
        """Nats per token of `params` parameters trained on `tokens` tokens."""

    @abstractmethod
    def optimal(self, flops: float) -> tuple[float, float]:
        """(parameters, tokens) that spend `flops` FLOPs on the lowest loss, or as the law's authors would."""

    def compute(self, params: float, tokens: float) -> float:
        """FLOPs of training `params` parameters on `tokens` tokens."""
        check("params", params)
        check("tokens", tokens)
        return self.flops_per_token(params) * tokens

    def loss_at_compute(self, flops: float) -> float:
        """Nats per token of the best use of `flops` FLOPs."""
        return self.loss(*self.optimal(flops))

    def compute_for(self, loss: float) -> float:
        """The least FLOPs that reach `loss` nats per token."""
        self._reachable(loss, self.irreducible, "its irreducible term")
        return _falls_to(loss, self.loss_at_compute)

    def tokens_for(self, loss: float, params: float) -> float:
        """Tokens after which `params` parameters reach `loss` nats per token."""
        check("params", params)
        self._reachable(loss, self.loss(params, math.exp(WIDEST)), f"the limit of {params:.4g} parameters")
        return _falls_to(loss, lambda tokens: self.loss(params, tokens))

    def params_for(self, loss: float, tokens: float) -> float:
        """Parameters that reach `loss` nats per token after `tokens` tokens."""
        check("tokens", tokens)
        self._reachable(loss, self.loss(math.exp(WIDEST), tokens), f"the limit of {tokens:.4g} tokens")
        return _falls_to(loss, lambda params: self.loss(params, tokens))

    def spend(self, flops: float, tokens_per_param: float) -> tuple[float, float]:
        """(parameters, tokens) that spend `flops` FLOPs at so many tokens a parameter."""
        check("flops", flops)
        check("tokens_per_param", tokens_per_param)
        if self.flops_per_token is six_n:
            params = np.sqrt(flops / (6 * tokens_per_param))
        else:
            params = _falls_to(-flops, lambda params: -self.flops_per_token(params) * tokens_per_param * params)
        return params, flops / self.flops_per_token(params)

    def reach(self, loss: float, tokens_per_param: float) -> tuple[float, float]:
        """(parameters, tokens) that reach `loss` nats per token at so many tokens a parameter."""
        check("tokens_per_param", tokens_per_param)
        self._reachable(loss, self.irreducible, "its irreducible term")
        params = _falls_to(loss, lambda params: self.loss(params, tokens_per_param * params))
        return params, tokens_per_param * params

    def _reachable(self, loss: float, limit: float, what: str) -> None:
        check("loss", loss)
        if loss <= limit:
            raise InputError(f"loss: wanted more than {limit:.4f}, {what} in {self.name}, got {loss:g}: unreachable")


@dataclass(frozen=True, kw_only=True)
class ParametricLaw(Law):
    """L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, section 3.3)."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    @property
    def irreducible(self) -> float:
        return self.E

    @property
    def a(self) -> float:
        """Best parameters grow with C^a where C = 6·N·D."""
        return self.beta / (self.alpha + self.beta)

    @property
    def b(self) -> float:
        """Best tokens grow with C^b where C = 6·N·D."""
        return self.alpha / (self.alpha + self.beta)

    def loss(self, params: float, tokens: float) -> float:
        check("params", params)
        check("tokens", tokens)
        return self.E + self.A * np.power(1.0 * params, -self.alpha) + self.B * np.power(1.0 * tokens, -self.beta)

    def optimal(self, flops: float) -> tuple[float, float]:
        """In closed form for 6·N (Hoffmann et al. 2022, equation 4), and then of arrays too; else by search."""
        check("flops", flops)
        ratio = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        params = ratio * np.power(flops / 6, self.a)
        if self.flops_per_token is six_n:
            return params, flops / (6 * params)

        def loss(log_params: float) -> float:
            params = math.exp(log_params)
            return self.loss(params, flops / self.flops_per_token(params))

        middle, reach = math.log(params), math.log(100)
        found = minimize_scalar(loss, bounds=(middle - reach, middle + reach), options={"xatol": 1e-9})
        params = math.exp(found.x)
        return params, flops / self.flops_per_token(params)

    def tokens_for(self, loss: float, params: float) -> float:
        check("params", params)
        limit = self.E + self.A * params**-self.alpha
        self._reachable(loss, limit, f"the limit of {params:.4g} parameters")
        return ((loss - limit) / self.B) ** (-1 / self.beta)

    def params_for(self, loss: float, tokens: float) -> float:
        check("tokens", tokens)
        limit = self.E + self.B * tokens**-self.beta
        self._reachable(loss, limit, f"the limit of {tokens:.4g} tokens")
        return ((loss - limit) / self.A) ** (-1 / self.alpha)


@dataclass(frozen=True, kw_only=True)
class ComputeLaw(Law):
    """L(C) = (C / scale)^-exponent + constant, of models that all saw `tokens_per_param` tokens a parameter.

    scale: FLOPs. tokens_per_param: None where the points behind the law had no one ratio; parameters and tokens are
    then refused. Asked for a loss at a ratio more than a quarter away from its own, the law refuses too.
    """

    scale: float
    exponent: float
    constant: float
    tokens_per_param: float | None = 20.0

    @property
    def irreducible(self) -> float:
        return self.constant

    def loss(self, params: float, tokens: float) -> float:
        flops = self.compute(params, tokens)
        ratio = self._ratio()
        off = np.max(np.abs(np.log(np.asarray(tokens) / params / ratio)))
        if off > math.log(RATIO_SLACK):
            given = np.ravel(np.asarray(tokens) / params)[0]
            raise InputError(
                f"tokens: wanted about {ratio:.3g} a parameter, all that {self.name} knows of, got {given:.3g}"
            )
        return self.loss_at_compute(flops)

    def loss_at_compute(self, flops: float) -> float:
        check("flops", flops)
        return np.power(flops / self.scale, -self.exponent) + self.constant

    def optimal(self, flops: float) -> tuple[float, float]:
        return self.spend(flops, self._ratio())

    def compute_for(self, loss: float) -> float:
        self._reachable(loss, self.constant, "its irreducible term")
        return self.scale * (loss - self.constant) ** (-1 / self.exponent)

    def tokens_for(self, loss: float, params: float) -> float:
        check("params", params)
        tokens = self.compute_for(loss) / self.flops_per_token(params)
        self.loss(params, tokens)  # refuses another ratio
        return tokens

    def params_for(self, loss: float, tokens: float) -> float:
        check("tokens", tokens)
        flops = self.compute_for(loss)
        params = _falls_to(-flops / tokens, lambda params: -self.flops_per_token(params))
        self.loss(params, tokens)
        return params

    def _ratio(self) -> float:
        if self.tokens_per_param is None:
            raise InputError(f"{self.name}: wanted a law in parameters and tokens, got one in FLOPs alone")
        return self.tokens_per_param


@dataclass(frozen=True, kw_only=True)
class KaplanLaw(Law):
    """Kaplan et al. 2020: L(N, D) of equation 1.5 with table 2's constants, and N = n_per_pf_day · (C / PF-day)^0.73.

    N leaves embeddings out. L(N, D) is of models trained until they get no better, so at the best sizes it lies up to
    11 % under `loss_of_compute`, the paper's own trend there (1e-6 to 1e3 PF-days). Tokens are what the budget leaves:
    C / flops_per_token.
    """

    n_c: float = 6.4e13
    alpha_n: float = 0.076
    d_c: float = 1.8e13
    alpha_d: float = 0.103
    n_per_pf_day: float = 1.3e9
    a: float = 0.73

    @property
    def irreducible(self) -> float:
        return 0.0

    @property
    def b(self) -> float:
        """Tokens grow with C^b where C = 6·N·D."""
        return 1 - self.a

    def loss(self, params: float, tokens: float) -> float:
        check("params", params)
        check("tokens", tokens)
        of_params = np.power(self.n_c / params, self.alpha_n / self.alpha_d)
        return np.power(of_params + self.d_c / tokens, self.alpha_d)

    def optimal(self, flops: float) -> tuple[float, float]:
        check("flops", flops)
        params = self.n_per_pf_day * np.power(flops / PF_DAY, self.a)
        return params, flops / self.flops_per_token(params)

    def loss_of_params(self, params: float) -> float:
        """L(N), equation 1.1: tokens without end."""
        check("params", params)
        return np.power(8.8e13 / params, 0.076)

    def loss_of_tokens(self, tokens: float) -> float:
        """L(D), equation 1.2: parameters without end, stopped early."""
        check("tokens", tokens)
        return np.power(5.4e13 / tokens, 0.095)

    def loss_of_compute(self, flops: float) -> float:
        """L(C_min), equation 1.3: the least FLOPs, at a batch far under the critical one."""
        check("flops", flops)
        return np.power(3.1e8 * PF_DAY / flops, 0.050)


def check(name: str, value: Any) -> None:
    """Raises InputError unless `value`, a number or an array, is finite and above 0 throughout."""
    values = np.asarray(value, dtype=float)
    good = np.isfinite(values) & (values > 0)
    if not good.all():
        raise InputError(f"{name}: wanted a number above 0, got {np.ravel(values[~good])[0]:g}")


def _falls_to(wanted: float, falling: Callable[[float], float]) -> float:
    """Where a falling function of a number above 0 comes to `wanted`; its logarithm is what is searched."""
    low, high = falling(math.exp(WIDEST)), falling(math.exp(-WIDEST))
    if not low <= wanted <= high:
        raise InputError(f"wanted a number from {low:.4g} to {high:.4g}, got {wanted:g}: unreachable")
    return math.exp(brentq(lambda x: falling(math.exp(x)) - wanted, -WIDEST, WIDEST, xtol=1e-12, rtol=1e-14))


_DEY = "Dey et al. 2023, Cerebras-GPT (arXiv 2304.03208), equation 1: the Pile, FLOPs by the published convention"
_MUP = "fitted here to the five muP losses of Dey et al. 2023 (arXiv 2304.03208): the Pile, 2.6e18 to 1.1e21 FLOPs"
_HOFFMANN = "Hoffmann et al. 2022 (arXiv 2203.15556), equation 10: MassiveText"
_BESIROGLU = "Besiroglu et al. 2024 (arXiv 2404.10102): 240 of Hoffmann's runs, fitted again"
_KAPLAN = "Kaplan et al. 2020 (arXiv 2001.08361): WebText2"

# fmt: off
_ROWS = (
    ComputeLaw(name="cerebras", source=_DEY, scale=5.984e22, exponent=0.0737, constant=0.5066, residual=0.0071),
    ComputeLaw(name="cerebras-mup", source=_MUP, scale=1.033e22, exponent=0.0801, constant=0.6483, residual=0.0004),
    ParametricLaw(name="chinchilla", source=_HOFFMANN, E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28,
                  residual=0.0194),
    ParametricLaw(
        name="chinchilla-refit", source=_BESIROGLU, E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658,
        residual=0.0075),
    KaplanLaw(name="kaplan", source=_KAPLAN),
)
# fmt: on

LAWS: dict[str, Law] = {law.name: law for law in _ROWS}


def law_named(name: str) -> Law:
    """A law of LAWS. Raises InputError, naming --law, for another name."""
    if name not in LAWS:
        raise InputError(f"--law: wanted one of {', '.join(LAWS)}, got {name}")
    return LAWS[name]
