"""Points as they are read: any order of columns, any way to write a number, and one line for what is no point."""

import numpy as np
import pytest

from cgpt.errors import InputError
from cgpt.metrics import Metrics, Summary
from cgpt.recipe import TrainConfig, resolve, write_config
from cgpt.scaling.flops import flops_per_token
from cgpt.scaling.points import Points, read_points


def write(folder, text, name="points.csv"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def write_run(folder, val_loss=3.5, tokens=8192, seq_len=None, curve=(5.0, 4.0)):
    """A run folder as `cgpt train` leaves one; `curve`: held-out losses before the last."""
    recipe = resolve(TrainConfig(model="tiny", steps=16, seq_len=seq_len))
    folder.mkdir(parents=True)
    write_config(folder, recipe, {})
    metrics = Metrics(folder)
    losses = [*curve, val_loss]
    for step, loss in enumerate(losses, 1):
        metrics.append({"step": 2 * step - 1, "tokens": tokens * (2 * step - 1) // (2 * len(losses)), "loss": 9.0})
        metrics.append({"step": 2 * step, "tokens": tokens * step // len(losses), "loss": 8.0, "val_loss": loss})
    metrics.close()
    rest = dict.fromkeys(Summary.__dataclass_fields__)
    parameters = recipe.shape.n_params
    Summary(**{**rest, "parameters": parameters, "tokens": tokens, "val_loss": val_loss, "steps": 16}).write(folder)
    return recipe


def test_columns_in_any_order_and_numbers_in_any_form(tmp_path):
    text = (
        "\ufeffnote, Loss ,tokens,PARAMS\r\n"
        "# a remark, with commas\r\n"
        '"one, two",2.5,1_000_000,"1e6"\r\n'
        "\r\n"
        "x, +3E0 , 2e9 ,1.5e+08\r\n"
    )
    points = read_points([write(tmp_path, text)])
    assert np.array_equal(points.loss, [2.5, 3.0])
    assert np.array_equal(points.tokens, [1e6, 2e9])
    assert np.array_equal(points.params, [1e6, 1.5e8])
    assert np.array_equal(points.flops, [6e12, 6 * 1.5e8 * 2e9])
    assert points.notes == ("flops = 6 params tokens",)
    assert points.run is None


@pytest.mark.parametrize(
    ("header", "row", "name", "value"),
    [
        ("params,flops,loss", "1e8,1.2e18,3", "tokens", 2e9),
        ("tokens,flops,loss", "2e9,1.2e18,3", "params", 1e8),
        ("params,tokens,loss", "1e8,2e9,3", "flops", 1.2e18),
    ],
)
def test_two_columns_give_the_third(tmp_path, header, row, name, value):
    points = read_points([write(tmp_path, f"{header}\n{row}\n")])
    assert getattr(points, name)[0] == pytest.approx(value)
    assert points.notes[0].startswith(f"{name} = ")


def test_three_columns_are_taken_as_they_are(tmp_path):
    points = read_points([write(tmp_path, "params,tokens,flops,loss\n1e8,2e9,9e18,3\n")])
    assert points.flops[0] == 9e18
    assert points.notes == ()


def test_several_files_are_one_table(tmp_path):
    one = write(tmp_path, "run,params,flops,loss\na,1e8,1e18,3\n", "one.csv")
    two = write(tmp_path, "loss,flops,params,run\n2,1e20,1e9,b\n", "two.csv")
    points = read_points([one, two])
    assert points.run == ("a", "b")
    assert np.array_equal(points.loss, [3, 2])
    assert points.source == f"{one} and 1 more"
    bare = write(tmp_path, "flops,loss\n1e21,1.9\n", "bare.csv")
    points = read_points([one, bare])
    assert points.params is None
    assert np.array_equal(points.flops, [1e18, 1e21])
    with pytest.raises(InputError, match="wanted params, loss, or two of params, tokens and flops; got flops, loss"):
        points.needing("params", "loss")


def test_runs_give_their_last_held_out_loss_or_their_curve(tmp_path):
    recipe = write_run(tmp_path / "runs" / "one")
    write_run(tmp_path / "runs" / "two", val_loss=3.0, tokens=16384)
    (tmp_path / "runs" / "notes").mkdir()
    points = read_points([tmp_path / "runs"])
    assert np.array_equal(points.loss, [3.5, 3.0])
    assert np.array_equal(points.tokens, [8192, 16384])
    assert set(points.params) == {recipe.shape.n_params}
    assert np.array_equal(points.flops, flops_per_token(recipe.shape).total * points.tokens)
    assert "published convention" in points.notes[0]
    curve = read_points([tmp_path / "runs" / "one"], curves=True)
    assert np.array_equal(curve.loss, [5.0, 4.0, 3.5])
    assert np.array_equal(curve.tokens, [2730, 5461, 8192])
    assert len(set(curve.run)) == 1


def test_a_run_on_shorter_sequences_costs_less(tmp_path):
    long, short = (read_points([tmp_path / str(n)]) for n in (128, 64) if write_run(tmp_path / str(n), seq_len=n))
    assert short.flops[0] < long.flops[0]


def test_a_torn_last_line_of_metrics_is_left_out(tmp_path):
    write_run(tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "val_lo')
    assert len(read_points([tmp_path / "run"], curves=True)) == 3


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", "wanted a line of column names and points, got an empty file"),
        ("params,tokens,loss\n", "wanted points under the column names, got none"),
        ("size,loss\n1,2\n", "wanted columns named loss and some of params, tokens, flops, got size, loss"),
        ("params,tokens\n1,2\n", "wanted columns named loss and some of params, tokens, flops, got params, tokens"),
        ("1e8,1e18,3.0\n1e9,1e19,2.0\n", "wanted columns named loss .* got 1e8, 1e18, 3.0"),
        ("flops,flops,loss\n1,2,3\n", "wanted each column once, got flops, flops, loss"),
        ("flops,loss\n1e18,3\n1e19\n", "points.csv, line 3: wanted 2 cells, got 1"),
        ("flops,loss\n1e18,-3\n", "points.csv, line 2: loss: wanted a number above 0, got -3"),
        ("flops,loss\n1e18,nan\n", "points.csv, line 2: loss: wanted a number above 0, got nan"),
        ("flops,loss\n1e18,inf\n", "points.csv, line 2: loss: wanted a number above 0, got inf"),
        ("flops,loss\n1e18,\n", "points.csv, line 2: loss: wanted a number above 0, got nothing"),
        ("flops,loss\n# x\n\n1e18,two\n", "points.csv, line 4: loss: wanted a number above 0, got two"),
        ("params,tokens,loss\n1e8,0,3\n", "points.csv, line 2: tokens: wanted a number above 0, got 0"),
        (b"\x89PNG\r\n\x1a\n\x00", "wanted a CSV file, got something else"),
    ],
)
def test_what_is_no_table_is_one_line(tmp_path, text, wanted):
    with pytest.raises(InputError, match=wanted) as caught:
        read_points([write(tmp_path, text)])
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def damage(folder, name, text):
    write_run(folder)
    (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda run: None, "run: no such file or folder"),
        (lambda run: run.mkdir(), r"run: wanted a run folder, or a folder of them \(config.json\), got none"),
        (lambda run: write_run(run, val_loss=None), "run: wanted a finished run, got one that was stopped before"),
        (lambda run: write_run(run, val_loss=-1.0), "run: val_loss: wanted a number above 0, got -1.0"),
        (lambda run: write_run(run, tokens=0), "run: tokens: wanted a number above 0, got 0"),
        (lambda run: damage(run, "summary.json", "{"), "summary.json: wanted JSON, got a damaged file"),
        (lambda run: damage(run, "summary.json", "[]"), "summary.json: wanted a JSON object, got list"),
        (lambda run: damage(run, "summary.json", "{}"), "wanted a run's config.json and summary.json, got damage"),
        (lambda run: damage(run, "config.json", '{"recipe": 1}'), "wanted a run's config.json and summary.json, got d"),
    ],
)
def test_what_is_no_run_is_one_line(tmp_path, make, wanted):
    make(tmp_path / "run")
    with pytest.raises(InputError, match=wanted) as caught:
        read_points([tmp_path / "run"])
    assert "\n" not in str(caught.value)


def test_a_run_without_its_end_is_named(tmp_path):
    write_run(tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(InputError, match=r"run: wanted a finished run \(summary.json\), got none"):
        read_points([tmp_path / "run"])
    with pytest.raises(InputError, match="DATA: wanted a CSV file or run folders, got none"):
        read_points([])


def test_columns_of_one_length():
    with pytest.raises(InputError, match=r"the points: flops: wanted 2 numbers, got \(3,\)"):
        Points(loss=[1.0, 2.0], flops=[1.0, 2.0, 3.0])
    with pytest.raises(InputError, match="x: loss: wanted numbers above 0, got -2"):
        Points(loss=[1.0, -2.0], source="x")
