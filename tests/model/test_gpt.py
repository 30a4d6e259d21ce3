"""The GPT against an independent functional GPT-2 in fp64: values, gradients, names, parts and errors."""

import pytest
import torch
import torch.nn.functional as F
from definition import error, gpt_logits, lively, loss_and_gradients, tokens

from cgpt.errors import InputError
from cgpt.model.config import GPTConfig
from cgpt.model.gpt import GPT
from cgpt.model.presets import PRESETS

CONFIG = GPTConfig(n_layer=2, n_head=3, d_model=48, d_head=16, d_ff=200, vocab_size=331, seq_len=40)
SHAPES = {
    "ln_1.weight": (48,),
    "ln_1.bias": (48,),
    "attn.c_attn.weight": (48, 144),
    "attn.c_attn.bias": (144,),
    "attn.c_proj.weight": (48, 48),
    "attn.c_proj.bias": (48,),
    "ln_2.weight": (48,),
    "ln_2.bias": (48,),
    "mlp.c_fc.weight": (48, 200),
    "mlp.c_fc.bias": (200,),
    "mlp.c_proj.weight": (200, 48),
    "mlp.c_proj.bias": (48,),
}


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "swiglu"])
@pytest.mark.parametrize(("batch", "time"), [(2, 40), (3, 17), (1, 1)])
def test_fp32_values_and_gradients_equal_the_fp64_definition(activation, batch, time):
    config = GPTConfig.from_dict(CONFIG.to_dict() | {"activation": activation})
    model = lively(config)
    ids, targets = tokens(config, batch, time)
    weights = {name: value.double() for name, value in model.state_dict().items()}
    want_loss, want = loss_and_gradients(weights, ids, targets, config)

    assert error(model(ids), gpt_logits(weights, ids, config)) < 1e-5
    loss = model(ids, targets)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(want_loss.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        scale = want[name].norm().clamp_min(1e-6)  # a single token leaves attention's q and k without gradient
        assert (parameter.grad.double() - want[name]).norm() < 1e-5 * scale, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_no_more_than_twice_what_torch_does(dtype):
    model = lively(CONFIG, dtype)
    ids, targets = tokens(CONFIG, 2, 40)
    narrow = model.state_dict()
    want_loss, want = loss_and_gradients({n: v.double() for n, v in narrow.items()}, ids, targets, CONFIG)
    torch_loss, torch_gradients = loss_and_gradients(narrow, ids, targets, CONFIG)

    loss = model(ids, targets)
    loss.backward()
    assert abs(loss.item() - want_loss.item()) <= 2 * abs(torch_loss.item() - want_loss.item()) + 1e-3
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == dtype
        assert error(parameter.grad, want[name]) <= 2 * error(torch_gradients[name], want[name]) + 1e-3, name


def test_names_and_shapes_are_hugging_face_gpt2s():
    expected = {"wte.weight": (331, 48), "wpe.weight": (40, 48), "ln_f.weight": (48,), "ln_f.bias": (48,)}
    expected |= {f"h.{layer}.{name}": shape for layer in range(2) for name, shape in SHAPES.items()}
    assert {name: tuple(value.shape) for name, value in GPT(CONFIG).state_dict().items()} == expected


@pytest.mark.parametrize("name", PRESETS)
def test_built_models_hold_exactly_the_counted_parameters(name):
    config = PRESETS[name].config
    with torch.device("meta"):
        model = GPT(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == config.n_params
    assert all(parameter.is_meta for parameter in model.parameters())


def test_the_parts_walked_by_hand_are_the_forward():
    model = lively(CONFIG)
    ids, targets = tokens(CONFIG, 2, 9)
    x = model.embed(ids)
    for layer in range(CONFIG.n_layer):
        x = model.h[layer](x)
    assert torch.equal(model.head.logits(x), model(ids))
    assert torch.equal(model.head(x, targets), model(ids, targets))


def test_the_head_is_tied_and_owns_nothing():
    model = lively(CONFIG)
    ids, targets = tokens(CONFIG, 2, 9)
    assert model.head.wte.weight is model.wte.weight
    model(ids, targets).backward()
    unseen = sorted(set(range(CONFIG.vocab_size)) - set(ids.flatten().tolist()))
    assert (model.wte.weight.grad[unseen].norm(dim=1) > 0).all()  # only the output projection reaches these rows


def test_no_token_sees_the_future():
    model = lively(CONFIG)
    ids, _ = tokens(CONFIG, 1, 20)
    changed = ids.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % CONFIG.vocab_size
    before, after = model(ids), model(changed)
    torch.testing.assert_close(after[:, :12], before[:, :12], rtol=1e-5, atol=1e-5)
    assert (after[:, 12:] - before[:, 12:]).abs().amax(-1).min() > 1e-2


def test_ignored_targets_do_not_count():
    model = lively(CONFIG)
    ids, targets = tokens(CONFIG, 2, 10)
    masked = targets.clone()
    masked[:, 5:] = -100
    want = F.cross_entropy(model(ids)[:, :5].flatten(0, 1), targets[:, :5].flatten())
    torch.testing.assert_close(model(ids, masked), want)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(1, 41, dtype=torch.int64), "a sequence must be at most 40 tokens, got 41"),
        (torch.tensor([[0, 331]]), r"token ids must be in \[0, 331\), got 331"),
        (torch.tensor([[5, -1]]), r"token ids must be in \[0, 331\), got -1"),
        (torch.zeros(3, dtype=torch.int64), r"ids must be \(batch, time\) int64, got \(3,\) torch.int64"),
        (
            torch.zeros(1, 3, dtype=torch.int32),
            r"ids must be \(batch, time\) int64, got \(1, 3\) torch.int32",
        ),
    ],
)
def test_bad_ids_are_named(ids, message):
    with pytest.raises(InputError, match=message):
        GPT(CONFIG)(ids)
