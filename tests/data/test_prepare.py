"""Preparing text: the same bytes whatever happens on the way, and nothing half-written when it fails."""

import contextlib
import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from cgpt.data import prepare as room
from cgpt.data import shards, writer
from cgpt.data.prepare import open_corpus, prepare
from cgpt.data.sources import find
from cgpt.data.tokenizer import EOT, gpt2
from cgpt.errors import InputError

SHARD_TOKENS = 4096


@pytest.fixture(scope="module")
def prose(tmp_path_factory):
    """A folder with a long .txt and many documents: about 0.4M tokens, so about 90 shards of 4096."""
    folder = tmp_path_factory.mktemp("prose")
    texts = [piece.text for piece in room.read(find("moby-dick"), room.Counter())]
    (folder / "long.txt").write_text("".join(texts[:40]))
    (folder / "many.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


@pytest.fixture(scope="module")
def whole(prose, tmp_path_factory):
    """The files of an uninterrupted run with one worker."""
    out = tmp_path_factory.mktemp("whole") / "out"
    prepare(prose, out, workers=1, progress=False, shard_tokens=SHARD_TOKENS)
    return contents(out)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refusal(pattern, *arguments, **options):
    with pytest.raises(InputError) as caught:
        prepare(*arguments, progress=False, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert re.search(pattern, message), message


def in_process(prose, out, **options):
    """The preparation of `out` in a process of its own, slowed so that a kill finds it at work."""
    code = f"""
import time
from cgpt.data.prepare import prepare
from cgpt.data.writer import ShardWriter
add = ShardWriter.add
ShardWriter.add = lambda self, batch: (time.sleep(0.005), add(self, batch))
prepare({str(prose)!r}, {str(out)!r}, progress=False, shard_tokens={SHARD_TOKENS})
"""
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, **options)


def test_result_is_the_plain_encoding(prose, whole, tmp_path):
    assert sorted(whole)[:2] == ["dataset.json", "documents.idx"]
    assert len(whole) > 40
    tokens = np.frombuffer(b"".join(whole[name] for name in sorted(whole) if name.startswith("shard")), "<u2")
    texts = [(prose / "long.txt").read_text()]
    texts += [json.loads(line)["text"] for line in (prose / "many.jsonl").read_text().splitlines()]
    expected = [[*gpt2().encode_ordinary(text), EOT] for text in texts]
    assert tokens.tolist() == np.concatenate(expected).tolist()
    ends = np.frombuffer(whole["documents.idx"], "<i8")
    assert ends.tolist() == np.cumsum([len(each) for each in expected]).tolist()


@pytest.mark.parametrize("workers", [2, 5])
def test_workers_do_not_change_a_byte(prose, whole, tmp_path, workers):
    prepare(prose, tmp_path / "out", workers=workers, progress=False, shard_tokens=SHARD_TOKENS)
    assert contents(tmp_path / "out") == whole


def test_killed_again_and_again_and_resumed_equals_uninterrupted(prose, whole, tmp_path):
    out = tmp_path / "out"
    kept = {}
    rng = random.Random(0)
    for goal in (2, 11, 25):
        process = in_process(prose, out)
        while process.poll() is None and not (out / f"shard-{goal:05d}.bin").exists():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.stderr.read()
        assert not (out / "dataset.json").exists()
        with pytest.raises(InputError, match="unfinished"):
            shards.open_dataset(out)
        recorded = json.loads((out / "unfinished.json").read_text())["files"]
        assert len(recorded) >= goal
        assert kept == {name: (out / name).stat().st_mtime_ns for name in kept}, "a finished shard was redone"
        kept = {name: (out / name).stat().st_mtime_ns for name in recorded}
    prepare(prose, out, progress=False, shard_tokens=SHARD_TOKENS)
    assert kept == {name: (out / name).stat().st_mtime_ns for name in kept}
    assert contents(out) == whole


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # a progress bar may keep a thread
def test_death_at_every_sync_and_rename_is_resumable(tmp_path):
    row = json.dumps({"text": "It was a dark and stormy night. " * 20})
    (tmp_path / "a.jsonl").write_text(f"{row}\n" * 6)
    arguments = (tmp_path / "a.jsonl", tmp_path / "out")
    options = {"workers": 1, "progress": False, "shard_tokens": 256}
    prepare(arguments[0], tmp_path / "whole", **options)
    steps = 0

    def dying(real, at):
        def call(*arguments):
            nonlocal steps
            steps += 1
            if steps == at:
                os._exit(9)
            return real(*arguments)

        return call

    for at in range(1, 200):
        child = os.fork()
        if child == 0:
            for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "replace"), (Path, "unlink")):
                setattr(owner, name, dying(getattr(owner, name), at))
            prepare(*arguments, **options)
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            break
        prepare(*arguments, **options)
        assert contents(tmp_path / "out") == contents(tmp_path / "whole"), at
        shutil.rmtree(tmp_path / "out")
    assert 20 < at < 200  # it died at every step of three shards, then lived


