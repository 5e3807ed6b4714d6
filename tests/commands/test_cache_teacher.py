"""`hfkd cache-teacher`: what it writes, alone, in several processes and after it was ended; what it refuses."""

import functools
import itertools
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from interrupting import end, in_child, in_two_processes, start

import hfkd.teacher_cache.files
from hfkd import load_student
from hfkd.cli import main
from hfkd.commands.cache_teacher import cache_teacher
from hfkd.commands.train import distill, train_teacher

RECIPE = {
    "student_name_or_path": "cifar_resnet8",
    "teacher_name_or_path": "teacher",
    "dataset_name": "digits",
    "random_flip": False,
    "train_split": "train[:64]",
    "eval_split": "test[:20]",
    "losses": {"kd": {"temperature": 4.0}},
    "num_train_epochs": 2,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 16,
    "optim": "sgd",
    "learning_rate": 0.05,
    "eval_strategy": "epoch",
    "logging_strategy": "epoch",
    "save_strategy": "no",
    "disable_tqdm": True,
}


def save_teacher(seed=1):
    torch.manual_seed(seed)
    load_student("cifar_resnet14", num_classes=10).save_pretrained("teacher")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Four an epoch."""
    monkeypatch.setattr("hfkd.teacher_cache.writing.ROWS_A_SHARD", 18)


@pytest.fixture
def recipe():
    save_teacher()
    return written()


def written(**changes):
    path = Path("recipes/digits/kd.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(RECIPE | changes))
    return str(path)


def files_of(folder):
    """All but `cache.json`, which is written first."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file() and path.suffix != ".json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def results_of(folder):
    return json.loads(Path(folder, "results.json").read_text())


def test_from_a_recipe_to_a_student(recipe, capsys):
    main(["cache-teacher", recipe, "--disable_tqdm", "false"])
    size, *progress, end = capsys.readouterr().out.splitlines()
    assert size == "runs/cache/digits/kd will take 0.0 MiB."
    assert [line.rpartition(" sees ")[2] for line in progress] == [
        "20 evaluation images.",
        "128 images of 2 epochs.",
    ]
    assert end == "runs/cache/digits/kd holds 2 epochs of 64 images (0.0 MiB)."
    assert len(list(Path("runs/cache/digits/kd").rglob("shard-*.bin"))) == 8
    distill([recipe, "--output_dir", "live"])
    distill([recipe, "--output_dir", "replayed", "--teacher_cache", "runs/cache/digits/kd"])
    shutil.rmtree("teacher")
    distill([recipe, "--output_dir", "alone", "--teacher_cache", "runs/cache/digits/kd"])
    live, replayed, alone = (results_of(folder) for folder in ("live", "replayed", "alone"))
    for expected, given, same in zip(live["epochs"], replayed["epochs"], alone["epochs"], strict=True):
        assert given["loss_kd"] == pytest.approx(expected["loss_kd"], rel=1e-2)
        assert same["loss_kd"] == given["loss_kd"]
        assert given["eval_teacher_top1"] == expected["eval_teacher_top1"] and "eval_agreement" in given
    assert alone["teacher"] == "cifar_resnet14" and alone["teacher_parameters"] == live["teacher_parameters"]
    assert alone["teacher_cache"] == {"epochs": 2, "top_k": None} and "teacher_cache" not in live
    assert yaml.safe_load(Path("alone/student/recipe.yaml").read_text())["teacher_cache"] == "path/to/kd"


def test_the_largest_logits_for_other_temperatures(recipe):
    folder = cache_teacher([recipe, "--top_k", "3", "--temperatures", "4", "2", "--epochs", "1", "--seed", "5"])
    facts = json.loads(Path(folder, "cache.json").read_text())
    assert facts["row"] == {"classes": 10, "views": 1, "top_k": 3, "temperatures": [2.0, 4.0]}
    assert facts["epochs"] == 1 and facts["train"]["seed"] == 5
    settings = ["--seed", "5", "--teacher_cache", str(folder), "--losses.kd.temperature", "2"]
    distill([recipe, *settings, "--logit_standardization", "true"])
    assert results_of("runs/digits/kd")["teacher_cache"] == {"epochs": 1, "top_k": 3}


