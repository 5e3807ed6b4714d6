"""Recipes by name: files, sections of files, the current folder before the package, and what they extend."""

import os
from pathlib import Path

import pytest
from helpers import ROOT

from hfkd.errors import HfkdError, NotFoundError
from hfkd.recipe.finding import find_recipe, names_below, packaged_names
from hfkd.recipe.reading import load_recipe, parse_recipe
from hfkd.recipe.yaml_file import dump_yaml

NAME = "cifar100/resnet56-resnet20/kd_zscore"
SHARED = {"dataset_name": "digits", "student_name_or_path": "cifar_resnet8", "seed": 1, "weight_decay": 0.1}
SECTIONS = {"a": {"seed": 2}, "b": {"weight_decay": None, "extends": "elsewhere"}, "none": None}


def write(path, **keys):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(dump_yaml(keys))


@pytest.mark.parametrize("form", ["{}", "{}.yaml", "recipes/{}", "recipes/{}.yaml", str(ROOT / "recipes/{}.yaml")])
@pytest.mark.parametrize("name", [NAME, "deit_tiny", "digits/student"])
def test_a_packaged_recipe_is_found_from_anywhere(name, form):
    source = find_recipe(form.format(name))
    assert source.name == name and source.path.is_relative_to(ROOT)
    assert parse_recipe([form.format(name)])[3] == parse_recipe([name])[3]


def test_sections_lie_over_the_keys_that_they_share():
    write("mine/pair.yaml", **SHARED, recipes=SECTIONS)
    write("mine/elsewhere.yaml", learning_rate=3.0, seed=9)
    assert load_recipe("mine/pair/a") == SHARED | {"seed": 2} == load_recipe("mine/pair/a.yaml")
    assert load_recipe("mine/pair/b") == SHARED | {"weight_decay": None, "learning_rate": 3.0}
    assert load_recipe("mine/pair/none") == SHARED
    assert parse_recipe(["mine/pair/a"])[2].output_dir == "runs/pair/a"
    assert names_below(Path("mine")) == ["pair/a", "pair/b", "pair/none"], "elsewhere.yaml has no student"


def test_the_current_folder_comes_first():
    write("recipes/digits/own.yaml", **SHARED)
    write("recipes/digits.yaml", **SHARED, recipes={"kd": {"seed": 7}})
    assert load_recipe("digits/own") == SHARED and load_recipe("digits/kd")["seed"] == 7
    assert "lr_scheduler_type" in load_recipe("digits/student"), "which only the package has"
    write("deit_tiny.yaml", **SHARED)
    assert load_recipe("deit_tiny") == SHARED and parse_recipe(["deit_tiny"])[2].output_dir == "runs/deit_tiny"


def test_a_recipe_is_extended_by_name_and_through_any_number_of_levels():
    write("a.yaml", extends=NAME, seed=1, ce_weight=None)
    write("folder/b.yaml", extends="../a", seed=2)
    write("c.yaml", extends="folder/b.yaml", lr_milestones=None)
    packaged = load_recipe(NAME)
    assert load_recipe("c") == packaged | {"seed": 2, "ce_weight": None, "lr_milestones": None}
    config = parse_recipe(["c", "--weight_decay", "null"])[2]
    assert config.ce_weight == 1.0 and config.lr_milestones is None and config.weight_decay == 0.0
    write("row.yaml", extends="cifar100/resnet56-resnet20", losses={"kd": {}})
    shared = {"student_name_or_path": "cifar_resnet20", "losses": {"kd": {}}, "num_train_epochs": 240}
    assert load_recipe("row").items() >= shared.items(), "a file of sections stands for the keys that they share"


def test_a_section_cannot_extend_itself():
    write("pair.yaml", recipes={"a": {"extends": "pair/b"}, "b": {"extends": "other"}})
    write("other.yaml", extends="pair/a")
    with pytest.raises(HfkdError, match="pair/a extends pair/b extends other.yaml extends pair/a: a recipe cannot"):
        load_recipe("pair/a")


@pytest.mark.parametrize(
    "name, message",
    [
        ("cifar100/resnet56-resnet20/kd_zscor", f"no recipe at cifar100/.*/kd_zscor. Did you mean {NAME}"),
        ("recipes/deit_tinny.yaml", "no recipe at recipes/deit_tinny.yaml. Did you mean deit_tiny"),
        ("q", "no recipe at q. `hfkd recipes` lists"),
        ("pair", r"pair.yaml holds several recipes. Name one of them: pair/a, pair/b, pair/none\."),
        ("pair/c", "no recipe at pair/c"),
        ("text/a", "text/a must hold a mapping .* got str"),
        ("list", "recipes in list.yaml must map names to recipes, got .1."),
        ("typo/a", "Unknown key 'lerning_rate' in typo/a. Did you mean 'learning_rate'"),
    ],
)
def test_mistakes(name, message):
    write("pair.yaml", **SHARED, recipes=SECTIONS)
    write("list.yaml", recipes=[1])
    write("text.yaml", recipes={"a": "kd"})
    write("typo.yaml", recipes={"a": {"lerning_rate": 1.0}})
    with pytest.raises(HfkdError, match=message) as raised:
        load_recipe(name)
    assert isinstance(raised.value, NotFoundError) == ("no recipe" in message)


def test_a_reference_is_found_from_its_folder(tmp_path):
    write("mine/pair.yaml", **SHARED, recipes=SECTIONS)
    for name, expected in (("mine/pair/a", "../../mine/pair/a"), (NAME, NAME)):
        reference = find_recipe(name).reference(tmp_path / "runs/search")
        assert reference == expected
        write("runs/search/best.yaml", extends=reference)
        assert load_recipe("runs/search/best.yaml") == load_recipe(name)


def test_no_file_that_ships_is_overlooked():
    """Each is a recipe, holds recipes, or is extended by some."""
    files = {path.relative_to(ROOT / "recipes") for path in (ROOT / "recipes").rglob("*.yaml")}
    parents = {
        "cifar100/base.yaml",
        "cifar100/vit.yaml",
        "cifar100/vit_32px.yaml",
        "imagenet/base.yaml",
        "imagenet/vit.yaml",
        "photographs.yaml",
    }
    used = {find_recipe(name).path.resolve().relative_to(ROOT / "recipes") for name in packaged_names()}
    assert files == used | {*map(Path, parents)} | {path for path in files if path.parent.name == "accelerate"}
    assert os.path.samefile(ROOT / "recipes", ROOT / "hfkd/recipes")
