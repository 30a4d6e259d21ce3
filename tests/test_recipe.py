from dataclasses import replace
from pathlib import Path

import pytest

from cgpt.errors import InputError
from cgpt.model.presets import PRESETS
from cgpt.recipe import Recipe, TrainConfig, batch_at, new_folder, resolve, resolve_resumed, resumed_folder


def test_no_flags_give_the_tiny_presets_own_recipe():
    recipe, tiny = resolve(TrainConfig()), PRESETS["tiny"]
    assert (recipe.model, recipe.data, recipe.precision, recipe.device, recipe.seed) == (
        "tiny", "moby-dick", "bf16", "cpu", 0,
    )  # fmt: skip
    assert (recipe.steps, recipe.lr, recipe.warmup_tokens) == (tiny.steps, tiny.lr, tiny.warmup_tokens)
    assert (recipe.shape, recipe.batch_schedule, recipe.tokens) == (tiny.config, tiny.batch_schedule, tiny.tokens)


@pytest.mark.parametrize("name", PRESETS)
def test_every_presets_recipe_comes_back_from_json(name):
    recipe = resolve(TrainConfig(model=name))
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert (recipe.beta1, recipe.beta2, recipe.weight_decay, recipe.clip) == (0.9, 0.95, 0.1, 1.0)


def test_another_batch_size_sees_the_same_tokens():
    recipe, preset = resolve(TrainConfig(model="111M", batch_size=30)), PRESETS["111M"]
    assert recipe.steps == 4 * preset.steps
    assert recipe.tokens == preset.tokens


def test_the_batch_of_13b_grows_where_published():
    recipe = resolve(TrainConfig(model="13B"))
    change = 57_000 * 720 * 2048
    assert [batch_at(recipe, tokens) for tokens in (0, change - 1, change)] == [720, 720, 1080]


def test_warm_up_takes_at_most_a_fifth_of_a_short_run():
    recipe = resolve(TrainConfig(model="111M", batch_size=2, seq_len=1024, steps=20))
    assert recipe.warmup_tokens == recipe.tokens // 5
    assert resolve(TrainConfig(steps=20, warmup_tokens=0)).warmup_tokens == 0


def test_shorter_sequences_keep_the_model_and_longer_ones_grow_it():
    assert resolve(TrainConfig(model="111M", seq_len=1024)).shape == PRESETS["111M"].config
    assert resolve(TrainConfig(model="111M", seq_len=4096)).shape.seq_len == 4096


def test_variants_of_a_preset():
    tiny = PRESETS["tiny"].config
    recipe = resolve(TrainConfig(positions="alibi", activation="swiglu", embedding_norm=True))
    assert recipe.shape == replace(tiny, positions="alibi", activation="swiglu", d_ff=256, embedding_norm=True)
    assert (recipe.lr, recipe.parametrization) == (PRESETS["tiny"].lr, "sp")
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert resolve(TrainConfig(positions="rotary", seq_len=4096)).shape.seq_len == 4096


def test_a_parametrization_brings_its_numbers_and_its_learning_rate():
    recipe, preset = resolve(TrainConfig(model="590M", parametrization="mup", steps=9)), PRESETS["590M-mup"]
    assert (recipe.shape, recipe.lr, recipe.parametrization) == (preset.config, preset.lr, "mup")
    assert resolve(TrainConfig(model="590M", parametrization="mup", lr=1e-3)).lr == 1e-3
    for name in ("590M", "590M-mup"):
        preset = PRESETS[name]
        recipe = resolve(TrainConfig(model=name, parametrization=preset.parametrization))
        assert (recipe.shape, recipe.lr, recipe.parametrization) == (preset.config, preset.lr, preset.parametrization)
    deep = resolve(TrainConfig(model="590M-mup", parametrization="completep")).shape
    assert deep.residual_scale == 24 / 18
    assert resolve(TrainConfig(model="590M-mup", parametrization="sp")).shape.hidden_lr_scale == 1


@pytest.mark.parametrize(
    ("flag", "value", "wanted"),
    [
        ("positions", "sinus", "one of learned, none, rotary, alibi"),
        ("activation", "relu", "one of gelu, gelu_tanh, swiglu"),
        ("parametrization", "ntk", "one of sp, mup, completep"),
    ],
)
def test_unknown_variants_are_named(flag, value, wanted):
    with pytest.raises(InputError, match=f"--{flag}: wanted {wanted}, got {value}"):
        resolve(TrainConfig(**{flag: value}))


def test_a_resumed_run_keeps_its_variant():
    saved = resolve(TrainConfig(positions="rotary", parametrization="mup"))
    same = TrainConfig(positions="rotary", activation="gelu", parametrization="mup", resume=True)
    assert resolve_resumed(same, saved, Path("x")) == saved
    assert resolve_resumed(TrainConfig(), saved, Path("x")) == saved
    changes = {"positions": "none", "activation": "swiglu", "embedding_norm": True, "parametrization": "sp"}
    for flag, value in changes.items():
        with pytest.raises(InputError, match=f"--{flag.replace('_', '-')}: the run in x has .*, got {value}"):
            resolve_resumed(TrainConfig(**{flag: value}), saved, Path("x"))


def test_a_recipe_saved_before_there_were_variants_still_opens():
    recipe = resolve(TrainConfig())
    saved = recipe.to_dict()
    for name in ("moments", "parametrization"):
        del saved[name]
    for name in list(saved["shape"]):
        if name.endswith("_scale") or name in ("positions", "embedding_norm"):
            del saved["shape"][name]
    assert Recipe.from_dict(saved) == recipe


def test_a_resumed_run_changes_only_what_makes_no_other_run():
    saved = resolve(TrainConfig(steps=10, lr=0.5))
    config = TrainConfig(steps=20, keep=5, lr=0.5, batch_size=saved.batch_schedule[0][1], out=Path("x"), resume=True)
    recipe = resolve_resumed(config, saved, Path("x"))
    assert (recipe.steps, recipe.keep, recipe.lr) == (20, 5, 0.5)
    for flag, value in {"seed": 1, "batch_size": 99, "data": "python-stdlib", "precision": "fp32"}.items():
        with pytest.raises(InputError, match=f"--{flag.replace('_', '-')}: the run in x has .*, got"):
            resolve_resumed(TrainConfig(**{flag: value}), saved, Path("x"))


def test_run_folders_are_numbered_past_the_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(data="texts/my.book.txt")
    recipe = resolve(config)
    for wanted in ("tiny-my", "tiny-my-2"):
        folder = new_folder(config, recipe)
        assert folder == Path("runs") / wanted
        folder.mkdir(parents=True)
    (tmp_path / "runs" / "tiny-my-9").mkdir()
    (tmp_path / "runs" / "tiny-mystery-20").mkdir()
    assert new_folder(config, recipe) == Path("runs/tiny-my-10")
    assert resumed_folder(config) == Path("runs/tiny-my-9")
