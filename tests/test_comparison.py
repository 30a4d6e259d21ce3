"""`cgpt plot`: what is drawn of which run, and every run that cannot be drawn."""

import json
import math
import re
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cgpt import cli, comparison
from cgpt.comparison import compare
from cgpt.errors import InputError
from cgpt.metrics import Summary
from cgpt.model import presets
from cgpt.pictures import COLOURS
from cgpt.plot_flags import Plot
from cgpt.plots import smoothed
from cgpt.recipe import TrainConfig, resolve, write_config
from cgpt.scaling.flops import flops_per_token
from nano import NANO

DATA = {"name": "whales", "tokens": 1000, "documents": 3}


@pytest.fixture(autouse=True)
def nano(monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "nano", NANO)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn, instead of their files' bytes alone."""
    figures, real = [], comparison.write
    monkeypatch.setattr(comparison, "write", lambda figure, path: figures.append(figure) or real(figure, path))
    return figures


def make_run(folder, rows, identity=DATA, bits=None, **changes):
    folder.mkdir(parents=True)
    recipe = replace(resolve(TrainConfig(model="nano", data="d")), **changes)
    write_config(folder, recipe, identity)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if bits is not None:
        numbers = dict.fromkeys(Summary.__dataclass_fields__, 1)
        Summary(**{**numbers, "val_loss": 4.0, "bits_per_byte": bits}).write(folder)
    return folder


def rows_of(n, start=6.0, every=4, **more):
    rows = []
    for step in range(1, n + 1):
        row = {"step": step, "tokens": 32 * step, "loss": start / step**0.3, "lr": 0.1, "grad_norm": 1.0 + step}
        row["tokens_per_second"] = 64.0
        if step % every == 0:
            row["val_loss"] = row["loss"] + 0.25
        rows.append(row | more)
    return rows


def plot(tmp_path, *runs, **options):
    return compare(Plot(tuple(runs), tmp_path / "out.png", **options))


def lines(figure):
    """(label, xs, ys) of the lines in the order that they were drawn."""
    return [(line.get_label(), line.get_xdata(), line.get_ydata()) for line in figure.axes[0].lines]


def legend(figure):
    found = [*figure.legends, *(legend for axes in figure.axes if (legend := axes.get_legend()))]
    return [text.get_text() for each in found for text in each.get_texts()]


def refusal(pattern, tmp_path, *runs, **options):
    with pytest.raises(InputError) as caught:
        plot(tmp_path, *runs, **options)
    assert "\n" not in str(caught.value)
    assert re.search(pattern, str(caught.value)), str(caught.value)
    assert not (tmp_path / "out.png").exists()


def test_curves_and_held_out_losses(tmp_path, drawn):
    first = make_run(tmp_path / "a", rows_of(40))
    second = make_run(tmp_path / "b", rows_of(30, start=7.0))
    path, notes = plot(tmp_path, first, second, smooth=5)
    assert (path, notes) == (tmp_path / "out.png", [])
    assert struct.unpack(">II", path.read_bytes()[16:24]) == (1020, 600)
    found = lines(drawn[0])
    assert len(found) == 6  # single steps, smoothed and held out, of two runs
    losses = np.array([row["loss"] for row in rows_of(40)])
    (_, xs, raw), (label, _, smooth), (_, held_x, held_y) = found[:3]
    assert xs.tolist() == [32.0 * step for step in range(1, 41)]
    assert raw.tolist() == losses.tolist()
    assert np.allclose(smooth, smoothed(losses, 5), rtol=1e-15)
    assert held_x.tolist() == [32.0 * step for step in range(4, 41, 4)]
    assert held_y.tolist() == [row["val_loss"] for row in rows_of(40) if "val_loss" in row]
    assert label == f"a (809 k): {held_y[-1]:.3f}"
    assert legend(drawn[0])[0] == label
    colours = [line.get_color() for line in drawn[0].axes[0].lines]
    assert colours == [COLOURS[0]] * 3 + [COLOURS[1]] * 3


@pytest.mark.parametrize(
    ("x", "wanted"),
    [
        ("tokens", lambda step: 32 * step),
        ("steps", lambda step: step),
        ("flops", lambda step: 32 * step * flops_per_token(NANO.config).total),
        ("time", lambda step: step / 2),
    ],
)
def test_axes(tmp_path, drawn, x, wanted):
    plot(tmp_path, make_run(tmp_path / "a", rows_of(20)), x=x, smooth=1)
    _, xs, _ = lines(drawn[0])[0]
    assert np.allclose(xs, [wanted(step) for step in range(1, 21)], rtol=1e-12)
    assert drawn[0].axes[0].get_xscale() == ("log" if x == "flops" else "linear")


