"""Greedy text is transformers' own, token for token: ragged prompts, left-padded there and packed here."""

import pytest
import torch

from cgpt.evaluate.generate import Draw, generate, generate_batch
from cgpt.model.config import GPTConfig
from cgpt.model.gpt import GPT

transformers = pytest.importorskip("transformers")

GPT2Config, GPT2LMHeadModel = transformers.GPT2Config, transformers.GPT2LMHeadModel  # imported here, not in a test
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh"}  # theirs, ours
NEW = 72


def both(seed, activation, n_positions=160):
    """One GPT-2 with random weights, as theirs and as ours, in fp32."""
    torch.manual_seed(seed)
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=311,
            n_positions=n_positions,
            n_embd=64,
            n_layer=3,
            n_head=4,
            activation_function=activation,
            initializer_range=0.2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    ).eval()
    shape = GPTConfig(
        n_layer=3,
        n_head=4,
        d_model=64,
        d_head=16,
        d_ff=256,
        vocab_size=311,
        seq_len=n_positions,
        activation=ACTIVATIONS[activation],
    )
    ours = GPT(shape)
    ours.load_state_dict(theirs.transformer.state_dict())
    return theirs, ours


def ragged(seed, lengths=(1, 23, 7, 64, 40)):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 311, (length,), generator=draw).tolist() for length in lengths]


def theirs_of(model, prompts, count=NEW, eos=None):
    """Their tokens after each prompt, of one left-padded batch."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    how = {"do_sample": False, "max_new_tokens": count, "pad_token_id": 0, "eos_token_id": eos, "use_cache": True}
    return model.generate(ids, attention_mask=mask, **how)[:, longest:].tolist()


def ours_of(model, prompts, count=NEW, eos=None):
    found = {}
    for text in generate_batch(model, prompts, count, Draw(temperature=0), eos):
        found[text.prompt] = text.tokens
    return [found[i] for i in range(len(prompts))]


@pytest.mark.parametrize(("seed", "activation"), [(0, "gelu"), (1, "gelu"), (2, "gelu"), (3, "gelu_new")])
def test_a_ragged_batch_is_theirs_token_for_token(seed, activation):
    theirs, ours = both(seed, activation)
    prompts = ragged(seed)
    wanted = theirs_of(theirs, prompts)
    assert len({token for tokens in wanted for token in tokens}) > 40  # it does not only repeat itself
    assert ours_of(ours, prompts) == wanted
    assert list(generate(ours, prompts[1], NEW, temperature=0)) == wanted[1]


def test_an_end_of_text_ends_each_where_it_ends_theirs():
    theirs, ours = both(1, "gelu_new")
    prompts = ragged(1)
    whole = theirs_of(theirs, prompts)
    eos = whole[1][20]
    wanted = [tokens[: tokens.index(eos)] if eos in tokens else tokens for tokens in whole]
    padded = theirs_of(theirs, prompts, eos=eos)
    assert [row[: len(tokens)] for row, tokens in zip(padded, wanted, strict=True)] == wanted
    assert ours_of(ours, prompts, eos=eos) == wanted
    assert len({len(tokens) for tokens in wanted}) > 1


def test_to_the_last_position():
    theirs, ours = both(2, "gelu", n_positions=64)
    prompts = ragged(2, (20, 3, 12))
    assert ours_of(ours, prompts, 44) == theirs_of(theirs, prompts, 44)
