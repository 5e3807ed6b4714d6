"""Students that learn from a teacher's stored embeddings and logits: as from the teacher itself."""

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import Plain, config, images, train_logs

from hfkd import CachedTeacher, DistillationTrainer, Teacher, load_student
from hfkd.commands.cache_teacher import cache_teacher
from hfkd.commands.train import distill
from hfkd.errors import HfkdError, RunError
from hfkd.losses import LOSSES
from hfkd.teacher_cache.files import CHOICE_DTYPE, map_rows, write_rows
from hfkd.teacher_cache.rows import EMBEDDINGS, RowFormat
from hfkd.teacher_cache.writing import write_cache

SETTINGS = {"crd": {"negatives": 4}, "feature_queue": {"size": 16}}
METHODS = [
    name
    for name, loss in LOSSES.items()
    if list(loss.teacher_layers or ()) == ["embedding"] and not loss.reads_classifier
]


ON_LOGITS = [
    name
    for name, loss in LOSSES.items()
    if loss.needs_teacher
    and loss.teacher_layers == ()
    and not (loss.reads_classifier or loss.reads_members)
    and {"teacher_layer", "teacher_layers"}.isdisjoint(inspect.signature(loss).parameters)
]


class Rounding(Plain):
    """A teacher whose embedding is rounded to float16."""

    def forward(self, pixel_values):
        return self.fc(self.conv(pixel_values).relu().mean(dim=(2, 3)).half().float())


class Backbone(Rounding):
    """The same, without a classifier."""

    def forward(self, pixel_values):
        return self.conv(pixel_values).relu().mean(dim=(2, 3)).half().float()


def teacher_of(kind=Rounding):
    torch.manual_seed(1)
    return Teacher(kind(width=12), has_classifier=kind is Rounding)


def cached(folder="cache", teacher=None, views=1, **row):
    args, data = config(), (images(24), images(10, augment=False))
    row = RowFormat(10, views, **row)
    write_cache(folder, teacher or teacher_of(), *data, args, row, epochs=2, rows_a_shard=9, with_embeddings=True)
    return CachedTeacher(folder)


def trained(teacher, losses, student=None, **changes):
    torch.manual_seed(3)
    args = config("run", losses=losses, num_train_epochs=3, **changes)
    sets = {"train_dataset": images(24), "eval_dataset": images(10, augment=False)}
    trainer = DistillationTrainer(student or Plain(), teacher, args, **sets)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return cached(tmp_path_factory.mktemp("features") / "cache")


def test_methods_that_read_the_embedding_alone():
    assert {"pkt", "rkd", "cc", "srd", "crd", "feature_queue", "itrd"} <= set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_as_from_the_teacher_itself(cache, name):
    """To the bit, where the teacher's features are float16."""
    losses = {name: SETTINGS.get(name, {}), "kd": {"weight": 0.0}}
    live, replayed = (trained(teacher, losses, max_steps=6) for teacher in (teacher_of(), cache))
    logs = [[entry["loss"] - entry["loss_ce"] for entry in train_logs(run)] for run in (live, replayed)]
    assert logs[0] == logs[1] and max(logs[0]) > 0
    for key, value in live.distiller.state_dict().items():
        torch.testing.assert_close(replayed.distiller.state_dict()[key], value, rtol=0, atol=0, msg=key)


@pytest.fixture(scope="module")
def cache_of_two_views(tmp_path_factory):
    return cached(tmp_path_factory.mktemp("features") / "views", views=2)


@pytest.mark.parametrize("name", ON_LOGITS)
def test_methods_on_logits(cache, cache_of_two_views, name):
    """The first steps, in which float16 is the only difference; OFA-KD reads all stages of the student besides."""
    logs = []
    for teacher in (teacher_of(), cache_of_two_views if LOSSES[name].views == 2 else cache):
        torch.manual_seed(4)
        student = load_student("cifar_resnet8", num_classes=10)
        run = trained(teacher, {name: {}}, student, max_steps=2, learning_rate=1e-4)
        logs.append([entry["loss"] for entry in train_logs(run)])
    assert logs[0] == pytest.approx(logs[1], rel=1e-2)


def test_with_logits_too(cache):
    """Beside features the cache holds the logits, which agree with the teacher's; also the largest alone."""
    largest = cached("largest", top_k=3, temperatures=(2.0,))
    losses = {"pkt": {}, "kd": {"temperature": 2.0}}
    for teacher in (cache, largest):
        run = trained(teacher, losses, eval_strategy="epoch")
        assert run.results.rows[-1]["eval_agreement"] >= 0 and train_logs(run)[0]["loss_kd"] > 0
    logs = [train_logs(trained(teacher, losses))[0] for teacher in (teacher_of(), cache)]
    assert logs[0]["loss_kd"] == pytest.approx(logs[1]["loss_kd"], rel=1e-2)


