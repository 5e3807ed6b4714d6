"""Loading by name: splits, columns, class names, and what is said when something is wrong."""

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Features, Value
from pictures import encoded
from PIL import Image

from hfkd.data import CenterCrop, ImageDataset, LazyImageDataset, NoAugmentation, load_image_splits, open_streams

FLAT = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "transform": NoAugmentation()}
ANIMALS = ClassLabel(names=["cat", "dog"])
IMAGE = datasets.Image()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """`datasets` leaves locks in its cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def picture(value=0):
    return Image.fromarray(np.full((8, 8, 3), value, dtype=np.uint8))


def parquet_folder(folder, features, labels, splits=("train", "test")):
    """A folder of Parquet files; `labels`: {column: values}, in every split; pictures in image columns."""
    folder.mkdir(exist_ok=True)
    rows = len(next(iter(labels.values())))
    pictures = [picture(i) for i in range(rows)]
    images = {name: pictures for name, feature in features.items() if isinstance(feature, datasets.Image)}
    for split in splits:
        data = datasets.Dataset.from_dict({**images, **labels}, features=Features(features))
        data.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


def load(folder, tmp_path, **arguments):
    return load_image_splits(str(folder), cache_dir=str(tmp_path / "cache"), **arguments)


def image_folder(folder, splits):
    """{split: {class: [file name]}}; files hold the picture of their position."""
    for split, classes in splits.items():
        for name, files in classes.items():
            (folder / split / name).mkdir(parents=True)
            for i, file in enumerate(files):
                picture(i).save(folder / split / name / file)
    return folder


# ---- What can be loaded --------------------------------------------------------------------------


def test_digits():
    train, test = load_image_splits("digits")
    assert (len(train), len(test)) == (1437, 360)
    assert train.class_names == [str(digit) for digit in range(10)]
    assert np.bincount(test.labels()).min() >= 35
    again = ImageDataset.from_split(load_image_splits("digits")[1], image_size=32, **FLAT)
    dataset = ImageDataset.from_split(test, image_size=32, **FLAT)
    assert dataset.images.shape == (360, 3, 32, 32) and dataset.images.float().std() > 50
    assert torch.equal(dataset.images, again.images) and torch.equal(dataset.labels, again.labels)
    assert torch.equal(dataset.images[:, 0], dataset.images[:, 2])


def test_parquet_folder(tmp_path):
    folder = parquet_folder(tmp_path / "pets", {"photo": IMAGE, "animal": ANIMALS}, {"animal": [0, 1, 1]})
    train, test = load(folder, tmp_path)
    assert (train.image_column, train.label_column, train.class_names) == ("photo", "animal", ["cat", "dog"])
    assert train.name == f"{folder}, split 'train'" and test.name == f"{folder}, split 'test'"
    dataset = ImageDataset.from_split(train, image_size=8, **FLAT)
    assert dataset.labels.tolist() == [0, 1, 1]
    assert dataset.images[:, 0, 0, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("evaluation", ["test", "val", "valid", "validation"])
def test_image_folder(tmp_path, evaluation):
    # "train" is also a class: its images must not land in the training split.
    classes = {"train": ["a.png", "b.PNG"], "cat": ["c.bmp"]}
    folder = image_folder(tmp_path / "pets", {"train": classes, evaluation: {"train": ["d.png"]}})
    (folder / "train" / "cat" / "notes.txt").write_text("no image")
    (folder / "train" / ".hidden").mkdir()
    train, test = load_image_splits(str(folder))
    assert train.class_names == test.class_names == ["cat", "train"]
    assert train.labels().tolist() == [0, 1, 1] and test.labels().tolist() == [1]
    assert test.name.endswith(f"split '{evaluation}'")
    dataset = ImageDataset.from_split(train, image_size=8, **FLAT)
    assert dataset.images[:, 0, 0, 0].tolist() == [0, 0, 1]


@pytest.mark.parametrize("on_demand", [False, True])
def test_image_folder_with_images_of_many_kinds(tmp_path, on_demand):
    folder = image_folder(
        tmp_path / "pets", {"train": {"cat": ["rgb.png"], "dog": ["rgb.png"]}, "test": {"cat": ["rgb.png"]}}
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    half = np.zeros((8, 8, 3), dtype=np.uint8)
    half[:4] = 200
    Image.fromarray(half).save(folder / "train" / "cat" / "turned.png", exif=exif)
    picture(200).quantize(4).save(folder / "train" / "cat" / "palette.gif")
    for mode, name in (("L", "grey.png"), ("RGBA", "alpha.png"), ("CMYK", "ink.jpg")):
        picture(200).convert(mode).save(folder / "train" / "cat" / name)
    split = load_image_splits(str(folder))[0]
    if on_demand:
        dataset = LazyImageDataset(split, transform=CenterCrop(8, (0, 0, 0), (1, 1, 1)))
        images = (dataset.__getitems__(range(6))["pixel_values"] * 255).round().int()
    else:
        images = ImageDataset.from_split(split, image_size=8, **FLAT).images[:6].int()
    alpha, grey, ink, palette, _, turned = images  # in the order of their names
    assert all((image == 200).all() for image in (alpha, grey, palette))
    assert (ink - 200).abs().max() <= 2
    assert (turned[:, :, :4] == 0).all() and (turned[:, :, 4:] == 200).all()


def test_default_evaluation_split_is_test_before_validation(tmp_path):
    splits = ("train", "validation", "test")
    folder = parquet_folder(tmp_path / "pets", {"image": IMAGE, "label": ANIMALS}, {"label": [0, 1]}, splits)
    assert load(folder, tmp_path)[1].name.endswith("'test'")
    assert load(folder, tmp_path, eval_split="validation")[1].name.endswith("'validation'")


def test_evaluation_needs_no_training_split(tmp_path):
    features = {"image": IMAGE, "label": ANIMALS}
    folder = parquet_folder(tmp_path / "pets", features, {"label": [0, 1]}, ("test",))
    train, test = load(folder, tmp_path, train_split=None)
    assert train is None and len(test) == 2


def test_slices_of_a_split():
    train, test = load_image_splits("digits", train_split="train[:90%]", eval_split="train[90%:]")
    assert (len(train), len(test)) == (1293, 144)
    whole = load_image_splits("digits")[0].labels()
    assert sorted(train.labels().tolist() + test.labels().tolist()) == sorted(whole.tolist())
    assert len(set(test.labels().tolist())) == 10
    assert train.name == "digits, split 'train[:90%]'"


def test_slices_of_rows_sorted_by_class_hold_every_class(tmp_path):
    labels = [0] * 20 + [1] * 20
    folder = parquet_folder(tmp_path / "sorted", {"image": IMAGE, "label": ANIMALS}, {"label": labels})
    train, test = load(folder, tmp_path, train_split="train[:75%]", eval_split="train[75%:]")
    assert set(train.labels()) == set(test.labels()) == {0, 1} and (len(train), len(test)) == (30, 10)


@pytest.mark.parametrize("spec", ["train[:10", "train[:x]", "train[5000:]"])
def test_slices_that_are_none(spec):
    with pytest.raises(ValueError, match=r"train_split: .*train\["):
        load_image_splits("digits", train_split=spec)


# ---- Columns and classes -------------------------------------------------------------------------


TWO_LABELS = {"image": IMAGE, "fine": ANIMALS, "coarse": ClassLabel(names=["pet"])}


def test_label_column_among_several(tmp_path):
    folder = parquet_folder(tmp_path / "pets", TWO_LABELS, {"fine": [0, 1], "coarse": [0, 0]})
    for arguments in ({"label_column": "fine"}, {"class_names": ["cat", "dog"]}):
        assert load(folder, tmp_path, **arguments)[0].label_column == "fine"
    for arguments in ({}, {"class_names": ["dog", "emu"]}):
        with pytest.raises(ValueError, match="several .* Set label_column. Candidates: 'fine', 'coarse'"):
            load(folder, tmp_path, **arguments)


def test_expected_classes_are_matched_by_name(tmp_path):
    folder = parquet_folder(tmp_path / "pets", TWO_LABELS, {"fine": [0, 1], "coarse": [0, 0]})
    for names, labels in ((["dog", "cat"], [1, 0]), (["ant", "cat", "dog"], [1, 2]), (["cat", "emu"], [0, 1])):
        split = load(folder, tmp_path, label_column="fine", class_names=names)[1]
        assert split.class_names == (names if "emu" not in names else ["cat", "dog"])
        assert split.labels().tolist() == labels
    split = load(folder, tmp_path, label_column="fine")[1].renumbered(["emu", "dog", "cat"], [2, 1])
    assert split.labels().tolist() == [2, 1]


def test_a_column_named_label_comes_first(tmp_path):
    features = {"image": IMAGE, "species": ANIMALS, "label": ANIMALS}
    folder = parquet_folder(tmp_path / "pets", features, {"species": [0, 1], "label": [1, 0]})
    assert load(folder, tmp_path)[0].label_column == "label"


def test_whole_numbers_as_labels(tmp_path):
    folder = parquet_folder(tmp_path / "a", {"image": IMAGE, "labels": Value("int8")}, {"labels": [0, 3]})
    with pytest.warns(UserWarning, match="'labels' are 0, 3, .* mapped to the 2 classes 0 to 1"):
        train, test = load(folder, tmp_path)
    assert train.class_names == test.class_names == ["0", "3"] and test.labels().tolist() == [0, 1]
    folder = parquet_folder(tmp_path / "b", {"image": IMAGE, "kind": Value("int64")}, {"kind": [0, 1]})
    assert load(folder, tmp_path, label_column="kind")[0].class_names == ["0", "1"]
    with pytest.raises(ValueError, match="no column holds class labels. .* Candidates: 'kind'"):
        load(folder, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"label_column": "lable"},
            "label_column: .* no column 'lable'. Did you mean 'label'\\? Columns: 'image', 'label', 'text'",
        ),
        ({"image_column": "imgae"}, "image_column: .* has no column 'imgae'. Did you mean 'image'\\?"),
        ({"label_column": "image"}, "label_column: column 'image' .* is Image, .* Candidates: 'label', 'text'"),
        ({"image_column": "label"}, "image_column: column 'label' .* is ClassLabel, not an image.* 'image'"),
        ({"train_split": "trian"}, "train_split: .* has no split 'trian'. It has: train, test"),
        ({"eval_split": "dev"}, "eval_split: .* has no split 'dev'"),
        ({"train_split": "train[:0]"}, "train_split: .*split 'train\\[:0\\]' is empty"),
    ],
)
def test_wrong_keys(tmp_path, arguments, message):
    features = {"image": IMAGE, "label": ANIMALS, "text": Value("string")}
    folder = parquet_folder(tmp_path / "pets", features, {"label": [0, 1], "text": ["a", "b"]})
    with pytest.raises(ValueError, match=message):
        load(folder, tmp_path, **arguments)


def test_image_column_must_be_clear(tmp_path):
    folder = parquet_folder(tmp_path / "a", {"x": IMAGE, "y": IMAGE, "label": ANIMALS}, {"label": [0, 1]})
    with pytest.raises(ValueError, match="several columns hold images: 'x', 'y'. Set image_column"):
        load(folder, tmp_path)
    assert load(folder, tmp_path, image_column="y")[0].image_column == "y"
    folder = parquet_folder(tmp_path / "b", {"label": ANIMALS}, {"label": [0]})
    with pytest.raises(ValueError, match="no column holds images"):
        load(folder, tmp_path)


def test_no_evaluation_split(tmp_path):
    folder = parquet_folder(tmp_path / "pets", {"image": IMAGE, "label": ANIMALS}, {"label": [0]}, ("train",))
    with pytest.raises(ValueError, match="eval_split: .* none of the splits .* It has: train. Set eval"):
        load(folder, tmp_path)


def bytes_folder(folder, columns, splits=("train", "test"), **features):
    """A folder of Parquet files as pandas writes them; columns: {split: {name: values}}."""
    folder.mkdir()
    for split in splits:
        features = datasets.Features(features) if features else None
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")
    return str(folder)


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: {"bytes": data, "path": None}])
def test_bytes_columns(tmp_path, monkeypatch, wrap):
    """Also in a folder whose name `datasets` takes for that of a reader."""
    monkeypatch.chdir(tmp_path)
    columns = {"image": [wrap(encoded(picture(i))) for i in range(2)], "label": ["dog", "cat"]}
    bytes_folder(tmp_path / "pandas", columns)
    folder = "pandas"
    split = load(folder, tmp_path)[0]
    assert (split.image_column, split.class_names, split.labels().tolist()) == ("image", ["cat", "dog"], [1, 0])
    assert ImageDataset.from_split(split, image_size=8, **FLAT).images[:, 0, 0, 0].tolist() == [0, 1]
    stream = open_streams(folder)[0]
    assert stream.class_names == ["cat", "dog"]
    samples = [sample for unit in range(len(stream.shards.sizes)) for sample in stream.shards.read(unit, np.arange(2))]
    assert [(cell["bytes"], label) for cell, label in samples] == [(encoded(picture(i)), 1 - i) for i in range(2)]


@pytest.mark.parametrize("streaming", [False, True])
def test_text_labels(tmp_path, streaming):
    open_splits = (lambda name, **more: open_streams(name, **more)) if streaming else load_image_splits
    features = {"image": IMAGE, "label": Value("string")}
    folder = parquet_folder(tmp_path / "pets", features, {"label": ["dog", "ant", "cat"]})
    assert open_splits(folder)[0].class_names == ["ant", "cat", "dog"]
    parquet_folder(tmp_path / "pets", features, {"label": ["dog", "bee"]}, ("test",))
    with pytest.raises(ValueError, match="'label' of .*test.* has classes that .*train.* lacks: 'bee'"):
        open_splits(folder)
    assert open_splits(folder, train_split=None, class_names=["bee", "cow", "dog"])[1].class_names[1] == "cow"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("labels", [[1, 2, 4], [100, 7, 9]])
def test_numbers_that_do_not_start_at_0(tmp_path, streaming, labels):
    folder = parquet_folder(tmp_path / "p", {"image": IMAGE, "label": Value("int64")}, {"label": labels * 2})
    with pytest.warns(UserWarning, match="not 0 to 2. They are mapped to the 3 classes"):
        split = (open_streams if streaming else load_image_splits)(folder)[0]
    assert split.class_names == [str(label) for label in sorted(labels)]
    if streaming:
        assert [label for _, label in split.shards.read(0, np.arange(3))] == np.argsort(np.argsort(labels)).tolist()
    else:
        assert split.labels().tolist() == np.argsort(np.argsort(labels)).tolist() * 2


def test_numbers_of_a_models_classes(tmp_path):
    """A test set may lack some numbers, and those that are there keep their meaning."""
    folder = parquet_folder(tmp_path / "p", {"image": IMAGE, "label": Value("int64")}, {"label": [1, 2]})
    for names in (["ant", "bee", "cat"], ["LABEL_0", "LABEL_1", "LABEL_2"], ["0", "1", "2"]):
        split = load(folder, tmp_path, train_split=None, class_names=names)[1]
        assert split.class_names == names and split.labels().tolist() == [1, 2]
    assert load(folder, tmp_path, train_split=None, class_names=["1", "2", "4"])[1].labels().tolist() == [0, 1]


@pytest.mark.parametrize("feature", [Value("int64"), Value("string"), ClassLabel(names=["7"]), ANIMALS])
@pytest.mark.parametrize("streaming", [False, True])
def test_one_class(tmp_path, feature, streaming):
    value = 0 if isinstance(feature, ClassLabel) else "7" if feature.dtype == "string" else 7
    folder = parquet_folder(tmp_path / "p", {"image": IMAGE, "label": feature}, {"label": [value] * 3})
    if streaming and feature is ANIMALS:
        return  # the labels are not read
    with pytest.raises(ValueError, match="'train' has one class .*nothing to learn"):
        (open_streams if streaming else load_image_splits)(folder)


def test_a_parquet_file_without_labels(tmp_path):
    folder = bytes_folder(tmp_path / "p", {"image": [encoded(picture())]}, image=Value("binary"))
    assert [(split.has_labels, split.labels().tolist()) for split in load(folder, tmp_path)] == [(False, [-100])] * 2


# ---- Orders of class names -----------------------------------------------------------------------


def ordered_folder(folder, names, test="test"):
    """Each split's file says its own order of the class names; its rows are the classes in the order of `names`."""
    for split, own in names.items():
        features = {"image": IMAGE, "label": ClassLabel(names=own)}
        parquet_folder(folder, features, {"label": list(range(len(own)))}, (split,))
    return str(folder)


