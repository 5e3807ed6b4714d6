"""Runs are found below folders, each once, and what holds none is said."""

from pathlib import Path

import pytest
from finished import KD_ZSCORE, finished_run

from hfkd.runs.finished import find_runs, read_run, teacher_of


def test_a_run_is_read_back():
    run = read_run(finished_run("runs/a", [60.0, 62.0], seed=3))
    assert (run.name, run.steps, run.is_whole, run.export) == (KD_ZSCORE, 20, True, None)
    assert run.recipe["seed"] == 3 and run.results["best"]["top1"] == 62
    Path("runs/a/student").mkdir()
    Path("runs/a/student/model.safetensors").touch()
    assert run.export == Path("runs/a/student")
    assert not read_run(finished_run("runs/b", [60.0], planned_epochs=2)).is_whole
    assert read_run(finished_run("runs/c", [60.0], recipe=False)).recipe == {}
    with pytest.raises(FileNotFoundError, match="runs holds no results.json: give the folder of a run"):
        read_run("runs")


def test_damaged_and_earlier_files():
    finished_run("cut", [60.0])
    Path("cut/results.json").write_text('{"role": "stu')
    with pytest.raises(ValueError, match="cut/results.json is damaged"):
        read_run("cut")
    Path("cut/results.json").write_text('{"role": "student", "epochs": []}')
    with pytest.raises(ValueError, match="earlier hfkd: it lacks recipe, seed, planned_steps"):
        read_run("cut")
    Path(finished_run("odd", [60.0]), "recipe.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="odd/recipe.yaml is not valid YAML: .*line 1"):
        read_run("odd")


def test_runs_are_found_below_a_folder():
    """A run's checkpoints and export are no runs of their own; a folder that was given twice counts once."""
    finished_run("runs/cifar100/pair/kd", [60.0])
    finished_run("runs/cifar100/pair/kd/student", [60.0])
    finished_run("runs/cifar100/pair/dkd", [61.0])
    Path("runs/cache/pair").mkdir(parents=True)
    Path("runs/started").mkdir()
    Path("runs/started/recipe.yaml").write_text("seed: 1")
    finished_run("runs/unmeasured", [])
    runs, left_out = find_runs(["runs/cache", "runs/cifar100", "runs/cifar100/pair/kd/student", "runs/started", "runs"])
    assert [str(run.folder) for run in runs] == ["runs/cifar100/pair/dkd", "runs/cifar100/pair/kd"]
    assert left_out[0] == "runs/cache holds no run." and left_out[1].startswith("runs/started holds no results.json")
    assert "runs/unmeasured was not evaluated yet." in left_out

    exported, _ = find_runs(["runs/cifar100/pair/kd/student"])
    assert exported[0].folder == Path("runs/cifar100/pair/kd")
    Path("runs/cifar100/pair/kd/results.json").unlink()
    assert find_runs(["runs/cifar100/pair/kd/student"])[0][0].folder == Path("runs/cifar100/pair/kd/student")


def test_errors_name_the_runs_that_there_are():
    with pytest.raises(FileNotFoundError, match="There is no folder runs/kd. Train one with `hfkd distill"):
        find_runs(["runs/kd"])
    finished_run("runs/digits/kd", [60.0])
    Path("runs/cache").mkdir()
    with pytest.raises(FileNotFoundError, match="no folder runs/kd.\nRuns nearby: runs/digits/kd."):
        find_runs(["runs/digits/kd", "runs/kd"])
    message = "There is no run to read:\n  runs/cache holds no run.\nRuns nearby: runs/digits/kd."
    with pytest.raises(FileNotFoundError, match=message):
        find_runs(["runs/cache"])


def test_the_teacher_of_a_recipe():
    one = teacher_of({"teacher_name_or_path": "cifar_resnet56", "teacher_checkpoint": "weights.pth"})
    assert one.members == [("cifar_resnet56", "weights.pth")] and one.class_indices is None
    settings = {
        "teacher_name_or_path": ["runs/a/teacher", "runs/b/teacher"],
        "teacher_checkpoint": None,
        "teacher_class_indices": [1, 0],
        "teacher_prompts": None,
    }
    ensemble = teacher_of(settings)
    assert ensemble.members == [("runs/a/teacher", None), ("runs/b/teacher", None)] and ensemble.settings == settings
    assert teacher_of({}).members == [] and set(teacher_of({}).settings.values()) == {None}
    run = read_run(finished_run("runs/a", [60.0]))
    assert run.teacher.names == ("runs/cifar100/teachers/resnet56/teacher",)
