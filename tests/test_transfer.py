"""What was tuned in a run, taken to larger models: the same at its own shape, the table's numbers away from it."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from cgpt import cli, train
from cgpt.errors import InputError
from cgpt.metrics import read
from cgpt.model.config import resized
from cgpt.model.parametrization import EXPONENTS
from cgpt.model.presets import PRESETS
from cgpt.recipe import Recipe, TrainConfig, resolve, resolve_resumed, resumed_folder, write_config
from cgpt.train_file import to_dict
from nano import NANO

RUN = Path("tuned")


def nano(**more):
    return TrainConfig(**{"model": "nano", "data": "corpus.txt", "steps": 4, "eval_tokens": 32, **more})


@pytest.fixture
def tuned(here):
    """A run's recipe with numbers of its own, as found by a sweep; not trained."""
    shape = replace(NANO.config, embedding_init_std=0.3, hidden_init_std=0.11, embedding_scale=4.0)
    config = nano(lr=0.02, precision="fp32", weight_decay=0.05, batch_size=3, decay="cosine", seed=5)
    recipe = replace(resolve(config), shape=shape)
    write(RUN, recipe)
    return recipe


def write(folder, recipe):
    folder.mkdir()
    write_config(folder, recipe, {})


def losses(run):
    return [row["loss"] for row in read(Path(run))]


def test_at_the_runs_own_shape_all_is_the_runs(tuned):
    found = resolve(TrainConfig(transfer_from=RUN))
    numbers = {"residual_init_std": tuned.shape.residual_std, "softmax_scale": tuned.shape.attention_scale}
    same = {"shape": replace(tuned.shape, **numbers), "parametrization": "mup", "transfer_from": str(RUN)}
    assert found == replace(tuned, **same)
    assert Recipe.from_dict(found.to_dict()) == found


def test_at_the_runs_own_shape_the_losses_are_the_runs(here):
    train.train(nano(out=RUN, lr=0.02))
    train.train(TrainConfig(transfer_from=RUN, out=Path("again")))
    assert losses("again") == losses(RUN)
    train.train(TrainConfig(transfer_from=RUN, out=Path("wider"), width=32))
    assert losses("wider")[0] != losses(RUN)[0]


def test_wider_and_deeper_follow_the_table(tuned):
    found = resolve(TrainConfig(transfer_from=RUN, width=64, layers=6))
    shape = found.shape
    assert (shape.d_model, shape.n_head, shape.d_head, shape.d_ff, shape.n_layer) == (64, 8, 8, 128, 6)
    assert found.lr == tuned.lr
    at_run = {name: getattr(tuned.shape, name) for name in EXPONENTS}
    at_run |= {"residual_init_std": 0.11 / math.sqrt(4), "softmax_scale": 8**-0.5}
    factors = {  # m 4, l 3
        "hidden_init_std": 1 / 2,
        "residual_init_std": 1 / 2 / math.sqrt(3),
        "logits_scale": 1 / 4,
        "hidden_lr_scale": 1 / 4,
    }
    want = {name: value * factors.get(name, 1) for name, value in at_run.items()}
    assert {name: getattr(shape, name) for name in EXPONENTS} == pytest.approx(want, rel=1e-14)
    assert (found.batch_schedule, found.steps, found.weight_decay, found.decay, found.data, found.precision) == (
        tuned.batch_schedule, tuned.steps, 0.05, "cosine", "corpus.txt", "fp32",
    )  # fmt: skip
    deep = resolve(TrainConfig(transfer_from=RUN, width=64, layers=6, parametrization="completep"))
    assert (deep.parametrization, deep.shape.residual_scale, deep.shape.hidden_decay_scale) == ("completep", 1 / 3, 4)
    assert deep.shape.hidden_eps_scale == pytest.approx(1 / 12)


def test_what_is_asked_for_has_precedence(tuned):
    found = resolve(TrainConfig(transfer_from=RUN, lr=0.5, batch_size=6, weight_decay=0.2, precision="bf16", seed=0))
    assert (found.lr, found.weight_decay, found.precision, found.seed) == (0.5, 0.2, "bf16", 0)
    assert (found.batch_schedule, found.steps) == (((0, 6),), 2)  # as many tokens
    assert resolve(TrainConfig(transfer_from=RUN, steps=9)).steps == 9
    short = resolve(TrainConfig(transfer_from=RUN, seq_len=8))
    assert (short.seq_len, short.shape.seq_len, short.steps, short.tokens) == (8, 16, 8, tuned.tokens)


def test_a_run_on_shorter_sequences_keeps_its_positions(tuned):
    short = resolve(TrainConfig(transfer_from=RUN, seq_len=8))
    write(Path("short"), short)
    again = resolve(TrainConfig(transfer_from=Path("short")))
    assert again == replace(short, transfer_from="short")
    assert resolve(TrainConfig(transfer_from=Path("short"), batch_size=1)).tokens == pytest.approx(
        short.tokens, rel=0.2
    )


