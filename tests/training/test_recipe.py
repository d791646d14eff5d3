"""Recipes: complete, checked at the door, and wrong keys answered with the right ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lilliput.errors import UsageError
from lilliput.formats import FORMATS
from lilliput.training.recipe import Recipe, load_recipe, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_a_named_recipe_loads_and_is_the_same_after_writing_it_down(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    recipe.save(tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml").settings() == recipe.settings()


@pytest.mark.parametrize("name", ["qlora", "lora", "guanaco", "alpaca-lora"])
def test_a_named_recipe_says_where_it_comes_from(name: str) -> None:
    text = (Path(__file__).parents[2] / "src/lilliput/training/recipes" / f"{name}.yaml").read_text()
    assert "Source:" in text


def test_guanaco_is_the_papers() -> None:
    """arXiv 2305.14314, table 9 and the script that trained the 7B model."""
    recipe = load_recipe("guanaco")
    assert (recipe.lora.r, recipe.lora.lora_alpha, recipe.lora.lora_dropout) == (64, 16, 0.1)
    assert (recipe.train.learning_rate, recipe.train.schedule, recipe.train.max_grad_norm) == (2e-4, "constant", 0.3)
    assert (recipe.train.batch_size * recipe.train.accumulation, recipe.train.max_steps) == (16, 1875)
    assert recipe.model.format == "nf4"
    assert FORMATS["nf4"].option("double_quant", recipe.model.double_quant) is True
    assert (recipe.optim.name, recipe.optim.bits, recipe.optim.paged) == ("adamw", 32, True)  # paged_adamw_32bit


def test_alpaca_loras_are_those_of_its_script() -> None:
    """The defaults of finetune.py: an 8-bit base under r 8 on the query and value projections, 128 examples a step."""
    recipe = load_recipe("alpaca-lora")
    assert (recipe.model.format, recipe.model.threshold) == ("int8", None)  # null: the format's own 6.0
    assert (recipe.lora.r, recipe.lora.lora_alpha, recipe.lora.lora_dropout) == (8, 16, 0.05)
    assert recipe.lora.target_modules == ["q_proj", "v_proj"]
    assert (recipe.train.batch_size * recipe.train.accumulation, recipe.train.epochs) == (128, 3)
    assert (recipe.train.learning_rate, recipe.train.warmup, recipe.data.max_length) == (3e-4, 100, 256)


def test_options_follow_the_format() -> None:
    assert load_recipe("qlora", ["model.format=int8"]).model.double_quant is None
    recipe = load_recipe("qlora", ["model.format=int8", "model.threshold=4", "model.embeddings=true"])
    assert (recipe.model.threshold, recipe.model.embeddings) == (4.0, True)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["model.format=int8", "model.double_quant=true"], "int8 has no double_quant"),
        (["model.threshold=6"], "nf4 has no threshold"),
        (["model.format=fp4", "model.embeddings=true"], "fp4 has no embeddings"),
        (["model.format=int8", "model.threshold=-1"], "threshold"),
    ],
)
def test_an_option_that_the_format_has_not_is_refused(settings: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load_recipe("qlora", settings)


def test_settings_are_yaml_values() -> None:
    settings = ["lora.r=4", "train.learning_rate=1e-3", "lora.target_modules=[q_proj, v_proj]", "train.max_steps=null"]
    recipe = load_recipe("guanaco", settings)
    assert recipe.lora.r == 4
    assert recipe.train.learning_rate == 1e-3
    assert recipe.lora.target_modules == ["q_proj", "v_proj"]
    assert recipe.train.max_steps is None
    assert recipe.lora.lora_alpha == 16  # untouched


def test_a_file_says_only_what_differs(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("lora:\n  r: 2\n")
    assert load_recipe(file).settings() == load_recipe("qlora", ["lora.r=2"]).settings()
    file.write_text("like: guanaco\ntrain:\n  max_steps: 10\n")
    assert load_recipe(file).settings() == load_recipe("guanaco", ["train.max_steps=10"]).settings()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("lora.rank=16", r"lora.rank: unknown; did you mean lora.r\?"),
        ("lora.alpha=16", r"did you mean lora.lora_alpha\?"),
        ("train.lr=1", r"did you mean train.learning_rate\?"),
        ("train.learning_rat=1", r"did you mean train.learning_rate\?"),
        ("train.packing=true", r"did you mean data.packing\?"),
        ("trian.epochs=1", "trian: no such section.*did you mean 'train'"),
        ("lora.r=many", "lora: r='many'"),
        ("lora.use_dora=true", "use_dora=True is a field of PEFT that is not supported"),
        ("train.epochs=soon", "train.epochs='soon'.*passes over the data"),
        ("train.learning_rate=.inf", "train.learning_rate=inf: input should be a finite number"),
        ("train.epochs=-1", "train.epochs=-1.*greater than 0"),
        ("train.schedule=cosin", "expected one of 'constant', 'linear', 'cosine'"),
        ("model.format=nf5", r"unknown number format 'nf5'; did you mean 'nf4'\?"),
        ("optim.bits=4", "optim.bits=4: input should be 8 or 32"),
        ("optim.name=adamw8bit", "expected one of 'adamw', 'adam', 'sgd'"),
        ("optim.budget=2GB", "optim.budget is of paged state. Set optim.paged=true"),
        ("train.optim=adamw_8bit", r"did you mean optim.name\?"),
        ("model.bits=4", r"did you mean model.format\?"),
        ("train.epochs", "not of the form section.key=value"),
        ("lora.target_modules=[", "no YAML"),
    ],
)
def test_a_wrong_setting_is_refused_with_the_right_one(setting: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load_recipe("qlora", [setting])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {epoch: 3}", "mine.yaml: train.epoch: unknown; did you mean train.epochs"),
        ("- 1", "expected sections"),
        ("", "expected sections"),
        ("1: {epochs: 3}", "1: no such section"),
        ("train: 3", "train: expected keys with values"),
        ("a: [", "no YAML"),
        ("like: quanaco", "no recipe named 'quanaco'; did you mean 'guanaco'"),
    ],
)
def test_a_wrong_file_is_refused(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=said):
        load_recipe(file)


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'guanaco'"):
        load_recipe("quanaco")


def test_early_stop_needs_evaluations() -> None:
    with pytest.raises(UsageError, match="early_stop needs evaluations"):
        load_recipe("qlora", ["train.early_stop=2", "data.eval_fraction=0"])


def test_written_recipe_explains_every_value() -> None:
    lines = [line for line in load_recipe("qlora").dump().splitlines() if line.startswith("  ")]
    assert all("  # " in line for line in lines)
    assert set(yaml.safe_load(load_recipe("qlora").dump())) == set(Recipe.model_fields)
