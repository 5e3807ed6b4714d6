"""`hfkd search`: what it leaves behind, what it starts from, and what it refuses."""

import csv
import importlib.util
import json
import os
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from interrupting import differences, end_of

from hfkd import load_student
from hfkd.cli import main
from hfkd.commands.search import build_search_trainer, search
from hfkd.commands.train import distill
from hfkd.recipe.config import DistillationConfig
from hfkd.recipe.finding import find_recipe
from hfkd.recipe.reading import load_recipe, parse_recipe
from hfkd.search import study as search_study
from hfkd.search.figure import search_figure
from hfkd.search.results import SearchedTrial, best_of, best_recipe, standard_error
from hfkd.search.space import Parameter

BASE = {
    "dataset_name": "digits",
    "random_flip": False,
    "train_split": "train[:96]",
    "eval_split": "test[:50]",
    "num_train_epochs": 1,
    "per_device_train_batch_size": 32,
    "optim": "sgd",
    "learning_rate": 0.05,
    "disable_tqdm": True,
}
OWN = {
    "extends": "base.yaml",
    "student_name_or_path": "cifar_resnet8",
    "teacher_name_or_path": "teacher",
    "ce_weight": 0.1,
    "losses": {"kd": {"temperature": 2.0, "weight": 9.0}},
    "published_top1": 71.43,
    "search": {
        "losses.kd.temperature": {"low": 1, "high": 8, "log": True},
        "learning_rate": {"choices": [0.025, 0.05, 0.1]},
    },
}
PATH, FOLDER = Path("recipes/digits/run.yaml"), Path("runs/search/digits/run")
SPACE = [Parameter("losses.kd.temperature", 2.0, 1.0, 8.0, True), Parameter("learning_rate", 0.05, choices=(0.05, 0.1))]


@pytest.fixture
def recipe():
    """A recipe over its parent, and the (untrained) teacher that it names."""
    torch.manual_seed(1)
    load_student("cifar_resnet14", num_classes=10).save_pretrained("teacher")
    PATH.parent.mkdir(parents=True)
    (PATH.parent / "base.yaml").write_text(yaml.safe_dump(BASE))
    PATH.write_text(yaml.safe_dump(OWN))
    return str(PATH)


def trial(number, temperature, top1, pruned=False, is_recipe=False, rate=0.05):
    values = {"losses.kd.temperature": temperature, "learning_rate": rate}
    return SearchedTrial(number, values, top1, 4 if pruned else 8, pruned, is_recipe, 1.5)


TRIALS = [trial(0, 2.0, 50.0, is_recipe=True), trial(1, 3.0, 60.0, rate=0.1), trial(2, 7.0, 70.0, pruned=True)]


