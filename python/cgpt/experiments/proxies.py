"""Small models that stand for large ones: a tuned base, and the same model wider, by one parametrization or another.

The base has the published numbers (cgpt.model.parametrization.CEREBRAS) and the asked shape at its smallest width, so
all parametrizations begin from one model, and what tells them apart is what they do with width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cgpt.errors import InputError
from cgpt.model.config import GPTConfig
from cgpt.model.parametrization import CEREBRAS, KINDS, Base, parametrize


def base_of(shape: GPTConfig, lr: float, init_std: float | None = None, embedding_scale: float | None = None) -> Base:
    """`shape` as a base: the published init std, embedding scale and softmax scale (1 / d_head) where none is given."""
    std = CEREBRAS.config.hidden_init_std if init_std is None else init_std
    scale = CEREBRAS.config.embedding_scale if embedding_scale is None else embedding_scale
    config = replace(
        shape,
        embedding_init_std=std,
        hidden_init_std=std,
        residual_init_std=None,
        embedding_scale=scale,
        softmax_scale=1 / shape.d_head,
    )
    return Base(config, lr)


def widened(shape: GPTConfig, width: int) -> GPTConfig:
    """`shape` at another width, with more or fewer heads of the same kind. Raises InputError where none fits."""
    if width < 1 or width % shape.d_head:
        raise InputError(f"--widths: wanted multiples of the heads' {shape.d_head}, got {width}")
    ratio = shape.d_ff / shape.d_model
    return replace(shape, d_model=width, n_head=width // shape.d_head, d_ff=max(8, round(ratio * width / 8) * 8))


def wide(base: Base, kind: str, widths: Sequence[int]) -> list[GPTConfig]:
    """The base at each width, by the rules of `kind`. Raises InputError for an unknown kind."""
    if kind not in KINDS:
        raise InputError(f"--parametrization: wanted one of {', '.join(KINDS)}, got {kind}")
    return [parametrize(widened(base.config, width), kind, base) for width in widths]
