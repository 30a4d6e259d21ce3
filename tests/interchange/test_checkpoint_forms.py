"""Every form that a GPT-2 checkpoint comes in gives the model that transformers makes of it."""

import json
import os

import pytest
import torch
from hub import bare, model_of, tokens, untied, write

import cgpt
from cgpt.errors import InputError
from cgpt.interchange.weights import open_weights
from cgpt.tensor_files import write_tensors

VOCABULARY = 120  # cgpt.load needs no tokenizer


@pytest.fixture(scope="module")
def model():
    return model_of(vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def want(model):
    with torch.no_grad():
        return model(tokens(VOCABULARY)).logits


def logits(folder, **options):
    with torch.no_grad():
        return cgpt.load(folder, **options)(tokens(VOCABULARY))


def config(model, **changed):
    return {**model.config.to_dict(), **changed}


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("prefix", [True, False])
def test_every_form_opens(model, want, tmp_path, form, shards, prefix):
    state = untied(model) if prefix else bare(model.state_dict())
    folder = write(tmp_path / "hf", config(model), state, form, shards)
    assert (logits(folder) - want).abs().max() <= 1e-5


def test_masks_of_older_checkpoints_and_an_equal_head_are_passed_over(model, want, tmp_path):
    state = untied(model) | {"lm_head.weight": model.lm_head.weight.detach().clone()}
    for layer in range(2):
        state[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 16, 16, dtype=torch.uint8).tril()
        state[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    for form in ("safetensors", "bin"):
        folder = write(tmp_path / form, config(model, tie_word_embeddings=False), state, form, 2)
        assert (logits(folder) - want).abs().max() <= 1e-5


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_head_of_its_own_is_refused(model, tmp_path, form):
    other = model.lm_head.weight.detach().clone()
    other[-1, -1] += 1e-3
    folder = write(tmp_path / "hf", config(model), untied(model) | {"lm_head.weight": other}, form)
    with pytest.raises(InputError, match=r"lm_head.weight to hold what wte.weight does, for heads are tied"):
        open_weights(folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_weights_of_any_float_type_are_read_to_the_bit(model, tmp_path, dtype, form):
    state = {name: value.to(dtype) for name, value in untied(model).items()}
    weights = open_weights(write(tmp_path / "hf", config(model), state, form))
    for name, shape in weights.shapes.items():
        got = weights.read(name)
        assert got.dtype == torch.float32
        assert tuple(got.shape) == shape
        assert torch.equal(got, state[f"transformer.{name}"].float())


def test_one_tensor_may_be_longer_than_a_piece(monkeypatch, model, want, tmp_path):
    from cgpt import tensor_files
    from cgpt.interchange import files

    monkeypatch.setattr(tensor_files, "PIECE", 100)
    monkeypatch.setattr(files, "PIECE", 100)
    state = untied(model) | {"lm_head.weight": model.lm_head.weight.detach().clone()}
    for form in ("safetensors", "bin"):
        folder = write(tmp_path / form, config(model), {k: v.double() for k, v in state.items()}, form)
        assert (logits(folder) - want).abs().max() <= 1e-5


def test_a_bin_from_before_zip_files_opens(model, want, tmp_path):
    folder = write(tmp_path / "hf", config(model), untied(model), "bin")
    torch.save(untied(model), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert (logits(folder) - want).abs().max() <= 1e-5


def test_links_as_the_hubs_cache_has_them_are_followed(model, want, tmp_path):
    folder = write(tmp_path / "blobs", config(model), untied(model))
    (tmp_path / "snapshot").mkdir()
    for file in folder.iterdir():
        os.symlink(f"../blobs/{file.name}", tmp_path / "snapshot" / file.name)
    assert (logits(tmp_path / "snapshot") - want).abs().max() <= 1e-5


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu"])
def test_activations(tmp_path, activation):
    other = model_of(vocab_size=VOCABULARY, activation_function=activation)
    folder = write(tmp_path / "hf", other.config.to_dict(), untied(other))
    with torch.no_grad():
        assert (logits(folder) - other(tokens(VOCABULARY)).logits).abs().max() <= 1e-5


def test_unscaled_attention_another_eps_and_a_narrow_mlp(tmp_path):
    other = model_of(vocab_size=VOCABULARY, scale_attn_weights=False, layer_norm_epsilon=1e-2, n_inner=40)
    folder = write(tmp_path / "hf", other.config.to_dict(), untied(other))
    with torch.no_grad():
        assert (logits(folder) - other(tokens(VOCABULARY)).logits).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_load_rounds_to_the_type_asked_for(model, want, tmp_path, dtype):
    folder = write(tmp_path / "hf", config(model), untied(model))
    loaded = cgpt.load(str(folder), dtype=dtype)
    state = untied(model)
    assert all(torch.equal(p, state[f"transformer.{name}"].to(dtype)) for name, p in loaded.named_parameters())
    got = logits(folder, dtype=dtype)
    assert got.dtype == dtype
    assert 1e-6 < ((got.float() - want).norm() / want.norm()) < 2e-2


def test_load_refuses_other_types_and_places(model, tmp_path):
    folder = write(tmp_path / "hf", config(model), untied(model))
    with pytest.raises(InputError, match=r"dtype must be one of .*, got torch.int8"):
        cgpt.load(folder, dtype=torch.int8)
    with pytest.raises(InputError, match="device must be one that torch knows, such as cpu or cuda, got abacus"):
        cgpt.load(folder, device="abacus")
    with pytest.raises(InputError, match=r"nowhere: wanted a run folder or a Hugging Face folder .*, got no folder"):
        cgpt.load(tmp_path / "nowhere")
    (tmp_path / "blank").mkdir()
    with pytest.raises(InputError, match=r"blank: wanted a run folder or a Hugging Face folder .*, got none"):
        cgpt.load(tmp_path / "blank")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="finds no CUDA device"):
            cgpt.load(folder, device="cuda")


def test_a_file_of_ours_is_read_by_safetensors_and_the_other_way_about(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    from cgpt.tensor_files import TensorFile

    found = {"b": torch.randn(3, 5), "a": torch.randn(0, 4), "c": torch.tensor(2.5), "é": torch.randn(7)}
    write_tensors(tmp_path / "ours", {k: tuple(v.shape) for k, v in found.items()}, found.items(), "F32", {"k": "v"})
    with safe_open(tmp_path / "ours", "pt") as file:
        assert file.metadata() == {"k": "v"}
        assert all(torch.equal(file.get_tensor(name), value) for name, value in found.items())
    save_file({**found, "i": torch.arange(3)}, tmp_path / "theirs", {"format": "pt"})
    ours = TensorFile(tmp_path / "theirs")
    assert all(torch.equal(ours.read(name), value) for name, value in found.items())
    with pytest.raises(InputError, match="wanted i in one of F64, F32, F16, BF16, got I64"):
        ours.read("i")


# btlm: the muP models, and BTLM-3B with ALiBi and SwiGLU -----------------------------------------------------------

BTLM = {
    "model_type": "btlm", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": VOCABULARY,
    "mup_embeddings_scale": 10, "mup_output_alpha": 1.5, "mup_width_scale": 0.25, "mup_scale_qk_dot_by_d": True,
}  # fmt: skip


def btlm_state(values):
    generator = torch.Generator().manual_seed(2)
    d, f = 32, values.get("n_inner", 128)
    shapes = {"wte.weight": (VOCABULARY, d), "ln_f.weight": (d,), "ln_f.bias": (d,)}
    if values.get("position_embedding_type") != "alibi":
        shapes["wpe.weight"] = (16, d)
    fcs = ("c_fc", "c_fc2") if values["activation_function"] == "swiglu" else ("c_fc",)
    for layer in range(2):
        widths = {"attn.c_attn": (d, 3 * d), "attn.c_proj": (d, d), "mlp.c_proj": (f, d)}
        widths |= {f"mlp.{fc}": (d, f) for fc in fcs}
        for name, shape in widths.items():
            shapes |= {f"h.{layer}.{name}.weight": shape, f"h.{layer}.{name}.bias": shape[1:]}
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"h.{layer}.{norm}.weight": (d,), f"h.{layer}.{norm}.bias": (d,)}
    state = {f"transformer.{k}": 0.2 * torch.randn(s, generator=generator) for k, s in shapes.items()}
    if values.get("position_embedding_type") == "alibi":
        state["transformer.relative_pe.slopes"] = torch.ones(2, 1)
    return state


def btlm_logits(state, ids, values):
    """Its forward from the published code's definition, in fp64."""
    w = {name.removeprefix("transformer."): value.double() for name, value in state.items()}

    def norm(x, name):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def project(x, name):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    alibi, time = values.get("position_embedding_type") == "alibi", ids.shape[1]
    x = (w["wte.weight"][ids] + (0 if alibi else w["wpe.weight"][:time])) * values["mup_embeddings_scale"]
    distance = torch.arange(time)[:, None] - torch.arange(time)
    for layer in range(2):
        packed = project(norm(x, f"h.{layer}.ln_1"), f"h.{layer}.attn.c_attn")
        q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in packed.split(32, -1))
        scores = q @ k.transpose(2, 3) / (16 if values["mup_scale_qk_dot_by_d"] else 4)
        if alibi:
            scores = scores - torch.tensor([2**-4, 2**-8])[:, None, None] * distance
        out = scores.masked_fill(distance < 0, -torch.inf).softmax(-1) @ v
        x = x + project(out.transpose(1, 2).flatten(2), f"h.{layer}.attn.c_proj")
        y = norm(x, f"h.{layer}.ln_2")
        if values["activation_function"] == "swiglu":
            inside = project(y, f"h.{layer}.mlp.c_fc") * torch.nn.functional.silu(project(y, f"h.{layer}.mlp.c_fc2"))
        else:
            inside = torch.nn.functional.gelu(project(y, f"h.{layer}.mlp.c_fc"))
        x = x + project(inside, f"h.{layer}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T * values["mup_output_alpha"] * values["mup_width_scale"]


@pytest.mark.parametrize(
    "variety",
    [
        {"activation_function": "gelu", "position_embedding_type": "learned"},
        {"activation_function": "gelu", "mup_scale_qk_dot_by_d": False},
        {"activation_function": "swiglu", "position_embedding_type": "alibi", "n_inner": 88},
    ],
)
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_btlm_has_its_factors(tmp_path, variety, form):
    values = BTLM | variety
    state = btlm_state(values)
    folder = write(tmp_path / "hf", values, state, form)
    want = btlm_logits(state, tokens(VOCABULARY), values)
    assert (logits(folder) - want).abs().max() <= 1e-5 * want.abs().max()


def test_a_folded_btlm_is_a_plain_gpt2_to_transformers(tmp_path):
    from hub import tokenizer_of
    from transformers import AutoModelForCausalLM

    from cgpt.interchange.exporting import export

    values = BTLM | {"activation_function": "gelu", "vocab_size": 300}
    state = {**btlm_state(values), "transformer.wte.weight": 0.2 * torch.randn(300, 32)}
    folder = write(tmp_path / "hf", values, state)
    (folder / "tokenizer.json").write_bytes(tokenizer_of(300).file)
    assert export(folder, tmp_path / "out").folded
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    want = btlm_logits(state, tokens(300), values)
    with torch.no_grad():
        assert (plain(tokens(300)).logits - want).abs().max() <= 1e-5 * want.abs().max()
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "gpt2"
