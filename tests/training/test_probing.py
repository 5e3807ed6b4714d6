"""`probe_every`: the nearest neighbours of the evaluation images' features, every few epochs of a training."""

import json

import pytest
import torch
from helpers import Plain, config, images
from torch import nn

from hfkd import DistillationTrainer, load_student
from hfkd.errors import HfkdError
from hfkd.networks.probes import knn_classes, top1

SETTINGS = {"num_train_epochs": 5, "eval_strategy": "epoch", "save_strategy": "epoch", "probe_every": 2}


def build(output_dir, student=None, eval_dataset=None, **changes):
    torch.manual_seed(0)
    args = config(output_dir, **(SETTINGS | changes))
    eval_dataset = eval_dataset or images(40, seed=1, augment=False)
    return DistillationTrainer(student or Plain(), None, args, train_dataset=images(24), eval_dataset=eval_dataset)


def measured():
    with open("run/results.json") as file:
        return {row["epoch"]: row["eval_knn"] for row in json.load(file)["epochs"] if "eval_knn" in row}


def test_every_second_epoch_and_the_last():
    trainer = build("run", eval_on_start=True, metric_for_best_model="knn", load_best_model_at_end=True)
    trainer.train()
    found = measured()
    assert list(found) == [0, 2, 4, 5]
    best = max([2, 4, 5], key=found.get)
    assert trainer.state.best_model_checkpoint == f"run/checkpoint-{3 * best}"
    assert trainer.results.best()["epoch"] == best

    pixels = trainer.eval_dataset.__getitems__(range(40))
    model = trainer.model.eval()
    features = model.conv(pixels["pixel_values"]).relu().mean(dim=(2, 3)).detach()
    expected = top1(knn_classes(features, features, pixels["labels"], same_images=True), pixels["labels"])
    assert trainer.evaluate()["eval_knn"] == found[best] == pytest.approx(expected) and expected > 10


def test_resumed_measures_at_the_same_epochs():
    build("run").train()
    found = measured()
    assert list(found) == [2, 4, 5]
    again = build("run")
    again.train(resume_from_checkpoint="run/checkpoint-9")
    assert measured() == found


def test_beside_taps_averages_several_sets_and_metrics_of_a_user():
    """The losses tap the same layer, and the moving average is another network."""
    sets = {"small": images(20, seed=1, augment=False), "large": images(40, seed=1, augment=False)}
    args = config("run", **SETTINGS, losses={"pkt": {}}, ema_decay=0.5, metric_for_best_model="large_knn")
    trainer = DistillationTrainer(
        load_student("cifar_resnet8", num_classes=10),
        load_student("cifar_resnet8", num_classes=10),
        args,
        train_dataset=images(24),
        eval_dataset=sets,
        compute_metrics=lambda prediction: {"images": len(prediction.label_ids)},
    )
    trainer.train()
    rows = [entry for entry in trainer.state.log_history if "eval_large_knn" in entry]
    assert [entry["epoch"] for entry in rows] == [2, 4, 5] and rows[0]["eval_large_images"] == 40
    assert "eval_knn" not in trainer.predict(sets["small"]).metrics and 0 < rows[-1]["eval_large_knn"] <= 100
    model, batch = trainer.average.module.timm_model, sets["large"].__getitems__(range(40))
    with torch.no_grad():
        features = model.forward_head(model.forward_features(batch["pixel_values"]), pre_logits=True)
    expected = top1(knn_classes(features, features, batch["labels"], same_images=True), batch["labels"])
    assert rows[-1]["eval_large_knn"] == pytest.approx(expected)


def test_mistakes():
    with pytest.raises(HfkdError, match="probe_every must be 1 or more, got 0"):
        config(probe_every=0)
    with pytest.raises(HfkdError, match="prediction_loss_only measures the loss alone"):
        config(probe_every=1, prediction_loss_only=True)
    with pytest.raises(HfkdError, match="no evaluation gives 'knn'"):
        build("run", probe_every=None, metric_for_best_model="knn", load_best_model_at_end=True)
    with pytest.raises(HfkdError, match="no linear layer"):
        build("run", student=nn.Sequential(nn.Conv2d(3, 10, 32), nn.Flatten()))


def test_a_backbone_of_images_without_labels():
    """The best by neighbours; the other figures of its evaluations are the losses."""
    train_set, eval_set = images(24), images(40, seed=1, augment=False)
    train_set.has_labels = False
    args = config("run", **SETTINGS, losses={"pkt": {}}, ce_weight=0, metric_for_best_model="knn")
    args.load_best_model_at_end = True
    trainer = DistillationTrainer(
        load_student("cifar_resnet8", []),
        load_student("cifar_resnet8x4", num_classes=10),
        args,
        train_dataset=train_set,
        eval_dataset=eval_set,
    )
    trainer.train()
    found = measured()
    best = max(found, key=found.get)
    assert list(found) == [2, 4, 5] and trainer.state.best_model_checkpoint == f"run/checkpoint-{3 * best:g}"
    batch = eval_set.__getitems__(range(40))
    with torch.no_grad():
        features = trainer.model.timm_model.eval()(batch["pixel_values"])
    expected = top1(knn_classes(features, features, batch["labels"], same_images=True), batch["labels"])
    assert found[best] == pytest.approx(expected) and trainer.results.rows[-1]["eval_loss_pkt"] > 0
    eval_set.has_labels = False
    with pytest.raises(HfkdError, match="probe_every .* the evaluation images have no labels"):
        build("again", eval_dataset=eval_set)
