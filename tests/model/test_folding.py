"""Folding: a plain GPT-2 with the logits of a model that has factors, to 1e-12 in fp64."""

from dataclasses import replace

import pytest
import torch
from definition import lively, tokens

from cgpt.model.config import POSITIONS
from cgpt.model.folding import PLAIN, fold
from cgpt.model.gpt import GPT
from cgpt.model.parametrization import CEREBRAS, parametrize
from cgpt_ext import dispatch

SMALL = replace(CEREBRAS.config, n_layer=3, n_head=4, d_model=96, d_head=24, d_ff=200, vocab_size=211, seq_len=32)
REFERENCE = {op: "reference" for op in ("attention", "embedding", "gelu_mlp", "layer_norm", "linear", "rotary")}


def logits(config, state):
    model = GPT(config).double()
    model.load_state_dict(state)
    with torch.no_grad(), dispatch.use(**REFERENCE):
        return model(tokens(config, 2, 32)[0])


@pytest.mark.parametrize("embedding_norm", [False, True])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("kind", ["mup", "completep"])
def test_logits_are_kept_and_factors_gone(kind, positions, embedding_norm):
    varied = replace(SMALL, positions=positions, embedding_norm=embedding_norm)
    config = parametrize(varied, kind, CEREBRAS)
    state = lively(config, torch.float64).state_dict()
    before = {name: value.clone() for name, value in state.items()}
    folded, plain = fold(state, config)

    assert plain == replace(config, **PLAIN)
    assert plain.attention_scale == 24**-0.5
    want = logits(config, state)
    assert (logits(plain, folded) - want).abs().max() <= 1e-12
    assert (logits(plain, before) - want).abs().max() > 1e-2 * want.abs().max()  # without, they are others
    assert all(torch.equal(state[name], value) for name, value in before.items())


def test_a_plain_model_is_left_as_it_is():
    plain = replace(SMALL, **PLAIN)
    state = GPT(plain).state_dict()
    folded, config = fold(state, plain)
    assert config == plain
    assert all(folded[name] is value for name, value in state.items())


def test_every_factor_and_rate_of_the_config_is_undone():
    scales = {name for name in type(SMALL).__dataclass_fields__ if name.endswith("_scale")}
    assert set(PLAIN) == scales
