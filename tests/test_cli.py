"""`cgpt` as a user meets it. Every mistake is one line, exit code 2, and nothing half-written."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import nano
from cgpt import cli, placing
from cgpt.data.prepare import prepare
from cgpt.stream.limits import Limits
from nano import start

TRAIN = "train --model nano --data corpus.txt --steps 2 --eval-tokens 32 --out run".split()


def refused(capsys, *argv):
    """The one line on stderr of a command that must fail."""
    capsys.readouterr()
    code = cli.main([str(word) for word in argv])
    errors = capsys.readouterr().err
    assert code == 2
    lines = errors.splitlines()
    assert len(lines) == 1, errors
    assert lines[0].startswith("cgpt: ")
    return lines[0]


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        ("train --model 7B", "--model: wanted one of tiny, mini, 111M, 256M, 590M, 1.3B, 2.7B, 6.7B, 13B, "),
        ("train --stepz 3", "Unrecognized options: --stepz, 3; perhaps --steps?"),
        ("train --steps many", "--steps: no type matching"),
        ("train --steps 0", "--steps: wanted a number above 0, got 0"),
        ("train --lr nan", "--lr: wanted a number above 0, got nan"),
        ("train --lr -1", "--lr: wanted a number above 0, got -1.0"),
        ("train --precision int8", "invalid choice 'int8' for argument '--precision'"),
        ("train --min-lr-ratio 2", "--min-lr-ratio: wanted a share from 0 to 1, got 2.0"),
        ("train --batch-schedule 5", "--batch-schedule: wanted TOKENS:SEQUENCES,..., got 5"),
        ("train --batch-schedule 0:1 --batch-size 2", "--batch-schedule: wanted it or --batch-size, got both"),
        ("train --batch-schedule 5:1", "batch schedule: starts must ascend from 0 tokens, got [5]"),
        ("train --warmup-tokens 99999999 --steps 1", "--warmup-tokens: wanted at most the run's 512, got 99999999"),
        ("train --resume", "runs/tiny-moby-dick: wanted a run to resume, got none"),
        ("train --resume --out corpus.txt", "corpus.txt: wanted a run to resume (config.json), got none"),
        ("train --out corpus.txt", "corpus.txt: wanted a folder for the run, got a file"),
        ("train --data nowhere.txt", "nowhere.txt: no such file or folder"),
        ("eval nowhere", "nowhere: wanted a run folder (config.json), got no folder"),
        ("generate .", ".: wanted a run folder (config.json), got none"),
        ("data info nowhere", "nowhere: no such file or folder"),
        ("data prepare corpus.txt", "Missing from cgpt data prepare: --out DIR"),
        ("data", "Expected one of {prepare, export, info}"),
        ("", "Expected one of {train, plan, fit, coord-check, sweep, ablate, eval, generate, import, export, plot, "),
        ("dance", "Unrecognized options: dance"),
    ],
)
def test_mistakes_are_one_line(here, capsys, argv, wanted):
    assert wanted in refused(capsys, *argv.split())
    assert sorted(path.name for path in here.iterdir() if path.name != "cache") == ["corpus.txt"]


def test_a_model_past_the_memory_there_is(here, capsys, monkeypatch):
    monkeypatch.setattr(placing, "limits", lambda: Limits({"memory": 8 << 30}))
    wanted = "--model: 13B wants 195.46 GiB for state and gradients, got 8.00 GiB of free memory; --placement auto or"
    assert wanted in refused(capsys, "train", "--model", "13B")
    assert not (here / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(here, capsys):
    wanted = f"cgpt: --device: wanted cuda, got a machine where torch {torch.__version__} finds no CUDA device"
    assert refused(capsys, *TRAIN, "--device", "cuda") == wanted
    assert not (here / "run").exists()
    assert cli.main(TRAIN) == 0
    for argv in (["eval", "run"], ["generate", "run"], ["train", "--resume", "--out", "run"]):
        assert refused(capsys, *argv, "--device", "cuda") == wanted


def write(path, data):
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("empty.txt", b"", "wanted text, got an empty file"),
        ("binary.txt", b"whale\0sea" * 100, "NUL"),
        ("latin.txt", "the wh\xe4le ".encode("latin-1") * 100, "UTF-8"),
        ("short.txt", b"one whale", "wanted at least 34 tokens"),
        ("rows.jsonl", b'{"text": "a whale"}\n{"body": "a ship"}\n', "text"),
        ("book.pdf", b"%PDF-1.4", "got the suffix '.pdf'"),
        ("torn.jsonl.xz", b"\xfd7zXZ\0\0\4", "torn.jsonl.xz"),
        ("ids.bin", np.full(1000, 50257, "<u2").tobytes(), "wanted token ids under 50257, got 50257 at position 0"),
        ("odd.bin", b"abc", "an even number of bytes, got 3"),
    ],
)
def test_bad_corpora_are_one_line_and_leave_no_run(here, capsys, name, content, wanted):
    (here / name).write_bytes(content)
    line = refused(capsys, *TRAIN, "--data", name)
    assert wanted in line
    assert name in line
    assert not (here / "run").exists()


@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_damaged_shards_are_named(here, capsys, how):
    prepare(here / "corpus.txt", here / "shards", progress=False)
    shard = here / "shards" / "shard-00000.bin"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data if how == "flipped" else data[:-1])
    assert str(shard.relative_to(here)) in refused(capsys, *TRAIN, "--data", "shards")
    assert not (here / "run").exists()


def test_train_eval_and_generate_in_turn(here, capsys, monkeypatch):
    assert cli.main(TRAIN) == 0
    summary = json.loads((here / "run" / "summary.json").read_text())
    capsys.readouterr()
    assert cli.main(["eval", "run", "--tokens", "32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loss"] == pytest.approx(summary["val_loss"], rel=1e-6)
    assert found["split"] == "held-out split"
    (here / "other.txt").write_text("the whale and the sea " * 50)
    assert cli.main(["eval", "run", "--data", "other.txt"]) == 0
    assert "other.txt (all of it): " in capsys.readouterr().out
    texts = []
    for seed in ("1", "1", "2"):
        assert cli.main(["generate", "run", "--prompt", "the whale", "--max-tokens", "8", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("the whale")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    process = start("generate", "run", "--prompt", "na\u00efve", "--max-tokens", "2", cwd=here)
    out, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    assert out.startswith("na?ve")
    assert "temperature" in refused(capsys, "generate", "run", "--temperature", "-1")
    assert "--tokens: wanted at least 1, got 0" in refused(capsys, "eval", "run", "--tokens", "0")


def test_a_damaged_run_is_named(here, capsys):
    assert cli.main(TRAIN) == 0
    for path in (here / "run" / "checkpoints").glob("step-*/head.safetensors"):
        os.truncate(path, 10)
    for argv in (["eval", "run"], ["generate", "run"], ["train", "--resume", "--out", "run"]):
        assert "wanted a whole checkpoint, got only damaged ones" in refused(capsys, *argv)
    (here / "run" / "config.json").write_text("{")
    assert "run/config.json: wanted a run's configuration, got a damaged file" in refused(capsys, "eval", "run")


def test_a_rate_that_blows_the_weights_up_stops_the_run(here, capsys):
    line = refused(capsys, *TRAIN, "--lr", "1e30", "--warmup-tokens", "0", "--checkpoint-every", "1")
    assert "loss: wanted a finite number, got" in line or "gradients: wanted a finite norm" in line


def test_a_folder_that_cannot_be_made(here, capsys):
    (here / "file").write_text("")
    line = refused(capsys, *TRAIN, "--out", "file/run")
    assert "file/run" in line
    assert "Not a directory" in line


def test_a_full_disk_ends_the_process_with_one_line_and_no_partial_checkpoint(here):
    program = (
        "import resource, runpy, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))\n"
        "sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", program, nano.__file__, *TRAIN]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 1
    assert "embed.safetensors: File too large; last good checkpoint: none" in lines[0]
    assert os.listdir(here / "run" / "checkpoints") == []


def test_data_prepare_and_info(here, capsys):
    assert cli.main(["data", "prepare", "corpus.txt", "--out", "shards"]) == 0
    capsys.readouterr()
    assert cli.main(["data", "info", "shards", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text_bytes"] == (here / "corpus.txt").stat().st_size
    assert found["documents"] == 1


def test_info_lists_presets_and_implementations(capsys):
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    published = "111M 256M 590M 1.3B 2.7B 6.7B 13B".split()
    counts = [found["presets"][name]["parameters"] for name in published]
    assert counts == [111050496, 255977024, 590310912, 1315723264, 2651553280, 6658404352, 12853386240]
    assert {"attention", "gelu_mlp", "layer_norm", "cross_entropy", "embedding", "adamw"} <= set(found["ops"])
    assert all(row["why"] for devices in found["ops"].values() for row in devices.values())
    assert found["cuda"]["available"] == torch.cuda.is_available()
    assert cli.main(["info"]) == 0
    assert "12,853,386,240" in capsys.readouterr().out


def test_help_imports_no_torch(tmp_path):
    program = (
        "import sys\nfrom cgpt.cli import main\ntry:\n    main(['train', '--help'])\n"
        "except SystemExit as error:\n    assert not error.code\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for flag in "--model --data --steps --batch-size --seq-len --lr --precision --device --seed --out --resume".split():
        assert flag in done.stdout


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_mistake_in_a_process_of_its_own(tmp_path, monkeypatch, encoding):
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    process = start("train", "--stepz", "3", cwd=tmp_path)
    out, errors = process.communicate()
    assert (process.returncode, out) == (2, "")
    line = "cgpt: Unrecognized options: --stepz, 3; perhaps --steps? (cgpt --help lists what there is)\n"
    assert errors == line
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_leaves_is_no_error(tmp_path):
    process = start("info", cwd=tmp_path)
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait() == 1
    assert "Traceback" not in errors
