"""`cgpt generate` as a command: prompts and texts by file and pipe, what it refuses, memory, Ctrl-C."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from cgpt import cli, console, heap, placing, train
from cgpt.data.tokenizer import gpt2
from cgpt.errors import InputError
from cgpt.evaluate import write_run as module
from cgpt.evaluate.sampling import Draw
from cgpt.model import presets
from cgpt.model.cache import cache_bytes
from cgpt.placing import Room, place_reading
from cgpt.recipe import TrainConfig, read_config
from nano import NANO, start, write_corpus

PROMPTS = ["the whale", "a ship of the old captain and the sea", "\u6f22\u5b57"]
MB = 10**6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a run of three steps, of sequences of 8 tokens in a model of 16 positions."""
    here, threads = tmp_path_factory.mktemp("generate"), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "nano", NANO)
        patch.setenv("XDG_CACHE_HOME", str(here / "cache"))
        patch.chdir(here)
        patch.setattr(heap, "keep_large_buffers", lambda: None)  # for whole processes, not for a test runner's
        patch.setattr(placing, "own_memory", lambda: 0)  # grows while tests run
        write_corpus(here)
        torch.set_num_threads(1)
        config = {"model": "nano", "data": "corpus.txt", "steps": 3, "batch_size": 2, "seq_len": 8, "eval_tokens": 32}
        train.train(TrainConfig(**config, out=here / "run"))
        yield here
    torch.set_num_threads(threads)


