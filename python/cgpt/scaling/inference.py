"""The cheapest model of a given quality once it has been used as well as trained.

    minimise over N    flops_per_token(N) · (D + T / 3)    where the law gives D: loss(N, D) = the loss wanted

T is the tokens that will be read or written in the model's life, each a forward pass, a third of a training token.
T = 0 gives the law's compute-optimal point; the more is inferred, the smaller the model and the longer its training.
Source of the idea: Sardana et al. 2024 (arXiv 2401.00448); Dey et al. 2023 (arXiv 2304.03208).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from scipy.optimize import minimize_scalar

from cgpt.errors import InputError
from cgpt.scaling.laws import ComputeLaw, Law, check

USUAL_RATIO = 20.0  # tokens a parameter, what a train + inference optimum is compared with
ENDLESS = 1e60  # tokens


@dataclass(frozen=True)
class Lifetime:
    """A model and what it costs. params, tokens: of training. train_flops, inference_flops: FLOPs over its life."""

    params: float
    tokens: float
    train_flops: float
    inference_flops: float

    @property
    def flops(self) -> float:
        """FLOPs of training and inference together."""
        return self.train_flops + self.inference_flops


@dataclass(frozen=True)
class Comparison:
    """`best` for its lifetime beside `usual`, which reaches the same loss at 20 tokens a parameter.

    break_even: tokens of inference from which on the smaller of the two is the cheaper; 0 where it always is.
    """

    loss: float
    inference_tokens: float
    best: Lifetime
    usual: Lifetime
    break_even: float

    def to_dict(self) -> dict:
        """JSON values."""
        found = asdict(self)
        for name, lifetime in (("best", self.best), ("usual", self.usual)):
            found[name]["flops"] = lifetime.flops
        return found


def lifetime(law: Law, params: float, tokens: float, inference_tokens: float) -> Lifetime:
    """Costs of `params` parameters, trained on `tokens` tokens and used for `inference_tokens`, which may be 0.

    Raises InputError for numbers that are none of these.
    """
    if not 0 <= inference_tokens < math.inf:
        raise InputError(f"inference_tokens: wanted a number of at least 0, got {inference_tokens:g}")
    train = law.compute(params, tokens)
    return Lifetime(params, tokens, train, inference_tokens * law.flops_per_token(params) / 3)


def cheapest(law: Law, loss: float, inference_tokens: float) -> Lifetime:
    """The parameters and tokens that reach `loss` nats per token with the fewest FLOPs of training and inference.

    Raises InputError for a loss that the law cannot reach, and for a law that knows one ratio of tokens to parameters.
    """
    if isinstance(law, ComputeLaw):
        raise InputError(f"{law.name}: wanted a law in parameters and tokens, got one in FLOPs alone")
    least = law.params_for(loss, ENDLESS)  # the loss asks for more than these, whatever the tokens

    def at(log_excess: float) -> Lifetime:
        params = least * (1 + math.exp(log_excess))
        return lifetime(law, params, law.tokens_for(loss, params), inference_tokens)

    found = minimize_scalar(lambda x: math.log(at(x).flops), bounds=(-25, 25), options={"xatol": 1e-9})
    return at(found.x)


def compare(law: Law, loss: float, inference_tokens: float, tokens_per_param: float = USUAL_RATIO) -> Comparison:
    """`cheapest` beside the point of the same loss at `tokens_per_param`. Raises what `cheapest` raises."""
    check("tokens_per_param", tokens_per_param)
    best = cheapest(law, loss, inference_tokens)
    usual = lifetime(law, *law.reach(loss, tokens_per_param), inference_tokens)
    return Comparison(loss, inference_tokens, best, usual, break_even(law, best, usual))


def break_even(law: Law, one: Lifetime, other: Lifetime) -> float:
    """Tokens of inference from which on the smaller of two models of one loss is the cheaper; 0 where it always is."""
    small, large = sorted((one, other), key=lambda model: model.params)
    saved = (law.flops_per_token(large.params) - law.flops_per_token(small.params)) / 3  # a token of inference
    dearer = small.train_flops - large.train_flops
    return max(0.0, dearer / saved) if saved else 0.0
