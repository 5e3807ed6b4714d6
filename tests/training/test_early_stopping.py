"""Early stopping from a recipe: where a run ends, how it is resumed, and what is refused."""

import json
from pathlib import Path

import pytest
import yaml
from helpers import DIGITS_RECIPE, config
from transformers import TrainerControl, TrainerState

from hfkd.commands.train import train_teacher
from hfkd.recipe.reading import parse_recipe
from hfkd.runs.finished import read_run
from hfkd.training.early_stopping import EarlyStopping
from hfkd.training.results import ResultsWriter

RECIPE = DIGITS_RECIPE | {
    "train_split": "train[:32]",
    "num_train_epochs": 6,
    "learning_rate": 0.0,  # nothing ever improves
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "metric_for_best_model": "top1",
    "early_stopping_patience": 2,
    "early_stopping_threshold": 50.0,  # moving BatchNorm statistics change the top-1 a little
    "disable_tqdm": True,
}
RUN = ["r.yaml", "--output_dir", "run"]


def epochs_of(folder):
    return [row["epoch"] for row in json.loads(Path(folder, "results.json").read_text())["epochs"]]


def test_a_run_ends_and_goes_on_counting_when_it_is_resumed(capsys):
    Path("r.yaml").write_text(yaml.safe_dump(RECIPE))
    train_teacher(RUN)
    assert epochs_of("run") == [1, 2, 3] and read_run("run").is_whole
    assert "top1 has not improved for 2 evaluations" in capsys.readouterr().out
    again = train_teacher([*RUN, "--resume_from_checkpoint", "true"])
    assert epochs_of("run") == [1, 2, 3] and again.state.global_step == 6, "it has ended"

    cut = ["r.yaml", "--output_dir", "cut"]
    train_teacher([*cut, "--num_train_epochs", "2"])
    train_teacher([*cut, "--resume_from_checkpoint", "true", "--allow_recipe_change", "true"])
    assert epochs_of("cut") == [1, 2, 3], "one evaluation without improvement was before the cut"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--eval_strategy", "no"], "early_stopping_patience counts evaluations: set eval_strategy"),
        (["--early_stopping_patience", "0"], "early_stopping_patience must be 1 or more, got 0"),
        (["--early_stopping_patience", "null"], "early_stopping_threshold goes with early_stopping_patience"),
    ],
)
def test_refused_before_anything_is_loaded(words, message):
    Path("r.yaml").write_text(yaml.safe_dump(RECIPE))
    with pytest.raises(ValueError, match=message):
        parse_recipe(["r.yaml", *words])


def test_a_metric_that_no_evaluation_gives():
    Path("r.yaml").write_text(yaml.safe_dump(RECIPE | {"metric_for_best_model": "top11"}))
    with pytest.raises(ValueError, match="no evaluation gives 'top11'"):
        train_teacher(RUN)


def test_an_evaluation_without_the_metric_does_not_count(caplog):
    """As of `knn`, which is measured every few epochs."""
    arguments = config(metric_for_best_model="knn", early_stopping_patience=1, eval_strategy="epoch")
    callback = EarlyStopping(arguments, ResultsWriter())
    state, control = TrainerState(best_metric=50.0), TrainerControl()
    callback.on_evaluate(arguments, state, control, {"eval_top1": 10.0})
    assert not control.should_training_stop and not caplog.records
    callback.on_evaluate(arguments, state, control, {"eval_knn": 10.0})
    assert control.should_training_stop
