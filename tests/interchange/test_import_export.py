"""`cgpt import` and `cgpt export` from end to end: what is written, what opens it, and what a failure leaves."""

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hub import model_of, tokenizer_of, tokens, untied, write
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import cgpt
from cgpt import checkpoint, cli
from cgpt.data.tokenizer import gpt2
from cgpt.errors import InputError
from cgpt.interchange.exporting import export, shards
from cgpt.interchange.importing import import_
from cgpt.model.parametrization import CEREBRAS, parametrize
from cgpt.recipe import read_config, write_config
from cgpt.stream.build import build
from cgpt.stream.format import Format
from nano import hear_interrupts

VOCABULARY = 300


@pytest.fixture(scope="module")
def model():
    return model_of(vocab_size=VOCABULARY, bos_token_id=VOCABULARY - 1, eos_token_id=VOCABULARY - 1)


@pytest.fixture
def folder(model, tmp_path, monkeypatch):
    """hf/, as save_pretrained leaves it, with a vocabulary of 300, in the working folder."""
    monkeypatch.chdir(tmp_path)
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf/tokenizer.json").write_bytes(tokenizer_of(VOCABULARY).file)
    return tmp_path / "hf"


def said(capsys, *argv, code=0):
    capsys.readouterr()
    assert cli.main(list(map(str, argv))) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err