def test_of_a_teacher_without_a_classifier(capsys):
    """For a classifier, and for a backbone whose evaluations have neighbours alone."""
    teacher = cached("features", teacher_of(Backbone))
    assert "features will take" in capsys.readouterr().out
    assert json.loads(Path("features/cache.json").read_text())["row"]["width"] == 12
    assert teacher.files.format.dtype.names == (EMBEDDINGS,) and not teacher.has_classifier
    live, replayed = (trained(each, {"pkt": {}}, eval_strategy="epoch") for each in (teacher_of(Backbone), teacher))
    assert train_logs(live)[0]["loss_pkt"] == train_logs(replayed)[0]["loss_pkt"] > 0
    assert "eval_agreement" not in replayed.results.rows[-1] and "eval_top1" in replayed.results.rows[-1]
    student = load_student("cifar_resnet8", [])
    with pytest.raises(HfkdError, match="No evaluation measures anything here.* or probe_every"):
        settings = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
        trained(teacher, {"pkt": {}}, load_student("cifar_resnet8", []), ce_weight=0, **settings)
    best = {"metric_for_best_model": "knn", "load_best_model_at_end": True, "save_strategy": "epoch"}
    run = trained(teacher, {"pkt": {}}, student, ce_weight=0, eval_strategy="epoch", probe_every=1, **best)
    assert run.state.best_metric == max(entry.get("eval_knn", 0) for entry in run.state.log_history)


def test_what_a_cache_lacks(cache):
    write_cache("logits", teacher_of(), images(24), images(10, augment=False), config(), RowFormat(10, 1), epochs=1)
    features = cached("features", teacher_of(Backbone))
    for teacher, losses, message in (
        (CachedTeacher("logits"), {"pkt": {}}, "logits holds no features, and the loss 'pkt' reads them"),
        (features, {"kd": {}}, "losses \\['kd'\\] read logits or a classifier, and the teacher .* has none"),
        (cache, {"fitnet": {}}, "'fitnet' reads the teacher's features or classifier"),
        (cache, {"srrl": {}}, "'srrl' reads the teacher's features or classifier"),
    ):
        with pytest.raises(HfkdError, match=message):
            trained(teacher, losses)
    with pytest.raises(HfkdError, match="has no classifier, and no loss reads the features"):
        data = images(24), images(10, augment=False)
        write_cache("none", teacher_of(Backbone), *data, config(), RowFormat(10, 1), epochs=1)


RECIPE = {
    "student_name_or_path": "cifar_resnet8",
    "teacher_name_or_path": "teacher",
    "dataset_name": "digits",
    "random_flip": False,
    "train_split": "train[:40]",
    "eval_split": "test[:20]",
    "losses": {"feature_queue": {"size": 32}},
    "num_train_epochs": 2,
    "per_device_train_batch_size": 20,
    "optim": "sgd",
    "logging_strategy": "epoch",
    "save_strategy": "no",
    "disable_tqdm": True,
}


def test_from_a_recipe_and_verified(capsys):
    torch.manual_seed(1)
    load_student("cifar_resnet8x4", num_classes=7).save_pretrained("teacher")  # of other classes
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    folder = cache_teacher(["recipe.yaml", "--cache_dir", "cache"])
    printed = capsys.readouterr().out
    assert printed.index("will take 0.0 MiB") < printed.index("holds 2 epochs of 40 images")
    assert cache_teacher(["recipe.yaml", "--cache_dir", "cache", "--verify", "true"]) == folder
    assert "holds what the teacher gives: 80 rows were computed again" in capsys.readouterr().out
    live = distill(["recipe.yaml", "--output_dir", "live"])
    replayed = distill(["recipe.yaml", "--output_dir", "replayed", "--teacher_cache", "cache"])
    losses = [run.results.rows[-1]["loss_feature_queue"] for run in (live, replayed)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)

    path = folder / "epoch-0001" / "shard-00000.bin"
    rows = map_rows(path, np.dtype([(EMBEDDINGS, "<f2", (256,))]), 40).copy()
    rows[EMBEDDINGS][7] *= 1.01
    write_rows(path, rows)
    with pytest.raises(RunError, match="image 7 of epoch 1 differs by 0.0"):
        cache_teacher(["recipe.yaml", "--cache_dir", "cache", "--verify", "true"])
    torch.manual_seed(2)
    load_student("cifar_resnet8x4", num_classes=7).save_pretrained("teacher")
    with pytest.raises(HfkdError, match="written for another run:\n  teacher.weights"):
        cache_teacher(["recipe.yaml", "--cache_dir", "cache", "--verify", "true"])
    choices = map_rows(folder / "evaluation.bin", CHOICE_DTYPE, 20)
    assert (choices == -1).all()
