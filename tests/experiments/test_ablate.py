"""Every combination on equal tokens, means and spread."""

import json
import statistics

import pytest

from cgpt import cli
from cgpt.errors import InputError
from cgpt.experiments import ablate, report
from cgpt.experiments.matrix import Outcome
from cgpt.recipe import TrainConfig, resolve

POSITIONS = "learned", "none", "rotary", "alibi"


def recipe():
    return resolve(TrainConfig(model="nano", data="corpus.txt", steps=2))


def outcome(positions, activation, norm, seed, loss):
    fields = {"positions": positions, "activation": activation, "embedding_norm": norm, "seed": seed}
    return Outcome("-".join(map(str, fields.values())), fields, loss, loss and loss / 2, 100, 10, 1.0)


LOSSES = {
    ("alibi", "gelu", "off"): (3.0, 3.2),
    ("none", "gelu", "off"): (4.0, 4.4),
    ("alibi", "gelu", "on"): (3.5, 3.5),
}
OUTCOMES = [outcome(*key, seed, loss) for key, losses in LOSSES.items() for seed, loss in enumerate(losses)]


def test_four_positions_two_activations_two_norms(here):
    found = ablate.cells(recipe(), POSITIONS, ("gelu", "swiglu"), ("off", "on"), (0, 1, 2))
    assert len({cell.name for cell in found}) == len(found) == 4 * 2 * 2 * 3
    assert len({cell.recipe.tokens for cell in found}) == 1
    for cell in found:
        shape = cell.recipe.shape
        assert shape.positions == cell.fields["positions"]
        assert shape.activation == cell.fields["activation"]
        assert shape.embedding_norm == (cell.fields["embedding_norm"] == "on")
        assert cell.recipe.seed == cell.fields["seed"]


def test_means_and_spread():
    rows = ablate.combinations(OUTCOMES)
    assert [row.loss for row in rows] == pytest.approx([3.1, 3.5, 4.2])
    assert [row.spread for row in rows] == pytest.approx(
        [statistics.stdev((3.0, 3.2)), 0.0, statistics.stdev((4.0, 4.4))]
    )
    assert rows[0].bits_per_byte == pytest.approx(1.55)
    choices = {tuple(row.choices.items()): row for row in ablate.by_choice(OUTCOMES)}
    assert list(choices) == [
        (("positions", "alibi"),), (("positions", "none"),), (("embedding_norm", "on"),), (("embedding_norm", "off"),),
    ]  # fmt: skip
    alibi = choices[(("positions", "alibi"),)]
    assert (alibi.loss, alibi.runs) == (pytest.approx(3.3), 4)
    assert alibi.spread == pytest.approx((0.02 / 2) ** 0.5)  # of two pairs, one of them alike


def test_one_seed_has_no_spread_and_a_diverged_run_is_last():
    rows = ablate.combinations([outcome("none", "gelu", "off", 0, None), outcome("alibi", "gelu", "off", 0, 3.0)])
    assert [row.choices["positions"] for row in rows] == ["alibi", "none"]
    assert rows[0].spread is None
    assert "diverged" in report.ablate_text([outcome("none", "gelu", "off", 0, None)])


@pytest.mark.parametrize(("asked", "told"), [
    ((("learnt",), ("gelu",), ("off",), (0,)), "positions must be one of learned, none, rotary, alibi, got 'learnt'"),
    ((("none",), ("relu",), ("off",), (0,)), "activation must be one of gelu, gelu_tanh, swiglu, got 'relu'"),
    ((("none",), ("gelu",), ("yes",), (0,)), "--embedding-norm: wanted off, on or both, got yes"),
    ((("none",), ("gelu",), ("on",), (0, 0)), "--seeds: wanted values, each once, got 0 0"),
])  # fmt: skip
def test_mistakes_are_named(here, asked, told):
    with pytest.raises(InputError, match=told):
        ablate.cells(recipe(), *asked)


def test_the_command_runs_the_whole_matrix(here, capsys):
    shared = "--model nano --data corpus.txt --steps 2 --eval-tokens 32 --seeds 0 --out out"
    assert cli.main(["ablate", *shared.split()]) == 0
    out = capsys.readouterr().out
    table = [line.split() for line in out.splitlines() if line.startswith(POSITIONS)]
    assert len(table) == 16
    losses = [float(row[4]) for row in table]
    assert losses == sorted(losses)
    assert "positions       alibi" in out
    found = json.loads((here / "out" / "ablate.json").read_text())
    assert len(found["combinations"]) == 16
    assert len(found["choices"]) == 8
    assert (here / "out" / "ablate.png").stat().st_size > 5000


def test_a_table_of_several_seeds_has_their_spread(here, capsys):
    asked = "--model nano --data corpus.txt --steps 2 --eval-tokens 32 --positions none --activation gelu --out out"
    assert cli.main(["ablate", *asked.split(), "--embedding-norm", "off", "--seeds", "0", "1"]) == 0
    out = capsys.readouterr().out
    (row,) = [line.split() for line in out.splitlines() if line.startswith("none")]
    losses = [json.loads(line)["loss"] for line in (here / "out" / "results.jsonl").read_text().splitlines()]
    assert float(row[4]) == pytest.approx(statistics.fmean(losses), abs=1e-4)
    assert float(row[5]) == pytest.approx(statistics.stdev(losses), abs=1e-4)
    assert "standard deviation between 2 seeds" in out
