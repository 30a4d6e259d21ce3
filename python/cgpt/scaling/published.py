"""Seven models whose training is known in full, and the trends of their hyperparameters.

Dey et al. 2023, Cerebras-GPT (arXiv 2304.03208, tables 1, 6 and 7) and its released configurations: 20 tokens a
parameter of the Pile, GPT-2's vocabulary, sequences of 2048. Losses are the Pile's, of the test split, in nats a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Published:
    """params, tokens: of training. flops: of training, by the published convention. batch: tokens a step, the largest.
    lr: the peak. loss: of the model in its standard form, mup_loss: in muP, where it was trained."""

    name: str
    n_layer: int
    d_model: int
    params: int
    tokens: int
    flops: float
    batch: int
    lr: float
    loss: float
    mup_loss: float | None


# fmt: off
PUBLISHED = (
    Published("111M", 10,  768,    111_050_496,   2_220_933_120, 2.64368e18,  120 * 2048, 6.0e-4, 2.608, 2.588),
    Published("256M", 14, 1088,    255_977_024,   5_119_082_496, 1.27623e19,  264 * 2048, 6.0e-4, 2.349, 2.359),
    Published("590M", 18, 1536,    590_310_912,  11_806_113_792, 6.13036e19,  264 * 2048, 2.0e-4, 2.181, 2.155),
    Published("1.3B", 24, 2048,  1_315_723_264,  26_313_424_896, 2.81554e20,  528 * 2048, 2.0e-4, 1.997, 1.984),
    Published("2.7B", 32, 2560,  2_651_553_280,  53_030_191_104, 1.08349e21,  528 * 2048, 2.0e-4, 1.834, 1.846),
    Published("6.7B", 32, 4096,  6_658_404_352, 133_166_858_240, 6.28209e21, 1040 * 2048, 1.2e-4, 1.704, None),
    Published("13B",  40, 5120, 12_853_386_240, 257_066_680_320, 2.26647e22, 1080 * 2048, 1.2e-4, 1.572, None),
)
# fmt: on


def between(params: float, column: Callable[[Published], float], *, beyond: bool = True) -> float:
    """The number of a model of `params` parameters: in logarithms on the line between the two published neighbours.

    Outside the seven it goes on along the straight line fitted to all of them, shifted to meet the last, or stays that
    of the last with beyond=False. At a published size it is the published number.
    """
    x = np.log([row.params for row in PUBLISHED])
    y = np.log([column(row) for row in PUBLISHED])
    at = float(np.log(params))
    inside = float(np.clip(at, x[0], x[-1]))
    slope = np.polyfit(x - x.mean(), y, 1)[0] if beyond and at != inside else 0.0
    return float(np.exp(np.interp(inside, x, y) + slope * (at - inside)))
