"""Trackers: rows read back from what each of them wrote, runs that go on, and trackers that fail in every way."""

import json
import re
import sqlite3
import struct
import threading
import time
from typing import ClassVar

import pytest

from cgpt import cli, tracking
from cgpt.errors import InputError
from cgpt.metrics import read
from cgpt.tracking import Tracked, Tracking, tracked

TRAIN = "train --model nano --data corpus.txt --steps 6 --eval-tokens 32 --eval-every 2 --checkpoint-every 2 --out run"


class Fake:
    """A tracker in memory, which may fail or hang at a step of its choice."""

    opened: ClassVar[list] = []

    def __init__(self, folder, tracked, config, step):
        self.folder, self.tracked, self.config, self.step = folder, tracked, config, step
        self.rows, self.closed = [], False
        Fake.opened.append(self)

    def log(self, step, values):
        self.rows.append((step, values))

    def close(self):
        self.closed = True


@pytest.fixture
def fakes(monkeypatch):
    """Trackers `one` and `two`, as if installed."""
    monkeypatch.setattr(Fake, "opened", [])
    monkeypatch.setattr(tracking, "TRACKERS", {"one": Fake, "two": Fake})
    monkeypatch.setattr(tracking, "_installed", lambda name: name in ("one", "two"))


def session(folder, run, steps, start=0, furthest=0, said=None):
    track = Tracking(run, folder, {"lr": 0.1}, start, furthest, (said if said is not None else []).append)
    for step in steps:
        track.log({"step": step, "loss": 1 / step, "grad_norm": None if step == 2 else 1.0})
    track.close()


def test_every_tracker_gets_every_row(tmp_path, fakes):
    run = tracked(["one", "two", "one"], "p")
    assert run.names == ("one", "two")
    session(tmp_path, run, [1, 2, 3])
    assert len(Fake.opened) == 2
    for fake in Fake.opened:
        assert fake.rows == [
            (1, {"loss": 1.0, "grad_norm": 1.0}),
            (2, {"loss": 0.5}),
            (3, {"loss": 1 / 3, "grad_norm": 1.0}),
        ]
        assert fake.closed
        assert (fake.config, fake.tracked.project, fake.step) == ({"lr": 0.1}, "p", 0)


def test_a_run_that_goes_on_keeps_its_name_and_repeats_no_step(tmp_path, fakes):
    first = tracked(["one"], "p")
    session(tmp_path, first, range(1, 6))
    second = tracked([], None, tmp_path)
    assert (second.names, second.project, second.id) == (("one",), "p", first.id)
    session(tmp_path, second, range(3, 8), start=2, furthest=5)
    assert [step for step, _ in Fake.opened[1].rows] == [6, 7]
    # Cut off again before it has caught up, its own rows now end at 4: what was sent is not forgotten.
    third = tracked(["one", "two"], None, tmp_path)
    session(tmp_path, third, range(3, 8), start=2, furthest=4)
    by_name = dict(zip(("one", "two"), Fake.opened[2:], strict=True))
    assert [step for step, _ in by_name["one"].rows] == [6, 7]
    assert [step for step, _ in by_name["two"].rows] == [3, 4, 5, 6, 7]  # new to the run: nothing was sent
    assert third.id == first.id


def test_what_is_asked_wrongly_is_one_line(tmp_path, fakes):
    session(tmp_path, tracked(["one"], "p"), [1])
    (tmp_path / "none").mkdir()
    for names, project, folder, wanted in (
        (["three"], None, None, "--track: wanted one of one, two, got three"),
        ([], "p", None, "--project: wanted --track with it, got none"),
        (["one"], " ", None, "--project: wanted a name, got an empty one"),
        ([], "q", tmp_path, f"--project: the run in {tmp_path} is tracked in p, got q"),
    ):
        with pytest.raises(InputError) as caught:
            tracked(names, project, folder)
        assert str(caught.value) == wanted
    assert tracked([], None, tmp_path / "none").names == ()
    for damage in ("{", "[]", '{"trackers": {"one": "x"}, "project": "p", "id": "1"}', '{"trackers": {}}'):
        (tmp_path / "tracking.json").write_text(damage)
        with pytest.raises(InputError, match=r"tracking\.json: wanted what names the trackers' run, got a damaged"):
            tracked([], None, tmp_path)


def test_a_package_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "TRACKERS", {"wandb": Fake, "no_such_tracker": Fake})
    (tmp_path / "no_such_tracker").mkdir()
    (tmp_path / "no_such_tracker/run-1").write_text("")
    monkeypatch.syspath_prepend(tmp_path)  # as the working folder is
    with pytest.raises(InputError, match="wanted the no_such_tracker package, got none"):
        tracked(["no_such_tracker"], None)
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^--track: wanted the wandb package, got none: pip install wandb$"):
        tracked(["wandb"], None)


def failing(at, error):
    class Failing(Fake):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            if at == "open":
                raise error

        def log(self, step, values):
            super().log(step, values)
            if step == at:
                raise error

        def close(self):
            super().close()
            if at == "close":
                raise error

    return Failing


@pytest.mark.parametrize("error", [RuntimeError("lost\nits server"), SystemExit(3)])
@pytest.mark.parametrize("at", ["open", 2, "close"])
def test_one_that_raises_is_left_out_and_said_once(tmp_path, fakes, monkeypatch, at, error):
    monkeypatch.setitem(tracking.TRACKERS, "one", failing(at, error))
    said = []
    session(tmp_path, tracked(["one", "two"], None), range(1, 50), said=said)
    (line,) = said
    assert line.startswith("tracking one is left out, and the run goes on: at ")
    assert f"{type(error).__name__}: {str(error).split()[0]}" in line
    assert "\n" not in line
    assert {"open": "at opening it", 2: "at step 2", "close": "at closing it"}[at] in line
    whole = next(fake for fake in Fake.opened if len(fake.rows) == 49)
    assert whole.closed


