"""LitGPT's `pretrain` command with and without our parts, in an environment of its own: its requirements clash."""

from pathlib import Path

import pytest

from environments import run_in
from results import largest_difference, record

STEPS, ACCUMULATED, LAYERS = 10, 2, 2


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    made_by = "pip install torch==2.13.0 litgpt==0.5.13 requests"
    script = Path(__file__).with_name("litgpt_run.py")
    return run_in("CGPT_LITGPT_PYTHON", made_by, script, tmp_path_factory.mktemp("litgpt"), TORCH_COMPILE_DISABLE="1")


def test_losses_are_torchs(found):
    theirs, mine = found["theirs"], found["mine"]
    assert not theirs["calls"]
    assert mine["calls"]["adamw"] == STEPS
    forwards = STEPS * ACCUMULATED
    assert mine["calls"]["attention"] == mine["calls"]["gelu_mlp"] >= LAYERS * forwards  # evaluations besides
    assert mine["calls"]["layer_norm"] >= (2 * LAYERS + 1) * forwards
    difference = largest_difference(mine["losses"], theirs["losses"])
    record("litgpt", sorted(mine["calls"]), STEPS, difference, version=found["version"])


def test_mixed_precision(found):
    """bf16 products in two orders of summation."""
    theirs, mine = found["theirs in bf16"], found["mine in bf16"]
    assert mine["calls"] == found["mine"]["calls"]
    assert largest_difference(mine["losses"], theirs["losses"]) < 0.02


def test_checkpoints_change_hands(found):
    rest = found["mine"]["losses"][ACCUMULATED * STEPS // 2 :]
    assert found["mine, by us"]["losses"] == rest
    for name in ("theirs, by us", "mine, by them"):
        assert found[name]["losses"] == pytest.approx(rest, abs=1e-3)
    assert found["theirs, by us"]["calls"]["adamw"] == STEPS // 2
    assert not found["mine, by them"]["calls"]
