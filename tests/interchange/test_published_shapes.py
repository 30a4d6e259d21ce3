"""The seven published shapes, random weights: transformers -> here -> transformers, logits equal to 1e-5 in fp32.

The two smallest have their published widths. From 590M up there are fewer heads, of the published width, and with them
a narrower model; layers, positions and vocabulary are cut everywhere.
"""

import json
from pathlib import Path

import pytest
import torch
from hub import tokenizer_of, tokens
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import cgpt
from cgpt.interchange.exporting import export
from cgpt.interchange.importing import import_
from cgpt.model.huggingface import shape_of
from cgpt.model.presets import PRESETS

VOCABULARY, POSITIONS = 400, 64

# fmt: off
CUT = {  # name: (layers, heads, d_head); d_ff is 4 widths
    "111M": (2, 12, 64),
    "256M": (1, 17, 64),
    "590M": (2, 3, 128),
    "1.3B": (2, 4, 128),
    "2.7B": (2, 8, 80),
    "6.7B": (2, 4, 128),
    "13B":  (2, 5, 128),
}
# fmt: on


@pytest.mark.parametrize("name", CUT)
def test_logits_are_equal_both_ways(name, tmp_path):
    layers, heads, d_head = CUT[name]
    published = PRESETS[name].config
    assert published.n_layer >= layers
    assert published.d_head == d_head
    assert published.n_head % heads == 0
    width = heads * d_head
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        n_inner=4 * width,
        n_positions=POSITIONS,
        vocab_size=VOCABULARY,
        activation_function="gelu",
        bos_token_id=VOCABULARY - 1,
        eos_token_id=VOCABULARY - 1,
    )
    model = GPT2LMHeadModel(config).eval()
    ids = tokens(VOCABULARY, POSITIONS)
    folder = tmp_path / "hf"
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer_of(VOCABULARY).file)

    import_(folder, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "back")
    with torch.no_grad():
        want = model(ids).logits
        ours = cgpt.load(tmp_path / "run")(ids)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()(ids).logits
    assert want.abs().max() > 0.1  # not so small that 1e-5 says nothing
    assert (ours - want).abs().max() <= 1e-5
    assert torch.equal(theirs, want)


def test_the_published_configurations_are_the_presets():
    """configs.json: config.json of the released models; 6.7B's and 2.7B's muP one follow the others' pattern."""
    shipped = Path(__file__).with_name("configs.json")
    for name, values in json.loads(shipped.read_text()).items():
        size = name.removesuffix("-mup")
        shape, kind = shape_of(values)
        want = PRESETS[name].config
        assert kind == PRESETS[name].parametrization
        for field in ("n_layer", "n_head", "d_model", "d_head", "d_ff", "vocab_size", "seq_len", "activation"):
            assert getattr(shape, field) == getattr(want, field), (size, field)
        for field in ("embedding_scale", "attention_scale", "logits_scale", "residual_scale", "hidden_lr_scale"):
            assert getattr(shape, field) == pytest.approx(getattr(want, field), rel=1e-14), (name, field)
