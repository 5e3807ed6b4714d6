"""`hfkd recipes`: the list, its search and copies."""

from pathlib import Path

import pytest

from hfkd.cli import main
from hfkd.commands.recipes import recipes
from hfkd.recipe.finding import packaged_names
from hfkd.recipe.reading import load_recipe, parse_recipe


def test_the_list_and_its_search(capsys):
    Path("recipes").mkdir()
    Path("recipes/own.yaml").write_text("{dataset_name: digits, student_name_or_path: cifar_resnet8}")
    assert recipes([]) == sorted(["own", *packaged_names()])
    capsys.readouterr()
    assert recipes(["ResNet56-resnet20", "Z-score", "dkd"]) == ["cifar100/resnet56-resnet20/dkd_zscore"]
    *_, row = capsys.readouterr().out.splitlines()
    expected = ["cifar100/resnet56-resnet20/dkd_zscore", "cifar_resnet20", "dkd + Z-score", "72.32"]
    assert [cell.strip() for cell in row.strip("|").split("|")] == expected


def test_a_copy_gives_the_same_run(capsys):
    name = "cifar100/resnet56-resnet20/mlkd_zscore"
    assert recipes(["--copy", name]) == [name]
    assert "hfkd distill mlkd_zscore.yaml" in capsys.readouterr().out
    assert load_recipe("mlkd_zscore.yaml") == load_recipe(name)
    recipes(["--copy", "deit_tiny", "mine.yaml"])
    given = parse_recipe(["deit_tiny", "--output_dir", "runs/mine"])[3]
    assert parse_recipe(["mine"])[3] == given


@pytest.mark.parametrize(
    "argv, message",
    [
        (["resnet56", "nothing"], "No recipe has 'resnet56' and 'nothing' in its row"),
        (["--copy", "deit_tinny"], "Did you mean deit_tiny"),
        (["--copy", "deit_tiny", "there.yaml"], "there.yaml exists. Give another file"),
        (["--copy", "deit_tiny", "no/such/folder.yaml"], "cannot be written .No such file"),
        (["--copy", "deit_tiny", "a.yaml", "b.yaml"], "--copy takes the name of one recipe and one file"),
        (["--coppy", "deit_tiny"], "'coppy' in the command line. Did you mean 'copy'"),
    ],
)
def test_mistakes(argv, message, capsys):
    Path("there.yaml").touch()
    with pytest.raises(SystemExit) as ending:
        main(["recipes", *argv])
    error = capsys.readouterr().err
    assert ending.value.code == 2 and message.replace(".No", "(No") in error and not Path("there.yaml").read_text()
