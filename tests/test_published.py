"""The published numbers are those of the recipes."""

import pytest
from helpers import ROOT

from hfkd.published import published_runs
from hfkd.recipe import load_recipe, recipe_name


def test_every_recipe_with_a_published_value_has_its_row():
    paths = [path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "accelerate"]
    recipes = {recipe_name(path): load_recipe(path) for path in paths}
    values = {name: recipe["published_top1"] for name, recipe in recipes.items() if recipe.get("published_top1")}
    assert {name: row.top1 for name, row in published_runs().items()} == values


def test_the_curves_are_the_published_logs():
    rows = {name: row for name, row in published_runs().items() if row.test_top1}
    assert len(rows) == 59
    for name, row in rows.items():
        assert max(row.test_top1) == pytest.approx(row.best, abs=0.011), name
        epochs = load_recipe(ROOT / "recipes" / f"{name}.yaml").get("num_train_epochs")
        assert len(row.test_top1) == epochs, name
        assert row.temperature == () or len(row.temperature) == epochs
    assert rows["cifar100/resnet56-resnet20/kd_zscore"].best == 71.53
