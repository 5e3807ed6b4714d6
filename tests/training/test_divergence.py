"""A run whose numbers are no longer finite: told of, stopped, exported nowhere, and never the best."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from helpers import Plain, config, images
from safetensors.torch import load_file
from transformers import TrainerCallback

from hfkd import DistillationTrainer
from hfkd.cli import main
from hfkd.comparison.rows import compared
from hfkd.errors import HfkdError, RunError
from hfkd.runs.finished import read_run
from hfkd.training.divergence import last_finite_checkpoint

RECIPE = {
    "student_name_or_path": "cifar_resnet8",
    "dataset_name": "digits",
    "random_flip": False,
    "train_split": "train[:32]",
    "eval_split": "test[:20]",
    "num_train_epochs": 4,
    "per_device_train_batch_size": 16,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "eval_strategy": "epoch",
    "logging_strategy": "epoch",
    "save_strategy": "epoch",
    "disable_tqdm": True,
    "output_dir": "run",
}


def strict(path):
    """Content of a file that any JSON parser reads: Python's takes NaN as well."""

    def refuse(constant):
        raise AssertionError(f"{path} holds {constant}")

    return json.loads(Path(path).read_text(), parse_constant=refuse)


class At(TrainerCallback):
    """Makes a weight NaN, or the logits infinite, after a step."""

    def __init__(self, step, value=math.nan):
        self.step, self.value = step, value

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                model.fc.weight[0, 0] = self.value


def build(step=None, value=math.nan, epochs=3, **changes):
    """Three steps an epoch; a weight is `value` from a step on."""
    torch.manual_seed(0)
    settings = {"num_train_epochs": epochs, "eval_strategy": "epoch", "logging_strategy": "epoch"}
    args = config(**(settings | {"save_strategy": "epoch"} | changes))
    data = {"train_dataset": images(24), "eval_dataset": images(10, seed=1, augment=False)}
    return DistillationTrainer(Plain(), None, args, callbacks=[At(step, value)] if step else [], **data)


def test_the_command(capsys, caplog):
    """What a far too high learning rate comes to, and what others make of its folder."""
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    with pytest.raises(SystemExit) as end:
        main(["distill", "recipe.yaml", "--learning_rate", "1e8", "--load_best_model_at_end", "true"])
    told = capsys.readouterr()
    assert end.value.code == 1 and "at its best" not in told.out
    assert (
        told.err.count("hfkd distill: error: The run has diverged: ") == 1 and "learning_rate (it is 1e+08)" in told.err
    )
    assert "The run has diverged" in caplog.text
    results = strict("run/results.json")
    assert results["diverged"]["step"] == 2 and results["epochs"] == [] and "best" not in results
    assert sorted(path.name for path in Path("run").iterdir()) == [".hfkd.lock", "recipe.yaml", "results.json"]
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"num_train_epochs": 1, "output_dir": "good"}))
    main(["distill", "recipe.yaml"])
    capsys.readouterr()
    main(["compare", "good", "run"])
    assert "run diverged at step 2, before its first evaluation." in capsys.readouterr().out


