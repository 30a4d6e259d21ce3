import struct

import numpy as np
import pytest

from cgpt.plots import plot_loss, smoothed


def test_smoothing_is_the_corrected_moving_average():
    losses = np.array([4.0, 2.0, 0.0])
    keep = 1 - 2 / 4
    weights = np.array([keep**2, keep, 1.0])
    assert smoothed(losses, 3)[-1] == pytest.approx((weights * losses).sum() / weights.sum())
    assert smoothed(losses, 3)[0] == 4.0
    assert np.array_equal(smoothed(losses, 1), losses)


@pytest.mark.parametrize("rows", [[], [{"step": 1, "tokens": 8, "loss": 3.0}]])
@pytest.mark.parametrize("unigram", [None, 2.0])
def test_any_run_can_be_drawn(tmp_path, rows, unigram):
    path = plot_loss(tmp_path, rows, unigram, "a run")
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (960, 540)


def test_the_curve_changes_the_picture(tmp_path):
    rows = [{"step": i, "tokens": 8 * i, "loss": 9.0 - i, "val_loss": 9.5 - i} for i in range(1, 6)]
    empty = plot_loss(tmp_path, [], 2.0, "a run").read_bytes()
    assert plot_loss(tmp_path, rows, 2.0, "a run").read_bytes() != empty
    assert not list(tmp_path.glob("*.tmp"))
