"""Mistakes of users, through the command line: one message, exit code 2, before data and networks are loaded."""

import json
import re
from pathlib import Path

import datasets
import pytest
import torch
from helpers import Plain, config, images
from PIL import Image

from hfkd import DistillationTrainer
from hfkd.cli import main
from hfkd.comparison.rows import compared
from hfkd.errors import HfkdError
from hfkd.losses import DistillationLoss
from hfkd.recipe.reading import parse_recipe
from hfkd.recipe.yaml_file import dump_yaml
from hfkd.runs.finished import find_runs

RECIPE = {
    "student_name_or_path": "cifar_resnet8",
    "dataset_name": "digits",
    "random_flip": False,
    "train_split": "train[:32]",
    "eval_split": "test[:20]",
    "per_device_train_batch_size": 16,
    "num_train_epochs": 1,
    "optim": "sgd",
    "save_strategy": "no",
    "disable_tqdm": True,
}


def recipe(path="r.yaml", **changes):
    Path(path).write_text(dump_yaml(RECIPE | changes))
    return path


@pytest.fixture
def nothing_loaded(monkeypatch):
    """Neither data nor networks may be loaded."""

    def fail(*args, **kwargs):
        raise AssertionError("something was loaded")

    for name in ("load_splits", "build_student", "load_teachers", "open_cache"):
        monkeypatch.setattr(f"hfkd.commands.build.{name}", fail)


