"""The published rows: read whole, and the numbers that everybody quotes."""

import pytest

from cgpt.evaluate.published import COLUMNS, SHOTS, models
from cgpt.scaling.published import PUBLISHED


@pytest.mark.parametrize("shots", SHOTS)
def test_every_row_has_all_seven_accuracies_and_their_mean(shots):
    found = models(shots)
    assert len(found) == len({model.name for model in found}) == 36
    for model in found:
        assert list(model.accuracy) == list(COLUMNS)
        assert all(0.1 < value < 0.9 for value in model.accuracy.values())
        assert sum(model.accuracy.values()) / 7 == pytest.approx(model.mean, abs=1.5e-3)


def test_the_rows_of_the_largest_model():
    zero, five = ({model.name: model for model in models(shots)}["Cerebras-GPT 13B"] for shots in SHOTS)
    assert zero.accuracy["hellaswag"] == 0.513
    assert zero.accuracy["lambada_openai"] == 0.696
    assert (zero.mean, five.mean) == (0.570, 0.581)
    assert (zero.batch_seqs, zero.n_cs2, zero.train_flops) == (1080, 12, 2.3e22)


def test_flops_and_batches_are_those_of_the_models_we_train():
    found = {model.size: model for model in models(0) if model.family == "Cerebras"}
    assert list(found) == [row.name for row in PUBLISHED]
    for row in PUBLISHED:
        assert found[row.name].train_flops == pytest.approx(row.flops, rel=0.05)
        assert found[row.name].batch_seqs == row.batch // 2048
        assert found[row.name].is_cerebras


def test_others_have_no_batch_and_other_counts_of_examples_no_rows():
    assert all(model.batch_seqs is None for model in models(5) if not model.is_cerebras)
    assert models(1) == models(25) == []
