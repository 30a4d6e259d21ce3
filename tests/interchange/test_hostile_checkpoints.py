"""Checkpoints that are damaged, incomplete or malicious: one line that names the file, nothing run, nothing left."""

import json
import os
import pickle
import struct

import pytest
import torch
from hub import bare, model_of, tokenizer_of, untied, write

from cgpt import cli
from cgpt.errors import InputError
from cgpt.interchange.weights import open_weights

VOCABULARY = 300


@pytest.fixture(scope="module")
def model():
    return model_of(vocab_size=VOCABULARY)


@pytest.fixture
def folder(model, tmp_path):
    """A whole checkpoint in one safetensors file."""
    return save(tmp_path / "hf", model, untied(model))


def save(folder, model, state, form="safetensors", shards=1):
    write(folder, model.config.to_dict(), state, form, shards)
    (folder / "tokenizer.json").write_bytes(tokenizer_of(VOCABULARY).file)
    return folder


def refused(folder, capsys):
    """What `cgpt import` says; nothing may be left of the run, nor of what it was written under."""
    out = folder.parent / "run"
    capsys.readouterr()
    before = set(folder.parent.iterdir())
    assert cli.main(["import", str(folder), "--out", str(out)]) == 2
    assert set(folder.parent.iterdir()) == before
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("cgpt: ")
    assert captured.out == ""
    return line


def header_of(path):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put_header(path, header, data, length=None):
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head) if length is None else length) + head + data)


# Pickles -----------------------------------------------------------------------------------------------------------


