"""A plan becomes a run: `cgpt plan --write`, `cgpt train --config`."""

import json
from pathlib import Path

import pytest

from cgpt import cli
from cgpt.errors import InputError
from cgpt.model.presets import PRESETS
from cgpt.recipe import TrainConfig, read_config, resolve
from cgpt.train_file import read_train_file, to_dict


def written(path, **changed):
    content = to_dict(PRESETS["111M"], {}) | changed
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))
    return path


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_comes_back_from_a_file(tmp_path, name):
    path = tmp_path / "preset.json"
    path.write_text(json.dumps(to_dict(PRESETS[name], {"seed": 3})))
    assert read_train_file(path) == (PRESETS[name], {"seed": 3})
    assert resolve(TrainConfig(config=path, seed=0)) == resolve(TrainConfig(model=name))


def test_flags_go_before_the_files_and_those_before_defaults(tmp_path):
    path = written(tmp_path / "preset.json", flags={"precision": "fp32", "micro_batch_size": 2, "seed": 7})
    recipe = resolve(TrainConfig(config=path, precision="bf16", steps=10, lr=1e-3))
    assert (recipe.precision, recipe.micro_batch_size, recipe.seed) == ("bf16", 2, 7)
    assert (recipe.model, recipe.steps, recipe.lr) == ("111M", 10, 1e-3)


def test_what_has_a_default_may_be_missing(tmp_path):
    preset, _ = read_train_file(written(tmp_path / "preset.json", beta1=..., grad_clip=..., flags=...))
    assert (preset.beta1, preset.grad_clip) == (0.9, 1.0)


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"lr": ...}, "the file lacks lr"),
        ({"speed": 1}, "the file has unknown speed"),
        ({"lr": "fast"}, "lr: wanted a number, got 'fast'"),
        ({"lr": -1}, "lr: wanted a number above 0, got -1"),
        ({"lr": float("nan")}, "lr: wanted a number above 0, got nan"),
        ({"lr": float("inf")}, "lr: wanted a number above 0, got inf"),
        ({"weight_decay": -0.1}, "weight_decay: wanted a number of at least 0, got -0.1"),
        ({"parametrization": "np"}, "parametrization: wanted one of sp, mup, completep, got np"),
        ({"steps": 1.5}, "steps: wanted a whole number, got 1.5"),
        ({"steps": True}, "steps: wanted a whole number, got True"),
        ({"decay": "steep"}, "decay: wanted one of linear, cosine, constant, got steep"),
        ({"batch_schedule": 8}, r"batch_schedule: wanted \[\[from_tokens, sequences\], ...\], got 8"),
        ({"batch_schedule": [[5, 8]]}, r"batch schedule: starts must ascend from 0 tokens, got \[5\]"),
        ({"shape": 5}, "wanted a preset with a shape"),
        ({"shape": {"n_layer": 2}}, "GPTConfig: the dictionary lacks"),
        ({"flags": {"resume": True}}, "flags: wanted some of device, precision"),
        ({"flags": {"seed": "x"}}, "seed: wanted a whole number, got 'x'"),
    ],
)
def test_mistakes_name_the_file_and_the_field(tmp_path, changed, line):
    path = written(tmp_path / "preset.json", **changed)
    with pytest.raises(InputError, match=f"preset.json: {line}") as refusal:
        resolve(TrainConfig(config=path))
    assert "\n" not in str(refusal.value)


def test_flags_of_a_file_are_held_to_what_flags_are(tmp_path):
    with pytest.raises(InputError, match="--device: wanted one of cpu, cuda, got tpu"):
        resolve(TrainConfig(config=written(tmp_path / "preset.json", flags={"device": "tpu"})))


def test_a_plan_takes_another_parametrization_as_a_preset_does(tmp_path):
    path = written(tmp_path / "preset.json")
    recipe = resolve(TrainConfig(config=path, parametrization="mup"))
    assert recipe == resolve(TrainConfig(model="111M", parametrization="mup"))
    assert recipe.lr == 6e-3


def test_what_is_no_file_of_ours(tmp_path):
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(InputError, match=r"text\.json: wanted JSON, got something else"):
        resolve(TrainConfig(config=tmp_path / "text.json"))
    with pytest.raises(FileNotFoundError):
        resolve(TrainConfig(config=tmp_path / "none.json"))
    with pytest.raises(InputError, match="--config: wanted it or --model, got both"):
        resolve(TrainConfig(config=written(tmp_path / "preset.json"), model="tiny"))


def test_a_plan_becomes_a_run(tmp_path, monkeypatch, capsys):
    """Written, trained two steps, resumed for a third by the same file."""
    monkeypatch.chdir(tmp_path)
    assert cli.main("plan --params 1.7e6 --seq-len 64 --device cpu --write plan.json --json".split()) == 0
    plan = json.loads(capsys.readouterr().out)
    Path("text.txt").write_text("to be or not to be, that is the question; " * 400)
    train = "train --config plan.json --data text.txt --batch-size 2 --eval-tokens 64".split()
    assert cli.main([*train, "--steps", "2"]) == 0
    folder = Path("runs") / f"{plan['name']}-text"
    recipe, _ = read_config(folder)
    assert recipe.shape.to_dict() == plan["shape"]
    assert recipe.shape.n_params == plan["params"]
    assert (recipe.lr, recipe.decay, recipe.eps) == (plan["lr"], plan["decay"], plan["adam_eps"])
    assert cli.main("train --config plan.json --data text.txt --resume --steps 3".split()) == 0
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(0 < row["loss"] < 12 for row in rows)
    whole = resolve(TrainConfig(config=Path("plan.json")))
    assert (whole.steps, whole.tokens, whole.warmup_tokens) == (plan["steps"], plan["tokens"], plan["warmup_tokens"])
