"""The README's table of trainers is what their tests found: bench/integrations.py."""

import importlib.util
import json
from pathlib import Path

import pytest

from results import largest_difference, record

ROOT = Path(__file__).parents[2]


@pytest.fixture
def integrations():
    spec = importlib.util.spec_from_file_location("integrations", ROOT / "bench" / "integrations.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_has_it(integrations):
    readme = (ROOT / "README.md").read_text()
    between = readme.split("<!-- integrations -->")[1].split("<!-- /integrations -->")[0]
    assert between.strip() == integrations.table()


def test_every_trainer_is_in_the_results_and_near_enough(integrations):
    rows = json.loads(integrations.RESULTS.read_text())
    found = [row["trainer"] for row in rows]
    assert found == list(integrations.ROWS)
    for row in rows:
        assert row["largest_difference"] <= 1e-3
        assert row["steps"] >= 10
        assert "adamw" in row["parts"]


def test_rows_are_kept_until_measured_again(integrations, tmp_path):
    integrations.RESULTS = tmp_path / "integrations.json"
    row = {"version": "1", "parts": ["adamw"], "steps": 10, "torch": "2"}
    integrations.write([{"trainer": "litgpt", "largest_difference": 1e-6, **row}])
    twice = [{"trainer": "accelerate", "largest_difference": d, **row} for d in (3e-5, 2e-4, 1e-5)]
    integrations.write(twice)
    rows = json.loads(integrations.RESULTS.read_text())
    assert [(r["trainer"], r["largest_difference"]) for r in rows] == [("accelerate", 2e-4), ("litgpt", 1e-6)]
    assert "| LitGPT 1 |" in integrations.table()
    with pytest.raises(ValueError, match="trainers must be of ROWS, got nobody"):
        integrations.write([{"trainer": "nobody", "largest_difference": 0.0, **row}])


def test_what_a_record_takes(tmp_path, monkeypatch):
    monkeypatch.setenv("CGPT_RECORD", str(tmp_path / "found.jsonl"))
    record("torch", ["adamw"], 10, 2e-4)
    record("somebody", ["adamw"], 10, 1e-6, version="3")
    for bad in (2e-3, float("nan")):
        with pytest.raises(AssertionError, match="losses differ by"):
            record("torch", ["adamw"], 10, bad)
    rows = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert [(row["trainer"], row["largest_difference"]) for row in rows] == [("torch", 2e-4), ("somebody", 1e-6)]
    assert rows[1]["version"] == "3"
    with pytest.raises(AssertionError, match="no learning"):
        largest_difference([1.0, 1.0], [1.0, 1.0])
    with pytest.raises(AssertionError):
        largest_difference([1.0], [2.0, 1.0])
    with pytest.raises(AssertionError, match="not finite"):
        largest_difference([2.0, float("nan")], [2.0, 1.0])
    assert largest_difference([2.0, 1.5], [2.0, 1.0]) == 0.5
