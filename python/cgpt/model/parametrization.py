"""SP, muP and CompleteP as one table: how every number of a model follows from those of a tuned, smaller one.

    number = the base's number · m^a · k^b · l^c        m = d_model / base's, k = d_head / base's, l = n_layer / base's

At the base's shape all three are the base itself, to the bit. SP is what GPT-2 did. muP keeps activations and their
updates the size they have at the base whatever the width, so that learning rates tuned there serve here (Yang et al.
2022, arXiv 2203.03466), in the form of Cerebras-GPT (Dey et al. 2023, arXiv 2304.03208, section 2.4 and appendix G):
weight decay and eps stay. CompleteP adds depth (Dey et al. 2025, arXiv 2505.01618, table 1 with alpha 1): branches fall
as 1/l, which takes over what 1/sqrt(2L) did at init; the projections' decay grows as their rate falls, and eps falls
with the gradients.
"""

from dataclasses import dataclass, replace

from cgpt.errors import InputError
from cgpt.model.config import GPTConfig

KINDS = ("sp", "mup", "completep")

_SAME = (0, 0, 0)

# fmt: off
EXPONENTS = {  # of (width, head width, depth)
    #                      sp             mup               completep
    "embedding_init_std":  (_SAME,         _SAME,            _SAME),
    "hidden_init_std":     (_SAME,         (-1/2, 0, 0),     (-1/2, 0, 0)),
    "residual_init_std":   ((0, 0, -1/2),  (-1/2, 0, -1/2),  (-1/2, 0, 0)),
    "embedding_scale":     (_SAME,         _SAME,            _SAME),
    "softmax_scale":       ((0, -1/2, 0),  (0, -1, 0),       (0, -1, 0)),
    "residual_scale":      (_SAME,         _SAME,            (0, 0, -1)),
    "logits_scale":        (_SAME,         (-1, 0, 0),       (-1, 0, 0)),
    "embedding_lr_scale":  (_SAME,         _SAME,            _SAME),
    "hidden_lr_scale":     (_SAME,         (-1, 0, 0),       (-1, 0, 0)),
    "vector_lr_scale":     (_SAME,         _SAME,            _SAME),
    "hidden_decay_scale":  (_SAME,         _SAME,            (1, 0, 0)),
    "embedding_eps_scale": (_SAME,         _SAME,            (-1, 0, 0)),
    "hidden_eps_scale":    (_SAME,         _SAME,            (-1, 0, -1)),
}
# fmt: on


@dataclass(frozen=True)
class Base:
    """A tuned model. config: its shape and its numbers. lr: the peak learning rate found for it."""

    config: GPTConfig
    lr: float


# The proxy that Cerebras-GPT's hyperparameters were searched on, some 200 draws of lr, init std and embedding scale.
CEREBRAS = Base(
    GPTConfig(
        n_layer=24,
        n_head=4,
        d_model=256,
        d_head=64,
        d_ff=1024,
        vocab_size=50257,
        seq_len=2048,
        embedding_init_std=0.08,
        hidden_init_std=0.08,
        embedding_scale=10.0,
        softmax_scale=1 / 64,
    ),
    lr=6e-3,
)


def parametrize(config: GPTConfig, kind: str, base: Base) -> GPTConfig:
    """The shape of `config` with the numbers that `base` and the rules of `kind`, one of KINDS, give it.

    Depth, width and head width may differ from the base's, and so may all that no rule depends on. The learning rate is
    the base's: what a parameter's is multiplied by is in the config. Raises InputError for an unknown kind.
    """
    if kind not in KINDS:
        raise InputError(f"parametrization: wanted one of {', '.join(KINDS)}, got {kind}")
    tuned = base.config
    ratios = config.d_model / tuned.d_model, config.d_head / tuned.d_head, config.n_layer / tuned.n_layer
    numbers = {name: getattr(tuned, name) for name in EXPONENTS}
    numbers |= {"residual_init_std": tuned.residual_std, "softmax_scale": tuned.attention_scale}
    for name, exponents in EXPONENTS.items():
        for ratio, exponent in zip(ratios, exponents[KINDS.index(kind)], strict=True):
            numbers[name] *= ratio**exponent
    return replace(config, **numbers)
