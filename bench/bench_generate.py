"""Greedy text from random weights against transformers' generate, and against reading the whole context for each token.

32 tokens after prompts of 64, the prompt's walk among them. Without a cache the context is short: it costs more with
every token. That peer is left out for eight prompts, which it would take one by one.
"""

import pytest
import torch

from cgpt.evaluate.generate import Draw, generate_batch
from cgpt.model.gpt import GPT
from cgpt.model.presets import PRESETS

PROMPT, NEW = 64, 32


def huggingface(model):
    transformers = pytest.importorskip("transformers")
    config = model.config
    shape = transformers.GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.seq_len,
        n_embd=config.d_model,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_inner=config.d_ff,
        activation_function="gelu",
    )
    twin = transformers.GPT2LMHeadModel(shape).to(model.wte.weight.dtype).eval()
    twin.transformer.load_state_dict(model.state_dict())
    return twin


@torch.no_grad()
def whole_context(model, prompts):
    ids = torch.tensor(prompts)
    for _ in range(NEW):
        x = model.embed(ids)
        for block in model.h:
            x = block(x)
        ids = torch.cat((ids, model.head.logits(x[:, -1:]).argmax(-1)), 1)
    return ids


@pytest.mark.benchmark(group="generate")
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", ["tiny", "111M"])
def test_generate(versus, name, dtype, batch):
    model = GPT(PRESETS[name].config).to(dtype).requires_grad_(False)
    twin = huggingface(model)
    prompts = torch.randint(50257, (batch, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()
    how = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0}
    mask = torch.ones(batch, PROMPT, dtype=torch.int64)

    def ours():
        for _ in generate_batch(model, prompts, NEW, Draw(temperature=0)):
            pass

    peers = {"transformers": lambda: twin.generate(torch.tensor(prompts), attention_mask=mask, **how)}
    if batch == 1:
        peers["without cache"] = lambda: whole_context(model, prompts)
    versus(ours, peers, tokens=batch * NEW)
