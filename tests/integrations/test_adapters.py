"""What the adapters of nanoGPT and LitGPT put in place of those classes' methods, on stand-ins for the classes."""

import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cgpt_ext import nn as ours
from cgpt_ext.integrations import litgpt, nanogpt
from tiny import HEADS, WIDTH, counted

TIME = 7


@pytest.fixture
def x():
    return torch.randn(2, TIME, WIDTH, requires_grad=True)


def near(module, forwards, x):
    """Values and gradients of two forwards of one module, in fp32."""
    results = []
    for forward in forwards:
        out = forward(x)
        grads = torch.autograd.grad(out.square().sum(), [x, *module.parameters()])
        results.append([out, *grads])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def nanogpt_model():
    """A module with nanoGPT's three classes, in the parts that the adapter reads."""

    class LayerNorm(nn.Module):
        def __init__(self, bias):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(WIDTH))
            self.bias = nn.Parameter(torch.rand(WIDTH)) if bias else None

        def forward(self, input):
            return F.layer_norm(input, (WIDTH,), self.weight, self.bias, 1e-5)

    class CausalSelfAttention(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.c_attn = nn.Linear(WIDTH, 3 * WIDTH, bias=config.bias)
            self.c_proj = nn.Linear(WIDTH, WIDTH, bias=config.bias)
            self.resid_dropout, self.dropout, self.n_head = nn.Dropout(config.dropout), config.dropout, HEADS

        def forward(self, x):
            heads = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, -1))
            y = F.scaled_dot_product_attention(*heads, is_causal=True, dropout_p=self.dropout * self.training)
            return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))

    class MLP(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.c_fc = nn.Linear(WIDTH, 3 * WIDTH, bias=config.bias)
            self.c_proj = nn.Linear(3 * WIDTH, WIDTH, bias=config.bias)
            self.dropout = nn.Dropout(config.dropout)

        def forward(self, x):
            return self.dropout(self.c_proj(F.gelu(self.c_fc(x))))

    model = types.ModuleType("model")
    model.LayerNorm, model.CausalSelfAttention, model.MLP = LayerNorm, CausalSelfAttention, MLP
    return model


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpts_classes(bias, x):
    model, theirs = nanogpt_model(), nanogpt_model()
    nanogpt.apply_cgpt_kernels_to_nanogpt(model)
    nanogpt.apply_cgpt_kernels_to_nanogpt(model)  # a second time changes nothing
    config = types.SimpleNamespace(bias=bias, dropout=0.0)
    for name, argument in (("LayerNorm", bias), ("CausalSelfAttention", config), ("MLP", config)):
        module = getattr(model, name)(argument)
        with counted() as calls:
            near(module, (module, lambda x, n=name, m=module: getattr(theirs, n).forward(m, x)), x)
        assert sum(calls.values()) == 1


def test_nanogpts_parts_one_by_one():
    model, plain = nanogpt_model(), nanogpt_model()
    nanogpt.apply_cgpt_kernels_to_nanogpt(model, attention=False, layer_norm=False)
    assert model.MLP.forward is nanogpt._mlp
    for name in ("LayerNorm", "CausalSelfAttention"):
        assert getattr(model, name).forward.__code__ is getattr(plain, name).forward.__code__


def test_nanogpts_attention_with_dropout_is_its_own_in_training_alone(x):
    model = nanogpt_model()
    nanogpt.apply_cgpt_kernels_to_nanogpt(model)
    with pytest.warns(UserWarning, match="attention with dropout 0.5 trains by nanoGPT's own"):
        module = model.CausalSelfAttention(types.SimpleNamespace(bias=True, dropout=0.5))
    with counted() as calls:
        assert not torch.equal(module(x), module(x))
        assert not calls
        module.eval()
        assert torch.equal(module(x), module(x))
    assert calls == {"attention": 2}


def test_torchs_adamw_comes_back():
    from cgpt_ext.optim import AdamW

    theirs = torch.optim.AdamW

    def interrupted():
        with nanogpt.torchs_adamw_replaced():
            assert torch.optim.AdamW is AdamW
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert torch.optim.AdamW is theirs


def litgpt_attention(**config):
    config = {"attention_scores_scalar": None, "head_size": 16, "attention_logit_softcapping": None, **config}
    return types.SimpleNamespace(config=types.SimpleNamespace(**config), mscale=1.0)


def test_litgpts_attention():
    asked = []

    def theirs(self, q, k, v, mask=None):
        asked.append(mask)
        scale = (self.config.attention_scores_scalar or self.config.head_size) ** -0.5 * self.mscale**2
        causal = mask is None and q.shape[2] == k.shape[2]
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale).transpose(1, 2)

    mine = litgpt._attention(theirs)
    q, k, v = torch.randn(3, 2, 4, TIME, 16).unbind(0)
    for config, mscale in (({}, 1.0), ({"attention_scores_scalar": 9}, 1.0), ({}, 0.7)):
        layer = litgpt_attention(**config)
        layer.mscale = mscale
        with counted() as calls:
            got = mine(layer, q, k, v)
        assert calls == {"attention": 1}
        torch.testing.assert_close(got, theirs(layer, q, k, v), rtol=1e-4, atol=1e-5)
        asked.clear()
    mask = torch.ones(TIME, TIME, dtype=torch.bool).tril()
    narrow = [x[..., :12].contiguous() for x in (q, k, v)]
    wide = [x.repeat(1, 1, 1, 17) for x in (q, k, v)]  # 272
    with counted() as calls:
        mine(litgpt_attention(), q, k, v, mask)
        mine(litgpt_attention(attention_logit_softcapping=30.0), q, k, v)
        mine(litgpt_attention(), *narrow)
        mine(litgpt_attention(), *wide)
        mine(litgpt_attention(), q[:, :, -1:], k, v)
    assert len(asked) == 5
    assert asked[0] is mask
    assert not calls


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_litgpts_mlp(approximate, x):
    def theirs(self, x):
        return self.proj(F.gelu(self.fc(x), approximate=approximate))

    layer = nn.Module()
    layer.fc, layer.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH, bias=False)
    layer.config = types.SimpleNamespace(gelu_approximate=approximate)
    mine = litgpt._mlp(theirs)
    with counted() as calls:
        near(layer, (lambda x: mine(layer, x), lambda x: theirs(layer, x)), x)
        assert calls == {"gelu_mlp": 1}

        class LoRALinear(nn.Linear):
            pass

        layer.fc = LoRALinear(WIDTH, 3 * WIDTH)
        assert torch.equal(mine(layer, x), theirs(layer, x))
    assert calls == {"gelu_mlp": 1}


def test_litgpts_norms():
    for theirs, wanted in ((nn.LayerNorm, ours.LayerNorm), (nn.RMSNorm, nn.RMSNorm)):
        kind = type("Config", (), {"norm_class": property(lambda self, theirs=theirs: theirs)})
        litgpt._patch(kind, "norm_class", litgpt._norm_class)
        first = kind.__dict__["norm_class"]
        litgpt._patch(kind, "norm_class", litgpt._norm_class)
        assert kind.__dict__["norm_class"] is first
        assert kind().norm_class is wanted