def test_two_views_for_a_loss_that_reads_them():
    save_teacher()
    folder = cache_teacher([written(losses={"mlkd": {}})])
    assert json.loads(Path(folder, "cache.json").read_text())["row"]["views"] == 2
    distill([written(losses={"mlkd": {}}), "--teacher_cache", str(folder)])
    distill([written(), "--teacher_cache", str(folder), "--output_dir", "one_view"])
    for run, term in (("runs/digits/kd", "loss_mlkd_kd"), ("one_view", "loss_kd")):
        results = results_of(run)
        assert results["teacher_cache"]["top_k"] is None and results["epochs"][0][term] > 0


def test_a_large_data_set_gets_larger_shards(recipe, monkeypatch):
    monkeypatch.setattr("hfkd.teacher_cache.writing.MAX_SHARDS", 2)
    folder = cache_teacher([recipe])
    assert len(list(folder.rglob("shard-*.bin"))) == 4


# ---- Processes that share the work, or are ended ---------------------------------------------------------------------


def test_two_processes(recipe):
    cache_teacher([recipe, "--cache_dir", "one"])

    def run(rank):
        cache_teacher([recipe, "--cache_dir", "two"])

    assert in_two_processes(run) == [0, 0]
    assert files_of("two") == files_of("one") and len(files_of("one")) == 9


def test_two_commands_at_the_same_time(recipe):
    cache_teacher([recipe, "--cache_dir", "one"])
    commands = [start(lambda: cache_teacher([recipe, "--cache_dir", "two"])) for _ in range(2)]
    assert [end(command) for command in commands] == [0, 0]
    assert files_of("two") == files_of("one")


def test_killed_and_continued(recipe, monkeypatch):
    """Before each of its renames: what was finished is not computed again, and nothing half-written is left."""
    expected = files_of(cache_teacher([recipe, "--cache_dir", "whole"]))
    rename, written = os.replace, []

    def run(left):
        def replace(source, target):
            if next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)

        monkeypatch.setattr(hfkd.teacher_cache.files.os, "replace", replace)
        cache_teacher([recipe, "--cache_dir", "cut"])

    for renames in (0, 1, 4):  # the first is that of cache.json
        assert in_child(functools.partial(run, itertools.count(renames, -1))) == -signal.SIGKILL
        partial = [path for path in files_of("cut") if path.endswith(".partial")]
        assert partial
        written.append(len(files_of("cut")) - len(partial))
    assert written == [0, 0, 4]
    ages = {path: path.stat().st_mtime_ns for path in Path("cut").rglob("*.bin")}
    cache_teacher([recipe, "--cache_dir", "cut"])
    assert files_of("cut") == expected
    assert all(path.stat().st_mtime_ns == age for path, age in ages.items())


def test_a_disk_that_fills_up(recipe, monkeypatch):
    """A quota, to which the kernel says 'File too large'. What was written before is neither lost nor written again."""
    expected = files_of(cache_teacher([recipe, "--cache_dir", "whole"]))
    rename, left = os.replace, itertools.count(4, -1)  # cache.json, evaluation.bin and two shards

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def replace(source, target):
        rename(source, target)
        if next(left) == 1:
            limit(100)

    def run():
        monkeypatch.setattr(hfkd.teacher_cache.files.os, "replace", replace)
        message = r"shard-00002.bin could not be written \(.*File too large.*MiB are free.*run the same command again"
        with pytest.raises(RuntimeError, match=message):
            cache_teacher([recipe, "--cache_dir", "full"])
        limit(resource.RLIM_INFINITY)
        before = {path: path.stat().st_mtime_ns for path in Path("full").rglob("*.bin")}
        assert sorted(path.name for path in before) == ["evaluation.bin", "shard-00000.bin", "shard-00001.bin"]
        cache_teacher([recipe, "--cache_dir", "full"])
        assert files_of("full") == expected
        assert all(path.stat().st_mtime_ns == age for path, age in before.items())

    assert in_child(run) == 0


