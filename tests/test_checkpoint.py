import errno
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from cgpt import checkpoint
from cgpt.errors import InputError
from cgpt.model.config import GPTConfig
from cgpt.stream.build import build
from cgpt.stream.format import Format
from cgpt.stream.record import MOMENTS

SHAPE = GPTConfig(n_layer=2, n_head=2, d_model=16, d_head=8, d_ff=32, vocab_size=61, seq_len=8)


def filled(format=Format(), seed=0):  # noqa: B008 (frozen)
    """A store whose masters and moments are random, ties of bf16 rounding and tiny values among them."""
    _, store = build(SHAPE, format, "cpu")
    generator = torch.Generator().manual_seed(seed)
    for name in store.names():
        value = torch.randn(store.shape(name), generator=generator)
        value.view(-1)[0], value.view(-1)[1] = 1 + 2**-8, 1e-41
        with store.record(store.owner[name], writing=True) as record:
            record.set_master(name, value)
            for kind in MOMENTS:
                record.view(kind, name).copy_(torch.rand(value.shape, generator=generator))
    return store


def bits(store):
    return [record.memory.clone() for record in store.records]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(bits(a), bits(b), strict=True))


def damage(path, how):
    if how == "truncated":
        os.truncate(path, path.stat().st_size - 2)  # of JSON, the last byte is a line feed
    elif how == "flipped":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()


@pytest.mark.parametrize("format", [Format("bf16"), Format("fp16"), Format("fp32"), Format("bf16", "bf16")])
def test_a_round_trip_keeps_every_bit(tmp_path, format):
    store = filled(format)
    checkpoint.save(tmp_path, store, 7, {"samples": 28})
    path, manifest, skipped = checkpoint.newest(tmp_path)
    _, other = build(SHAPE, format, "cpu")
    checkpoint.load(path, other, manifest)
    assert same(store, other)
    assert (path.name, manifest["step"], manifest["samples"], skipped) == ("step-00000007", 7, 28, [])


def test_files_are_safetensors_with_hugging_face_names_and_fp32_masters(tmp_path):
    store = filled()
    path = checkpoint.save(tmp_path, store, 1, {})
    found = {}
    for name in ("embed", "h.0", "h.1", "head"):
        found |= load_file(path / f"{name}.safetensors")
    weights = {name: tensor for name, tensor in found.items() if "/" not in name}
    assert sorted(weights) == sorted(store.names())
    assert {"wte.weight", "h.1.attn.c_attn.weight", "ln_f.bias"} <= set(weights)
    for name, tensor in weights.items():
        assert torch.equal(tensor, store.read(name))
        assert torch.equal(found[f"exp_avg_sq/{name}"], store.moment("exp_avg_sq", name))


def test_the_newest_are_kept_and_latest_points_at_the_last(tmp_path):
    store = filled()
    for step in (1, 2, 3, 4):
        checkpoint.save(tmp_path, store, step, {}, keep=2)
    assert checkpoint.steps(tmp_path) == ["step-00000004", "step-00000003"]
    assert (tmp_path / "latest").resolve() == (tmp_path / "step-00000004").resolve()
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000003", "step-00000004"]


@pytest.mark.parametrize("file", ["h.1.safetensors", "manifest.json"])
@pytest.mark.parametrize("how", ["truncated", "flipped", "gone"])
def test_a_damaged_checkpoint_is_skipped_by_name(tmp_path, file, how):
    checkpoint.save(tmp_path, filled(), 1, {})
    broken = checkpoint.save(tmp_path, filled(seed=1), 2, {})
    damage(broken / file, how)
    path, _, skipped = checkpoint.newest(tmp_path)
    assert path.name == "step-00000001"
    assert len(skipped) == 1
    assert str(broken / file) in skipped[0]
    assert "\n" not in skipped[0]


def test_flipped_bytes_all_over_a_file_are_noticed(tmp_path):
    path = checkpoint.save(tmp_path, filled(), 1, {"samples": 3})
    manifest = checkpoint.verify(path)
    for file in (path / "manifest.json", path / "head.safetensors"):
        data = file.read_bytes()
        for i in range(0, len(data), 7):
            file.write_bytes(data[:i] + bytes([data[i] ^ 4]) + data[i + 1 :])
            try:
                assert checkpoint.verify(path) == manifest  # white space between JSON values says nothing
                assert file.name == "manifest.json"
            except InputError as error:
                assert str(path) in str(error)  # noqa: PT017 -- either outcome is checked
        file.write_bytes(data)


def test_nothing_whole_is_an_error_that_names_all(tmp_path):
    with pytest.raises(InputError, match="wanted a checkpoint, got none"):
        checkpoint.newest(tmp_path)
    for step in (1, 2):
        damage(checkpoint.save(tmp_path, filled(), step, {}) / "embed.safetensors", "flipped")
    with pytest.raises(InputError, match=r"only damaged ones: .*step-00000002.*step-00000001"):
        checkpoint.newest(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("call", range(12))
def test_a_save_that_fails_at_any_sync_leaves_the_one_before(tmp_path, monkeypatch, number, call):
    before = filled()
    checkpoint.save(tmp_path, before, 1, {})
    calls, fsync = [], os.fsync

    def failing(descriptor):
        calls.append(descriptor)
        if len(calls) == call + 1:
            raise OSError(number, os.strerror(number))
        return fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    failed = None
    try:
        checkpoint.save(tmp_path, filled(seed=1), 2, {})
    except OSError as error:
        failed = error
    monkeypatch.undo()
    assert (failed is not None) == (call < len(calls))
    path, manifest, skipped = checkpoint.newest(tmp_path)
    assert skipped == []
    assert not list(tmp_path.glob("*.tmp"))
    if failed is not None:
        assert failed.errno == number
        assert str(tmp_path) in failed.filename
    if path.name == "step-00000001":
        _, other = build(SHAPE, Format(), "cpu")
        checkpoint.load(path, other, manifest)
        assert same(before, other)
    else:  # the folder was in place when the failure came
        assert call >= 7


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path):
    (tmp_path / "step-00000005.tmp").mkdir()
    (tmp_path / "step-00000005.tmp" / "embed.safetensors").write_bytes(b"half")
    assert checkpoint.steps(tmp_path) == []
    checkpoint.save(tmp_path, filled(), 6, {})
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000006"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    checkpoint.save(tmp_path, filled(), 1, {})
    path, manifest, _ = checkpoint.newest(tmp_path)
    wider = GPTConfig(n_layer=2, n_head=2, d_model=32, d_head=16, d_ff=64, vocab_size=61, seq_len=8)
    deeper = GPTConfig(n_layer=3, n_head=2, d_model=16, d_head=8, d_ff=32, vocab_size=61, seq_len=8)
    with pytest.raises(InputError, match=r"wte.weight: wanted float32 \(61, 32\), got torch.float32 \(61, 16\)"):
        checkpoint.load(path, build(wider, Format(), "cpu")[1], manifest)
    with pytest.raises(InputError, match=r"wanted a checkpoint with layer h\.2, got none"):
        checkpoint.load(path, build(deeper, Format(), "cpu")[1], manifest)


def test_a_signed_manifest_of_another_format_is_refused(tmp_path):
    path = checkpoint.save(tmp_path, filled(), 1, {})
    content = json.loads((path / "manifest.json").read_text())
    content.pop("sha256")
    checkpoint.write_signed_json(path / "manifest.json", {**content, "format": 99})
    with pytest.raises(InputError, match="wanted format 1, got 99"):
        checkpoint.verify(path)
    shutil.rmtree(path)
