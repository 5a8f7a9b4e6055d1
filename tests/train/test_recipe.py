"""Recipes: what is accepted, and that everything else is refused with its name and numbers."""

from pathlib import Path

import pytest

from moekit.core.errors import UserError
from moekit.train.recipe import load_recipe, recipe_from_dict

GOOD = {"name": "x", "model": {"model_type": "qwen3_moe"}, "train": {"tokens": 100}}
RECIPES = sorted(Path(__file__).parents[2].glob("recipes/babel*.yaml"))


def with_field(section: str, name: str, value: object) -> dict:
    raw = {**GOOD, section: {**GOOD.get(section, {}), name: value}}
    return raw


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_load(path: Path) -> None:
    assert load_recipe(path).steps > 100


def test_steps_cover_the_tokens() -> None:
    recipe = recipe_from_dict(with_field("train", "tokens", 8193))
    assert recipe.train.batch_windows * recipe.train.seq_len == 8192
    assert recipe.steps == 2


def test_evaluations_see_a_window_where_that_is_short() -> None:
    assert recipe_from_dict(with_field("train", "seq_len", 64)).train.context == 64
    assert recipe_from_dict(with_field("train", "seq_len", 2048)).train.context == 512


def test_evaluations_fit_the_model() -> None:
    raw = with_field("model", "max_position_embeddings", 512)
    raw["train"] = {"tokens": 100, "eval_context": 600}
    with pytest.raises(UserError, match="eval_context 600 exceeds"):
        recipe_from_dict(raw)


def test_overrides(tmp_path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("name: x\nmodel: {model_type: qwen3_moe}\n")
    recipe = load_recipe(path, ["train.seq_len=64", "optim.lr=1e-3", "data.weights={a: 1}"])
    assert recipe.train.seq_len == 64
    assert recipe.optim.lr == 1e-3
    assert recipe.data.weights == {"a": 1}


@pytest.mark.parametrize(
    ("section", "name", "value", "message"),
    [
        ("train", "seqlen", 1, "unknown field 'train.seqlen'. Did you mean 'seq_len'"),
        ("train", "seq_len", 0, "train.seq_len is 0"),
        ("train", "seq_len", "long", "train.seq_len is 'long'; expected int"),
        ("train", "micro_windows", 5, "16 is not a multiple of train.micro_windows 5"),
        ("train", "attention", "spda", "Did you mean 'sdpa'"),
        ("train", "init_std", "wide", "train.init_std is 'wide'; expected float"),
        ("train", "eval_context", 1.5, "train.eval_context is 1.5; expected int"),
        ("train", "eval_context", -1, "train.eval_context is -1"),
        ("optim", "name", "sgd", "optim.name is 'sgd'"),
        ("optim", "decay", 1.5, "optim.decay is 1.5"),
        ("model", "max_position_embeddings", 256, "512 exceeds model.max_position_embeddings 256"),
    ],
)
def test_bad_values(section: str, name: str, value: object, message: str) -> None:
    with pytest.raises(UserError) as error:
        recipe_from_dict(with_field(section, name, value))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1", "expected a mapping"),
        ("name: x", "lacks 'model'"),
        ("name: x\nmodel: {}", "model.model_type is missing"),
        ("name: x\nmodel: 3", "model is 3; expected"),
    ],
)
def test_bad_files(tmp_path, text: str, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_recipe(path)
    assert message in str(error.value)


def test_missing_file(tmp_path) -> None:
    with pytest.raises(UserError, match="No such file"):
        load_recipe(tmp_path / "none.yaml")
