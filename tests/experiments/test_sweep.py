"""What a sweep tries, what it finds, and what it shows."""

import json
import math

import pytest

from cgpt import cli
from cgpt.errors import InputError
from cgpt.experiments import report, sweep
from cgpt.experiments.matrix import Outcome
from cgpt.experiments.sweep import Grid
from cgpt.recipe import TrainConfig, resolve

GRID = Grid((16, 32), (1e-3, 2e-3), (0.08,), (10.0,), ("mup", "sp"), (0, 1))


def recipe():
    return resolve(TrainConfig(model="nano", data="corpus.txt", steps=2))


def outcome(kind, width, lr, loss, seed=0):
    fields = {"parametrization": kind, "width": width, "lr": lr, "init_std": 0.08, "embedding_scale": 10.0}
    return Outcome(f"{kind}{width}{lr}{seed}", fields | {"seed": seed}, loss, None, 1, 1, 1.0)


def test_every_point_at_every_width_from_every_seed(here):
    found = sweep.cells(recipe(), GRID)
    assert len({cell.name for cell in found}) == len(found) == 2 * 2 * 2 * 2
    for cell in found:
        shape, fields = cell.recipe.shape, cell.fields
        assert (shape.d_model, shape.d_head, shape.d_ff) == (fields["width"], 8, 2 * fields["width"])
        assert (cell.recipe.lr, cell.recipe.seed) == (fields["lr"], fields["seed"])
        m = fields["width"] / 16 if fields["parametrization"] == "mup" else 1
        assert shape.hidden_lr_scale == shape.logits_scale == 1 / m
        assert shape.hidden_init_std == pytest.approx(0.08 / math.sqrt(m))
        assert (shape.embedding_init_std, shape.embedding_scale, shape.softmax_scale) == (0.08, 10.0, 1 / 8)


def test_random_draws_lie_within_the_bounds_and_are_the_same_each_time(here):
    grid = Grid((16,), (1e-3, 1e-1), (0.02, 0.1), (1.0, 20.0), ("mup",), (0,), draws=20)
    points = grid.points()
    assert points == grid.points()
    assert len(set(points)) == 20
    for values, bounds in zip(zip(*points, strict=True), (grid.lr, grid.init_std, grid.embedding_scale), strict=True):
        assert min(bounds) <= min(values) < math.sqrt(bounds[0] * bounds[1]) < max(values) <= max(bounds)


@pytest.mark.parametrize(("change", "told"), [
    ({"widths": (20,)}, "--widths: wanted multiples of the heads' 8, got 20"),
    ({"widths": ()}, "--widths: wanted values, each once, got "),
    ({"lr": (1e-3, 1e-3)}, "--lr: wanted values, each once, got 0.001 0.001"),
    ({"lr": (0.0,)}, "--lr: wanted numbers above 0, got 0.0"),
    ({"parametrizations": ("ntk",)}, "--parametrization: wanted one of sp, mup, completep, got ntk"),
    ({"draws": 0}, "--random: wanted at least 1 draw, got 0"),
])  # fmt: skip
def test_mistakes_are_named(here, change, told):
    with pytest.raises(InputError) as error:
        sweep.cells(recipe(), Grid(**{**vars(GRID), **change}))
    assert str(error.value) == told


RATES = 1e-3, 2e-3, 4e-3, 8e-3
CURVES = {  # the optimum stands under muP and moves under SP
    ("mup", 16): (5.0, 4.0, 4.5, 6.0), ("mup", 32): (4.8, 3.8, 3.9, None),
    ("sp", 16): (5.0, 4.5, 4.4, 4.0), ("sp", 32): (3.7, 3.9, None, None),
}  # fmt: skip
OUTCOMES = [outcome(*key, lr, loss) for key, curve in CURVES.items() for lr, loss in zip(RATES, curve, strict=True)]


def test_the_best_of_each_width_and_how_far_they_lie_apart():
    found = sweep.best(OUTCOMES)
    assert [(row.parametrization, row.width, row.lr, row.loss, row.place) for row in found] == [
        ("mup", 16, 2e-3, 4.0, 1), ("mup", 32, 2e-3, 3.8, 1), ("sp", 16, 8e-3, 4.0, 3), ("sp", 32, 1e-3, 3.7, 0),
    ]  # fmt: skip
    assert (sweep.drift(found, "mup"), sweep.drift(found, "sp")) == (0, 3)


def test_seeds_are_averaged_and_one_that_diverged_counts():
    pair = [outcome("sp", 16, 1e-3, 4.0, 0), outcome("sp", 16, 1e-3, 5.0, 1)]
    assert sweep.best(pair)[0].loss == 4.5
    assert sweep.best([*pair, outcome("sp", 16, 2e-3, 1.0, 0), outcome("sp", 16, 2e-3, None, 1)])[0].lr == 1e-3


def test_the_report_for_people_and_for_programs(tmp_path):
    text = report.sweep_text(OUTCOMES)
    assert "4.0000*" in text
    assert "3.7000*" in text
    assert text.count("*") == 4
    assert text.count("diverged") == 3
    assert "sp: best learning rates lie 3 grid steps apart" in text
    found = json.loads(json.dumps(report.sweep_json(OUTCOMES), allow_nan=False))
    assert found["drift"] == {"mup": 0, "sp": 3}
    assert sum(point["loss"] is None for point in found["points"]) == 3
    assert report.plot_sweep(tmp_path / "sweep.png", OUTCOMES).stat().st_size > 5000


def test_the_command(here, capsys):
    shared = "--model nano --data corpus.txt --steps 2 --eval-tokens 32 --widths 16 32 --lr 1e-3 1e-2 --out out --json"
    assert cli.main(["sweep", *shared.split()]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert len(found["points"]) == 4
    assert len(found["best"]) == 2
    assert "4/4" in err
    assert json.loads((here / "out" / "sweep.json").read_text()) == found
    assert (here / "out" / "sweep.png").is_file()
    assert cli.main(["sweep", *shared.split(), "--widths", "12"]) == 2
    assert "wanted multiples of the heads' 8, got 12" in capsys.readouterr().err
