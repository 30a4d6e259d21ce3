"""Accounts computed by hand, and a GPT's layers in numbers against the GPT itself."""

from dataclasses import replace

import pytest
import torch

from cgpt.errors import InputError
from cgpt.model.config import GPTConfig
from cgpt.model.gpt import GPT
from cgpt.model.presets import PRESETS
from cgpt.stream.account import BACKWARD, HEAD_BYTES, KEPT, account, boundary_bytes
from cgpt.stream.build import layers_of
from cgpt.stream.format import Format
from cgpt.stream.gpt_plans import gpt_plans
from cgpt.stream.layout import CHUNK as C
from cgpt.stream.layout import layers_plan
from cgpt.stream.placement import Placement

# One, two and one chunks: every size is a whole number of the layout's steps, so sums can be done in the head.
PLANS = layers_plan([("embed", {"wte": (32, 32)}), ("h.0", {"w": (64, 32)}), ("head", {"g": (C,), "wte": (32, 32)})])


@pytest.mark.parametrize("shape", [PRESETS["tiny"].config, GPTConfig(3, 2, 48, 24, 100, 77, 33), PRESETS["13B"].config])
def test_a_gpt_in_numbers_is_the_gpt(shape):
    with torch.device("meta"):
        layers = layers_of(GPT(shape))
    wanted = [(x.name, {name: tuple(p.shape) for name, p in x.parameters.items()}) for x in layers]
    assert gpt_plans(shape) == layers_plan(wanted)
    assert sum(plan.owned.parameters for plan in gpt_plans(shape)) == shape.n_params


def test_resident():
    found = account(PLANS, Placement.resident(3), Format(), 16, 8)
    assert found.needs.device == 12 * (C + 2 * C + C)
    assert (found.host, found.disk) == (0, 0)
    between = 16 * 8 * 2
    assert found.workspace == {
        "flow": 2 * between,
        "inputs": 0,
        "kept": KEPT * between,
        "working": HEAD_BYTES + 4 * between,
        "gradients": 2 * 2 * C * 2 + 2 * (C + 2 * C + 2 * C),
    }
    assert found.device == found.needs.device + sum(found.workspace.values())
    assert found.device_parts["state"] == 48 * C
    assert "slots" not in found.device_parts


@pytest.mark.parametrize(("format", "working", "record"), [
    (Format("bf16"), 2, 12), (Format("fp16"), 2, 14), (Format("fp32"), 4, 12), (Format("bf16", "bf16"), 2, 8),
])  # fmt: skip
def test_everything_on_the_host(format, working, record):
    placement = Placement(("host",) * 3, ("host",) * 3, (True,) * 3, micro_batches=2)
    found = account(PLANS, placement, format, 16, 8)
    assert found.needs.device == 2 * 2 * C * working  # two slots for h.0, or for the head: its own chunk and wte's
    assert found.host_parts == {"state": 4 * C * record, "gradients": 4 * C * working}
    between = 16 * 8 * working
    assert found.workspace["inputs"] == 2 * between
    assert found.workspace["kept"] == 0
    # two layers' sums in fp32, one contribution in the working type, and the head's part of wte in fp32
    assert found.workspace["gradients"] == 2 * 2 * C * 4 + 2 * C * working + C * 4


def test_several_visits_hold_partial_sums_of_all_that_a_layer_reads():
    placement = Placement(("host",) * 3, ("host",) * 3, (True,) * 3, visits=2)
    assert account(PLANS, placement, Format(), 16, 8).host_parts["gradients"] == 4 * (C + 2 * C + 2 * C)


def test_before_and_on_the_disk():
    placement = Placement(("device", "host", "disk"), ("disk",) * 3, (True,) * 3)
    found = account(PLANS, placement, Format(), 16, 8)
    assert found.device_parts["weights"] == C * 2
    # of the head's reads only its own chunk is away: wte is kept; h.0's two are the largest slot
    assert found.device_parts["slots"] == 2 * 2 * C * 2
    assert found.host_parts == {
        "weights": (C + 2 * C) * 2,
        # records with gradients, h.0's the largest; the head's weights; gradients on their way
        "staging": 3 * (6 + 1) * 4096 + 2 * 4096 + 2 * 4096,
    }
    assert found.disk == 4096 + ((3 + 1) + (6 + 1) + (3 + 1)) * 4096
    # partial sums of several visits wait on the host
    found = account(PLANS, replace(placement, visits=2), Format(), 16, 8)
    assert found.host_parts == {
        "weights": (C + 2 * C) * 2,
        "gradients": 4 * (C + 2 * C + 2 * C),
        "staging": 3 * 6 * 4096 + 2 * 4096,
    }
    assert found.disk == 4096 + (3 + 6 + 3) * 4096


def test_activations_on_the_host():
    between = boundary_bytes(Format(), 5, 9)
    assert between == 128
    placement = Placement(("host",) * 3, ("host",) * 3, (True,) * 3, "host", micro_batches=3, boundary=between)
    found = account(PLANS, placement, Format(), 5, 9)
    assert found.device_parts["ring"] == 2 * 3 * 128
    assert found.host_parts["activations"] == 3 * 128  # of h.0 alone: ids stay, the head's turn is at once
    assert found.workspace["inputs"] == 0
    assert account(PLANS, replace(placement, activations="device"), Format(), 5, 9).workspace["inputs"] == 3 * 128


def test_the_arithmetic_of_a_wide_layer_outweighs_the_logits():
    found = account(PLANS, Placement.resident(3), Format(), 1 << 16, 512)
    assert found.workspace["working"] == (KEPT + BACKWARD) * (1 << 16) * 512 * 2 > HEAD_BYTES


def test_weights_that_are_only_read():
    everywhere = Placement(("device", "host", "disk"), ("device", "host", "disk"), (True,) * 3, micro_batches=3)
    found = account(PLANS, everywhere, Format(training=False), 16, 8)
    between = 16 * 8 * 2
    assert found.workspace == {"flow": 4 * between, "working": HEAD_BYTES + 2 * between}
    assert found.device_parts == {"weights": C * 2, "slots": 2 * 2 * C * 2, **found.workspace}
    assert found.host_parts == {"weights": 2 * C * 2, "staging": 2 * 4096}
    assert found.disk == 2 * 4096
    # on a CPU torch's memory is the host's
    beside = account(PLANS, everywhere, Format(training=False), 16, 8, "host")
    assert beside.device == beside.needs.device == found.needs.device
    assert beside.host == found.needs.host + sum(found.workspace.values())


@pytest.mark.parametrize(("format", "told"), [
    ({"precision": "int4"}, "precision: wanted one of bf16, fp16, fp32, got int4"),
    ({"moments": "fp16"}, "moments: wanted one of fp32, bf16, got fp16"),
])  # fmt: skip
def test_unknown_formats(format, told):
    with pytest.raises(InputError, match=told):
        Format(**format)
