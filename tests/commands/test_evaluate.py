"""`hfkd evaluate`: the classes of a data set are those of the model with the same names."""

import datasets
import pytest
from PIL import Image

from hfkd import load_student
from hfkd.commands.evaluate import evaluate, load_evaluation, with_classes_of
from hfkd.data import load_image_splits
from hfkd.recipe.arguments import DataArguments


def test_help_shows_what_an_evaluation_reads(capsys):
    with pytest.raises(SystemExit):
        evaluate(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "By default that of the model's run." in printed and "(required)" not in printed
    assert "--crop_pct" in printed and not any(key in printed for key in ("train_split", "--random_", "color_jitter"))


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
