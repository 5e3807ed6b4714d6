"""From which checkpoint a run goes on, and with which settings."""

import functools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from interrupting import build, differences, end_of, flip_a_bit

import hfkd.data.datasets
from hfkd import load_student
from hfkd.commands.train import distill
from hfkd.runs.checkpoints import checkpoints, defect, write_manifest

EACH_STEP = {
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "logging_strategy": "steps",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a checkpoint of each of its six steps, and what it came to."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        trainer = build("run", **EACH_STEP)
        trainer.train()
    return folder / "run", end_of(trainer)


@pytest.fixture
def copy(run):
    """A copy of it, in the working directory."""
    shutil.copytree(run[0], "run")
    return run[1]


def names(folders):
    return [folder.name for folder in folders]


def resumed(checkpoint=True, output_dir="run", **changes):
    trainer = build(output_dir, **(EACH_STEP | changes))
    trainer.train(resume_from_checkpoint=checkpoint)
    return end_of(trainer)


def test_a_damaged_last_checkpoint(copy, caplog):
    """The one before it is taken: of the last three, one lacks its manifest, one has a flipped bit, one is cut off."""
    os.remove("run/checkpoint-6/checkpoint.json")
    flip_a_bit(Path("run/checkpoint-5/optimizer.pt"))
    os.truncate("run/checkpoint-4/model.safetensors", 99)
    assert differences(copy, resumed()) == []
    for step, found in ((6, "checkpoint.json is missing"), (5, "optimizer.pt is damaged"), (4, "has 99 bytes instead")):
        assert any(f"checkpoint-{step} is left out" in line and found in line for line in caplog.messages)
    assert [defect(folder) for folder in checkpoints("run")] == [None] * 6  # they have been written anew


def test_a_named_damaged_checkpoint(copy):
    flip_a_bit(Path("run/checkpoint-4/scheduler.pt"))
    with pytest.raises(ValueError, match="checkpoint-4 cannot be resumed from: scheduler.pt is damaged.*true takes"):
        resumed("run/checkpoint-4")
    with pytest.raises(ValueError, match="run/checkpoint-7 cannot be resumed from: there is no such folder"):
        resumed("run/checkpoint-7")
    assert len(checkpoints("run")) == 6  # nothing is set aside by what fails


def test_none_is_whole(copy):
    for folder in checkpoints("run"):
        os.remove(folder / "checkpoint.json")
    with pytest.raises(ValueError, match="no whole checkpoint in run"):
        resumed()


@pytest.mark.parametrize(
    "form", ["run/checkpoint-4", "run/checkpoint-4/", "./run/../run/checkpoint-4", "absolute", "symlink", "path"]
)
def test_the_forms_of_a_name(copy, form):
    Path("latest").symlink_to(Path("run/checkpoint-4").absolute())
    forms = {"absolute": os.path.abspath("run/checkpoint-4"), "symlink": "latest", "path": Path("run/checkpoint-4")}
    assert differences(copy, resumed(forms.get(form, form))) == []
    left = sorted(path.name for path in Path("run").glob("*checkpoint-*"))
    assert left == [f"checkpoint-{step}" for step in range(1, 7)] + [f"superseded-checkpoint-{s}" for s in (5, 6)]


def test_one_that_was_set_aside(copy):
    """As long as its name says so, nothing finds it; by its name it can be gone on from."""
    resumed("run/checkpoint-2")
    shutil.rmtree("run/checkpoint-6")
    assert differences(copy, resumed("run/superseded-checkpoint-5")) == []


def test_into_another_folder(copy, run):
    assert differences(copy["student and losses"], resumed("run/checkpoint-4", "other")["student and losses"]) == []
    assert names(checkpoints("run")) == [f"checkpoint-{step}" for step in range(1, 7)]
    assert names(checkpoints("other")) == ["checkpoint-5", "checkpoint-6"]


def test_where_the_folder_has_moved(copy):
    """The state of a checkpoint names the best one by its former path."""
    os.rename("run", "moved")
    changes = {"load_best_model_at_end": True, "save_total_limit": 1}
    for checkpoint in (True, "moved/checkpoint-5"):
        given = resumed(checkpoint, "moved", **changes)
        assert given["best"] == copy["best"]
    assert f"checkpoint-{copy['best'][1]}" in names(checkpoints("moved"))


@pytest.mark.parametrize("damage", ["damaged", "gone"])
def test_the_best_checkpoint_is(damage, copy):
    """Where the last has been exported as the best one, nobody would know."""
    best = Path(json.loads(Path("run/checkpoint-6/trainer_state.json").read_text())["best_model_checkpoint"]).name
    assert best != "checkpoint-6"
    shutil.rmtree(f"run/{best}") if damage == "gone" else flip_a_bit(Path("run", best, "model.safetensors"))
    with pytest.raises(RuntimeError, match=f"run/{best}: .*--resume_from_checkpoint true --load_best_model_at_end fal"):
        resumed(load_best_model_at_end=True)
    assert differences(copy["student and losses"], resumed()["student and losses"]) == []


def test_checkpoints_of_the_model_alone():
    build("run", save_only_model=True, **EACH_STEP).train()
    with pytest.raises(ValueError, match="with save_only_model it holds the model alone"):
        resumed(save_only_model=True)


def test_another_number_of_processes(copy, caplog):
    os.rename("run/checkpoint-4/rng_state.pth", "run/checkpoint-4/rng_state_0.pth")
    shutil.copy("run/checkpoint-4/rng_state_0.pth", "run/checkpoint-4/rng_state_1.pth")
    os.remove("run/checkpoint-4/checkpoint.json")
    write_manifest("run/checkpoint-4")
    resumed("run/checkpoint-4")
    assert "checkpoint-4 was written by 2 processes, and this run has 1" in caplog.text


def test_another_batch_size(copy):
    """Half the steps an epoch: Trainer would take the run for done."""
    twice = {"per_device_train_batch_size": 16, "allow_recipe_change": True}
    message = (
        "checkpoint-4 was written with 8 images a batch, and this run has 16. .* Keep the 8 images a batch by "
        "--per_device_train_batch_size 8.$"
    )
    with pytest.raises(ValueError, match=message):
        resumed("run/checkpoint-4", **twice)


# ---- Other settings than the checkpoint's ----------------------------------------------------------------------------


def test_other_settings_take_effect(copy):
    """Of the optimizer and of the schedule, which Trainer takes from the checkpoint."""
    assert differences(copy, resumed("run/checkpoint-3", allow_recipe_change=True)) == []
    new = {"learning_rate": 0.01, "optim_args": "momentum=0.5", "weight_decay": 0.1, "lr_scheduler_type": "linear"}
    given = resumed("run/checkpoint-3", allow_recipe_change=True, **new)
    assert [entry["learning_rate"] for entry in given["log"] if "learning_rate" in entry and entry["step"] > 3] == [
        pytest.approx(0.01 * left / 6) for left in (3, 2, 1)
    ]
    groups = given["optimizer"]["param_groups"]
    assert {group["momentum"] for group in groups} == {0.5} and 0.1 in {group["weight_decay"] for group in groups}
    untouched = resumed("run/checkpoint-3", **new)["optimizer"]["param_groups"]
    assert {group["momentum"] for group in untouched} == {0.9}


def test_other_milestones_take_effect(copy):
    build("steps", lr_milestones=[1], **EACH_STEP).train()
    given = resumed("steps/checkpoint-2", "steps", lr_milestones=[1.5], lr_gamma=0.5, allow_recipe_change=True)
    rates = [entry["learning_rate"] for entry in given["log"] if "learning_rate" in entry]
    assert rates == [0.05] * 4 + [pytest.approx(0.025)] * 2


@pytest.mark.parametrize(
    "changes", [{"losses": {"kd": {}}}, {"losses": {"ctkd": {"instance_wise": True}}}, {"ema_decay": 0.9}]
)
def test_what_a_checkpoint_cannot_be_loaded_into(copy, changes):
    with pytest.raises(ValueError, match="checkpoint-6 cannot be loaded into this run.*losses, optimizer or ema_decay"):
        resumed(allow_recipe_change=True, **changes)
    assert torch.is_grad_enabled()


# ---- Another recipe ------------------------------------------------------------------------------------------------

RECIPE = {
    "student_name_or_path": "cifar_resnet8",
    "teacher_name_or_path": "teacher",
    "losses": {"kd": {}},
    "dataset_name": "digits",
    "random_flip": False,
    "train_split": "train[:16]",
    "eval_split": "test[:10]",
    "num_train_epochs": 2,
    "per_device_train_batch_size": 8,
    "optim": "sgd",
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "eval_strategy": "epoch",
    "logging_strategy": "epoch",
    "save_strategy": "epoch",
    "disable_tqdm": True,
    "report_to": "none",
}


@pytest.fixture
def half(monkeypatch):
    """The folder `half` of a run of this recipe that was killed in its second epoch."""
    monkeypatch.setattr(hfkd.data.datasets, "_digits", functools.cache(hfkd.data.datasets._digits))  # seconds each time
    monkeypatch.setattr("hfkd.training.exports.write_card", lambda *args, **kwargs: None)
    torch.manual_seed(1)
    load_student("cifar_resnet8", num_classes=10).save_pretrained("teacher")
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    distill(["recipe.yaml", "--output_dir", "half"])
    shutil.rmtree("half/checkpoint-4")
    shutil.rmtree("half/student")


def distilled(*overrides, resume="true", output_dir="half"):
    distill(["recipe.yaml", "--output_dir", output_dir, "--resume_from_checkpoint", resume, *overrides])
    return json.loads(Path(output_dir, "results.json").read_text())["epochs"]


def test_another_recipe_is_refused_or_allowed(half, caplog):
    before = Path("half/recipe.yaml").read_text()
    refusal = "(?s)another recipe.*learning_rate: 0.05 there, 0.01 here.*_recipe_change true"
    with pytest.raises(ValueError, match=refusal):
        distilled("--learning_rate", "0.01", "--ce_weight", "1")
    with pytest.raises(ValueError, match="(?s)losses: {'kd': {}} there, {'kd': {'temperature': 2.0}} here"):
        distilled("--losses.kd.temperature", "2.0")
    assert Path("half/recipe.yaml").read_text() == before and names(checkpoints("half")) == ["checkpoint-2"]

    rows = distilled("--learning_rate", "0.01", "--allow_recipe_change", "true")
    assert [row["learning_rate"] for row in rows] == [0.05, 0.01]
    assert "learning_rate: 0.05 there, 0.01 here" in caplog.text
    assert "resumes from half/checkpoint-2 with the recipe given here" in caplog.text
    assert yaml.safe_load(Path("half/recipe.yaml").read_text())["learning_rate"] == 0.01
    distilled("--learning_rate", "0.01")  # now it is this run's


def test_keys_without_effect_may_differ(half, caplog):
    changed = "--run_name other --disable_tqdm false --per_device_eval_batch_size 5 --hub_revision x"
    distilled(*changed.split())
    assert "another recipe" not in caplog.text


def test_a_checkpoint_of_another_folder_has_that_folders_recipe(half):
    named = {"resume": "half/checkpoint-2", "output_dir": "other"}
    with pytest.raises(ValueError, match="(?s)half holds the run of another recipe.*learning_rate: 0.05 there, 0.01"):
        distilled("--learning_rate", "0.01", **named)
    assert not Path("other").exists()
    assert distilled(**named)[-1]["step"] == 4
    assert Path("other/student/model.safetensors").is_file() and not Path("half/student").exists()


def test_a_run_without_a_whole_checkpoint_starts_again(half, caplog):
    expected = distilled(output_dir="whole")
    flip_a_bit(Path("half/checkpoint-2/model.safetensors"))
    rows = distilled()
    assert "half/checkpoint-2 is left out: model.safetensors is damaged" in caplog.text
    times = {"seconds": 0, "images_per_second": 0}
    assert [row | times for row in rows] == [row | times for row in expected]
    assert [defect(folder) for folder in checkpoints("half")] == [None, None]
