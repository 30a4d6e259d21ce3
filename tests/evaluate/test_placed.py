"""`cgpt eval` and `cgpt generate` of a run that does not fit: by their flags, what they say, and what they refuse."""

import json
import re
from dataclasses import replace

import pytest
import torch

from cgpt import cli, heap, placing, train
from cgpt.checkpoint import open_trained
from cgpt.errors import InputError
from cgpt.model import presets
from cgpt.placing import Room, place_reading
from cgpt.recipe import TrainConfig, read_config
from cgpt.stream.account import HEAD_BYTES
from cgpt.stream.store import Store
from nano import NANO, write_corpus

# 3.2 MB of embedding, and six blocks of 1.1 MB
WIDE = replace(NANO, name="wide", config=replace(NANO.config, n_layer=6, d_model=32, d_head=16, d_ff=8192))
MB = 10**6
EMBEDDING_AND_SLOTS = 5_500_000
HEAD = HEAD_BYTES + MB // 20  # what a host is always asked for, where the arithmetic is its own


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a run of three steps."""
    here, threads = tmp_path_factory.mktemp("placed"), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "wide", WIDE)
        patch.setenv("XDG_CACHE_HOME", str(here / "cache"))
        patch.chdir(here)
        patch.setattr(heap, "keep_large_buffers", lambda: None)  # for whole processes, not for a test runner's
        patch.setattr(placing, "own_memory", lambda: 0)  # grows while tests run
        write_corpus(here)
        torch.set_num_threads(1)
        train.train(
            TrainConfig(model="wide", data="corpus.txt", steps=3, batch_size=2, eval_tokens=32, out=here / "run")
        )
        yield here
    torch.set_num_threads(threads)


# flags, and how many layers are then on the device, the host and the disk: of embed, h.0 to h.5 and head
PLACES = {
    "host": (["--device-memory", f"{EMBEDDING_AND_SLOTS}"], (1, 7, 0)),
    "disk": (
        ["--device-memory", f"{EMBEDDING_AND_SLOTS}", "--host-memory", f"{EMBEDDING_AND_SLOTS + HEAD + 2_400_000}"],
        (1, 0, 7),
    ),
    "mixed": (["--device-memory", "7MB", "--host-memory", f"{7 * MB + HEAD + 4_600_000}"], (2, 2, 4)),
}


def run(capsys, *argv):
    """(what it says, what it says beside that)."""
    capsys.readouterr()
    assert cli.main([str(word) for word in argv]) == 0
    said = capsys.readouterr()
    return said.out, said.err


@pytest.mark.parametrize("place", PLACES)
def test_eval_and_generate_say_the_same_wherever_the_layers_live(folder, capsys, place):
    flags, counts = PLACES[place]
    flags = [*flags, "--disk", "."] if counts[2] else flags
    evaluate = "eval", "run", "--json", "--batch-size", "2"
    write = "generate", "run", "--prompt", "the whale", "--max-tokens", "6"
    (loss, silent), (text, quiet) = run(capsys, *evaluate), run(capsys, *write)
    assert (silent, quiet) == ("", "")
    homes = zip(counts, ("device", "host", "disk"), strict=True)
    told = ", ".join(f"{count} on the {tier}" for count, tier in homes if count)
    for command, wanted in ((evaluate, loss), (write, text)):
        out, beside = run(capsys, *command, *flags)
        assert out == wanted
        assert re.fullmatch(rf"placed   8 layers: {told}; they take device [^;]*; each walk brings .*\n", beside)
    assert json.loads(loss)["loss"] > 0
    assert not list(folder.glob("cgpt-state-*"))


def test_the_line_gives_the_bytes_that_there_are(folder, capsys):
    _, beside = run(capsys, "eval", "run", "--tokens", "16", *PLACES["host"][0])
    blocks = 6 * (2 * 32 * 8192 + 8192 + 4 * 32 * 32 + 7 * 1024) * 2  # each of 7 vectors in a chunk of its own
    found = re.search(r"host ([\d.]+) MiB; each walk brings ([\d.]+) MiB to the device", beside)
    assert [float(number) for number in found.groups()] == pytest.approx([blocks / 2**20] * 2, abs=0.02)


def test_a_walk_serves_as_many_batches_as_there_is_room_for(folder, capsys, monkeypatch):
    gathered = []
    gather = Store.gather
    monkeypatch.setattr(Store, "gather", lambda self, index: gathered.append(index) or gather(self, index))
    flags, _ = PLACES["host"]
    command = "eval", "run", "--json", "--batch-size", "1"
    wanted, _ = run(capsys, *command)
    walks, gathered[:] = len(gathered) // 8, []
    assert run(capsys, *command, *flags)[0] == wanted
    assert walks == 9  # windows of 16 tokens
    assert gathered == [*range(8)]


def test_a_walk_takes_no_more_batches_than_memory_has_room_for(folder):
    recipe, _ = read_config(folder / "run")
    sequences = 512
    between = sequences * 16 * 32 * 2
    room = Room(device_memory=EMBEDDING_AND_SLOTS, host_memory=EMBEDDING_AND_SLOTS + HEAD + 15 * MB)
    found = place_reading(recipe, room, sequences, 64)
    rows = found.placement.micro_batches
    assert 8 < rows < 64
    assert found.account.host <= found.budgets.host < found.account.host + between
    assert found.placement.state == place_reading(recipe, room, sequences, 1).placement.state
    assert place_reading(recipe, room, sequences, rows - 1).placement.micro_batches == rows - 1
    assert place_reading(recipe, Room(), sequences, 64).placement.micro_batches == 1  # nothing crosses


@pytest.mark.parametrize("command", [("eval", "run"), ("generate", "run")])
@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ("--device-memory 1MB", r"device memory: wanted at least [\d.]+ MiB \(weights .*\), got 976\.56 KiB"),
        ("--host-memory 9MB", r"host memory: wanted at least 13[\d.]+ MiB \(weights [^;]*\), got 8\.58 MiB\n"),
        ("--host-memory 143400KB", r"host memory: wanted .* got 136\.75 MiB; or --disk with [\d.]+ MiB free\n"),
        ("--host-memory 1PB", r"--host-memory: wanted at most the [\d.]+ GiB that are free, got "),
        ("--host-memory much", "--host-memory: wanted a size such as 4GiB or 80GB, got 'much'"),
        ("--disk nowhere", "--disk: wanted a folder for layers, got nowhere"),
    ],
)
def test_what_cannot_be_is_refused_before_the_checkpoint_is_read(folder, capsys, monkeypatch, command, flags, wanted):
    monkeypatch.setattr("cgpt.checkpoint.newest", lambda folder: pytest.fail("the checkpoint was read"))
    capsys.readouterr()
    assert cli.main([*command, *flags.split()]) == 2
    said = capsys.readouterr()
    assert (said.out, len(said.err.splitlines())) == ("", 1)
    assert re.match(f"cgpt: {wanted}", said.err)


def test_the_numbers_of_a_refusal_are_enough(folder):
    """What is asked for suffices, and a byte less does not: of the device, of the host, and of the process."""
    recipe, _ = read_config(folder / "run")

    def refused(**room):
        with pytest.raises(InputError) as error:
            place_reading(recipe, Room(**room), 1)
        return error.value.__cause__

    least = refused(device_memory=MB).wanted
    assert place_reading(recipe, Room(device_memory=least), 1).streams
    assert refused(device_memory=least - 1).limit == "device"
    assert not place_reading(recipe, Room(device_memory=1 << 50), 1).streams  # of a CPU, nothing is taken in vain
    whole = place_reading(recipe, Room(), 1)
    total = whole.account.needs.device + whole.account.host
    assert not place_reading(recipe, Room(host_memory=total), 1).streams
    with pytest.raises(InputError, match=r"^host memory: wanted at least .* MiB \(weights "):
        place_reading(recipe, Room(host_memory=total - 1), 1)
    on_disk = place_reading(recipe, Room(host_memory=total - 1, disk=str(folder)), 1)
    assert on_disk.placement.state.count("disk") > 0


def test_a_store_that_cannot_be_filled_is_closed(folder, monkeypatch):
    closed = []
    close = Store.close
    monkeypatch.setattr(Store, "close", lambda self: closed.append(self) or close(self))

    def broken(*_):
        raise InputError("no such layer")

    monkeypatch.setattr("cgpt.checkpoint.load", broken)
    with pytest.raises(InputError, match="no such layer"):
        open_trained(folder / "run")
    assert len(closed) == 1


@pytest.mark.parametrize(("place", "kept"), [((), [True]), (PLACES["host"][0], [])], ids=["resident", "streaming"])
def test_eval_keeps_freed_buffers_unless_layers_stream(folder, capsys, monkeypatch, place, kept):
    calls = []
    monkeypatch.setattr(heap, "keep_large_buffers", lambda: calls.append(True))
    run(capsys, "eval", "run", "--tokens", "16", *place)
    assert calls == kept
