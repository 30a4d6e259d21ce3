"""bench/ladder.py in a minute's budget: what it trains, and that it forecasts before it knows."""

import csv
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from cgpt.scaling.flops import flops_per_token

BENCH = Path(__file__).parents[1] / "bench" / "ladder.py"


@pytest.fixture(scope="module")
def ladder():
    spec = importlib.util.spec_from_file_location("ladder", BENCH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_twenty_tokens_a_parameter_under_mup(ladder):
    found = ladder.cells(Path("data"), ladder.WIDTHS, 20, 1e-2)
    assert len(found) >= 5
    params = [cell.recipe.shape.n_params for cell in found]
    assert params == sorted(params)
    for cell in found:
        recipe = cell.recipe
        assert recipe.tokens / recipe.shape.n_params == pytest.approx(20, abs=0.03)
        assert recipe.shape.hidden_lr_scale == pytest.approx(48 / recipe.shape.d_model)
        assert recipe.shape.vocab_size == 1024
        assert 16 * recipe.shape.n_head == recipe.shape.d_model


def test_the_forecast_stands_before_the_largest_is_trained(here, ladder, monkeypatch, capsys):
    seen = []
    run = ladder.run_matrix

    def watched(folder, cells, say):
        path = here / "out" / "forecast.json"
        seen.append((len(cells), json.loads(path.read_text()) if path.exists() else None))
        return run(folder, cells, say)

    monkeypatch.setattr(ladder, "run_matrix", watched)
    monkeypatch.setattr(ladder, "EVAL_TOKENS", 1 << 13)
    asked = "--runs runs --out out --data moby-dick --tokens-per-parameter 0.05 --sizes 4 --lr 0.02"
    monkeypatch.setattr(sys, "argv", ["ladder.py", *asked.split()])
    ladder.main()
    (few, nothing), (all_of_them, forecast) = seen
    assert (few, nothing, all_of_them) == (3, None, 4)
    assert "measured" not in forecast
    found = json.loads((here / "out" / "forecast.json").read_text())
    assert found["forecast"] == forecast["forecast"]
    assert found["error"] == pytest.approx(found["forecast"] / found["measured"] - 1)
    with (here / "out" / "points.csv").open() as file:
        rows = list(csv.DictReader(file))
    cells = ladder.cells(here / "runs" / "data", ladder.WIDTHS[:4], 0.05, 0.02)
    assert [row["run"] for row in rows] == [cell.name for cell in cells]
    for row, cell in zip(rows, cells, strict=True):
        assert float(row["flops"]) == cell.recipe.tokens * flops_per_token(cell.recipe.shape).total
    assert float(rows[-1]["loss"]) == pytest.approx(found["measured"], abs=1e-5)
    assert (here / "out" / "ladder.png").stat().st_size > 5000