def test_interrupt_keeps_whole_shards_only(prose, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    real = writer.ShardWriter.add

    def interrupted(self, batch):
        if self.batches == 50:
            raise KeyboardInterrupt
        real(self, batch)

    monkeypatch.setattr(writer.ShardWriter, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(prose, out, progress=False, shard_tokens=SHARD_TOKENS)
    monkeypatch.undo()
    left = set(contents(out))
    assert {"unfinished.json", "documents.idx", "shard-00000.bin"} <= left
    assert not [name for name in left if name.endswith((".tmp", ".lock"))]
    prepare(prose, out, progress=False, shard_tokens=SHARD_TOKENS)
    assert contents(out) == whole


def test_finished_folder_is_opened_and_left_alone(prose, tmp_path):
    (tmp_path / "a.txt").write_text("One. " * 100)
    first = prepare(tmp_path / "a.txt", tmp_path / "out", progress=False)
    before = contents(tmp_path / "out")
    again = prepare([tmp_path / "a.txt"], tmp_path / "out", progress=False)
    assert again.n_tokens == first.n_tokens
    assert contents(tmp_path / "out") == before
    refusal(
        r"out: wanted a new or empty folder, got the dataset of other sources \(a\.txt, ",
        prose,
        tmp_path / "out",
    )
    (tmp_path / "a.txt").write_text("Two. " * 100)
    refusal("got the dataset of other sources", tmp_path / "a.txt", tmp_path / "out")


def test_unfinished_folder_of_other_sources(prose, tmp_path):
    process = in_process(prose, tmp_path / "out")
    while process.poll() is None and not (tmp_path / "out/shard-00002.bin").exists():
        time.sleep(0.001)
    process.kill()
    process.wait()
    before = contents(tmp_path / "out")
    refusal("out: wanted the sources of the unfinished dataset there, got others", "moby-dick", tmp_path / "out")
    assert {name: data for name, data in before.items() if name != "prepare.lock"} == contents(tmp_path / "out")


def test_several_sources_keep_their_order(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    dataset = prepare([tmp_path / "b.txt", str(tmp_path / "a.txt")], tmp_path / "out", progress=False)
    assert gpt2().decode(dataset.tokens(0, dataset.n_tokens)) == "second<|endoftext|>first<|endoftext|>"
    assert dataset.info["corpora"] == ["b.txt", "a.txt"]


def test_special_tokens_in_text_are_text(tmp_path):
    (tmp_path / "a.txt").write_text("a <|endoftext|> b")
    dataset = prepare(tmp_path / "a.txt", tmp_path / "out", progress=False)
    tokens = dataset.tokens(0, dataset.n_tokens).tolist()
    assert tokens.index(EOT) == len(tokens) - 1


def test_progress_names_tokens_per_second(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("One. " * 100)
    prepare(tmp_path / "a.txt", tmp_path / "out")
    assert re.search(r"100%.*0\.00M tokens, .*M tokens/s", capsys.readouterr().err)


def bad_sources(folder):
    def write(name, data):
        (folder / name).write_bytes(data)
        return folder / name

    late = ("fine words " * 200_000).encode()  # several batches before the fault
    yield write("bin.txt", late + b"\0"), r"bin\.txt: .*NUL byte at byte offset 2200000"
    yield write("latin.txt", late + b"caf\xe9 x"), r"latin\.txt: .*0xe9 at byte offset 2200003"
    yield write("line.jsonl", b'{"text": "a"}\n{"txt": "b"}\n'), r"line\.jsonl:2: "
    yield write("cut.txt.gz", b"\x1f\x8b\x08\x00"), r"cut\.txt\.gz: wanted a whole \.gz archive"
    yield write("none.txt", b""), r"none\.txt: wanted text, got an empty file"
    yield write("blank.jsonl", b"\n\n"), r"blank\.jsonl: wanted text, got none"
    yield (
        write("hollow.jsonl", b'{"text": ""}\n'),
        r"hollow\.jsonl: wanted text, got none .*'empty documents': 1",
    )
    yield write("a.pdf", b"%PDF"), r"a\.pdf: wanted a "
    yield folder / "missing", r"missing: no such file or folder"
    yield [], "wanted at least one source"


def test_bad_sources_leave_nothing(tmp_path):
    for source, pattern in bad_sources(tmp_path):
        refusal(pattern, source, tmp_path / "out", shard_tokens=50_000)
        assert not (tmp_path / "out").exists()
        (tmp_path / "mine").mkdir(exist_ok=True)
        refusal(pattern, source, tmp_path / "mine", shard_tokens=50_000)
        assert list((tmp_path / "mine").iterdir()) == []


def test_folder_with_other_things_is_not_touched(tmp_path, prose):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/shard-00000.bin").write_text("precious")
    refusal(r"out: wanted a new or empty folder, got 1 entries, 'shard-00000\.bin'", prose, tmp_path / "out")
    assert contents(tmp_path / "out") == {"shard-00000.bin": b"precious"}


def test_out_in_use_by_another_run(tmp_path, prose):
    with writer.folder_for_one(tmp_path / "out", wait=False):
        refusal("out: wanted a folder of our own, got one that is being prepared now", prose, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_file_size_limit_stands_for_a_full_disk(tmp_path, prose):
    out = tmp_path / "out"
    limit = 2000  # bytes: the first shard does not fit
    process = in_process(prose, out, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert process.wait() == 1
    assert f"OSError: [Errno {errno.EFBIG}] File too large: '{out}/shard-00000.bin.tmp'" in process.stderr.read()
    assert not out.exists()


@pytest.mark.parametrize("fault", [1, 4, 5, 6, 9, 30])
def test_full_disk_at_any_write_keeps_whole_shards_and_is_resumable(tmp_path, prose, whole, monkeypatch, fault):
    out = tmp_path / "out"
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > fault:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*out") as caught:
        prepare(prose, out, progress=False, shard_tokens=SHARD_TOKENS)
    monkeypatch.undo()
    assert caught.value.errno == errno.ENOSPC
    if out.exists():
        recorded = shards.read_manifest(out / "unfinished.json")["files"]
        assert set(contents(out)) == {*recorded, "documents.idx", "unfinished.json"}
        assert recorded
    prepare(prose, out, progress=False, shard_tokens=SHARD_TOKENS)
    assert contents(out) == whole


@contextlib.contextmanager
def as_ordinary_user():
    """Root is bound by no permission, so stop being root for a while."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_read_only_folder(prose, tmp_path):
    gpt2()
    with tempfile.TemporaryDirectory() as name:
        locked = Path(name)
        (locked / "a.txt").write_text("One. " * 50)
        os.chmod(locked, 0o555)
        with as_ordinary_user(), pytest.raises(PermissionError, match=f"Permission denied: '{locked}/out'"):
            prepare("moby-dick", locked / "out", progress=False)
        with (
            as_ordinary_user(),
            pytest.raises(PermissionError, match=f"Permission denied: '{locked}/prepare.lock'"),
        ):
            prepare("moby-dick", locked, progress=False)
        assert contents(locked).keys() == {"a.txt"}
        os.chmod(locked, 0o755)


def test_read_only_dataset_opens_and_is_verified_each_time(tmp_path, monkeypatch):
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        out = Path(name) / "out"
        prepare("moby-dick", out, progress=False)
        os.chmod(out, 0o555)
        with as_ordinary_user():
            for _ in range(2):
                assert shards.open_dataset(out).n_tokens == 293_603
        assert not (out / ".verified").exists()
        os.chmod(out, 0o755)


def test_out_below_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        prepare("moby-dick", tmp_path / "file" / "out", progress=False)
    with pytest.raises(FileExistsError, match="file"):
        prepare("moby-dick", tmp_path / "file", progress=False)


def test_open_corpus_by_name_is_cached(tmp_path):
    first = open_corpus("moby-dick", tmp_path, progress=False)
    assert (first.n_tokens, first.n_documents, first.text_bytes) == (293_603, 138, 1_216_140)
    (folder,) = tmp_path.iterdir()
    stamps = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    open_corpus("moby-dick", tmp_path, progress=False)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == stamps


def test_open_corpus_follows_changes_of_the_text(tmp_path):
    (tmp_path / "a.txt").write_text("One fish.")
    first = open_corpus(tmp_path / "a.txt", tmp_path / "cache", progress=False)
    (tmp_path / "a.txt").write_text("One fish, two fish.")
    second = open_corpus(str(tmp_path / "a.txt"), tmp_path / "cache", progress=False)
    assert gpt2().decode(second.tokens(0, second.n_tokens - 1)) == "One fish, two fish."
    assert first.n_tokens < second.n_tokens


def test_open_corpus_default_cache_is_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    open_corpus("moby-dick", progress=False)
    assert [path.name[:9] for path in (tmp_path / "cgpt").iterdir()] == ["moby-dick"]


def test_open_corpus_at_once_prepares_once(tmp_path, prose, monkeypatch):
    encoded = []
    real = room._encode
    monkeypatch.setattr(room, "_encode", lambda *batch: encoded.append(1) or real(*batch))
    results = []
    ask = [threading.Thread(target=lambda: results.append(open_corpus(prose, tmp_path, progress=False))) for _ in "abc"]
    for thread in ask:
        thread.start()
    for thread in ask:
        thread.join()
    once = len(encoded)
    assert len({dataset.n_tokens for dataset in results}) == 1
    assert len(results) == 3
    encoded.clear()
    prepare(prose, tmp_path / "alone", progress=False)
    assert len(encoded) == once


def test_a_folder_that_its_holders_keep_removing_is_held_by_one_at_a_time(tmp_path):
    inside, most, done = 0, 0, []

    def hold():
        nonlocal inside, most
        for _ in range(200):
            with writer.folder_for_one(tmp_path / "out", wait=True):
                inside += 1
                most = max(most, inside)
                time.sleep(0)
                inside -= 1
        done.append(True)

    ask = [threading.Thread(target=hold) for _ in range(6)]
    for thread in ask:
        thread.start()
    for thread in ask:
        thread.join()
    assert (len(done), most) == (6, 1)


def test_open_corpus_takes_token_files_as_they_are(tmp_path, prose):
    prepare("moby-dick", tmp_path / "ready", progress=False)
    np.arange(100, dtype="<u2").tofile(tmp_path / "n.bin")
    assert open_corpus(tmp_path / "ready", tmp_path / "cache").n_tokens == 293_603
    assert open_corpus(tmp_path / "n.bin", tmp_path / "cache").n_tokens == 100
    assert open_corpus(tmp_path, tmp_path / "cache").n_tokens == 100
    assert not (tmp_path / "cache").exists()
    (tmp_path / "ready/dataset.json").rename(tmp_path / "ready/unfinished.json")
    for bad, pattern in ((tmp_path / "no", "no such file or folder"), (tmp_path / "ready", "unfinished")):
        with pytest.raises(InputError, match=pattern):
            open_corpus(bad, tmp_path / "cache")


def test_open_corpus_of_bad_text_leaves_the_cache_empty(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x\0")
    with pytest.raises(InputError, match="NUL"):
        open_corpus(tmp_path / "a.txt", tmp_path / "cache", progress=False)
    assert list((tmp_path / "cache").iterdir()) == []
