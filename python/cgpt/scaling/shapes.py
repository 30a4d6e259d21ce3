"""From a number of parameters to layers, width and heads, as the published models have them.

    N(L, d) = (V + s)·d + L·(12 d² + 13 d) + 2 d       width / layers: 77 at 111M to 128 at 13B, between them by
                                                       interpolation in log N, beyond them as the last
    d_head 128 from a width of 1536 on, 64 below it; narrower heads where 64 does not divide the width

V vocabulary, s positions, L layers, d width. The same with any real L and d gives FLOPs per token as a smooth function
of N alone, which laws are asked with. At a published N the shape is the published one, but for 2.7B's 32 heads of 80,
which would be 20 of 128. Source: Dey et al. 2023, Cerebras-GPT (arXiv 2304.03208), table 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from cgpt.errors import InputError
from cgpt.scaling.laws import check
from cgpt.scaling.published import between

WIDE = 1536  # from here on heads are 128 wide
HEAD, WIDE_HEAD = 64, 128
LEAST_LAYERS = 2
PARAMS_SLACK, ASPECT_SLACK = 0.01, 0.10  # a hundredth of the parameters is worth a tenth of the aspect
FARTHEST = 0.25  # off in parameters, and no shape is offered
MOST = 1e14  # parameters; past a thousandfold of the published range nothing here is more than arithmetic


@dataclass(frozen=True)
class Family:
    """All GPTs of one vocabulary and length: learned positions, tied head, an MLP of 4 d."""

    vocab_size: int = 50257
    seq_len: int = 2048

    @property
    def rows(self) -> int:
        """Vectors of width d outside the blocks: both tables, and the last norm's two."""
        return self.vocab_size + self.seq_len + 2

    def params(self, n_layer: float, d_model: float) -> float:
        """Parameters, of integers exactly."""
        return self.rows * d_model + n_layer * (12 * d_model * d_model + 13 * d_model)

    def width(self, params: float) -> float:
        """The width, a real number, of `params` parameters at the published ratio of width to layers."""
        check("params", params)
        aspect = _aspect(params)
        d = min(params / self.rows, (params * aspect / 12) ** (1 / 3))  # each alone would be all parameters
        for _ in range(60):  # Newton from the right on a convex cubic: falls to the root and stays
            over = self.params(d / aspect, d) - params
            step = over / (36 * d * d / aspect + 26 * d / aspect + self.rows)
            if step <= 1e-15 * d:
                break
            d -= step
        return d

    def in_blocks(self, params: float) -> float:
        """Of `params` parameters those outside the tables and the last norm, which is what Kaplan et al. count."""
        d = self.width(params)
        return d / _aspect(params) * (12 * d * d + 13 * d)

    def flops_per_token(self, params: float) -> float:
        """The published convention (cgpt.scaling.flops) for a real number of parameters."""
        d = self.width(params)
        layers, head = d / _aspect(params), WIDE_HEAD if d >= WIDE else HEAD
        attention = 24 * layers * self.seq_len * d + 9 * d / head * self.seq_len * layers
        return 72 * layers * d * d + attention + 10 * self.vocab_size * d

    def nearest(self, params: float) -> tuple[int, int, int]:
        """(layers, heads, width) of about `params` parameters, with the width that tensor cores like.

        Raises InputError for more than MOST, and where all shapes are more than a quarter off: the tables alone are too
        large.
        """
        check("params", params)
        if params > MOST:
            raise InputError(f"parameters: wanted at most {MOST:g}, got {params:.4g}")

        def cost(shape: tuple[int, int]) -> float:
            layers, d = shape
            off = math.log(self.params(layers, d) / params) / PARAMS_SLACK
            lean = math.log(d / layers / _aspect(params)) / ASPECT_SLACK
            return off * off + lean * lean

        layers, d = min(self._candidates(params), key=cost)
        if abs(math.log(self.params(layers, d) / params)) > math.log1p(FARTHEST):
            least = self.params(LEAST_LAYERS, 8)
            wanted = (
                f"at least {least:,}" if params < least else f"about {self.params(layers, d):,}, of the nearest shape"
            )
            raise InputError(
                f"parameters: wanted {wanted} with a vocabulary of {self.vocab_size} and {self.seq_len} positions, got "
                f"{params:.4g}; --vocab-size and --seq-len make models smaller and their sizes finer"
            )
        return layers, d // _head(d), d

    def _candidates(self, params: float) -> Iterator[tuple[int, int]]:
        middle = self.width(params)
        for d in _widths(middle / 2, middle * 2):
            layers = (params - self.rows * d) / (12 * d * d + 13 * d)
            for count in {math.floor(layers), math.ceil(layers), round(d / _aspect(params))}:
                yield max(LEAST_LAYERS, count), d


def _widths(low: float, high: float) -> Iterator[int]:
    d = 8
    while d <= max(high, 8):
        if d == 8 or (d >= low and (_head(d) > 8 or d <= 32)):  # eleven heads of 8 are no model
            yield d
        d += 8 if d < 128 else 32 if d < 256 else 64 if d < WIDE else 128


def _head(d: int) -> int:
    """The width of a head: a multiple of 8 that leaves at least two of them, or 8."""
    if d >= WIDE:
        return WIDE_HEAD
    fitting = [head for head in range(8, HEAD + 1, 8) if d % head == 0 and d // head > 1]
    return max(fitting, default=d)


def _aspect(params: float) -> float:
    return between(params, lambda row: row.d_model / row.n_layer, beyond=False)