def test_each_splits_own_order(tmp_path):
    folder = ordered_folder(tmp_path / "p", {"train": ["ant", "bee", "cat"], "test": ["cat", "ant", "bee"]})
    train, test = load(folder, tmp_path)
    assert train.class_names == test.class_names == ["ant", "bee", "cat"]
    assert (train.labels().tolist(), test.labels().tolist()) == ([0, 1, 2], [2, 0, 1])
    assert load(folder, tmp_path, eval_split="test[:67%]")[1].class_names == ["ant", "bee", "cat"]
    train, test = open_streams(folder)
    assert [label for _, label in test.shards.read(0, np.arange(3))] == [2, 0, 1]
    assert [label for _, label in train.shards.read(0, np.arange(3))] == [0, 1, 2]
    renumbered = test.renumbered(["x", "cat", "bee", "ant"], [3, 2, 1])
    assert [label for _, label in renumbered.shards.read(0, np.arange(3))] == [1, 3, 2]
    assert renumbered.class_names == ["x", "cat", "bee", "ant"]


@pytest.mark.parametrize("streaming", [False, True])
def test_unknown_names_in_another_split(tmp_path, streaming):
    folder = ordered_folder(tmp_path / "p", {"train": ["ant", "bee"], "test": ["ape", "bat"]})
    with pytest.raises(ValueError, match="test.* has classes that .*train.* lacks: 'ape', 'bat'. .* by name"):
        (open_streams if streaming else load_image_splits)(folder)