class Payload:
    """Creates a file where it is unpickled by anybody who trusts it."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_malicious_pickle_is_refused_and_not_run(model, tmp_path, capsys, zipped, shards):
    state, mark = untied(model), tmp_path / "executed"
    folder = save(tmp_path / "hf", model, state, "bin", shards)
    victim = sorted(folder.glob("*.bin"))[-1]
    content = torch.load(victim) | {"evil": Payload(os.system, f"touch {mark}")}
    torch.save(content, victim, _use_new_zipfile_serialization=zipped)
    line = refused(folder, capsys)
    assert f"{victim}: wanted a pickle of tensors alone, got one that asks for posix.system; nothing of it was" in line
    assert not mark.exists()
    torch.load(victim, weights_only=False)  # the payload is alive, or this test says nothing
    assert mark.exists()


@pytest.mark.parametrize(
    "payload",
    [
        Payload(eval, "open('executed', 'w')"),
        Payload(open, "executed", "w"),
        Payload(getattr, os, "system"),
    ],
)
def test_a_bare_pickle_in_the_place_of_a_checkpoint(model, tmp_path, capsys, monkeypatch, payload):
    monkeypatch.chdir(tmp_path)
    folder = save(tmp_path / "hf", model, untied(model), "bin")
    try:
        data = pickle.dumps(payload)
    except TypeError:  # a module cannot be pickled by value
        data = b"cbuiltins\ngetattr\n(cos\nsystem\nVname\ntR."
    (folder / "pytorch_model.bin").write_bytes(data)
    line = refused(folder, capsys)
    assert "pytorch_model.bin: wanted a pickle of tensors alone, got " in line
    assert line.endswith("; nothing of it was run")
    assert not (tmp_path / "executed").exists()


def test_what_a_bin_may_not_hold(model, tmp_path, capsys):
    folder = save(tmp_path / "hf", model, untied(model), "bin")
    for content, told in (
        (list(untied(model).values()), "wanted a dictionary of tensors, got list"),
        ({**untied(model), "epoch": 3}, "got int for 'epoch'"),
        ({"state_dict": untied(model)}, "got dict for 'state_dict'"),
        ({**untied(model), 7: torch.ones(1)}, "got Tensor for '7'"),
        ({**untied(model), "transformer.wte.weight": torch.ones(VOCABULARY, 32).to_sparse()}, "got Tensor for 'transf"),
        ({**untied(model), "transformer.wte.weight": torch.ones(VOCABULARY, 32).long()}, "got torch.int64"),
    ):
        torch.save(content, folder / "pytorch_model.bin")
        assert told in refused(folder, capsys)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_bin_cut_anywhere_is_refused(model, tmp_path, capsys, zipped):
    folder = save(tmp_path / "hf", model, untied(model), "bin")
    path = folder / "pytorch_model.bin"
    torch.save(untied(model), path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for share in (0.0, 0.001, 0.3, 0.9, 0.999):
        path.write_bytes(whole[: int(len(whole) * share)])
        assert str(path) in refused(folder, capsys)


# safetensors -------------------------------------------------------------------------------------------------------


def test_a_file_cut_anywhere_is_refused(folder, capsys):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert str(path) in refused(folder, capsys)
    path.write_bytes(whole + b"\0")
    assert "bytes of tensors side by side" in refused(folder, capsys)


def test_no_flipped_bit_of_the_header_gives_another_model(folder):
    """Names, types, shapes and places cannot change unnoticed; where the file is still read, it is the same."""
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    want = {name: open_weights(folder).read(name) for name in ("wte.weight", "h.1.mlp.c_fc.bias", "ln_f.weight")}
    noticed = 0
    for at in range(0, 8 + length, 23):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        try:
            weights = open_weights(folder)
            found = {name: weights.read(name) for name in want}
        except InputError as error:
            noticed += 1
            assert "\n" not in str(error)  # noqa: PT017 -- either outcome is checked
        else:
            assert all(torch.equal(found[name], value) for name, value in want.items())
    assert noticed > 50


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**8 + 1, 10**6])
def test_a_header_that_claims_more_than_there_is(folder, capsys, length):
    header, data = header_of(folder / "model.safetensors")
    put_header(folder / "model.safetensors", header, data, length)
    assert f"got one that claims {length}" in refused(folder, capsys)


def entry(header):
    return header["transformer.ln_f.weight"]


@pytest.mark.parametrize(
    "change",
    [
        lambda header: entry(header).update(shape=[33]),
        lambda header: entry(header).update(shape=[-32]),
        lambda header: entry(header).update(shape=[2**40, 2**40]),
        lambda header: entry(header).update(shape="32"),
        lambda header: entry(header).update(shape=[32.0]),
        lambda header: entry(header).update(dtype="F16"),
        lambda header: entry(header).update(dtype="I32"),
        lambda header: entry(header).update(dtype=None),
        lambda header: entry(header).update(data_offsets=[0, 128]),
        lambda header: entry(header).update(data_offsets=[2**62, 2**62 + 128]),
        lambda header: entry(header).update(data_offsets=[-128, 0]),
        lambda header: entry(header).update(data_offsets=[128]),
        lambda header: entry(header).pop("dtype"),
        lambda header: header.update({"transformer.ln_f.weight": 5}),
    ],
)
def test_a_header_that_lies_about_a_tensor(folder, capsys, change):
    header, data = header_of(folder / "model.safetensors")
    change(header)
    put_header(folder / "model.safetensors", header, data)
    assert "model.safetensors" in refused(folder, capsys)


@pytest.mark.parametrize("header", [b"[]", b"{", b"\xff\xfe", b"null", b"[" * 100_000, b'{"a": NaN}'])
def test_a_header_that_is_none(folder, capsys, header):
    put_header(folder / "model.safetensors", header, b"")
    assert "wanted a safetensors header, got a damaged one" in refused(folder, capsys)


def test_a_name_that_stands_twice(folder, capsys):
    header, data = header_of(folder / "model.safetensors")
    text = json.dumps(header)
    again = json.dumps({"transformer.ln_f.bias": header["transformer.ln_f.bias"]})
    put_header(folder / "model.safetensors", (text[:-1] + ", " + again[1:]).encode(), data)
    assert "transformer.ln_f.bias stands there twice" in refused(folder, capsys)


# Tensors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_tensors_that_do_not_fit_the_config(model, tmp_path, capsys, form):
    state = untied(model)
    folder = tmp_path / "hf"
    for change, told in (
        ({"transformer.wpe.weight": None}, "wanted wpe.weight (16, 32), got none"),
        ({"transformer.h.1.ln_2.bias": torch.ones(31)}, "wanted h.1.ln_2.bias (32,), got (31,)"),
        ({"transformer.h.1.mlp.c_fc.weight": torch.ones(128, 32)}, "h.1.mlp.c_fc.weight (32, 128), got (128, 32)"),
        ({"transformer.h.2.ln_1.bias": torch.ones(32)}, "got h.2.ln_1.bias as well"),
        ({"score.weight": torch.ones(2, 32)}, "got score.weight as well"),
        ({"lm_head.weight": torch.ones(5, 32)}, "wanted lm_head.weight (300, 32), as wte.weight is, got (5, 32)"),
        ({"wte.weight": torch.ones(VOCABULARY, 32)}, "wanted wte.weight once"),
        ({"transformer.h.0.ln_1.bias": torch.full((32,), float("nan"))}, "finite numbers in h.0.ln_1.bias, got NaN"),
        ({"transformer.ln_f.bias": torch.full((32,), float("inf"))}, "finite numbers in ln_f.bias, got NaN or Inf"),
        ({"transformer.ln_f.bias": torch.full((32,), 1e300, dtype=torch.float64)}, "finite numbers in ln_f.bias"),
    ):
        changed = {name: value for name, value in {**state, **change}.items() if value is not None}
        save(folder, model, changed, form)
        assert told in refused(folder, capsys), told


# Folders -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_shards_that_are_not_what_the_index_says(model, tmp_path, capsys, form):
    folder = save(tmp_path / "hf", model, untied(model), form, 3)
    (index,) = folder.glob("*.index.json")
    good = json.loads(index.read_text())
    second = sorted(folder.glob(f"*-00002-*.{form}"))[0]

    def placed(**change):
        index.write_text(json.dumps({"weight_map": {**good["weight_map"], **change}}))

    outside = tmp_path / f"outside.{form}"
    outside.write_bytes(second.read_bytes())
    for file in (f"../outside.{form}", str(outside), f"./{second.name}", "..", "", 5, None, "model.pkl"):
        placed(**{"transformer.wte.weight": file})
        assert "file beside the index, got" in refused(folder, capsys)
    placed(**{"transformer.wte.weight": f"gone.{form}"})
    assert f"gone.{form}: no such file" in refused(folder, capsys)
    placed(**{"transformer.wte.weight": second.name})
    assert "which the index says is there, got none" in refused(folder, capsys)
    for text in ("", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "\0"):
        index.write_text(text)
        assert str(index) in refused(folder, capsys)
    index.write_text(json.dumps(good))
    whole = second.read_bytes()
    second.write_bytes(whole[:-1])
    assert str(second) in refused(folder, capsys)
    second.unlink()
    assert f"{second}: no such file" in refused(folder, capsys)
    second.symlink_to(tmp_path / "nowhere")
    assert f"{second}: no such file" in refused(folder, capsys)
    second.unlink()
    second.mkdir()
    assert f"{second}: wanted a file, got a folder" in refused(folder, capsys)
    second.rmdir()
    second.symlink_to("/dev/zero")
    assert f"{second}: wanted a file, got something else" in refused(folder, capsys)
    second.unlink()
    os.mkfifo(second)
    assert f"{second}: wanted a file, got something else" in refused(folder, capsys)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_tensor_in_two_shards(model, tmp_path, capsys, form):
    folder = save(tmp_path / "hf", model, untied(model), form, 2)
    first, second = sorted(folder.glob(f"*.{form}"))
    state = untied(model)
    names = list(state)[1::2]
    more = {**{name: state[name] for name in names}, "transformer.wte.weight": state["transformer.wte.weight"] * 2}
    if form == "bin":
        torch.save(more, second)
    else:
        from safetensors.torch import save_file

        save_file(more, second)
    assert f"wanted wte.weight once, got it from {first.name} as well" in refused(folder, capsys)


def test_folders_without_weights_or_config(folder, capsys):
    (folder / "model.safetensors").unlink()
    assert "wanted weights (model.safetensors or " in refused(folder, capsys)
    (folder / "config.json").write_text('{"model_type": "gpt2"')
    assert "config.json" in refused(folder, capsys)
    (folder / "config.json").unlink()
    assert "wanted a run folder or a Hugging Face folder (config.json), got none" in refused(folder, capsys)


def test_a_head_under_both_names_is_one_too_many(model, tmp_path, capsys):
    state = {**untied(model), **bare(untied(model))}
    folder = save(tmp_path / "hf", model, {name: value.clone() for name, value in state.items()})
    assert "once, got it from model.safetensors as well" in refused(folder, capsys)


def test_a_head_that_the_config_promises(model, tmp_path, capsys):
    folder = save(tmp_path / "hf", model, untied(model))
    (folder / "config.json").write_text(json.dumps({**model.config.to_dict(), "tie_word_embeddings": False}))
    assert "wanted lm_head.weight, as tie_word_embeddings is false, got none" in refused(folder, capsys)
