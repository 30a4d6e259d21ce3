"""`cgpt fit` as a user meets it: a table, JSON, a picture, and one line for a mistake."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from cgpt import cli
from cgpt.scaling.laws import LAWS

CHINCHILLA = Path(__file__).parent / "chinchilla.csv"
LAW = LAWS["chinchilla-refit"]


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """One CSV file a method, made from one law."""
    folder = tmp_path_factory.mktemp("tables")
    rng = np.random.default_rng(0)
    flops = np.repeat(np.geomspace(1e18, 1e21, 5), 7)
    params = LAW.optimal(flops)[0] * np.tile(np.geomspace(0.25, 4, 7), 5)
    noise = np.exp(rng.normal(0, 0.001, 35))
    rows = np.stack((params, flops, LAW.loss(params, flops / (6 * params)) * noise), 1)
    np.savetxt(folder / "isoflop.csv", rows, delimiter=",", header="params,flops,loss", comments="")
    params = np.repeat(np.geomspace(3e7, 1e10, 8), 30)
    tokens = params * np.tile(np.geomspace(1, 300, 30), 8)
    rows = np.stack((params, tokens, LAW.loss(params, tokens)), 1)
    np.savetxt(folder / "envelope.csv", rows, delimiter=",", header="params,tokens,loss", comments="")
    np.savetxt(folder / "parametric.csv", rows[::7], delimiter=",", header="params,tokens,loss", comments="")
    flops = np.geomspace(1e18, 1e22, 8)
    rows = np.stack((flops, LAW.loss_at_compute(flops)), 1)
    np.savetxt(folder / "power.csv", rows, delimiter=",", header="flops,loss", comments="")
    return folder


def output(capsys, *argv):
    capsys.readouterr()
    assert cli.main(["fit", *map(str, argv)]) == 0
    return capsys.readouterr().out


def refused(capsys, *argv):
    capsys.readouterr()
    assert cli.main(["fit", *map(str, argv)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_json_of_a_parametric_fit(capsys):
    found = json.loads(output(capsys, CHINCHILLA, "--method", "parametric", "--bootstrap", 20, "--json"))
    assert set(found["intervals"]) == {"E", "A", "B", "alpha", "beta"} < set(found)
    for name, (low, high) in found["intervals"].items():
        assert low < found[name] < high
    assert found["E"] == pytest.approx(1.8172, abs=0.002)
    assert found["exponents"]["a"] == pytest.approx(found["beta"] / (found["alpha"] + found["beta"]))
    assert found["exponents"]["a"] + found["exponents"]["b"] == pytest.approx(1)
    assert found["points"] == 240
    assert found["bootstraps"] == 20
    assert found["notes"] == ["tokens = flops / (6 params)"]
    flops = [row["flops"] for row in found["predictions"]]
    assert flops == [1e22, 1e23, 1e24, 1e25]  # from the decade of the largest run on
    for row in found["predictions"]:
        assert 6 * row["params"] * row["tokens"] == pytest.approx(row["flops"])
        assert row["loss"] == pytest.approx(LAW.loss_at_compute(row["flops"]), rel=0.005)
        assert row["intervals"]["loss"][0] < row["loss"] < row["intervals"]["loss"][1]


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("power", {"scale", "exponent", "constant"}),
        ("envelope", {"a", "b", "params_scale", "tokens_scale"}),
        ("isoflop", {"a", "b", "params_scale", "tokens_scale"}),
        ("parametric", {"E", "A", "B", "alpha", "beta"}),
    ],
)
def test_every_method_as_table_json_and_picture(capsys, tables, tmp_path, method, names):
    data, picture = tables / f"{method}.csv", tmp_path / "fit.png"
    argv = data, "--method", method, "--bootstrap", 10
    found = json.loads(output(capsys, *argv, "--json", "--plot", picture))
    assert names == set(found["intervals"])
    for name in names:
        assert np.isfinite([found[name], *found["intervals"][name]]).all()
    table = output(capsys, *argv)
    for name in names:
        row = next(line for line in table.splitlines() if line.startswith(f"{name} "))
        assert float(row.split()[1]) == pytest.approx(found[name], rel=2e-3, abs=1e-4)
    assert "95 % interval of 10 bootstraps" in table
    if method != "power":
        assert found["exponents"]["a"] == pytest.approx(LAW.a, abs=0.01)
        assert "grow with flops^a" in table
    last = table.splitlines()[[line.startswith("flops  ") for line in table.splitlines()].index(True) + 4].split()
    assert float(last[0]) == found["predictions"][-1]["flops"]
    assert f"{found['predictions'][-1]['loss']:.4f}" in last
    data = picture.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == ((840, 540) if method == "power" else (1380, 540))
    assert not list(tmp_path.glob("*.tmp"))


def test_without_bootstrap_nothing_is_said_of_intervals(capsys, tables):
    found = json.loads(output(capsys, tables / "power.csv", "--method", "power", "--bootstrap", 0, "--json"))
    assert found["intervals"] == {}
    assert all(row["intervals"] == {} for row in found["predictions"])
    table = output(capsys, tables / "power.csv", "--method", "power", "--bootstrap", 0)
    assert "95 %" not in table
    assert "nan" not in table


@pytest.mark.parametrize("ending", [".svg", ".pdf"])
def test_pictures_of_other_kinds(capsys, tables, tmp_path, ending):
    picture = tmp_path / f"fit{ending}"
    output(capsys, tables / "power.csv", "--method", "power", "--bootstrap", 5, "--plot", picture)
    assert picture.read_bytes()[:5] in (b"<?xml", b"%PDF-")


def test_the_seed_is_a_flag(capsys, tables):
    argv = tables / "isoflop.csv", "--method", "isoflop", "--bootstrap", 10, "--json"
    one, same, other = (output(capsys, *argv, "--seed", seed) for seed in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        ("nowhere.csv", "cgpt: nowhere.csv: no such file or folder"),
        ("{one} --method power", "one.csv: wanted at least 3 points for power, got 1"),
        ("{minus} --method power", "minus.csv, line 3: loss: wanted a number above 0, got -2.5"),
        ("{power}", "wanted params, tokens, loss, or two of params, tokens and flops; got flops, loss"),
        ("{power} --method power --bootstrap -1", "--bootstrap and --seed: wanted numbers of at least 0, got -1 and 0"),
        ("{power} --method power --plot fit.bmp", "--plot: wanted a file ending in .png, .svg, .pdf, got fit.bmp"),
        ("{power} --method power --plot no/fit.png", "--plot: wanted a file in a folder that is there, got no/fit.png"),
        ("{power} --method spline", "invalid choice 'spline' for argument '--method'"),
        ("", "DATA"),
    ],
)
def test_mistakes_are_one_line(capsys, tables, tmp_path, monkeypatch, argv, wanted):
    monkeypatch.chdir(tmp_path)
    (tables / "one.csv").write_text("flops,loss\n1e18,3\n")
    (tables / "minus.csv").write_text("flops,loss\n1e18,3\n1e19,-2.5\n1e20,2\n")
    names = {name: tables / f"{name}.csv" for name in ("one", "minus", "power")}
    assert wanted in refused(capsys, *argv.format(**names).split())
    assert not list(tmp_path.iterdir())
