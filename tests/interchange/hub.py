"""Small Hugging Face folders for tests: models with every term alive, in each of the forms that checkpoints come in."""

import functools
import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from cgpt.data.vocabulary import learn

logging.disable_progress_bar()

SMALL = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 50257, "activation_function": "gelu"}


def model_of(**values):
    """A transformers GPT-2 whose biases and norms are off zero and one."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**{**SMALL, **values})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.05)
    return model


def tokens(vocab_size, time=16, batch=2):
    return torch.randint(0, vocab_size, (batch, time), generator=torch.Generator().manual_seed(1))


def bare(state):
    """Under the names of a GPT2Model, as the published 13B has them."""
    return {name.removeprefix("transformer."): value for name, value in state.items() if name != "lm_head.weight"}


def write(folder, config, state, form="safetensors", shards=1):
    """A checkpoint folder. config: a dictionary. form: safetensors or bin. shards: files, with an index if several."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    stem, suffix = ("model", ".safetensors") if form == "safetensors" else ("pytorch_model", ".bin")
    names, placed = list(state), {}
    for number in range(shards):
        part = {name: state[name].contiguous() for name in names[number::shards]}
        file = f"{stem}{suffix}" if shards == 1 else f"{stem}-{number + 1:05d}-of-{shards:05d}{suffix}"
        save_file(part, folder / file, {"format": "pt"}) if form == "safetensors" else torch.save(part, folder / file)
        placed |= dict.fromkeys(part, file)
    if shards > 1:
        index = {"metadata": {}, "weight_map": placed}
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    return folder


def untied(model):
    """The state_dict without the head."""
    return {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}


@functools.cache
def tokenizer_of(n_vocab):
    """A vocabulary of `n_vocab` ids, up to some 460, learnt from words and numbers."""
    text = " ".join(f"{i * i} whale {i % 37} ship{i % 11} sea{i % 13}ward" for i in range(400))
    return learn([text], n_vocab)
