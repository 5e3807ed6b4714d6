"""`hfkd evaluate`: the classes of a data set are those of the model with the same names."""

import math
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from hfkd import load_student
from hfkd.commands.evaluate import evaluate, load_evaluation, with_classes_of
from hfkd.data import load_image_splits
from hfkd.errors import HfkdError
from hfkd.networks.probes import linear_cka
from hfkd.recipe.arguments import DataArguments


def test_help_shows_what_an_evaluation_reads(capsys):
    with pytest.raises(SystemExit):
        evaluate(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "By default that of the model's run." in printed and "(required)" not in printed
    assert "--crop_pct" in printed and "--train_split" in printed  # a probe reads it
    assert not any(key in printed for key in ("--random_", "color_jitter"))


def test_names(tmp_path):
    folder = tmp_path / "pets"
    for name in ("ant", "bee"):
        path = folder / "test" / name / "a.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(path)
    load_student("cifar_resnet8", class_names=["cat", "bee", "ant"]).save_pretrained("model")
    _, images = load_evaluation("model", DataArguments(dataset_name=str(folder)))
    assert images.class_names == ["cat", "bee", "ant"] and images.labels.tolist() == [2, 1]
    load_student("cifar_resnet8", class_names=["cat", "Bee", "ANT"]).save_pretrained("model")
    for streaming in (False, True):
        more = {"streaming": True, "augmentation": "random_resized_crop"} if streaming else {}
        _, images = load_evaluation("model", DataArguments(dataset_name=str(folder), **more))
        assert images.class_names == ["cat", "Bee", "ANT"]
        if streaming:
            images.shard(0, 1, batch_size=2, drop_last=False)
        labels = next(iter(images))["labels"] if streaming else images.labels
        assert labels.tolist() == [2, 1]
    load_student("cifar_resnet8", class_names=["cat", "dog", "ant"]).save_pretrained("model")
    with pytest.raises(ValueError, match="has 2 classes and the model 3, .* Not among the model's: 'bee'"):
        load_evaluation("model", DataArguments(dataset_name=str(folder)))


def test_as_many_classes_with_generic_names_are_in_the_same_order(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})
    rows = {"image": [Image.new("RGB", (8, 8))] * 2, "label": [1, 0]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "pets" / "test.parquet")
    model = load_student("cifar_resnet8", num_classes=2)
    _, split = load_image_splits(str(tmp_path / "pets"), train_split=None, cache_dir=str(tmp_path / "cache"))
    renamed = with_classes_of(model, split)
    assert renamed.class_names == ["0", "1"] and renamed.labels().tolist() == [1, 0]


DIGITS = ("--dataset_name", "digits", "--train_split", "train[:150]", "--eval_split", "test[:60]")


def features_of(model, split):
    """Of the digits, made without hfkd."""
    _, split = load_image_splits("digits", train_split=None, eval_split=split)
    pixels = torch.stack([torch.from_numpy(np.array(image)) for image in split.dataset["image"]])
    cfg = model.pretrained_cfg
    images = pixels.permute(0, 3, 1, 2) / 255 - torch.tensor(cfg["mean"]).view(3, 1, 1)
    with torch.no_grad():
        features = model.forward_head(model.forward_features(images / torch.tensor(cfg["std"]).view(3, 1, 1)), True)
    return features, torch.tensor(split.dataset["label"])


def test_probes_of_a_student(capsys):
    """The 20 nearest neighbours by their definition; logistic regression is scikit-learn's."""
    student, teacher = (load_student(name, num_classes=7) for name in ("cifar_resnet8", "cifar_resnet8x4"))
    student.save_pretrained("student")  # its classes are others than the data's
    teacher.save_pretrained("teacher")
    metrics = evaluate(["student", *DIGITS, "--probe", "knn", "linear", "--teacher", "teacher"])
    printed = capsys.readouterr().out
    model = student.timm_model.eval()
    known, known_labels = features_of(model, "train[:150]")
    features, labels = features_of(model, "test[:60]")
    hits = 0
    for feature, label in zip(features, labels, strict=True):
        votes = [0.0] * 10
        cosine = F.cosine_similarity(feature, known)
        for neighbour in cosine.argsort(descending=True)[:20]:
            votes[known_labels[neighbour]] += math.exp(cosine[neighbour] / 0.07)
        hits += votes.index(max(votes)) == label
    assert metrics["eval_knn"] == pytest.approx(100 * hits / 60) and 10 < metrics["eval_knn"] < 100
    assert f"knn: {100 * hits / 60:.4f}" in printed and 10 < metrics["eval_linear"] < 100
    expected = linear_cka(features, features_of(teacher.timm_model.eval(), "test[:60]")[0])
    assert metrics["eval_cka"] == pytest.approx(expected, abs=1e-4) and "eval_cosine" not in metrics


def test_probes_of_a_backbone():
    """Of transformers; it has no classifier, whose accuracy could be measured."""
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}
    Dinov2Model(Dinov2Config(**settings)).save_pretrained("dinov2")
    BitImageProcessor(crop_size={"height": 32, "width": 32}).save_pretrained("dinov2")
    metrics = evaluate(["dinov2", *DIGITS, "--probe", "knn", "--teacher", "dinov2"])
    assert metrics.keys() == {"eval_knn", "eval_cka", "eval_cosine"} and metrics["eval_knn"] > 10
    assert metrics["eval_cka"] == pytest.approx(1) and metrics["eval_cosine"] == pytest.approx(1)


def test_a_probe_that_cannot_be_made():
    with pytest.raises(HfkdError, match="There is no probe 'svm'. Valid: knn, linear."):
        evaluate(["resnet18", *DIGITS, "--probe", "svm"])
    with pytest.raises(HfkdError, match="resnet18 is an architecture, not a trained model"):
        evaluate(["resnet18", *DIGITS])
    for number in range(3):
        path = Path("photos", "train", "any", f"{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (50 * number, 0, 9)).save(path)
    load_student("cifar_resnet8", num_classes=7).save_pretrained("student")
    unlabelled = ["student", "--dataset_name", "photos", "--label_column", "none"]
    with pytest.raises(HfkdError, match="A probe tells classes apart, and photos, split 'train.* has no labels"):
        evaluate([*unlabelled, "--probe", "knn"])
    metrics = evaluate([*unlabelled, "--eval_split", "train", "--teacher", "student"])
    assert metrics["eval_cka"] == pytest.approx(1) and metrics["eval_cosine"] == pytest.approx(1)
