"""Small random models of transformers, padded batches for them, and a count of who served their attention."""

from collections import Counter

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from numerics import assert_as_good_as_torch

VOCAB, TIME = 101, 21

TOKENS = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
LLAMA = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, **TOKENS,
}  # fmt: skip


def gpt2(dropout=0.0, num_hidden_layers=2, **options):
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=64, n_embd=64, n_layer=num_hidden_layers, n_head=4, initializer_range=0.1,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, **TOKENS, **options,
    )  # fmt: skip
    return _made(GPT2LMHeadModel, config)


def llama(**options):
    return _made(LlamaForCausalLM, LlamaConfig(**{**LLAMA, **options}, initializer_range=0.1))


def mistral():
    """Its sliding window is a third of the sequence."""
    return _made(MistralForCausalLM, MistralConfig(**LLAMA, sliding_window=7, initializer_range=0.1))


def qwen2():
    return _made(Qwen2ForCausalLM, Qwen2Config(**LLAMA, initializer_range=0.1))


def gpt_neox():
    config = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    return _made(GPTNeoXForCausalLM, GPTNeoXConfig(**config, initializer_range=0.1))


MODELS = {"gpt2": gpt2, "llama": llama, "mistral": mistral, "qwen2": qwen2, "gpt_neox": gpt_neox}


def _made(kind, config):
    torch.manual_seed(3)
    return kind(config)


def batch(side, sequences=4, time=TIME):
    """(ids, attention_mask): padding in front of or behind sequences of 21, 18, 2 and 14 tokens, or on both sides."""
    ids = torch.randint(1, VOCAB, (sequences, time), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    for row, missing in zip(mask, (0, 3, 19, 7), strict=False):
        if side in ("left", "both"):
            row[:missing] = 0
        if side == "right":
            row[time - missing :] = 0
    if side == "both":
        mask[1, -4:] = mask[3, -1:] = 0
    if side == "holes":
        mask[:, 5:8] = 0
    return ids, mask


def positions(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


def assert_models_agree(got, want, theirs, dtype):
    """A loss or logits, then gradients: `got` against `want` in fp64, at the bar that `theirs`, torch's, sets in dtype.

    In bf16 the largest error of a whole model is luck, so errors are held by their norm there; a loss, which is one
    number, to half its last bit.
    """
    for i, (g, w, t) in enumerate(zip(got, want, theirs, strict=True)):
        if dtype == torch.float32:
            assert_as_good_as_torch(g, w, t.to(g.dtype), what=f"result {i}")
            continue
        ours, torchs = ((x.double() - w.double()).norm() for x in (g, t))
        assert g.shape == w.shape
        bar = w.abs() * 2**-9 if g.dim() == 0 else 2 * torchs
        assert ours <= bar, f"result {i}: error {ours:.3e}, torch's own {torchs:.3e}"


def count_attention(monkeypatch):
    """Counts, from here on, what the name "cgpt" went to: our functions by name, or "sdpa"."""
    from cgpt_ext.integrations import transformers as interface

    calls = Counter()

    def counting(name, function):
        def call(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    for name in ("attention", "attention_varlen"):
        monkeypatch.setattr(interface, name, counting(name, getattr(interface, name)))
    monkeypatch.setattr(interface, "sdpa_attention_forward", counting("sdpa", interface.sdpa_attention_forward))
    return calls