def test_what_a_search_leaves(recipe, capsys, monkeypatch):
    """And that the same command does nothing more, one for other trials is refused, and the best one trains."""
    argv = [recipe, "--n_trials", "3", "--weight_decay", "0.001", "--hub_token", "secret"]
    trials = search(argv)
    shown = capsys.readouterr().out
    left = sorted(path.name for path in FOLDER.iterdir())
    assert left == ["best.yaml", "search.png", "search.yaml", "study.db", "study.lock", "trials.csv", "trials.md"]
    best = best_of(trials)
    assert len(trials) == 3 and trials[0].values == {"losses.kd.temperature": 2.0, "learning_rate": 0.05}
    assert f"| the best (trial {best.number})" in shown and "| the recipe's own" in shown
    assert "Top-1 in percent of 10 training images that were held out; the standard error" in shown
    with open(FOLDER / "trials.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["top1"]) for row in rows] == [each.top1 for each in trials]
    assert [row["recipes_own"] for row in rows] == ["True", "False", "False"]
    assert all(row["step"] == "3" for row in rows)  # 86 images in batches of 32
    kept = list(Path(datasets.config.HF_DATASETS_CACHE).rglob("hfkd_teacher_outputs/*/epoch-*/*.safetensors"))
    assert len(kept) == 1 and shown.count("\ncache     ") == 1, "of one epoch, which the other trials read"

    found = load_recipe(FOLDER / "best.yaml")
    assert found["losses"] == {"kd": {"temperature": best.values["losses.kd.temperature"], "weight": 9.0}}
    assert found["learning_rate"] == best.values["learning_rate"] and found["weight_decay"] == 0.001
    assert found["published_top1"] is None and found["train_split"] == "train[:96]" and found["search"] is None
    header = (FOLDER / "best.yaml").read_text()
    assert (
        f"hfkd search {recipe} --n_trials 3" in header and "secret" not in header + (FOLDER / "search.yaml").read_text()
    )

    monkeypatch.setattr(search_study, "_run_trial", None)
    assert search(argv) == trials
    with pytest.raises(ValueError, match="another search(.|\n)*weight_decay: 0.001 there, 0.0 here(.|\n)*--search_dir"):
        search([recipe])
    with pytest.raises(ValueError, match="another search(.|\n)*held_out: 0.1 there, 0.2 here"):
        search([*argv, "--held_out", "0.2"])
    trained = distill([str(FOLDER / "best.yaml"), "--dataset_name", "digits"])
    assert trained.args.learning_rate == found["learning_rate"]
    assert (FOLDER / "best" / "student" / "model.safetensors").is_file()


def test_the_recipes_trial_is_the_recipes_run(recipe, monkeypatch):
    """To the bit, where no image is held out; `distill` takes no notice of the section."""
    trainers = []
    monkeypatch.setattr(
        "hfkd.commands.search.build_search_trainer",
        lambda *given: trainers.append(build_search_trainer(*given)) or trainers[0],
    )
    settings = ["--lr_milestones", "0.5", "--logging_strategy", "epoch"]
    trials = search([recipe, "--n_trials", "1", "--held_out", "0", *settings])
    trained = distill([recipe, "--eval_strategy", "epoch", "--save_strategy", "no", *settings])
    assert differences(end_of(trained), end_of(trainers[0])) == []
    assert trials[0].top1 == trained.results.rows[-1]["eval_top1"]
    resolved = yaml.safe_load(Path("runs/digits/run/recipe.yaml").read_text())
    assert "search" not in resolved and not hasattr(trained.args, "search")


def test_held_out_images_are_not_trained_on(recipe):
    *arguments, _ = parse_recipe([recipe])
    trainer = build_search_trainer(*arguments, held_out=0.25)
    kept, chosen = trainer.train_dataset, trainer.eval_dataset
    assert len(kept) == 72 and len(chosen) == 24 and not set(kept.indices) & set(chosen.indices)
    assert set(chosen.indices) != set(range(72, 96))  # splits may be sorted by class
    assert kept.dataset.augmented and not chosen.dataset.augmented
    assert torch.equal(kept.dataset.labels, chosen.dataset.labels)
    whole = build_search_trainer(*arguments, held_out=0.0)
    assert len(whole.train_dataset) == 96 and len(whole.eval_dataset) == 50
    with pytest.raises(ValueError, match="held_out 0.001 of 96 training images leaves none to hold out"):
        build_search_trainer(*arguments, held_out=0.001)


def test_the_best_recipe_extends_what_may_be_extended(recipe, tmp_path):
    folder = Path("runs/elsewhere")
    folder.mkdir(parents=True)
    given = {"num_train_epochs": 2, "student_name_or_path": "cifar_resnet14", "train_split": "train[:5%]"}
    for path in (PATH, PATH.with_name("whole.yaml")):
        if path != PATH:
            path.write_text(yaml.safe_dump(load_recipe(PATH)))
        best = best_recipe(find_recipe(path), folder, given, OWN["losses"] | {"pkt": {}}, TRIALS[1])
        assert best["extends"] == f"../../recipes/digits/{path.name}" and not Path(best["extends"]).is_absolute()
        (folder / "best.yaml").write_text(yaml.safe_dump(best))
        model_args, data_args, config, _ = parse_recipe([str(folder / "best.yaml")])
        assert config.losses == {"kd": {"temperature": 3.0, "weight": 9.0}, "pkt": {}} and config.learning_rate == 0.1
        assert model_args.student_name_or_path == "cifar_resnet14" and config.ce_weight == 0.1
        assert data_args.train_split == "train[:96]" and config.num_train_epochs == 1 and config.published_top1 is None


def test_the_best_was_trained_to_the_end():
    assert best_of(TRIALS) is TRIALS[1]
    assert standard_error(50.0, 2500) == pytest.approx(1.0)


def test_the_figure_shows_every_trial():
    figure = search_figure(TRIALS, SPACE)
    panels = figure.axes
    assert [axes.get_xlabel() for axes in panels] == ["losses.kd.temperature", "learning_rate", "trial"]
    points = {kind.get_label(): kind.get_offsets().tolist() for kind in panels[0].collections}
    assert points == {"the recipe's own values": [[2, 50]], "the best": [[3, 60]], "stopped early": [[7, 70]]}
    assert [label.get_text() for label in panels[1].get_xticklabels()] == ["0.05", "0.1"]
    chosen = {kind.get_label(): kind.get_offsets().tolist() for kind in panels[1].collections}
    assert chosen == {"the recipe's own values": [[0, 50]], "the best": [[1, 60]], "stopped early": [[0, 70]]}
    assert panels[2].lines[0].get_ydata().tolist() == [50, 60, 60]  # what was stopped is no best
    (legend,) = figure.legends
    shown = {text.get_text() for text in legend.get_texts()}
    assert shown == {"the recipe's own values", "the best", "stopped early", "best so far"}


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--n_trials", "0"], "n_trials must be 1 or more, got 0"),
        (["--held_out", "1"], "held_out is a share, 0 or above and below 1, got 1.0"),
        (["--output_dir=here"], "output_dir is the folder of a run.*--search_dir"),
        (["--n_trails", "3"], "Unknown key 'n_trails'"),
        (["--streaming", "true", "--augmentation", "random_resized_crop"], "No images of a stream can be held out"),
        (
            ["--teacher_cache", "cache"],
            "temperature is searched, and the teacher cache cache holds the largest 4 logits",
        ),
    ],
)
def test_what_cannot_go_with_a_search(recipe, argv, message, monkeypatch):
    Path("cache").mkdir()
    Path("cache/cache.json").write_text(json.dumps({"row": {"top_k": 4}}))
    monkeypatch.setattr("hfkd.commands.search.build_search_trainer", None)  # nothing is loaded
    with pytest.raises(ValueError, match=message):
        search([recipe, *argv])


def test_several_processes_a_trial(recipe, monkeypatch):
    monkeypatch.setattr(DistillationConfig, "world_size", 2)
    with pytest.raises(
        ValueError, match="trained by one process, and 2 were started.*CUDA_VISIBLE_DEVICES=0 hfkd search"
    ):
        search([recipe])


def test_without_optuna(recipe, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "optuna" else found(name, *rest)
    )
    with pytest.raises(SystemExit):
        main(["search", recipe])
    assert 'needs optuna, which is not installed: pip install "hfkd[search]"' in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as ending:
        main(["search", "--help"])
    shown = capsys.readouterr().out
    assert ending.value.code == 0 and shown.startswith("usage: hfkd search RECIPE [--n_trials N]")
    assert "--n_trials" in shown and "--ce_weight" in shown and not os.listdir()
