"""GPT-2 and Llama with our kernels in them: the same losses and gradients, the same model to everybody else."""

import copy
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, BertConfig, BertModel, GPT2ForSequenceClassification
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.llama import modeling_llama

from cgpt_ext.integrations import transformers_patch
from cgpt_ext.integrations.transformers import apply_cgpt_kernels_to_gpt2, apply_cgpt_kernels_to_llama
from hf_models import VOCAB, assert_models_agree, batch, count_attention, gpt2, llama

MADE = {"gpt2": (gpt2, apply_cgpt_kernels_to_gpt2), "llama": (llama, apply_cgpt_kernels_to_llama)}
PARTS = {"gpt2": ("attention", "mlp", "layer_norm", "cross_entropy"), "llama": ("attention", "mlp", "cross_entropy")}
OPS = {"mlp": "gelu_mlp", "cross_entropy": "linear_cross_entropy"}
every = pytest.mark.parametrize("name", MADE)


@pytest.fixture
def calls(monkeypatch):
    """Counts who served attention, and our other ops where they stand in transformers_patch.py."""
    calls = count_attention(monkeypatch)

    def counting(name, function):
        def call(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    for name, op in OPS.items():
        monkeypatch.setattr(transformers_patch, op, counting(name, getattr(transformers_patch, op)))
    forward = transformers_patch.FusedLayerNorm.forward
    monkeypatch.setattr(transformers_patch.FusedLayerNorm, "forward", counting("layer_norm", forward))
    return calls


def labelled(side="left"):
    ids, mask = batch(side)
    labels = torch.where(mask.bool(), ids, -100)
    labels[0, 3:6] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def step(model, **inputs):
    """The loss and all gradients."""
    model.zero_grad()
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def hold(model, patched, **inputs):
    """`patched` at the bar that the model as it was sets in its dtype; in fp64 that is the truth."""
    got, theirs = step(patched, **inputs), step(model, **inputs)
    want = step(copy.deepcopy(model).double(), **inputs)
    assert_models_agree(got, want, theirs, model.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every
def test_all_parts(name, dtype, calls):
    make, apply = MADE[name]
    model, patched = make().to(dtype), make().to(dtype)
    apply(model=patched)
    hold(model, patched, **labelled())
    layers = {"attention_varlen": 2, "mlp": 2, "cross_entropy": 1}
    assert calls == (layers | {"layer_norm": 5} if name == "gpt2" else layers)


@pytest.mark.parametrize(("name", "part"), [(name, part) for name in MADE for part in PARTS[name]])
def test_each_part_by_itself(name, part, calls):
    make, apply = MADE[name]
    patched = make()
    apply(model=patched, **{other: other == part for other in PARTS[name]})
    hold(make(), patched, **labelled())
    assert set(calls) == {"attention_varlen" if part == "attention" else part}


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python"])
def test_activations(activation, calls):
    patched = gpt2(activation_function=activation)
    apply_cgpt_kernels_to_gpt2(model=patched)
    hold(gpt2(activation_function=activation), patched, **labelled())
    assert calls["mlp"] == 2


@pytest.mark.parametrize("activation", ["relu", "gelu_10", "quick_gelu"])
def test_other_activations_are_left(activation, calls):
    patched = gpt2(activation_function=activation)
    apply_cgpt_kernels_to_gpt2(model=patched)
    hold(gpt2(activation_function=activation), patched, **labelled())
    assert not calls["mlp"]


def test_llamas_with_biases_and_few_tokens(calls):
    patched = llama(mlp_bias=True)
    with torch.no_grad():
        for name, parameter in patched.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model = copy.deepcopy(patched)
    apply_cgpt_kernels_to_llama(model=patched)
    hold(model, patched, **labelled())
    assert calls["mlp"] == 2
    assert torch.equal(patched(torch.tensor([[5, 6]])).logits, patched.eval()(torch.tensor([[5, 6]])).logits)
    assert calls["mlp"] == 2  # two tokens are not worth joining the projections for


@pytest.mark.parametrize(
    "options",
    [
        {"num_items_in_batch": 31},
        {"num_items_in_batch": torch.tensor(31)},
        {"ignore_index": 5},
        {"shift_labels": torch.arange(4 * 21).view(4, 21) % VOCAB},
    ],
    ids=lambda options: next(iter(options)),
)
@every
def test_losses(name, options, calls):
    make, apply = MADE[name]
    patched = make()
    apply(model=patched)
    inputs = labelled("none")
    if "ignore_index" in options:
        inputs["labels"] = inputs["input_ids"]
    hold(make(), patched, **inputs, **options)
    assert calls["cross_entropy"] == 1


@every
def test_the_mean_of_no_label_is_transformers(name):
    make, apply = MADE[name]
    model, patched = make(), make()
    apply(model=patched)
    inputs = labelled()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    assert model(**inputs).loss.isnan()
    assert patched(**inputs).loss.isnan()


@every
def test_logits(name, calls):
    make, apply = MADE[name]
    model, patched = make(), make()
    apply(model=patched)
    inputs = labelled()
    want = model(**inputs)

    def close(out):
        assert (out.logits - want.logits).abs().max() < 1e-5
        assert (out.loss - want.loss).abs() < 1e-5

    out = patched(**inputs, output_hidden_states=True)
    assert out.logits is None
    assert len(out.hidden_states) == 3
    assert (patched(**inputs, return_dict=False)[0] - want.loss).abs() < 1e-5
    positional = patched(inputs["input_ids"])
    assert positional.loss is None
    assert positional.logits.shape == want.logits.shape
    with pytest.raises(TypeError, match="multiple values for argument 'input_ids'"):
        patched(inputs["input_ids"], **inputs)
    with pytest.raises(TypeError, match="positional arguments"):
        patched(*[None] * 99)
    assert patched(inputs["input_ids"], logits_to_keep=1).logits.shape[1] == 1
    fused = calls["cross_entropy"]
    close(patched(**inputs, skip_logits=False))
    close(patched.eval()(**inputs))
    assert calls["cross_entropy"] == fused
    assert patched(**inputs, skip_logits=True).logits is None
    assert calls["cross_entropy"] == fused + 1


@every
def test_a_loss_of_ones_own(name, calls):
    make, apply = MADE[name]
    patched = make()
    apply(model=patched)
    patched.loss_function = lambda logits, labels, **_: logits.sum() * 0 + 7
    assert patched(**labelled()).loss == 7
    assert not calls["cross_entropy"]


@every
def test_the_model_is_what_it_was(name, tmp_path):
    """Names, state_dict, copies, pickles, files and gradients' owners; and back again."""
    make, apply = MADE[name]
    model, patched = make(), make()
    kinds = [type(module) for module in patched.modules()]
    parameters = list(patched.parameters())
    patch = apply(model=patched)
    apply(model=patched)  # twice is once
    assert [type(module) for module in patched.modules()] != kinds
    assert all(a is b for a, b in zip(patched.parameters(), parameters, strict=True))
    assert list(patched.state_dict()) == list(model.state_dict())
    ids = batch("none")[0]
    want = patched(ids).logits
    for again in (copy.deepcopy(patched), pickle.loads(pickle.dumps(patched))):
        assert type(again) is type(patched)
        assert torch.equal(again(ids).logits, want)
    patched.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="cgpt")
    assert type(loaded) is type(model)
    assert loaded.config._attn_implementation == "cgpt"
    assert (loaded(ids).logits - want).abs().max() < 1e-5
    patch.revert()
    assert [type(module) for module in patched.modules()] == kinds
    assert patched.config._attn_implementation == "sdpa"
    assert torch.equal(patched(ids).logits, model(ids).logits)


def test_models_to_come(tmp_path, calls):
    before = gpt2()
    before.save_pretrained(tmp_path)
    with apply_cgpt_kernels_to_gpt2():
        made, loaded = gpt2(), AutoModelForCausalLM.from_pretrained(tmp_path)
        eager = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
        classifier = GPT2ForSequenceClassification(copy.deepcopy(before.config))
    assert eager.config._attn_implementation == "eager"
    for model in (made, loaded.train()):
        assert type(model) is transformers_patch.GPT2LMHeadModel
        calls.clear()
        hold(before, model, **labelled())
        assert calls == {"attention_varlen": 2, "mlp": 2, "layer_norm": 5, "cross_entropy": 1}
    calls.clear()
    classifier(batch("none")[0][:1])
    assert calls["mlp"] == 2
    after = gpt2()
    assert type(after) is modeling_gpt2.GPT2LMHeadModel
    assert type(after.transformer.h[0].mlp) is modeling_gpt2.GPT2MLP
    with apply_cgpt_kernels_to_llama(attention=False):
        model = llama()
    assert type(model.model.layers[0].mlp) is transformers_patch.LlamaMLP
    assert model.config._attn_implementation == "sdpa"
    assert type(llama().model.layers[0].mlp) is modeling_llama.LlamaMLP


class LoRA(nn.Module):
    """What PEFT puts in a layer's place: the layer, and two thin ones beside it."""

    def __init__(self, layer, inside, outside):
        super().__init__()
        self.base_layer, self.a, self.b = layer, nn.Linear(inside, 2, bias=False), nn.Linear(2, outside, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.b(self.a(x))


@pytest.mark.parametrize("order", ["before", "after"])
def test_layers_that_others_changed_are_left(order, calls):
    def change(model):
        torch.manual_seed(9)
        first, second = model.transformer.h[0].mlp, model.transformer.h[1].mlp
        first.c_fc = LoRA(first.c_fc, 64, 256)
        second.c_proj.register_forward_hook(lambda module, inputs, out: out * 1.5)
        model.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0.5,))
        return model

    wrapper = nn.Module()  # as PEFT's own model holds the one it changed
    wrapper.inner = gpt2()
    if order == "before":
        change(wrapper.inner)
    apply_cgpt_kernels_to_gpt2(model=wrapper)
    if order == "after":
        change(wrapper.inner)
    hold(change(gpt2()), wrapper.inner, **labelled())
    assert set(calls) == {"attention_varlen", "layer_norm"}


