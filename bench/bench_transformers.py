"""transformers' GPT-2 at GPT-2 small's shape with our kernels in it, against the same model as it is.

A step is forward, backward and AdamW: of full rows in fp32 and under autocast in bf16, and of a padded batch, whose
attention is SDPA's with a mask there. `generate` is greedy decoding of a left-padded batch, GPT-2's and of a Llama with
four query heads a key head.
"""

import pytest
import torch

pytest.importorskip("transformers")

from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from cgpt_ext.integrations.transformers import apply_cgpt_kernels_to_gpt2, apply_cgpt_kernels_to_llama
from cgpt_ext.optim import AdamW

TOKENS = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}


def gpt2():
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**dropout, **TOKENS))


def llama():
    shape = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 12}
    return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=3, vocab_size=50257, **TOKENS))


def step(model, optimizer, inputs, dtype):
    def run():
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(**inputs, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("batch", "time", "padding"), [(1, 512, 0), (4, 128, 30)], ids=["1x512", "4x128-padded"])
def test_step(benchmark, versus, batch, time, padding, dtype):
    benchmark.group = "transformers step"
    ids = torch.randint(1, 50257, (batch, time))
    inputs = {"input_ids": ids, "labels": ids}
    if padding:
        mask = torch.arange(time) < time - padding * torch.arange(batch)[:, None]
        inputs = {"input_ids": ids, "attention_mask": mask.long(), "labels": torch.where(mask, ids, -100)}
    theirs, mine = gpt2().train(), gpt2().train()
    apply_cgpt_kernels_to_gpt2(model=mine)
    ours = step(mine, AdamW(mine.parameters()), inputs, dtype)
    versus(ours, {"transformers": step(theirs, torch.optim.AdamW(theirs.parameters()), inputs, dtype)}, seconds=10)


@pytest.mark.parametrize(
    ("make", "apply"), [(gpt2, apply_cgpt_kernels_to_gpt2), (llama, apply_cgpt_kernels_to_llama)], ids=["gpt2", "llama"]
)
def test_generate(benchmark, versus, make, apply):
    benchmark.group = "transformers generate"
    ids = torch.randint(1, 50257, (4, 128))
    mask = (torch.arange(128) >= 30 * torch.arange(4)[:, None]).long()
    theirs, mine = make().bfloat16().eval(), make().bfloat16().eval()
    apply(model=mine)

    def run(model):
        return lambda: model.generate(ids, attention_mask=mask, max_new_tokens=16, do_sample=False)

    versus(run(mine), {"transformers": run(theirs)}, seconds=6)
