import pytest
import torch
from toy import Plain, layers

from cgpt.errors import InputError
from cgpt.model.config import GPTConfig
from cgpt.model.gpt import GPT
from cgpt.model.init import init_parameter
from cgpt.stream.build import build
from cgpt.stream.format import Format
from cgpt.stream.layout import CHUNK
from cgpt.stream.store import Store

SHAPE = GPTConfig(n_layer=2, n_head=2, d_model=16, d_head=8, d_ff=32, vocab_size=61, seq_len=8)
PRECISIONS = ("bf16", "fp16", "fp32")


@pytest.mark.parametrize(("precision", "moments", "wanted"), [
    ("bf16", "fp32", 12), ("fp16", "fp32", 14), ("fp32", "fp32", 12),
    ("bf16", "bf16", 8), ("fp16", "bf16", 10), ("fp32", "bf16", 8),
])  # fmt: skip
def test_bytes_a_parameter(precision, moments, wanted):
    _, store = build(SHAPE, Format(precision, moments), "cpu")
    padding = len(store.names()) * (CHUNK - 1)
    assert store.n_parameters == SHAPE.n_params
    assert wanted * store.n_parameters <= store.lanes.taken <= wanted * (store.n_parameters + padding)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_modules_parameters_are_views_that_stay_tied(precision):
    model, store = build(SHAPE, Format(precision), "cpu")
    value = torch.randn(SHAPE.vocab_size, SHAPE.d_model)
    store.write("wte.weight", value)
    assert model.wte.weight.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    assert (model.wte.weight.float() - value).abs().max() <= value.abs().max() * 2**-8
    assert model.wte.weight is store.layers[-1].parameters["wte.weight"] is store.layers[0].parameters["wte.weight"]
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_masters_are_exact_whatever_the_bits(precision):
    _, store = build(SHAPE, Format(precision), "cpu")
    bits = torch.randint(-(2**31), 2**31, (SHAPE.vocab_size, SHAPE.d_model), dtype=torch.int64).to(torch.int32)
    value = bits.view(torch.float32)
    value[~value.isfinite()] = 0.0
    store.write("wte.weight", value)
    assert torch.equal(store.read("wte.weight").view(torch.int32), value.view(torch.int32))


def test_bf16_weights_for_reading_equal_those_trained_with():
    value = torch.randn(SHAPE.vocab_size, SHAPE.d_model)
    trained, read = (build(SHAPE, Format(training=flag), "cpu") for flag in (True, False))
    for _, store in (trained, read):
        store.write("wte.weight", value)
    assert torch.equal(trained[0].wte.weight, read[0].wte.weight)
    assert read[1].lanes.taken < trained[1].lanes.taken / 5


def test_layers_own_decayed_parameters_first_and_the_embedding_is_owned_once():
    _, store = build(SHAPE, Format(), "cpu")
    assert store.owned[0] == ("wte.weight", "wpe.weight")
    assert store.owned[-1] == ("ln_f.weight", "ln_f.bias")
    decayed, undecayed = store.records[1].groups()
    assert decayed.names == [f"h.0.{n}.weight" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    assert all(name.endswith(".bias") or ".ln_" in name for name in undecayed.names)
    starts = [tensor.data_ptr() for group in (decayed, undecayed) for tensor in group.working]
    assert starts == sorted(starts)
    assert all((start - starts[0]) % 64 == 0 for start in starts)


def test_initial_weights_equal_the_models_own():
    _, store = build(SHAPE, Format("fp32"), "cpu")
    store.initialise(lambda name, tensor: init_parameter(name, tensor, SHAPE, 3))
    for name, parameter in GPT(SHAPE, seed=3).named_parameters():
        assert torch.equal(store.read(name), parameter)


def test_takes_any_layers_and_keeps_real_modules_working():
    model = Plain()
    store = Store(layers(model), Format("fp32"))
    store.write("h.0.1.bias", torch.full((24,), 0.5))
    assert torch.equal(model.h[0][1].bias, torch.full((24,), 0.5))


def test_wrong_values_are_refused():
    _, store = build(SHAPE, Format(), "cpu")
    with pytest.raises(InputError, match=r"wpe.weight: wanted float32 \(8, 16\), got torch.float32 \(3,\)"):
        store.write("wpe.weight", torch.zeros(3))
    with pytest.raises(InputError, match="precision: wanted one of bf16, fp16, fp32, got int8"):
        build(SHAPE, Format("int8"), "cpu")