def test_unfinished(recipe):
    folder = cache_teacher([recipe])
    shutil.rmtree(folder / "epoch-0001")
    with pytest.raises(ValueError, match="not finished: 4 of its 9 files.*epoch-0001/shard-00000.bin.*completes it"):
        distill([recipe, "--teacher_cache", str(folder)])


# ---- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, arguments, message",
    [
        ({"teacher_name_or_path": None}, [], "kd.yaml names no teacher"),
        ({}, ["--epochs", "0"], "epochs must be 1 or more"),
        ({}, ["--top_k", "11"], "top_k must be 1 ... 10"),
        ({}, ["--top_k", "0"], "top_k must be 1 ... 10"),
        ({}, ["--temperatures", "2"], "temperatures go with top_k"),
        ({}, ["--top_k", "2", "--temperatures", "-1"], "temperatures must be above 0"),
        ({"losses": {"mlkd": {}}}, ["--top_k", "2"], "'mlkd' needs all logits"),
        ({"losses": {}}, ["--top_k", "2"], "no loss that tells it"),
        ({"losses": {"fitnet": {}}}, [], "'fitnet' reads the teacher's features"),
        ({"mixup": 0.8, "dataloader_drop_last": True}, [], "leave mixup and cutmix at 0"),
        ({"streaming": True, "augmentation": "random_resized_crop"}, [], "set streaming: false"),
        ({}, ["--top_kk", "2"], "Unknown key 'top_kk'"),
        ({}, ["--output_dir", "here"], "--cache_dir says where"),
        ({"shard_teacher": True}, [], "leave shard_teacher out"),
    ],
)
def test_what_cannot_be_cached(changes, arguments, message, recipe):
    with pytest.raises(ValueError, match=message):
        cache_teacher([written(**changes), *arguments])


def test_another_use_is_refused(recipe):
    folder = str(cache_teacher([recipe]))
    use = [recipe, "--teacher_cache", folder]
    for arguments, message in (
        (["--seed", "5"], "seed: 42 in the cache, 5 here"),
        (["--train_split", "train[:80]"], "rows: 64 in the cache, 80 here"),
        (["--random_flip", "true"], "transform.flip: False in the cache, True here"),
        (["--augmentation", "random_resized_crop"], "transform.name: WeakAugmentation in the cache, RandomResizedCrop"),
        (["--teacher_name_or_path", "teacher", "teacher"], "1 teachers in the cache, 2 here"),
        (["--teacher_name_or_path", "me/teacher"], "teacher with the weights .* in the cache, me/teacher here"),
        (["--teacher_name_or_path", "resnet34"], "teacher with the weights .* in the cache, resnet34 here"),
        (["--teacher_class_indices", *"1023456789"], "teacher_class_indices: None in the cache, .1, 0, 2"),
    ):
        with pytest.raises(ValueError, match=f"(?s){message}"):
            distill([*use, *arguments])
    save_teacher(seed=2)
    with pytest.raises(ValueError, match="(?s)another teacher.*teacher with the weights .*hfkd cache-teacher"):
        distill(use)
    with pytest.raises(ValueError, match="(?s)holds another cache.*teacher.weights"):
        cache_teacher([recipe])
    with pytest.raises(ValueError, match="labels alone"):
        train_teacher([written(teacher_name_or_path=None, losses={}), "--teacher_cache", folder])


def test_help_explains_what_is_stored(capsys):
    with pytest.raises(SystemExit):
        main(["cache-teacher", "--help"])
    printed = capsys.readouterr().out
    for key in ("epochs", "top_k", "temperatures", "cache_dir", "teacher_name_or_path"):
        assert f"  --{key} " in printed
