"""The published numbers and settings are those of the recipes; what departs from them is named."""

from pathlib import Path

import pytest
from finished import RECIPE
from helpers import RESULTS

from hfkd.recipe.finding import packaged_names
from hfkd.recipe.reading import load_recipe
from hfkd.runs.published import COMPARED_KEYS, departures, published_runs


def test_every_recipe_with_a_published_value_has_its_row():
    recipes = {name: load_recipe(name) for name in packaged_names()}
    values = {name: recipe["published_top1"] for name, recipe in recipes.items() if recipe.get("published_top1")}
    assert {name: row.top1 for name, row in published_runs().items()} == values


def test_the_curves_are_the_published_logs():
    rows = {name: row for name, row in published_runs().items() if row.test_top1}
    assert len(rows) == 59
    for name, row in rows.items():
        assert max(row.test_top1) == pytest.approx(row.best, abs=0.011), name
        epochs = load_recipe(name).get("num_train_epochs")
        assert len(row.test_top1) == epochs, name
        assert row.temperature == () or len(row.temperature) == epochs
    assert rows["cifar100/resnet56-resnet20/kd_zscore"].best == 71.53


def architecture(teacher):
    """Of the teacher that a recipe names; a Hub id as it is."""
    if teacher is None or not teacher.startswith("runs/"):
        return teacher
    return load_recipe(str(Path(teacher).parent.relative_to("runs")))["student_name_or_path"]


def test_the_settings_are_those_of_the_recipes():
    for name, row in published_runs().items():
        recipe = load_recipe(name)
        expected = {key: value for key, value in recipe.items() if key in COMPARED_KEYS}
        expected |= {key: recipe[key] for key in ("dataset_name", "per_device_train_batch_size")}
        expected["eval_split"] = recipe.get("eval_split", "test")
        expected["teacher"] = architecture(recipe.get("teacher_name_or_path"))
        assert row.settings == expected, name


@pytest.mark.parametrize(
    "recipe, results, expected",
    [
        ({}, {}, []),
        ({"seed": 3, "bf16": False, "save_strategy": "no", "ce_weight": 0.1, "max_grad_norm": 0.0}, {}, []),
        ({"per_device_train_batch_size": 16}, {"devices": "4 x cuda"}, []),
        ({"per_device_train_batch_size": 16, "gradient_accumulation_steps": 4}, {}, []),
        ({"num_train_epochs": 10.0}, {}, ["10 of 240 epochs"]),
        ({"max_steps": 100}, {}, ["100 steps in place of 240 epochs"]),
        (
            {"num_train_epochs": 0.5, "lr_milestones": [6.25, 7.5]},
            {},
            ["0.5 of 240 epochs", "other lr_milestones"],
        ),
        ({"losses": {"kd": {"temperature": 4.0, "weight": 9.0}}}, {}, ["other losses.kd.temperature"]),
        ({"losses": {"kd": {"temperature": 2.0, "weight": 9.0}, "pkt": {}}}, {}, ["other losses.pkt"]),
        ({"logit_standardization": False}, {}, ["other logit_standardization"]),
        ({"mixup": 0.8}, {"teacher": "cifar_resnet110"}, ["other mixup, teacher"]),
        ({}, {"devices": "4 x cuda"}, ["other batch size"]),
        ({}, {"dataset": RESULTS["dataset"] | {"eval_split": "test[:10%]"}}, ["other images"]),
        ({}, {"dataset": RESULTS["dataset"] | {"train_images": 500}}, ["other images"]),
        ({}, {"dataset": RESULTS["dataset"] | {"classes": 20}}, ["other images"]),
        ({}, {"dataset": None}, ["other images"]),
    ],
)
def test_departures_are_named(recipe, results, expected):
    run = RESULTS | {"devices": "1 x cuda"} | results
    assert departures(RECIPE | recipe, run, published_runs()["cifar100/resnet56-resnet20/kd_zscore"]) == expected