def refused(capsys, argv, message):
    """Run a command that must be refused with a message, which a regular expression gives."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ending:
        main(argv)
    error = capsys.readouterr().err
    assert ending.value.code == 2 and re.search(message, error), error
    assert "Traceback" not in error and len(error.splitlines()) <= 4, error


@pytest.mark.parametrize(
    "key, value, message",
    [
        *(
            (key, value, "must be 1 or more")
            for key in ("per_device_train_batch_size", "image_size")
            for value in (0, -1)
        ),
        ("per_device_eval_batch_size", 0, "must be 1 or more, got 0"),
        ("gradient_accumulation_steps", 0, "must be 1 or more"),
        ("save_total_limit", 0, "must be 1 or more"),
        ("ddp_timeout", 0, "must be 1 or more"),
        ("patch_size", 0, "must be 1 or more"),
        ("shuffle_buffer_size", 0, "must be 1 or more"),
        ("dataloader_prefetch_factor", 0, "must be 1 or more"),
        ("dataloader_num_workers", -1, "must not be negative"),
        ("seed", -1, r"must be 0 or above and below 2\*\*32, got -1"),
        ("seed", 2**32, r"must be 0 or above and below 2\*\*32"),
        ("data_seed", -1, "must be 0 or above"),
        ("learning_rate", -1.0, "must not be negative, got -1.0"),
        ("learning_rate", float("inf"), "must be a finite number, got inf"),
        ("learning_rate", float("nan"), "must be a finite number, got nan"),
        ("ce_weight", float("nan"), "must be a finite number, got nan"),
        ("ce_weight", -1.0, "must not be negative"),
        ("weight_decay", -0.1, "must not be negative"),
        ("warmup_steps", -5, "must not be negative"),
        ("max_grad_norm", -1.0, "must not be negative"),
        ("label_smoothing_factor", -0.1, "must be 0 or above and below 1"),
        ("adam_beta2", 1.0, "must be 0 or above and below 1"),
        ("num_train_epochs", 0, "must be above 0, got 0"),
        ("num_train_epochs", -3, "must be above 0"),
        ("max_steps", 0, "must be 1 or more, or -1"),
        ("max_steps", -2, "must be 1 or more, or -1"),
        ("logging_steps", 0, "must be above 0"),
        ("lr_gamma", 0.0, "must be above 0"),
        ("lr_gamma", float("nan"), "must be a finite number"),
        ("lr_milestones", [3, 2], "must increase, got 3 2"),
        ("lr_milestones", [2, 2], "must increase, got 2 2"),
        ("lr_milestones", [0, 2], "must be above 0"),
        ("lr_milestones", [1, float("inf")], "must be a finite number"),
        ("mixup", -0.1, "must not be negative"),
        ("cutmix", float("nan"), "must be a finite number"),
        ("ema_decay", 1.0, "must be between 0 and 1"),
        ("published_top1", 101, "at most 100"),
        ("drop_path_rate", 1.0, "below 1"),
        ("crop_pct", float("nan"), "must be a finite number"),
        ("random_erasing", 25, "at most 1, got 25"),
        ("color_jitter", -1, "must not be negative"),
        ("teacher_class_indices", [0, -1], "must not be negative, got -1"),
        ("fp16", True, "fp16"),
        ("dataset_name", "a/" + "x" * 256, "is no name that a file could have"),
        ("teacher_name_or_path", ["a", "x" * 256], "is no name that a file could have"),
        ("neftune_noise_alpha", 5.0, "is for language models"),
        ("use_liger_kernel", True, "is for language models"),
        ("ddp_timeout", 2**50, "transformers refuses these settings"),
        ("per_device_train_batch_size", 10**400, r"must be below 2\*\*53"),
        ("teacher_device_map", "nowhere", "must be one of auto, .*, got 'nowhere'"),
        ("teacher_device_map", "{a", "teacher_device_map is not valid YAML"),
        ("accelerator_config", {"split": 1}, "transformers refuses these settings: .*'split'"),
    ],
)
def test_a_value_out_of_range(key, value, message, nothing_loaded, capsys):
    also = {"bf16": True} if key == "fp16" else {}
    refused(capsys, ["distill", recipe(**{key: value}, **also)], f"^hfkd distill: error: .*{key}.*{message}|{message}")


@pytest.mark.parametrize(
    "blocks, more, message",
    [
        ("{layer1: 3}", {}, r"must map each list of blocks to indices from 0 on, .*, got {'layer1': 3}"),
        ("{layer1: []}", {}, "must map each list of blocks"),
        ("{layer1: [0, -1]}", {}, "must map each list of blocks"),
        ("{layer1: [true]}", {}, "must map each list of blocks"),
        ("{}", {}, "must map each list of blocks"),
        ("layer1", {}, "must map each list of blocks to indices from 0 on, .*, got 'layer1'"),
        ("{layer1: [0]", {}, "--teacher_blocks is not valid YAML"),
        ("{layer1: [0]}", {"teacher_name_or_path": None, "losses": {}}, "needs one teacher, .* names none"),
        ("{layer1: [0]}", {"teacher_name_or_path": ["a/b", "a/c"]}, "needs one teacher, .* names 2"),
        ("{layer1: [0]}", {"pretrained": True}, "leave pretrained out"),
        ("{layer1: [0]}", {"teacher_device_map": "auto"}, "leave teacher_device_map out"),
        ("{layer1: [0]}", {"teacher_prompts": ["a {}"]}, "leave teacher_prompts out"),
        ("{layer1: [0]}", {"teacher_cache": "cache"}, "from the cache cache none is loaded: take teacher_cache: auto"),
    ],
)
def test_blocks_of_the_teacher(blocks, more, message, nothing_loaded, capsys):
    settings = {"teacher_name_or_path": "runs/t/teacher", "losses": {"kd": {}}} | more
    refused(capsys, ["distill", recipe(**settings), "--teacher_blocks", blocks], f"teacher_blocks.*{message}|{message}")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["evaluate", "student", "--dataset_name", "digits", "--batch_size", "0"], "batch_size must be 1 or more"),
        (
            ["evaluate", "student", "--dataset_name", "digits", "--num_workers", "-1"],
            "num_workers must not be negative",
        ),
        (["search", "r.yaml", "--held_out", "nan"], "held_out is a share"),
        (["cache-teacher", "r.yaml", "--epochs", "0"], "epochs must be 1 or more"),
        (["reproduce", "resnet56-resnet20", "--epochs_scale", "nan"], "epochs_scale is nan"),
    ],
)
def test_a_value_out_of_range_of_another_command(argv, message, capsys):
    recipe()
    Path("student").mkdir()
    Path("student/config.json").write_text("{}")
    refused(capsys, argv, message)


@pytest.mark.parametrize(
    "losses, message",
    [
        ({"kd": 4}, r"losses.kd must map parameters to their values, such as {temperature: 4}, got 4"),
        ({"kd": []}, "losses.kd must map"),
        (["kd"], "losses must map method names"),
        ("kd", "losses must map method names"),
        ({"kdd": {}}, "no method 'kdd'. Did you mean 'kd'"),
        ({"kd": {"temprature": 4}}, "'temprature'. Did you mean 'temperature'"),
        ({"kd": {"temperature": 0}}, "temperature is 0"),
        ({"kd": {"weight": float("nan")}}, "weight is"),
        ({"kd": {"temperature": "hot"}}, "losses.kd.temperature is 'hot'"),
    ],
)
@pytest.mark.parametrize("command", ["distill", "search"])
def test_losses_are_checked_first(command, losses, message, nothing_loaded, capsys):
    refused(capsys, [command, recipe(losses=losses, teacher_name_or_path="runs/t/teacher")], message)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--losses", "{kd: 4}"], "losses.kd is 4"),
        (["--losses", "{kd: {}, kd: {}}"], "the key 'kd' is given twice"),
        (["--losses={kd: "], "--losses is not valid YAML"),
        (["--accelerator_config", "{split: true"], "--accelerator_config is not valid YAML"),
        (["--lr_scheduler_kwargs", "[1]"], "lr_scheduler_kwargs must be a mapping"),
        (["--losses.kd.temperature", "1:30"], "losses.kd.temperature is '1:30'"),
    ],
)
def test_mappings_on_the_command_line(words, message, nothing_loaded, capsys):
    refused(capsys, ["distill", recipe(teacher_name_or_path="t"), *words], message)


@pytest.mark.parametrize(
    "extends, message",
    [
        (5, "extends in r.yaml must be the name or path of one recipe, got 5"),
        (["a.yaml", "b.yaml"], "must be the name or path of one recipe"),
        ("r.yaml", "r.yaml extends r.yaml: a recipe cannot extend itself"),
        ("a.yaml", "r.yaml extends a.yaml extends ../.*/r.yaml: a recipe cannot extend itself"),
        ("b.yaml", "no recipe at b.yaml. Did you mean r.yaml"),
    ],
)
def test_extends(extends, message, nothing_loaded, tmp_path, capsys):
    recipe("a.yaml", extends=f"./../{tmp_path.name}/r.yaml")
    refused(capsys, ["distill", recipe(extends=extends)], message)


def test_null_gives_a_key_its_default_again():
    recipe("base.yaml", ema_decay=0.9, seed=7, weight_decay=0.1, output_dir="there", lr_milestones=[1, 2])
    path = recipe(extends="base.yaml", weight_decay=None, losses={"kd": {"temperature": 2, "weight": None}})
    words = ["--ema_decay", "null", "--seed", "3", "--seed=~", "--output_dir", "null", "--lr_milestones", "null"]
    _, _, config, resolved = parse_recipe([path, *words, "--losses.kd.temperature", "null"])
    assert config.ema_decay is None and config.seed == 42 and config.weight_decay == 0 and not config.lr_milestones
    assert resolved["output_dir"] == config.output_dir == "runs/r" and config.losses == {"kd": {}}
    assert not {"ema_decay", "seed", "weight_decay", "lr_milestones"} & set(resolved)
    assert parse_recipe([path, "--seed", "null", "--seed", "3"])[2].seed == 3
    assert parse_recipe([path, "--losses", "null"])[2].losses == {}


def test_losses_as_yaml():
    _, _, config, resolved = parse_recipe([recipe(losses={"kd": {}}), "--losses", "{ctkd: {weight: 5e-1}}"])
    assert config.losses == resolved["losses"] == {"ctkd": {"weight": 0.5}}


@pytest.mark.parametrize(
    "optim, given, message",
    [
        ("sgd", "momentun=0.9", "optim_args: sgd takes no 'momentun'. Did you mean 'momentum'?"),
        ("sgd", "momentum", "must be of the form name=value,name=value, got 'momentum'"),
        ("sgd", "momentum=", "must be of the form"),
        ("sgd", "momentum=0.9,", "must be of the form"),
        ("sgd", "momentum=high", "momentum must be a number, got 'high'"),
        ("sgd", "momentum=nan", "momentum must be a finite number"),
        ("sgd", "nesterov=maybe", "nesterov must be true or false"),
        ("rmsprop", "dampening=1", "rmsprop takes no 'dampening'"),
        ("adamw_torch", "momentum=0.9", "adamw_torch takes none"),
    ],
)
def test_optim_args(optim, given, message, nothing_loaded, capsys):
    refused(capsys, ["distill", recipe(optim=optim), "--optim_args", given], message)


class OwnLoss(DistillationLoss):
    """Loss with two terms."""

    def forward(self, student, teacher, batch):
        return {"a": student.logits.mean(), "b_c": student.logits.std()}


class OneTerm(DistillationLoss):
    """Loss with one term."""

    def forward(self, student, teacher, batch):
        return student.logits.mean()


class Measured(OneTerm):
    """Loss that logs a value."""

    def metrics(self):
        return {"rate": torch.tensor(1.0)}


def test_names_of_own_losses():
    for losses, message in (
        ({"ce": OwnLoss()}, "'ce' is the name of the cross-entropy"),
        ({"own": OwnLoss(), "own_a": OneTerm()}, "two terms of the losses have the name 'loss_own_a'"),
        ({"own_b": OneTerm(), "own_b_c": OneTerm(), "own": OwnLoss()}, "have the name 'loss_own_b_c'"),
        ({"kd": OwnLoss()}, "'kd' is a method of hfkd, and the given OwnLoss is another"),
        ({"learning": Measured()}, "'rate' of the loss 'learning' is logged as 'learning_rate', which is taken"),
    ):
        with pytest.raises(HfkdError, match=f"(?i){message}"):
            DistillationTrainer(Plain(), Plain(), config(), train_dataset=images(), losses=losses).train()


@pytest.mark.parametrize("command", ["distill", "search"])
@pytest.mark.parametrize("key", ["teacher_name_or_path", "teacher_cache"])
def test_a_teacher_that_nothing_learns_from(command, key, nothing_loaded, capsys):
    message = f"{key} names a teacher, and no loss learns from it. Add a loss, .*, or leave {key} out"
    refused(capsys, [command, recipe(**{key: "runs/t/teacher"})], message)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["train"], "no command 'train'. Did you mean 'train-teacher'"),
        (
            ["distill", "r.yaml", "--student_name_or_path", "resnet56"],
            "'resnet56' is no timm .* Near are cifar_resnet56",
        ),
        (["distill", "r.yaml", "--batch_size", "8"], "'batch_size' .* Did you mean 'per_device_train_batch_size'"),
        (["search", "r.yaml", "--n_trial", "3"], "'n_trial' .* Did you mean 'n_trials'"),
        (["search", "r.yaml", "--sed", "3"], "'sed' .* Did you mean 'seed'"),
        (["cache-teacher", "r.yaml", "--epoch", "3"], "'epoch' .* Did you mean 'epochs'"),
        (["reproduce", "resnet56-resnet20", "--method", "kd"], "'method' .* Did you mean 'methods'"),
    ],
)
def test_near_names(argv, message, capsys, monkeypatch):
    monkeypatch.setattr("hfkd.commands.build.load_splits", None)
    recipe()
    refused(capsys, argv, message)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["runs/typo"], "no model at runs/typo: .*"),
        (["cifar_resnet8"], "cifar_resnet8 is an architecture, not a trained model"),
        (["cifar_resnet8", "--dataset_name", "digits"], "cifar_resnet8 is an architecture"),
        (["empty"], "empty holds no model .config.json."),
        (["someone/something", "--dataset_name", "digits"], "someone/something has no model .* HF_HUB_OFFLINE is set"),
        (["broken", "--dataset_name", "digits"], "broken has no model that can be loaded"),
    ],
)
def test_evaluate(argv, message, capsys):
    Path("empty").mkdir()
    Path("broken").mkdir()
    Path("broken/config.json").write_text("{")
    refused(capsys, ["evaluate", *argv], message)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"student_name_or_path": "someone/something"}, "someone/something has no model .* HF_HUB_OFFLINE is set"),
        ({"teacher_name_or_path": "someone/something"}, "someone/something has no model .* HF_HUB_OFFLINE is set"),
        ({"teacher_name_or_path": "resnet18"}, "resnet18 has no pretrained weights .* HF_HUB_OFFLINE is set"),
        ({"teacher_name_or_path": "empty"}, "empty has no model .* Give a folder that"),
        ({"teacher_name_or_path": "runs/typo"}, "'runs/typo' is no timm architecture, no existing folder"),
        ({"load_best_model_at_end": True, "eval_strategy": "epoch"}, "must be the same, got epoch and no"),
        ({"load_best_model_at_end": True, "save_strategy": "steps"}, "must be the same, got no and steps"),
        ({"output_dir": "r.yaml/run"}, "output_dir: r.yaml/run cannot be written .Not a directory."),
        ({"output_dir": "r.yaml"}, "output_dir: r.yaml cannot be written .Not a directory."),
        ({"output_dir": "/proc/run"}, "output_dir: /proc/run cannot be written"),
    ],
)
def test_names_folders_and_strategies(changes, message, capsys, monkeypatch):
    monkeypatch.setattr("hfkd.commands.build.load_splits", None)
    Path("empty").mkdir()
    losses = {"losses": {"kd": {}}} if "teacher_name_or_path" in changes else {}
    refused(capsys, ["distill", recipe(**changes, **losses)], message)


def test_a_data_set_that_the_hub_does_not_provide(capsys):
    refused(capsys, ["distill", recipe(dataset_name="someone/photos")], "data set 'someone/photos' cannot be loaded")


def test_a_run_goes_on_with_harmless_changes():
    path = recipe(save_strategy="epoch", num_train_epochs=2, max_steps=2)
    main(["distill", path])
    words = ["--ddp_timeout", "3600", "--save_total_limit", "3", "--logging_steps", "5", "--seed", "42"]
    main(["distill", path, "--resume_from_checkpoint", "true", *words])
    assert json.loads(Path("runs/r/results.json").read_text())["last"]["step"] == 2
    seeds = [["--output_dir", f"runs/{seed}", "--seed", str(seed)] for seed in (1, 2)]
    for more, words in zip(([], ["--logging_steps", "1", "--weight_decay", "0"]), seeds, strict=True):
        main(["distill", path, *words, *more])
    (row,) = compared(find_runs(["runs"])[0])
    assert row.label == "r" and len(row.runs) == 3


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "feature, values, keys",
    [
        (datasets.List(datasets.ClassLabel(names=["cat", "dog"])), [[0], [0, 1]], {}),
        (datasets.List(datasets.Value("int64"), length=2), [[1, 0], [1, 1]], {"label_column": "labels"}),
    ],
)
def test_several_labels_an_image_are_refused(feature, values, keys, streaming, monkeypatch, capsys):
    """Lists of classes, and rows of zeros and ones."""

    def fail(*args, **kwargs):
        raise AssertionError("a network was loaded")

    monkeypatch.setattr("hfkd.commands.build.build_student", fail)
    features = datasets.Features({"image": datasets.Image(), "labels": feature})
    rows = {"image": [Image.new("RGB", (8, 8))] * 2, "labels": values}
    Path("data").mkdir()
    for split in ("train", "test"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(f"data/{split}.parquet")
    changes = {"dataset_name": "data", "augmentation": "random_resized_crop", "streaming": streaming, **keys}
    path = recipe(**changes, train_split="train", eval_split="test")
    with pytest.raises(SystemExit) as ending:
        main(["train-teacher", path])
    error = capsys.readouterr().err  # with the bars of `datasets`
    assert ending.value.code == 2 and "hfkd learns one class for each image. Name a column with one label" in error
    assert re.search("column 'labels' of data holds a list of labels for each image .multi-label data", error)
