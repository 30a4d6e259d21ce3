"""Where a run's flags put its layers, and that the run does not depend on it."""

import json
import re

import pytest

from cgpt import checkpoint, train
from cgpt.errors import InputError
from cgpt.placing import describe, place_run
from cgpt.recipe import TrainConfig, resolve


def nano(**more):
    given = {"model": "nano", "data": "corpus.txt", "steps": 6, "batch_size": 4, "micro_batch_size": 1}
    return TrainConfig(**{**given, "eval_tokens": 64, "eval_every": 50, "checkpoint_every": 3, **more})


def weights(run):
    path, manifest, _ = checkpoint.newest(run / "checkpoints")
    return manifest["step"], {file.name: file.read_bytes() for file in path.glob("*.safetensors")}


def test_a_run_that_streams_ends_with_the_bytes_of_one_that_does_not(here, capsys):
    train.train(nano(out=here / "resident"))
    assert "placed " not in capsys.readouterr().out
    train.train(nano(out=here / "streamed", device_memory="4MB", timeline=True))
    said = capsys.readouterr().out
    assert re.search(r"host: weights of \d layers, state of 4; 4 micro-batches a visit, 1 visits a step", said)
    assert "seconds  predicted / measured: step " in said
    assert weights(here / "streamed") == weights(here / "resident")
    trace = json.loads((here / "streamed" / "timeline.json").read_text())
    names = {event["name"] for event in trace["traceEvents"]}
    assert {"h.0 forward", "h.1 backward", "h.0 weights", "h.0 gradients", "embed AdamW"} <= names
    assert (here / "streamed" / "timeline.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("later", [{"device_memory": "4MB"}, {"placement": "auto"}])
def test_a_run_may_be_resumed_elsewhere(here, later):
    train.train(nano(out=here / "whole"))
    before = {"device_memory": "4MB"} if "placement" in later else {}
    train.train(nano(out=here / "moved", steps=3, **before, decay="constant"))
    train.train(nano(out=here / "left", decay="constant"))
    train.train(TrainConfig(out=here / "moved", resume=True, steps=6, **later))
    assert weights(here / "moved") == weights(here / "left")


def test_with_room_for_everything_auto_is_resident(here):
    placed = place_run(resolve(nano(placement="auto")))
    assert not placed.streams
    assert placed.placement.weights == placed.placement.state == ("device",) * 4
    assert "device: weights of 4 layers, state of 4" in describe(placed)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"device_memory": "1MB"}, r"--placement: device memory: wanted at least [\d.]+ MiB .*, got 976.56 KiB"),
        ({"device_memory": "4MB", "host_memory": "1PB"}, r"--host-memory: wanted at most the [\d.]+ GiB that are free"),
        ({"disk": "nowhere"}, "--disk: wanted a folder for training state, got nowhere"),
        ({"placement": "resident", "disk": "."}, "--disk: wanted --placement auto with it, got resident"),
        ({"host_memory": "much"}, "--host-memory: wanted a size such as 4GiB or 80GB, got 'much'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(here, flags, message):
    with pytest.raises(InputError, match=message):
        train.train(nano(out=here / "run", **flags))
    assert not (here / "run").exists()
