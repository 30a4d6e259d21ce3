"""Hugging Face's models taken apart equal the models whole, and streaming them changes no bit."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("transformers")

from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from cgpt.errors import InputError
from cgpt.stream import Streamed
from cgpt.stream.huggingface import names, parts
from cgpt.stream.placement import Placement

VOCAB, TIME = 61, 9


def gpt2(tied=True, dropout=0.0, attention="sdpa", **options):
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=16, n_embd=32, n_layer=3, n_head=4, resid_pdrop=dropout, embd_pdrop=dropout,
        attn_pdrop=dropout, tie_word_embeddings=tied, attn_implementation=attention, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    return GPT2LMHeadModel(config).train()


def llama(tied=False, attention="sdpa", **options):
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=tied, attn_implementation=attention,
        **options,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).train()


MODELS = {
    "gpt2": gpt2,
    "gpt2 untied": lambda: gpt2(tied=False),
    "gpt2 eager": lambda: gpt2(attention="eager"),
    "llama": llama,
    "llama tied": lambda: llama(tied=True),
    "llama eager": lambda: llama(attention="eager"),
}


def batch(seed, size=2):
    ids = torch.randint(VOCAB, (size, TIME + 1), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]


def whole_loss(model, ids, targets):
    return F.cross_entropy(model(input_ids=ids, use_cache=False).logits.flatten(0, 1), targets.flatten())


def streamed(activations="device", state="host"):
    count = 5
    return Placement(("host",) * count if state == "host" else ("disk",) * count, (state,) * count, (True,) * count,
                     activations=activations, micro_batches=2)  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_losses_gradients_and_a_step_equal_the_whole_models(kind):
    model = MODELS[kind]()
    whole = copy.deepcopy(model)
    trainer = Streamed(*parts(model), precision="fp32", placement=streamed(), weight_decay=0.0, clip=0.0)
    of = names(model, trainer)
    ids, targets = batch(0)
    loss = whole_loss(whole, ids, targets)
    loss.backward()
    found = trainer.executor.gradients([[(ids, targets)]])
    assert found.loss == pytest.approx(loss.item(), rel=1e-5)
    own = dict(whole.named_parameters())
    assert set(of.values()) == set(own)
    for event in found.ready.values():
        event.wait()
    for name, gradient in found.by_name.items():
        want = own[of[name]].grad
        assert (gradient - want).norm() <= 1e-5 * want.norm(), name
    before = {name: parameter.detach().clone() for name, parameter in own.items()}
    gradients = {name: found.by_name[name].clone() for name in of}
    trainer.optimizer.step(found, 1e-3)
    for name, parameter in own.items():  # of one gradient: Adam's first step is its sign, and signs of rounding differ
        parameter.grad = next(gradients[mine] for mine, theirs in of.items() if theirs == name)
    torch.optim.AdamW(whole.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0).step()
    for name, got in trainer.state_dict().items():
        want = own[of[name]].detach()
        assert not torch.equal(want, before[of[name]]), name
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7, msg=name)
    trainer.close()


@pytest.mark.parametrize("make", [lambda: gpt2(dropout=0.1), lambda: gpt2(tied=False, dropout=0.1), llama,
                                  lambda: llama(tied=True)])  # fmt: skip
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_streaming_changes_no_bit(make, precision, tmp_path):
    found = []
    for placement in (
        None,
        streamed(),  # resident: one micro-batch a visit
        streamed("host"),
        streamed("host", "disk"),
    ):
        with Streamed(*parts(make()), precision=precision, placement=placement, disk=str(tmp_path),
                      sample=batch(0)[0]) as trainer:  # fmt: skip
            rows = []
            for step in range(4):
                batches = [batch(2 * step), batch(2 * step + 1)]
                rows.append(trainer.step(batches, 1e-2))
            found.append((rows, trainer.state_dict()))
    (want, weights), *others = found
    assert len({row.loss for row in want}) == 4
    for rows, tensors in others:
        assert rows == want
        assert all(torch.equal(tensors[name], weights[name]) for name in weights)


def test_dropout_draws_and_eval_does_not():
    losses = {}
    for dropout in (0.0, 0.1):
        model = gpt2(dropout=dropout)
        with Streamed(*parts(model), precision="fp32", placement=streamed()) as trainer:
            losses[dropout] = trainer.step([batch(0)], 0.0).loss
            model.eval()
            losses[dropout, "eval"] = trainer.step([batch(0)], 0.0).loss
    assert losses[0.1] != losses[0.0]
    assert losses[0.1, "eval"] == losses[0.0, "eval"] == losses[0.0]


@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_model_on_the_meta_device(make):
    real = make()
    own = dict(real.named_parameters())
    with torch.device("meta"):
        model = make()
    with Streamed(*parts(model), precision="fp32", placement=streamed()) as trainer:
        of = names(model, trainer)
        trainer.load(lambda name: own[of[name]].detach())
        got = trainer.loss([batch(0)])
    assert got == pytest.approx(whole_loss(real, *batch(0)).item(), rel=1e-5)


def test_what_it_does_not_know_is_refused_by_name():
    with pytest.raises(InputError, match="model must be one of GPT2LMHeadModel, LlamaForCausalLM, got Linear"):
        parts(nn.Linear(2, 2))
    with pytest.raises(InputError, match="add_cross_attention"):
        parts(gpt2(add_cross_attention=True))
    model = llama()
    model.gradient_checkpointing_enable()
    with pytest.raises(InputError, match="gradient checkpointing must be off"):
        parts(model)
