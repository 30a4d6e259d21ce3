"""Generation on a GPU: from kept keys and values as from whole contexts, and the same where layers stream."""

import pytest
import torch

from cgpt.evaluate.generate import Draw, generate_batch
from cgpt.model.config import GPTConfig
from cgpt.stream.build import build
from cgpt.stream.executor import Executor
from cgpt.stream.format import Format
from cgpt.stream.placement import Placement
from problems import GPU

PROMPTS = [[5], [3, 1, 4, 1, 5, 9, 2, 6], list(range(40, 110)), [7, 7], [96] * 64, [3, 1, 4, 1, 5, 9, 2, 6]]


def opened(config, precision, device, where, disk):
    """A model of random weights in a store that reads."""
    placement = Placement.resident(4) if where == "device" else Placement((where,) * 4, (where,) * 4, (True,) * 4)
    model, store = build(config, Format(precision, training=False), device, placement=placement, disk=disk)
    generator = torch.Generator().manual_seed(0)
    for name in store.names():
        norm = float(".ln_" in f".{name}" and name.endswith("weight"))
        store.write(name, norm + 0.15 * torch.randn(store.shape(name), generator=generator))
    return model, store


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize(
    ("precision", "apart", "positions"),
    [("bf16", 0.1, "learned"), ("bf16", 0.1, "rotary"), ("fp16", 0.015, "alibi"), ("fp32", 1e-3, "learned")],
)
def test_tokens_are_those_of_whole_contexts(device, precision, apart, positions, tmp_path):
    """Each token's logit in a whole forward is the largest, to rounding."""
    config = GPTConfig(2, 2, 64, 32, 128, vocab_size=113, seq_len=128, positions=positions)
    model, store = opened(config, precision, device, "device", None)
    texts = {text.prompt: text for text in generate_batch(model, PROMPTS, 50, Draw(temperature=0), at_once=4)}
    for text in texts.values():
        assert len(text.tokens) == 50
        with torch.no_grad():
            logits = model(torch.tensor([text.ids], device=store.device))[0].double().cpu()
        chosen = logits[text.n_prompt - 1 : -1]
        behind = chosen.amax(-1) - chosen.gather(1, torch.tensor(text.tokens)[:, None])[:, 0]
        assert behind.max() < apart
        assert chosen.std(-1).min() > 1  # beside which that is little
    store.close()
    for home in ("host", "disk"):
        model, store = opened(config, precision, device, home, str(tmp_path))
        walk = Executor(store)
        found = {
            text.prompt: text.tokens
            for text in generate_batch(model, PROMPTS, 50, Draw(temperature=0), walk=walk, at_once=4)
        }
        store.close()
        assert found == {prompt: text.tokens for prompt, text in texts.items()}