def test_time_where_a_speed_is_missing(tmp_path, drawn):
    rows = rows_of(6)
    rows[2]["tokens_per_second"] = None
    rows[3]["tokens_per_second"] = math.nan
    del rows[4]["tokens_per_second"]
    plot(tmp_path, make_run(tmp_path / "a", rows), x="time", smooth=1)
    assert np.allclose(lines(drawn[0])[0][1], np.arange(1, 7) / 2, rtol=1e-12)


@pytest.mark.parametrize("y", ["lr", "grad-norm", "tokens-per-second"])
def test_other_columns(tmp_path, drawn, y):
    plot(tmp_path, make_run(tmp_path / "a", rows_of(20)), y=y, smooth=1)
    ((label, _, ys),) = lines(drawn[0])
    assert ys.tolist() == [row[y.replace("-", "_")] for row in rows_of(20)]
    assert label == "a (809 k)"


def test_bits_per_byte_from_metrics_summary_or_a_twin(tmp_path, drawn):
    measured = rows_of(20)
    for row in measured:
        if "val_loss" in row:
            row["val_bits_per_byte"] = row["val_loss"] / 5
    own = {**DATA, "vocabulary": "f00"}
    runs = [
        make_run(tmp_path / "metrics", measured),
        make_run(tmp_path / "twin", rows_of(10)),  # cut off before its summary, of an earlier version
        make_run(tmp_path / "summary", rows_of(20), own, bits=2.0),
    ]
    _, notes = plot(tmp_path, *runs, y="bits-per-byte", smooth=1)
    smooth = [ys for label, _, ys in lines(drawn[0]) if not label.startswith("_")]
    for ys, factor, n in zip(smooth, (1 / 5, 1 / 5, 2.0 / 4.0), (20, 10, 20), strict=True):
        assert np.allclose(ys, [factor * row["loss"] for row in rows_of(n)], rtol=1e-12)
    assert notes == ["the runs are held out on different tokens: their held-out losses compare only roughly"]
    _, notes = plot(tmp_path, *runs)
    assert notes == ["the runs have different vocabularies: nats per token do not compare, --y bits-per-byte does"]
    alone = make_run(tmp_path / "alone/run", rows_of(5))
    (tmp_path / "out.png").unlink()
    refusal("run: wanted a run that has measured bits per byte, or one of the same", tmp_path, alone, y="bits-per-byte")


def test_missing_and_not_finite_values(tmp_path, drawn):
    rows = rows_of(20)
    rows[3]["loss"] = math.nan
    rows[4]["loss"] = math.inf
    rows[5]["loss"] = None
    del rows[6]["loss"]
    rows[7]["val_loss"] = math.nan
    folder = make_run(tmp_path / "a", rows)
    _, notes = plot(tmp_path, folder, smooth=1)
    assert notes == [f"{folder}: 3 values of loss are not finite and are left out"]
    (_, xs, ys), (_, held_x, _) = lines(drawn[0])
    assert len(xs) == len(ys) == 16
    assert held_x.tolist() == [32.0 * step for step in (4, 12, 16, 20)]


def test_runs_that_have_nothing_yet(tmp_path, drawn):
    begun = make_run(tmp_path / "begun", [])
    fresh = make_run(tmp_path / "fresh", [])
    (fresh / "metrics.jsonl").unlink()
    one = make_run(tmp_path / "one", rows_of(1))
    _, notes = plot(tmp_path, begun, fresh, one)
    assert notes == [f"{begun} has no loss yet and is left out", f"{fresh} has no loss yet and is left out"]
    assert legend(drawn[0]) == ["one (809 k)"]
    (tmp_path / "out.png").unlink()
    refusal(r"begun: wanted a run with loss in metrics\.jsonl, got none yet", tmp_path, begun, fresh)


def test_a_torn_last_line_is_no_error(tmp_path, drawn):
    folder = make_run(tmp_path / "a", rows_of(5))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "tok')
    plot(tmp_path, folder)
    assert len(lines(drawn[0])[0][1]) == 5


def test_folders_of_runs_and_names_that_tell_them_apart(tmp_path, drawn):
    for parent in ("x", "y"):
        for name in ("b", "a"):
            make_run(tmp_path / parent / name, rows_of(5))
    (tmp_path / "x/log.txt").write_text("")
    plot(tmp_path, tmp_path / "y", tmp_path / "x", tmp_path / "x/a")
    assert [text.split(" ")[0] for text in legend(drawn[0])] == ["y/a", "y/b", "x/a", "x/b"]


def test_names_that_matplotlib_would_take_for_something_else(tmp_path, drawn):
    runs = [make_run(tmp_path / name, rows_of(5)) for name in ("_hidden", "a$b_{$c")]
    plot(tmp_path, *runs, title="$\\frac{$")
    assert legend(drawn[0]) == ["./_hidden (809 k): 4.209", r"a\$b_{\$c (809 k): 4.209"]