def test_an_imported_run_is_evaluated_generates_and_is_exported(folder, model, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert "parameters, vocabulary of 300, computes in fp32" in said(capsys, "import", folder, "--out", "run")
    (tmp_path / "text.txt").write_text("whale ship1 sea12ward " * 30)
    found = json.loads(said(capsys, "eval", "run", "--data", "text.txt", "--json"))
    ids = torch.tensor([[*tokenizer_of(VOCABULARY).encode_ordinary("whale ship1 sea12ward " * 30), 299]])
    windows = (ids.shape[1] - 1) // 16
    spans = ids[:, : windows * 16 + 1].unfold(1, 17, 16)[0]
    with torch.no_grad():
        want = torch.nn.functional.cross_entropy(model(spans[:, :-1]).logits.flatten(0, 1), spans[:, 1:].flatten())
    assert found["loss"] == pytest.approx(want.item(), abs=1e-5)
    assert found["tokens"] == windows * 16
    assert said(capsys, "generate", "run", "--prompt", "whale", "--max-tokens", "3").startswith("whale")
    assert "one file" not in said(capsys, "export", "run", "--out", "back")
    line = said(capsys, "eval", "run", code=2)
    assert line.startswith("cgpt: --data: wanted text or tokens, as run was imported and has none of its own")
    line = said(capsys, "train", "--resume", "--out", "run", code=2)
    assert line == "cgpt: run: wanted a run to resume, got imported weights; cgpt train --init run goes on\n"
    line = said(capsys, "train", "--transfer-from", "run", "--out", "new", code=2)
    assert "wanted a run that was tuned, got imported weights, which --init takes" in line
    assert "hf: wanted a run folder, got a Hugging Face model; cgpt import" in said(capsys, "eval", "hf", code=2)


def test_export_gives_the_bytes_that_save_pretrained_does(model, tmp_path):
    """Of the weights and the index; of the others all that says something of the model."""
    model.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    (tmp_path / "theirs/tokenizer.json").write_bytes(tokenizer_of(VOCABULARY).file)
    import_(tmp_path / "theirs", tmp_path / "run")
    made = export(tmp_path / "run", tmp_path / "ours", shard_size="30KB")
    assert len(made.files) > 3
    for name in (*made.files, "model.safetensors.index.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name
    for name in ("config.json", "generation_config.json"):
        ours, theirs = (json.loads((tmp_path / whose / name).read_text()) for whose in ("ours", "theirs"))
        own = {"n_inner": 128} | {key: 0.0 for key in ours if key.endswith("pdrop")}  # said outright; of no concern
        assert ours == {key: own.get(key, theirs[key]) for key in theirs if key != "transformers_version"}
    files = {path.name for path in (tmp_path / "theirs").iterdir()}
    assert {path.name for path in (tmp_path / "ours").iterdir()} == files | {"tokenizer_config.json"}


@pytest.mark.parametrize(("dtype", "stored"), [("fp32", "F32"), ("bf16", "BF16"), ("fp16", "F16")])
def test_export_in_every_type(folder, model, tmp_path, dtype, stored):
    export(folder, tmp_path / "out", dtype)
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 (no mapping)
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {stored}  # noqa: SIM118
        for name, value in untied(model).items():
            assert torch.equal(file.get_tensor(name), value.to(file.get_tensor(name).dtype))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert found.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert found.lm_head.weight.data_ptr() == found.transformer.wte.weight.data_ptr()
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("whale")["input_ids"] == tokenizer_of(
        VOCABULARY
    ).encode_ordinary("whale")
    assert found.generation_config.eos_token_id == 299


def test_weights_past_fp16_are_refused(folder, model, tmp_path):
    state = untied(model)
    state["transformer.h.0.mlp.c_fc.bias"] = torch.full((128,), 7e4)
    write(folder, json.loads((folder / "config.json").read_text()), state)
    with pytest.raises(InputError, match=r"--dtype: wanted one that h.0.mlp.c_fc.bias fits in, got F16"):
        export(folder, tmp_path / "out", "fp16")
    assert not (tmp_path / "out").exists()
    export(folder, tmp_path / "out", "bf16")


def trained(run, config, tmp_path):
    """A run folder of a model of this shape with every weight off its start, as training leaves one."""
    generator = torch.Generator().manual_seed(3)
    recipe, _ = read_config(tmp_path / "run")
    _, store = build(config, Format("fp32"), "cpu")
    for name in store.names():
        store.write(name, torch.randn(store.shape(name), generator=generator) * 0.1)
    checkpoint.save(run / "checkpoints", store, 4, {"recipe": {}})
    identity = {"name": "x", "tokens": 1, "documents": 1, "vocabulary": tokenizer_of(VOCABULARY).hash}
    (run / "tokenizer.json").write_bytes(tokenizer_of(VOCABULARY).file)
    write_config(run, replace(recipe, shape=config), identity)
    return run


@pytest.mark.parametrize("kind", ["mup", "completep"])
def test_factors_are_folded(folder, tmp_path, kind, capsys):
    import_(folder, tmp_path / "run")
    shape = parametrize(read_config(tmp_path / "run")[0].shape, kind, CEREBRAS)
    run = trained(tmp_path / kind, shape, tmp_path)
    assert "its factors folded into the weights" in said(capsys, "export", run, "--out", "out")
    with torch.no_grad():
        want = cgpt.load(run)(tokens(VOCABULARY))
        got = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(tokens(VOCABULARY)).logits
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert cgpt.load(tmp_path / "out").config.embedding_scale == 1.0


@pytest.mark.parametrize("change", [{"positions": "rotary"}, {"activation": "swiglu"}, {"embedding_norm": True}])
def test_what_gpt2_cannot_express_is_refused_and_loads(folder, tmp_path, capsys, change):
    import_(folder, tmp_path / "run")
    run = trained(tmp_path / "other", replace(read_config(tmp_path / "run")[0].shape, **change), tmp_path)
    line = said(capsys, "export", run, "--out", "out", code=2)
    (name,) = change
    assert line.startswith(f"cgpt: {run}: {name}: wanted ")
    assert len(line.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    with torch.no_grad():
        assert cgpt.load(run)(tokens(VOCABULARY)).shape == (2, 16, VOCABULARY)


def test_a_padded_vocabulary_keeps_its_rows(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    padded = model_of(vocab_size=50304)
    write(tmp_path / "hf", padded.config.to_dict(), untied(padded))
    with pytest.raises(InputError, match=r"wanted tokenizer.json, .* beside a model of 50304"):
        import_("hf", "run")
    from cgpt.interchange.vocabulary import vocabulary_files

    (tmp_path / "hf/tokenizer.json").write_bytes(vocabulary_files(gpt2(), 16)["tokenizer.json"])
    import_("hf", "run")
    ids = tokens(50257)
    with torch.no_grad():
        assert (cgpt.load("run")(ids) - padded(ids).logits).abs().max() <= 1e-5
    assert said(capsys, "generate", "run", "--max-tokens", "2", "--temperature", "9", "--top-k", "0")
    assert json.loads((tmp_path / "run/config.json").read_text())["dataset"] == {"imported": "hf"}


def test_the_precision_is_that_of_the_weights_or_the_one_asked_for(folder, model, tmp_path):
    config = {**json.loads((folder / "config.json").read_text()), "dtype": "float32"}  # which may say what it likes
    stored = {torch.float64: "fp32", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    for form in ("bin", "safetensors"):
        for dtype, want in stored.items():
            write(folder, config, {name: value.to(dtype) for name, value in untied(model).items()}, form)
            if form == "bin":
                (folder / "model.safetensors").unlink(missing_ok=True)
            run = tmp_path / f"{dtype}{form}"
            assert import_(folder, run).precision == want
            assert read_config(run)[0].precision == want
    assert import_(folder, tmp_path / "asked", precision="fp16").precision == "fp16"
    with pytest.raises(InputError, match="precision: wanted one of bf16, fp16, fp32, got int8"):
        import_(folder, tmp_path / "never", precision="int8")


def test_shards_fill_up_in_order():
    sizes = {"a": 5, "b": 4, "c": 20, "d": 2, "e": 9, "f": 1}
    assert shards(sizes, 10) == [["c"], ["a", "b"], ["d"], ["e", "f"]]
    assert shards(sizes, 100) == [list(sizes)]
    assert shards({"a": 3}, 1) == [["a"]]


@pytest.mark.parametrize("command", ["import", "export"])
def test_out_must_be_new_or_empty(folder, tmp_path, capsys, command):
    for out, told in (("hf", "got one in use"), ("hf/config.json", "got a file")):
        assert told in said(capsys, command, folder, "--out", out, code=2)
    (tmp_path / "empty").mkdir()
    said(capsys, command, folder, "--out", "empty")
    assert any((tmp_path / "empty").iterdir())
    said(capsys, command, folder, "--out", "deep/er/still")
    assert (tmp_path / "deep/er/still/config.json").exists()
    assert "got one in use" in said(capsys, command, folder, "--out", "empty", code=2)


@pytest.mark.parametrize("command", ["import", "export"])
@pytest.mark.parametrize("call", range(5))
def test_a_full_disk_leaves_nothing(folder, tmp_path, capsys, monkeypatch, command, call):
    calls, fsync = [], os.fsync

    def failing(descriptor):
        calls.append(descriptor)
        if len(calls) == call + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    line = said(capsys, command, folder, "--out", "out", code=2)
    assert "No space left on device" in line
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_bad_sizes_and_types_are_named(folder, capsys):
    assert "--shard-size: wanted a size such as" in said(
        capsys, "export", folder, "--out", "x", "--shard-size", "huge", code=2
    )
    assert "--shard-size: wanted at least 1 byte" in said(
        capsys, "export", folder, "--out", "x", "--shard-size", "0", code=2
    )
    with pytest.raises(InputError, match="--dtype: wanted one of fp32, bf16, fp16, got fp8"):
        export(folder, "x", "fp8")


def test_a_run_is_not_imported(folder, tmp_path, capsys):
    import_(folder, "run")
    assert "run: wanted a Hugging Face model, got a run" in said(capsys, "import", "run", "--out", "again", code=2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_import_leaves_nothing_that_opens_and_can_be_run_again(folder, tmp_path, capsys, number):
    """Stopped within its third file; after SIGKILL what is left is taken away by the next attempt."""
    script = (
        "import sys, time; from cgpt import checkpoint, cli\n"
        "def failpoint(name):\n"
        "    if name == 'h.1.mlp.c_fc.weight on its way': print('there', flush=True); time.sleep(60)\n"
        "checkpoint.failpoint = failpoint\n"
        "sys.exit(cli.main(['import', 'hf', '--out', 'run']))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment, preexec_fn=hear_interrupts
    )
    assert process.stdout.readline() == b"there\n"
    assert "got one that another process has" in said(capsys, "import", "hf", "--out", "run", code=2)
    process.send_signal(number)
    assert process.wait(30) == (130 if number == signal.SIGINT else -signal.SIGKILL)
    process.stdout.close()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == ({"hf"} if number == signal.SIGINT else {"hf", ".run.unfinished"})
    with pytest.raises(InputError, match="wanted a run folder"):
        cgpt.load("run")
    with pytest.raises(InputError, match="wanted a run folder"):
        cgpt.load(".run.unfinished")
    import_("hf", "run")
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "run"}


def test_cgpt_alone_imports_nothing_heavy():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    script = "import cgpt, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], env=environment).returncode == 0
    assert [getattr(cgpt, name).__name__ for name in cgpt.__all__] == cgpt.__all__
    with pytest.raises(AttributeError, match="module 'cgpt' has no attribute 'nothing'"):
        cgpt.nothing  # noqa: B018