def test_it_ends_after_the_epoch_and_names_the_last_finite_checkpoint(caplog):
    trainer = build(step=4, load_best_model_at_end=True, save_total_limit=1)
    with pytest.raises(
        RunError, match=r"loss_ce is nan at step 6 \(epoch 2\).*finite weights is run/checkpoint-3\."
    ) as error:
        trainer.train()
    assert error.value.exit_code == 1 and trainer.state.global_step == 6
    assert [path.name for path in Path("run").glob("checkpoint-*")] == ["checkpoint-3"]
    assert [row["step"] for row in trainer.results.rows] == [3], "nothing was measured of what diverged"
    assert trainer.state.best_global_step == 3
    results = strict("run/results.json")
    assert "ends with this epoch" in caplog.text and caplog.text.count("has diverged") == 1
    assert results["diverged"] == {"step": 6, "epoch": 2.0, "reason": "loss_ce is nan"}
    assert results["best"]["step"] == results["last"]["step"] == 3
    assert compared([read_run("run")])[0].label == "run (diverged at step 6)"
    trainer.save_state()
    losses = [entry["loss"] for entry in strict("run/trainer_state.json")["log_history"] if "loss" in entry]
    assert len(losses) == 2 and losses[1] is None
    with pytest.raises(RunError, match="Nothing is exported"):
        build(step=6, load_best_model_at_end=True).train()  # the last step before an evaluation, in no loss


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_have_no_accuracy(value, caplog):
    trainer = build()
    with torch.no_grad():
        trainer.model.fc.bias[0] = value  # argmax, and so a top-1 of 10 %, is the same for all images
    metrics = trainer.evaluate()
    assert all(math.isnan(metrics[f"eval_{name}"]) for name in ("loss", "top1", "top5"))
    assert "the logits of an evaluation are not finite" in caplog.text and trainer.results.rows == []
    assert math.isnan(trainer.predict(trainer.eval_dataset).metrics["test_top1"])
    with pytest.raises(RunError, match="Nothing is exported"):
        trainer.export()
    assert not Path("run/student").exists()


def test_one_key_goes_on():
    trainer = build(step=4, stop_when_diverged=False, save_strategy="steps", save_steps=5)
    trainer.train()
    assert trainer.state.global_step == 9 and [row["step"] for row in trainer.results.rows] == [3]
    assert strict("run/checkpoint-5/unlogged.json")["sums"][0][0] is None, "NaN is no JSON"
    strict("run/checkpoint-5/trainer_state.json")
    with pytest.raises(RunError, match="No checkpoint has finite weights"):
        trainer.export()
    build(stop_when_diverged=False, save_strategy="no").train(resume_from_checkpoint="run/checkpoint-5")


def test_a_run_that_went_on_exports_its_best():
    trainer = build(step=4, stop_when_diverged=False, load_best_model_at_end=True)
    trainer.train()
    folder = trainer.export()
    assert all(value.isfinite().all() for value in load_file(folder / "model.safetensors").values())
    assert strict(folder / "results.json")["best"]["step"] == 3
    assert "The run diverged at step 6 (loss_ce is nan)" in (folder / "README.md").read_text()


def test_a_step_at_which_no_checkpoint_is_written():
    """Between two logs only the weights tell."""
    trainer = build(step=4, save_strategy="steps", save_steps=2)
    with pytest.raises(RunError, match="the weights are not finite at step 4 .*run/checkpoint-2"):
        trainer.train()
    assert last_finite_checkpoint("run") == Path("run/checkpoint-2")
    assert all(value.isfinite().all() for value in load_file("run/checkpoint-2/model.safetensors").values())


@pytest.mark.parametrize("metric, greater", [("top1", True), ("loss", False)])
def test_what_diverged_first_does_not_win_later(metric, greater):
    trainer = build(metric_for_best_model=metric, greater_is_better=greater)
    trainer.divergence.logits_are_finite = False
    assert not trainer._determine_best_metric({f"eval_{metric}": math.nan}, None) and trainer.state.best_metric is None
    trainer.divergence.logits_are_finite = True
    infinite = {f"eval_{metric}": -math.inf if greater else math.inf}
    assert not trainer._determine_best_metric(infinite, None) and trainer.state.best_metric is None
    assert trainer._determine_best_metric({f"eval_{metric}": 3.0}, None) and trainer.state.best_metric == 3.0


def test_a_teacher_that_diverged_is_refused():
    teacher = Plain()
    with torch.no_grad():
        teacher.fc.weight[0, 0] = math.nan
    with pytest.raises(HfkdError, match="logits of the teacher Plain .* are NaN") as error:
        DistillationTrainer(Plain(), teacher, config(losses={"kd": {}}), train_dataset=images(8))
    assert error.value.exit_code == 2