def test_many_runs_fit_beside_their_legend(tmp_path, drawn):
    for i in range(30):
        make_run(tmp_path / f"runs/{i:02d}", rows_of(5, start=6 + i / 10))
    plot(tmp_path, tmp_path / "runs")
    styles = {(line.get_color(), line.get_linestyle()) for line in drawn[0].axes[0].lines}
    assert len(styles) == 30
    (box,) = drawn[0].legends
    extent = box.get_window_extent()
    assert extent.y0 >= 0
    assert extent.x1 <= drawn[0].bbox.x1
    assert extent.x0 >= drawn[0].axes[0].get_window_extent().x1
    for i in range(35):
        make_run(tmp_path / f"more/{i}", rows_of(1))
    (tmp_path / "out.png").unlink()
    refusal("runs: wanted at most 32 runs in one picture, got 65", tmp_path, tmp_path / "runs", tmp_path / "more")


def test_runs_of_very_different_lengths_share_a_logarithmic_axis(tmp_path, drawn):
    short, long = make_run(tmp_path / "a", rows_of(8)), make_run(tmp_path / "b", rows_of(100))
    plot(tmp_path, short, long)
    plot(tmp_path, long)
    plot(tmp_path, long, log_x=True)
    assert [figure.axes[0].get_xscale() for figure in drawn] == ["log", "linear", "log"]


def test_the_start_is_cut_off_and_nothing_else(tmp_path, drawn):
    rows = rows_of(200, every=50)
    rows[0]["loss"] = 1000.0
    plot(tmp_path, make_run(tmp_path / "a", rows), smooth=1)
    low, high = drawn[0].axes[0].get_ylim()
    late = [row["loss"] for row in rows[8:]]
    assert high < 10
    assert low < min(late) < max(late) < high


def test_long_runs_are_thinned_and_keep_their_last_step(tmp_path, drawn):
    plot(tmp_path, make_run(tmp_path / "a", rows_of(5001, every=5001)), smooth=1)
    (_, xs, _), _ = lines(drawn[0])
    assert 1000 < len(xs) <= comparison.POINTS
    assert xs[-1] == 32.0 * 5001


def test_what_is_asked_wrongly(tmp_path):
    run = make_run(tmp_path / "a", rows_of(5))
    (tmp_path / "empty").mkdir()
    refusal("nowhere: wanted a run folder, or a folder of them, got no folder", tmp_path, tmp_path / "nowhere")
    refusal("config.json: wanted a run folder, .* got a file", tmp_path, run / "config.json")
    refusal(r"empty: wanted a run folder, or a folder of them \(config\.json\), got none", tmp_path, tmp_path / "empty")
    refusal("--smooth: wanted at least 1 step, got 0", tmp_path, run, smooth=0)
    for out in ("out.gif", "no/out.png"):
        with pytest.raises(InputError, match="--out: wanted a file "):
            compare(Plot((run,), tmp_path / out))
    for damage in (
        "3\n",
        '{"step": 1, "tokens": NaN}\n',
        '{"step": 1, "tokens": -8}\n',
        "{}\n",
        '{"step": "1", "tokens": 8}\n',
        '{"step": 1, "tokens": null}\n',
    ):
        (run / "metrics.jsonl").write_text(json.dumps(rows_of(1)[0]) + "\n" + damage)
        refusal(r"metrics\.jsonl:2: wanted a row of metrics with step and tokens, got another", tmp_path, run)
    (run / "config.json").write_text("{")
    refusal(r"config\.json: wanted a run's configuration, got a damaged file", tmp_path, run)


@pytest.mark.parametrize("ending", ["svg", "pdf"])
def test_other_formats(tmp_path, ending):
    path, _ = compare(Plot((make_run(tmp_path / "a", rows_of(5)),), tmp_path / f"out.{ending}"))
    assert path.read_bytes()[:5] == {"svg": b"<?xml", "pdf": b"%PDF-"}[ending]


def test_the_command(tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "runs/a", rows_of(5))
    make_run(tmp_path / "runs/b", [])
    monkeypatch.chdir(tmp_path)
    assert cli.main("plot runs --out out.png --x steps --title Whales".split()) == 0
    assert capsys.readouterr().out == "note: runs/b has no loss yet and is left out\nout.png\n"
    assert Path("out.png").read_bytes()[:4] == b"\x89PNG"
    assert cli.main("plot runs/b --out out.png".split()) == 2
    assert capsys.readouterr().err == "cgpt: runs/b: wanted a run with loss in metrics.jsonl, got none yet\n"
    assert cli.main("plot runs --out out.png --x miles".split()) == 2