def test_one_that_hangs_holds_nobody_up(tmp_path, fakes, monkeypatch):
    gate = threading.Event()

    class Hanging(Fake):
        def log(self, step, values):
            super().log(step, values)
            gate.wait(20)

    monkeypatch.setitem(tracking.TRACKERS, "one", Hanging)
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 0.2)
    said = []
    began = time.monotonic()
    session(tmp_path, tracked(["one"], None), range(1, 50), said=said)
    assert time.monotonic() - began < 5
    assert said == ["tracking one is left out, and the run goes on: wanted its end within 0.2 s, got none"]
    monkeypatch.setattr(tracking, "BEHIND", 5)
    said.clear()
    session(tmp_path, tracked(["one"], None), range(1, 50), said=said)
    assert said == ["tracking one is left out, and the run goes on: wanted it to keep up, got 5 rows behind"]
    gate.set()


def test_training_survives_its_trackers(here, capsys, fakes, monkeypatch):
    monkeypatch.setitem(tracking.TRACKERS, "one", failing(3, RuntimeError("gone")))
    from cgpt.recipe import TrainConfig
    from cgpt.train import train

    summary = train(
        TrainConfig(model="nano", data="corpus.txt", steps=6, eval_tokens=32, out=here / "run", track=("one", "two"))
    )
    assert summary.steps == 6
    said = capsys.readouterr().out
    assert said.count("tracking one is left out, and the run goes on: at step 3: RuntimeError: gone") == 1
    rows = {step: values for step, values in Fake.opened[1].rows}
    for row in read(here / "run"):
        assert rows[row["step"]] == {name: row[name] for name in row if name != "step" and row[name] is not None}
    assert {"loss", "lr", "tokens", "val_loss", "val_bits_per_byte"} <= rows[6].keys()
    assert Fake.opened[1].config["seed"] == 0


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}, events


def interrupted(monkeypatch, at):
    """Training is cut off before this step, as by a kill: no checkpoint after the last."""
    from cgpt import train

    one_step = train.one_step

    def step(run):
        if run.step == at:
            raise RuntimeError("cut off")
        return one_step(run)

    monkeypatch.setattr(train, "one_step", step)


def cut_off_and_resumed(here, *flags):
    with pytest.MonkeyPatch.context() as patch:
        interrupted(patch, 5)
        with pytest.raises(RuntimeError, match="cut off"):
            cli.main([*TRAIN.split(), *flags])
    assert [row["step"] for row in read(here / "run")] == [1, 2, 3, 4, 5]
    assert cli.main("train --resume --out run --steps 8".split()) == 0
    return read(here / "run")


def test_tensorboard_is_read_back(here):
    pytest.importorskip("tensorboard")
    rows = cut_off_and_resumed(here, "--track", "tensorboard")
    found, events = scalars(here / "run/tensorboard")
    assert [row["step"] for row in rows] == list(range(1, 9))
    for name in ("loss", "lr", "tokens", "grad_norm"):
        assert found[name] == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows]
    held_out = [(row["step"], pytest.approx(row["val_loss"], rel=1e-6)) for row in rows if "val_loss" in row]
    assert found["val_loss"] == held_out
    assert len(held_out) == 4
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert json.loads(text.strip("`\n"))["model"] == "nano"


def test_trackio_is_read_back(here, monkeypatch):
    pytest.importorskip("trackio")
    from trackio import sqlite_storage

    monkeypatch.setattr(sqlite_storage, "TRACKIO_DIR", here / "trackio")
    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", here / "trackio", raising=False)
    rows = cut_off_and_resumed(here, "--track", "trackio", "--project", "whales")
    (path,) = (here / "trackio").glob("whales*.db")
    with sqlite3.connect(path) as base:
        found = base.execute("select run_name, step, metrics from metrics order by id").fetchall()
    names = {name for name, *_ in found}
    assert len(names) == 1
    assert re.fullmatch(r"run-[0-9a-f]{8}", names.pop())
    assert [step for _, step, _ in found] == list(range(1, 9))
    for row, (_, _, metrics) in zip(rows, found, strict=True):
        assert json.loads(metrics)["loss"] == row["loss"]


def records(data):
    """Of a .wandb file: LevelDB's log in blocks of 32 KiB, the first of which begins with 7 bytes of its own."""
    at, parts = 7, []
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts.append(data[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


def test_wandb_offline(here, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert cli.main([*TRAIN.split(), "--track", "wandb", "--project", "whales"]) == 0
    (path,) = (here / "run/wandb").glob("offline-run-*/*.wandb")
    identity = json.loads((here / "run/tracking.json").read_text())["id"]
    assert path.name == f"run-{identity}.wandb"
    steps, project = {}, None
    for data in records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        project = record.run.project or project
        if record.HasField("history"):
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            steps[int(items["_step"])] = json.loads(items["loss"])
    assert project == "whales"
    assert steps == {row["step"]: pytest.approx(row["loss"]) for row in read(here / "run")}


def test_a_tracker_that_is_unknown_is_a_mistake(here, capsys):
    assert cli.main([*TRAIN.split(), "--track", "mlflow"]) == 2
    assert "invalid choice 'mlflow'" in capsys.readouterr().err
    assert cli.main([*TRAIN.split(), "--project", "p"]) == 2
    assert capsys.readouterr().err == "cgpt: --project: wanted --track with it, got none\n"
    assert not (here / "run").exists()


def test_no_trackers_no_file(here):
    assert cli.main(TRAIN.split()) == 0
    assert not (here / "run/tracking.json").exists()
    assert Tracked() == Tracked((), "cgpt", "", {})