@pytest.fixture
def generate(folder, capsys, monkeypatch):
    """generate(flags...) -> (exit code, stdout, stderr); stdin: bytes."""

    def run(*flags, stdin=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        code = cli.main(["generate", "run", *map(str, flags)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def rows(text):
    return [json.loads(line) for line in text.splitlines()]


def test_many_prompts_get_the_texts_that_each_gets_alone(generate, folder, monkeypatch):
    (folder / "lines.txt").write_text("\n".join([PROMPTS[0], "", "  ", *PROMPTS[1:]]) + "\r\n", encoding="utf-8")
    packed = "".join(json.dumps({"prompt": prompt, "id": 7}) + "\n\n" for prompt in PROMPTS)
    (folder / "rows.jsonl").write_text(packed)
    flags = "--max-tokens", 12, "--seed", 3
    code, out, err = generate("--prompts", "lines.txt", *flags)
    assert (code, err) == (0, "")
    found = rows(out)
    assert [row["prompt"] for row in found] == PROMPTS
    for row in found:
        assert list(row) == ["prompt", "sample", "text", "tokens", "finish_reason"]
        assert row["text"] == gpt2().decode(row["tokens"])
        assert (len(row["tokens"]), row["finish_reason"], row["sample"]) == (12, "length", 0)
        assert generate("--prompt", row["prompt"], *flags) == (0, row["prompt"] + row["text"] + "\n", "")
    assert generate("--prompts", "rows.jsonl", *flags) == (0, out, "")
    data = (folder / "lines.txt").read_bytes()
    assert generate("--prompts", "-", *flags, stdin=data) == (0, out, "")
    assert generate("--prompts", "rows.jsonl", "--out", "answers.jsonl", "--batch-size", 1, *flags) == (0, "", "")
    assert (folder / "answers.jsonl").read_text(encoding="utf-8") == out
    assert "\u6f22" in out  # as itself
    assert not list(folder.glob("*.tmp"))
    assert generate("--prompt", PROMPTS[0], "--out", "-", *flags) == (0, out.splitlines()[0] + "\n", "")


def test_a_prompt_is_read_from_a_pipe(generate):
    wanted = generate("--prompt", "the\nwhale", "--max-tokens", 4)
    assert generate("--prompt", "-", "--max-tokens", 4, stdin=b"the\nwhale") == wanted
    assert wanted[1].startswith("the\nwhale")
    assert generate("--max-tokens", 4) == generate("--prompt", "\n", "--max-tokens", 4)


def test_samples_and_stops_on_the_terminal(generate):
    flags = "--prompt", "the", "--max-tokens", 9, "--num-samples", 3
    _, out, _ = generate(*flags)
    texts = re.fullmatch(r"(?s)--- 1 of 3\nthe(.*)\n--- 2 of 3\nthe(.*)\n--- 3 of 3\nthe(.*)\n", out).groups()
    assert len(set(texts)) == 3
    assert generate(*flags[:4]) == (0, f"the{texts[0]}\n", "")
    found = rows(generate(*flags, "--out", "-")[1])
    assert [(row["sample"], row["text"]) for row in found] == list(enumerate(texts))
    stop = texts[0][3:5]
    (row,) = rows(generate(*flags[:4], "--stop", "\u6f22", stop, "--out", "-")[1])
    assert row["text"] == texts[0][: texts[0].index(stop)]
    assert row["finish_reason"] == "stop"


def test_the_context_is_what_the_run_was_trained_on(generate, monkeypatch):
    made = []
    shape = module.cache_shape
    monkeypatch.setattr(module, "cache_shape", lambda *a: made.append(shape(*a)) or made[-1])
    flags = "--prompt", "the whale", "--max-tokens", 30, "--temperature", 0
    narrow, wide = generate(*flags), generate(*flags, "--context", 16)
    assert made == [(1, 8), (1, 16)]
    assert narrow[0] == wide[0] == 0
    assert narrow == generate(*flags, "--context", 8)


REFUSED = [
    (["--prompt", "a", "--prompts", "good.txt"], "--prompts: wanted one of --prompt and --prompts, got both"),
    (["--prompts", "nowhere.txt"], "nowhere.txt: No such file or directory"),
    (["--prompts", "."], ".: Is a directory"),
    (["--prompts", "empty.txt"], "empty.txt: wanted a prompt, got none"),
    (["--prompts", "-"], "standard input: wanted a prompt, got none"),
    (["--prompts", "latin.txt"], "latin.txt: wanted text in UTF-8, got byte 0xef at 2"),
    (["--prompts", "bad.jsonl"], "bad.jsonl, line 2: wanted JSON, got "),
    (["--prompts", "list.jsonl"], 'list.jsonl, line 1: wanted an object with a text "prompt", got ["prompt"]'),
    (["--prompts", "number.jsonl"], 'wanted an object with a text "prompt", got {"prompt": 3}'),
    (["--out", "."], "--out: wanted a file, got the folder ."),
    (["--out", "no/such/file.jsonl"], "no/such/file.jsonl: No such file or directory"),
    (["--stop", ""], "--stop: wanted a text, got an empty one"),
    (["--max-tokens", "-1"], "--max-tokens: wanted at least 0, got -1"),
    (["--num-samples", "0"], "--num-samples: wanted at least 1, got 0"),
    (["--batch-size", "0"], "--batch-size: wanted at least 1, got 0"),
    (["--context", "17"], "--context: wanted 1 to the model's 16 positions, got 17"),
    (["--context", "0"], "--context: wanted 1 to the model's 16 positions, got 0"),
    (["--temperature", "-1"], "temperature must be finite and not negative, got -1.0"),
]


@pytest.mark.parametrize(("flags", "wanted"), REFUSED, ids=lambda x: " ".join(x)[:30] if isinstance(x, list) else "")
def test_what_cannot_be_is_refused_before_the_checkpoint_is_read(generate, folder, monkeypatch, flags, wanted):
    files = {"good.txt": b"a", "empty.txt": b" \n\n", "latin.txt": b"na\xefve", "bad.jsonl": b'{"prompt": "a"}\n{"pro'}
    files |= {"list.jsonl": b'["prompt"]', "number.jsonl": b'{"prompt": 3}'}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    monkeypatch.setattr("cgpt.checkpoint.newest", lambda folder: pytest.fail("the checkpoint was read"))
    code, out, err = generate(*flags)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith("cgpt: ")
    assert wanted in err
    assert not list(folder.glob("*.tmp"))


def test_a_prompt_that_no_encoding_takes_is_marked(generate, folder):
    (folder / "halves.jsonl").write_text(r'{"prompt": "a\ud800b"}')
    (row,) = rows(generate("--prompts", "halves.jsonl", "--max-tokens", 2)[1])
    assert row["prompt"] == "a\ufffdb"
    assert generate("--prompt", "a\udcffb", "--max-tokens", 0) == (0, "a\ufffdb\n", "")


def test_keys_and_values_are_planned_and_refused_with_both_numbers(generate, folder, monkeypatch):
    recipe, _ = read_config(folder / "run")
    one = cache_bytes(recipe.shape, 1, 16, 2)
    assert one == 2 * 2 * 16 * 16 * 2
    whole = place_reading(recipe, Room(), 1)
    cached = place_reading(recipe, Room(), 1, cache=one)
    assert cached.account.host == whole.account.host + one
    room = whole.account.host + whole.account.needs.device
    assert not place_reading(recipe, Room(host_memory=room), 1).streams
    assert not place_reading(recipe, Room(host_memory=room + one), 1, cache=one).streams
    with pytest.raises(InputError, match=r"^host memory: wanted at least .* cache"):
        place_reading(recipe, Room(host_memory=room + one - 1), 1, cache=one)
    monkeypatch.setattr(module, "cache_bytes", lambda *a: 3 << 30)
    code, out, err = generate("--host-memory", "200MB")
    assert (code, out) == (2, "")
    assert re.match(r"cgpt: host memory: wanted at least 3\.\d+ GiB \(.*cache[^,]* 3.00 GiB.*\), got ", err)


def test_layers_give_way_to_keys_and_values_on_a_gpu(folder, monkeypatch):
    """There a cache lies on the device itself: what it takes, layers lose."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (200 * MB, 200 * MB))
    recipe, _ = read_config(folder / "run")
    room = Room("cuda", device_memory=200 * MB)
    roomy = place_reading(recipe, room, 1)
    tight = place_reading(recipe, room, 1, cache=200 * MB - roomy.account.device + 1)
    assert (roomy.streams, tight.streams) == (False, True)
    assert tight.account.device <= 200 * MB
    with pytest.raises(InputError, match=r"device memory: wanted at least .*cache 190\.\d+ MiB"):
        place_reading(recipe, room, 1, cache=200 * MB)


def test_whoever_watches_is_told_how_fast(generate, folder, monkeypatch):
    monkeypatch.setattr(console, "interactive", lambda: True)
    code, _, err = generate("--prompt", "the", "--max-tokens", 5)
    assert code == 0
    assert re.fullmatch(r"5 tokens in [\d.]+ s: [\d.e+]+ tokens/s\n", err)
    (folder / "two.txt").write_text("a\nb\n")
    _, _, err = generate("--prompts", "two.txt", "--max-tokens", 5, "--out", "two.jsonl")
    assert "2/2" in err
    assert re.search(r"10 tokens in [\d.]+ s", err)


@pytest.mark.parametrize("draws", [0, 10])
def test_ctrl_c_keeps_what_there_is(generate, folder, monkeypatch, draws):
    token, drawn = Draw.token, []

    def interrupted(self, *arguments):
        if len(drawn) == draws:
            raise KeyboardInterrupt
        drawn.append(token(self, *arguments))
        return drawn[-1]

    flags = "--max-tokens", 20, "--seed", 3, "--temperature", 1
    (folder / "three.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    whole = rows(generate("--prompts", "three.txt", *flags)[1])
    one = generate("--prompt", PROMPTS[0], *flags)[1]
    monkeypatch.setattr(Draw, "token", interrupted)
    code, out, err = generate("--prompts", "three.txt", "--out", "cut.jsonl", *flags)
    assert (code, out, err) == (130, "", "cgpt: interrupted\n")
    assert not list(folder.glob("*.tmp"))
    if draws == 0:
        assert not (folder / "cut.jsonl").exists()
    else:
        found = rows((folder / "cut.jsonl").read_text())
        assert [row["finish_reason"] for row in found] == ["interrupted"] * 3
        assert sum(len(row["tokens"]) for row in found) == 10
        for row, other in zip(found, whole, strict=True):
            assert other["tokens"][: len(row["tokens"])] == row["tokens"] != []
    drawn.clear()
    code, out, err = generate("--prompt", PROMPTS[0], *flags)
    assert (code, err) == (130, "cgpt: interrupted\n")
    assert out.endswith("\n")
    assert one.startswith(out.removesuffix("\n"))
    assert len(out) > len(PROMPTS[0]) + draws


def test_a_real_signal_ends_it_cleanly(folder):
    process = start("generate", "run", "--prompt", "the whale", "--max-tokens", "1000000", cwd=folder)
    begun = process.stdout.read(60)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert begun.startswith("the whale")
    assert rest.endswith("\n")
    assert err == "cgpt: interrupted\n"


def test_what_is_no_file_is_written_to_as_it_is(generate, folder):
    os.mkfifo(folder / "pipe")
    reader = subprocess.Popen(["cat", folder / "pipe"], stdout=subprocess.PIPE, text=True)
    assert generate("--prompt", "a", "--max-tokens", 3, "--out", "pipe") == (0, "", "")
    (row,) = rows(reader.communicate(timeout=30)[0])
    assert (row["prompt"], len(row["tokens"])) == ("a", 3)
    assert (folder / "pipe").is_fifo()


def test_an_error_on_the_way_leaves_no_file(generate, folder, monkeypatch):
    def broken(self, *arguments):
        raise InputError("generate: the model's logits at position 3 must be finite, got NaN or Inf")

    monkeypatch.setattr(Draw, "token", broken)
    (folder / "kept.jsonl").write_text("before")
    code, _, err = generate("--prompt", "a", "--out", "kept.jsonl")
    assert (code, err.count("\n")) == (2, 1)
    assert (folder / "kept.jsonl").read_text() == "before"
    assert not list(folder.glob("*.tmp"))
