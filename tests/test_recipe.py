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
