"""`kernelize`, of the package `kernels`, puts our layers into a model, on a CPU and without a hub."""

import copy

import pytest
import torch

pytest.importorskip("kernels")
pytest.importorskip("transformers")

from kernels import Mode, kernelize, replace_kernel_forward_from_hub, use_kernel_mapping
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaMLP

from cgpt_ext.integrations import kernels_hub, transformers_patch
from cgpt_ext.integrations.kernels_hub import LAYERS, Repository, kernel_mapping, mark_layers
from hf_models import assert_models_agree, batch, gpt2, llama


@pytest.fixture(autouse=True)
def marked():
    """Marks classes for the test alone."""
    mark_layers()
    replace_kernel_forward_from_hub(torch.nn.LayerNorm, "LayerNorm")
    yield
    for kind in (GPT2MLP, LlamaMLP, torch.nn.LayerNorm):
        del kind.kernel_layer_name


@pytest.fixture
def calls(monkeypatch):
    calls = []

    def counting(name, function):
        return lambda *args: (calls.append(name), function(*args))[1]

    monkeypatch.setattr(transformers_patch, "gelu_mlp", counting("mlp", transformers_patch.gelu_mlp))
    monkeypatch.setattr(kernels_hub, "layer_norm", counting("layer_norm", kernels_hub.layer_norm))
    return calls


def kernelized(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE):
    with use_kernel_mapping(kernel_mapping()):
        return kernelize(model, mode=mode, device="cpu", use_fallback=False)


def step(model):
    model.zero_grad()
    ids = batch("none")[0]
    loss = model(ids, labels=ids).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("make", [gpt2, llama])
def test_values_and_gradients(make, calls):
    model, ours = make(), kernelized(make())
    got = step(ours)
    assert calls == ["layer_norm", "layer_norm", "mlp"] * 2 + ["layer_norm"] if make is gpt2 else ["mlp", "mlp"]
    assert_models_agree(got, step(copy.deepcopy(model).double()), step(model), torch.float32)
    assert list(ours.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("make", [gpt2, llama])
def test_what_does_not_fit_runs_its_own(make, calls):
    model, ours = make().double(), kernelized(make().double())
    assert all(torch.equal(a, b) for a, b in zip(step(ours), step(model), strict=True))
    assert not calls


def test_inference(calls):
    ids = batch("none")[0]
    model = gpt2().eval()
    want = model(ids).logits
    assert (kernelized(model, Mode.INFERENCE)(ids).logits - want).abs().max() < 1e-5
    assert calls


def test_a_repository_is_a_value():
    """kernels keeps what it loaded in a table by repository."""
    assert Repository("GPT2MLP") == Repository("GPT2MLP") != Repository("LlamaMLP")
    assert len({Repository("GPT2MLP"), Repository("GPT2MLP"), Repository("LayerNorm")}) == 2
    assert Repository("LayerNorm").load() is LAYERS["LayerNorm"]
    with pytest.raises(ValueError, match=r"^Repository: layer_name must be GPT2MLP or LlamaMLP or LayerNorm, got MLP$"):
        Repository("MLP")