def test_orders_within_a_split(tmp_path):
    names = {"train-00000-of-00002": ["ant", "bee"], "train-00001-of-00002": ["bee", "ant"], "test": ["ant", "bee"]}
    folder = tmp_path / "p"
    folder.mkdir()
    for file, own in names.items():
        features = Features({"image": IMAGE, "label": ClassLabel(names=own)})
        rows = datasets.Dataset.from_dict({"image": [picture()] * 2, "label": ["ant", "bee"]}, features=features)
        rows.to_parquet(folder / f"{file}.parquet")
    with pytest.raises(ValueError, match="files of .*'train', have .* different orders.*streaming: true"):
        load(folder, tmp_path)
    shards = open_streams(str(folder))[0].shards
    assert [label for unit in (0, 1) for _, label in shards.read(unit, np.arange(2))] == [0, 1, 0, 1]


def test_a_card_may_rename_the_classes(tmp_path):
    folder = ordered_folder(tmp_path / "p", {"train": ["0", "1"], "test": ["0", "1"]})
    (tmp_path / "p" / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: label\n    dtype:\n"
        "      class_label:\n        names: {'0': ant, '1': bee}\n---\n"
    )
    assert load(folder, tmp_path)[0].class_names == ["ant", "bee"]
    assert open_streams(folder)[0].class_names == ["ant", "bee"]