def test_float64(calls):
    """Attention refuses it, as `cgpt_ext.attention` does; every other part goes back to transformers' own."""
    patched = gpt2().double()
    apply_cgpt_kernels_to_gpt2(model=patched, attention=False)
    model = gpt2().double()
    for got, want in zip(step(patched, **labelled()), step(model, **labelled()), strict=True):
        assert torch.equal(got, want)
    assert not calls["mlp"] + calls["cross_entropy"]
    patched.set_attn_implementation("cgpt")
    with pytest.raises(TypeError, match="attention: q must be float32 or bfloat16 or float16, got float64"):
        patched(batch("none")[0])


def test_dropout_between_the_parts(calls):
    """The same random numbers in the same order: only attention's own dropout is SDPA's."""
    model, patched = gpt2(dropout=0.3), gpt2(dropout=0.3)
    apply_cgpt_kernels_to_gpt2(model=patched)
    losses = []
    for one in (model, patched):
        torch.manual_seed(2)
        losses.append(one.train()(**labelled()).loss)
    assert (losses[0] - losses[1]).abs() < 1e-5
    assert calls["mlp"] == calls["sdpa"] == 2


@every
def test_compiles_whole_with_labels(name):
    torch._dynamo.reset()
    make, apply = MADE[name]
    patched = make(num_hidden_layers=1)
    apply(model=patched)
    patched.set_attn_implementation("cgpt_causal")
    ids = batch("none")[0]
    want = step(patched, input_ids=ids, labels=ids)
    got = step(torch.compile(patched, fullgraph=True, backend="aot_eager"), input_ids=ids, labels=ids)
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


@every
def test_another_model_is_refused(name):
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    holds = {"gpt2": "a GPT-2", "llama": "a Llama"}[name]
    for model, what in ((BertModel(config), "BertModel"), ("gpt2", "str")):
        with pytest.raises(ValueError, match=f"^apply_cgpt_kernels_to_{name}: model must hold {holds}, got {what}$"):
            MADE[name][1](model=model)