def test_a_preset_takes_the_runs_numbers_and_keeps_its_own_recipe(tuned):
    found, preset = resolve(TrainConfig(model="111M", transfer_from=RUN)), PRESETS["111M"]
    m = 768 / 16
    assert (found.lr, found.shape.hidden_lr_scale, found.shape.logits_scale) == (tuned.lr, 1 / m, 1 / m)
    assert (found.shape.embedding_init_std, found.shape.embedding_scale) == (0.3, 4.0)
    assert found.shape.hidden_init_std == pytest.approx(0.11 / math.sqrt(m))
    assert found.shape.softmax_scale == pytest.approx(8**-0.5 * 8 / 64)
    assert (found.batch_schedule, found.steps, found.seq_len) == (preset.batch_schedule, preset.steps, 2048)
    assert (found.weight_decay, found.data, found.model) == (preset.weight_decay, "moby-dick", "111M")


def test_a_preset_of_ones_own_takes_them_too(tuned):
    preset = replace(NANO, name="own", config=resized(NANO.config, width=64), steps=7, lr=0.5, weight_decay=0.3)
    Path("own.json").write_text(json.dumps(to_dict(preset, {"precision": "fp32"})))
    found = resolve(TrainConfig(config=Path("own.json"), transfer_from=RUN))
    assert (found.lr, found.shape.hidden_lr_scale, found.shape.embedding_scale) == (tuned.lr, 1 / 4, 4.0)
    assert (found.model, found.precision, found.steps, found.weight_decay) == ("own", "fp32", 7, 0.3)


def test_rules_compose_from_run_to_run(tuned):
    write(Path("between"), resolve(TrainConfig(transfer_from=RUN, width=32)))
    twice = resolve(TrainConfig(transfer_from=Path("between"), width=64)).shape
    once = resolve(TrainConfig(transfer_from=RUN, width=64)).shape
    for name in EXPONENTS:
        assert getattr(twice, name) == pytest.approx(getattr(once, name), rel=1e-14)


def test_other_widths_without_a_run():
    plain = resolve(TrainConfig(width=192, layers=5))
    tiny = PRESETS["tiny"].config
    assert plain.shape == replace(tiny, d_model=192, n_head=4, d_ff=768, n_layer=5)
    assert (plain.lr, plain.parametrization) == (PRESETS["tiny"].lr, "sp")
    wide = resolve(TrainConfig(model="111M-mup", width=1536))
    assert (wide.shape.hidden_lr_scale, wide.shape.logits_scale, wide.lr) == (1 / 6, 1 / 6, 6e-3)
    assert resolve(TrainConfig(model="111M-mup", width=768)).shape == PRESETS["111M-mup"].config
    gated = resolve(TrainConfig(width=192, activation="swiglu"))
    assert (gated.shape.d_ff, gated.shape.activation) == (512, "swiglu")


def test_resume_goes_on_with_the_transferred_run(here, capsys):
    train.train(nano(lr=0.02))
    run = Path("runs/nano-corpus")
    config = TrainConfig(transfer_from=run, width=32, steps=2, eval_tokens=32)
    train.train(config)
    wide = Path("runs/nano-corpus-2")
    assert f"tuned in {run}" in capsys.readouterr().out
    assert resumed_folder(replace(config, resume=True)) == wide
    assert train.train(replace(config, steps=4, resume=True)).steps == 4
    assert train.train(TrainConfig(out=wide, steps=5, resume=True)).steps == 5
    for changed, told in (
        (replace(config, width=16), "--width: the run in x has 32, got 16"),
        (replace(config, layers=3), "--layers: the run in x has 2, got 3"),
        (replace(config, transfer_from=wide), f"--transfer-from: the run in x has {run}, got {wide}"),
    ):
        with pytest.raises(InputError, match=told):
            resolve_resumed(changed, resolve(config), Path("x"))


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ("--transfer-from nowhere", "--transfer-from: nowhere: wanted a run folder (config.json), got no folder"),
        ("--transfer-from .", "--transfer-from: .: wanted a run folder (config.json), got none"),
        ("--transfer-from nowhere --model 111M", "--transfer-from: nowhere: wanted a run folder (config.json)"),
        ("--transfer-from tuned --width 20", "--width: wanted a multiple of the heads' 8, got 20"),
        ("--transfer-from tuned --layers 0", "--layers: wanted a number above 0, got 0"),
        ("--width 100", "--width: wanted a multiple of the heads' 48, got 100"),
        ("--width -48", "--width: wanted a number above 0, got -48"),
    ],
)
def test_mistakes_are_one_line(tuned, capsys, argv, told):
    assert cli.main(["train", *argv.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"cgpt: {told}")
    assert not Path("runs").exists()
