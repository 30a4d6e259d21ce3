"""torchtitan's Trainer with and without our overrides, in an environment of its own: its requirements clash."""

from pathlib import Path

import pytest

from environments import run_in
from results import largest_difference, record

STEPS, ACCUMULATED, LAYERS = 10, 2, 2


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    made_by = "pip install torch==2.13.0 torchtitan==0.3.0 triton 'datasets<4.8'"
    script = Path(__file__).with_name("torchtitan_run.py")
    return run_in("CGPT_TORCHTITAN_PYTHON", made_by, script, tmp_path_factory.mktemp("torchtitan"))


def test_losses_are_torchs(found):
    theirs, mine = found["theirs"], found["mine"]
    assert not theirs["calls"]
    # Selective activation checkpointing computes attention again in the backward pass.
    assert mine["calls"] == {"attention": 2 * LAYERS * STEPS * ACCUMULATED, "adamw": STEPS}
    assert mine["norms"] == pytest.approx(theirs["norms"], rel=1e-3)
    difference = largest_difference(mine["losses"], theirs["losses"])
    record("torchtitan", sorted(mine["calls"]), STEPS, difference, version=found["version"])


def test_checkpoints_change_hands(found):
    """By torch.distributed.checkpoint, which wants the optimizer's every key in the file."""
    rest = {who: found[who]["losses"][STEPS // 2 :] for who in ("theirs", "mine")}
    assert found["mine, by us"]["losses"] == rest["mine"]
    assert found["theirs, by us"]["losses"] == pytest.approx(rest["theirs"], abs=1e-3)
    assert found["mine, by them"]["losses"] == pytest.approx(rest["mine"], abs=1e-3)
    assert found["theirs, by us"]["calls"]["adamw"] == 1 + STEPS // 2  # one of no length, which makes the states
    assert not found["mine, by them"]["calls"]