@pytest.mark.parametrize(
    ("feature", "labels", "message"),
    [
        (ANIMALS, [0, 1, -1], "column 'label' holds -1 in row 2; -1 marks an unlabelled row.* it: 1"),
        (Value("int64"), [0, -7, -7], "column 'label' holds -7 in row 1; the classes are 0 ... 0.* it: 2"),
        (ANIMALS, [0, None, 1], "column 'label' is empty in row 1. Rows like it: 1"),
    ],
)
def test_labels_that_are_no_class(tmp_path, feature, labels, message):
    folder = parquet_folder(tmp_path / "pets", {"image": IMAGE, "label": feature}, {"label": labels})
    with pytest.raises(ValueError, match=f"split 'train': {message}"):
        load(folder, tmp_path)


def test_class_folders_must_agree(tmp_path):
    splits = {"train": {"cat": ["a.png"], "dog": ["b.png"]}, "test": {"cats": ["c.png"]}}
    folder = image_folder(tmp_path / "pets", splits)
    with pytest.raises(ValueError, match="test has class folders .* lacks: cats. The classes are: cat, dog"):
        load_image_splits(str(folder))


@pytest.mark.parametrize("split", ["train", "test"])
def test_empty_class_folders_are_named(tmp_path, split):
    splits = {name: {"cat": ["a.png"], "dog": ["b.png"]} for name in ("train", "test")}
    splits[split]["dog"] = []
    folder = image_folder(tmp_path / "pets", splits)
    (folder / split / "dog" / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=f"folder .*pets/{split}/dog holds no image.* ends in .*remove the folder"):
        load_image_splits(str(folder))


# ---- What cannot be loaded -----------------------------------------------------------------------


def test_the_hub_does_not_answer(monkeypatch):
    failure = ConnectionError("no route to host")

    def load_dataset(*args, **kwargs):
        raise failure

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="'owner/pets' cannot be .*local folder instead.*no route") as caught:
        load_image_splits("owner/pets")
    assert caught.value.__cause__ is failure


def test_missing_and_empty_folders(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="'./missing' cannot be loaded: there is no such folder"):
        load_image_splits("./missing")
    with pytest.raises(ValueError, match="empty' cannot be loaded: give a folder of Parquet files"):
        load(tmp_path / "empty", tmp_path)
