"""Local folders as they come: names of splits, what lies beside them, tables of labels, files that are none."""

import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hfkd.data import load_image_splits, open_streams


def picture(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), value, dtype=np.uint8)).save(path)


def class_folders(folder, splits=("train", "test"), names=("cat", "dog")):
    for split in splits:
        for name in names:
            picture(folder / split / name / "a.png")
    return folder


def load(folder, **arguments):
    return load_image_splits(str(folder), **arguments)


def facts(splits):
    return [(split.class_names, split.labels().tolist()) for split in splits]


@pytest.mark.parametrize(
    ("train", "test"),
    [("Train", "Test"), ("Training", "Testing"), ("TRAIN", "Validation"), ("train", "VAL"), ("training", "valid")],
)
@pytest.mark.parametrize("open_splits", [load, lambda folder: open_streams(str(folder))])
def test_names_of_splits(tmp_path, train, test, open_splits):
    train, test = open_splits(class_folders(tmp_path, (train, test)))
    assert train.class_names == test.class_names == ["cat", "dog"]
    assert (train.split, test.split.startswith(("test", "val"))) == ("train", True)


def test_other_names_can_be_asked_for(tmp_path):
    class_folders(tmp_path, ("train", "Validation", "dev"))
    assert load(tmp_path, eval_split="dev")[1].split == "dev"
    assert load(tmp_path, eval_split="val")[1].split == "validation"
    with pytest.raises(ValueError, match="eval_split: .* has no split 'fit'. It has: train, validation"):
        load(tmp_path, eval_split="fit")
    with pytest.raises(ValueError, match="two folders for the split 'train': Train and train"):
        load(class_folders(tmp_path, ("Train",)))


def test_what_lies_beside_the_splits_does_not_matter(tmp_path):
    class_folders(tmp_path)
    for name in ("raw/2024-05", "annotations/xmls", "runs/base/teacher", "runs/base/checkpoint-3", ".git/objects"):
        (tmp_path / name).mkdir(parents=True)
    os.mkfifo(tmp_path / "raw" / "pipe.png")
    assert facts(load(tmp_path)) == [(["cat", "dog"], [0, 1])] * 2


def test_splits_that_are_not_asked_for_are_not_read(tmp_path):
    class_folders(tmp_path, ("train", "test", "val"))
    (tmp_path / "test" / "images").mkdir()
    assert load(tmp_path, eval_split="val")[1].labels().tolist() == [0, 1]


def test_hidden_files_are_skipped(tmp_path):
    class_folders(tmp_path)
    for name in ("train/cat/._a.png", "train/.cache/b.png", "train/cat/.thumbs/c.png", "train/__MACOSX/cat/._d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"Mac OS X")
    (tmp_path / "train" / ".DS_Store").write_bytes(b"")
    assert facts(load(tmp_path)) == [(["cat", "dog"], [0, 1])] * 2


def test_class_folders_without_splits(tmp_path):
    for name in ("train", "cat"):
        picture(tmp_path / name / "a.png")
    (tmp_path / "runs" / "base").mkdir(parents=True)
    train, test = load(tmp_path, eval_split="train[:50%]")
    assert train.class_names == ["cat", "train"] and train.labels().tolist() == [0, 1] and len(test) == 1


def tiny_imagenet(folder):
    for name in ("n01", "n02"):
        picture(folder / "train" / name / "images" / f"{name}_0.JPEG")
        (folder / "train" / name / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t0\t7\t7\n")
    for i in range(2):
        picture(folder / "val" / "images" / f"val_{i}.JPEG")
    (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t7\t7\nval_1.JPEG\tn01\t0\t0\t7\t7\n")
    picture(folder / "test" / "images" / "test_0.JPEG")
    (folder / "wnids.txt").write_text("n02\nn01\n")
    return folder


def test_tiny_imagenet(tmp_path):
    tiny_imagenet(tmp_path)
    assert facts(load(tmp_path)) == [(["n01", "n02"], [0, 1]), (["n01", "n02"], [1, 0])]
    assert load(tmp_path)[1].split == "val"
    assert facts(load(tmp_path, train_split=None, eval_split="val")[1:]) == [(["n01", "n02"], [1, 0])]
    assert [label for unit in (0, 1) for _, label in open_streams(str(tmp_path))[1].shards.read(unit, [0])] == [1, 0]
    with pytest.raises(ValueError, match="eval_split: .*/test holds no labels"):
        load(tmp_path, eval_split="test")
    shutil.rmtree(tmp_path / "train")
    assert facts(load(tmp_path, train_split=None)[1:]) == [(["n01", "n02"], [1, 0])]


# ---- Files that are none -----------------------------------------------------------------------------------------


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def make_link(path):
    path.symlink_to("nowhere.png")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (os.mkfifo, "is a pipe, a device, a socket"),
        (make_socket, "is a pipe, a device, a socket"),
        (lambda path: path.symlink_to("/dev/zero"), "is a pipe, a device, a socket"),
        (make_link, "is a link to nowhere.png, which does not exist"),
        (lambda path: path.symlink_to(path.name), "is a link to"),
    ],
)
def test_what_is_no_file(tmp_path, monkeypatch, make, message, streaming):
    class_folders(tmp_path)
    monkeypatch.chdir(tmp_path / "train" / "cat")  # names of sockets are short
    make(Path("b.png"))
    with pytest.raises(ValueError, match=f"/train/cat/b.png {message}"):
        (open_streams if streaming else load_image_splits)(str(tmp_path))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_pipe_in_place_of_a_parquet_file(tmp_path, streaming):
    os.mkfifo(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="train.parquet is a pipe"):
        (open_streams if streaming else load_image_splits)(str(tmp_path))


def test_a_name_that_is_not_utf8(tmp_path):
    class_folders(tmp_path)
    os.rename(tmp_path / "train/cat/a.png", os.fsencode(tmp_path / "train/cat") + b"/\xff.png")
    with pytest.raises(ValueError, match="cat holds a name that is not UTF-8"):
        load(tmp_path)


def test_links_to_folders(tmp_path):
    folder, elsewhere = class_folders(tmp_path / "pets"), tmp_path / "elsewhere"
    picture(elsewhere / "emu" / "a.png")
    (folder / "train" / "emu").symlink_to(elsewhere / "emu")
    assert load(folder)[0].class_names == ["cat", "dog", "emu"]
    (elsewhere / "emu" / "again").symlink_to(elsewhere / "emu")
    with pytest.raises(ValueError, match="emu/again is a link to a folder that it lies in"):
        load(folder)
    (folder / "train" / "fox").symlink_to("nowhere")
    with pytest.raises(ValueError, match="train/fox is a link to nowhere, which does not exist"):
        load(folder)


# ---- Tables of labels --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["metadata.csv", "labels.csv"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_table_in_each_split(tmp_path, table, separator):
    for split in ("train", "test"):
        rows = [("file_name", "label"), ("a.png", "dog"), ("sub/b.png", "cat")]
        for name, _ in rows[1:]:
            picture(tmp_path / split / name)
        text = "\ufeff" + "\n".join(separator.join(row) for row in rows) + "\n"
        (tmp_path / split / table).write_text(text, encoding="utf-8")
    picture(tmp_path / "train" / "unlisted.png")
    assert facts(load(tmp_path)) == [(["cat", "dog"], [1, 0])] * 2
    assert [label for unit in (0, 1) for _, label in open_streams(str(tmp_path))[1].shards.read(unit, [0])] == [1, 0]


def test_one_table_for_the_whole_folder(tmp_path):
    classes = {"train/a.png": "y", "train/b.png": "x", "test/c.png": "x"}
    for name in classes:
        picture(tmp_path / name)
    rows = "".join(f"{name},{label}\n" for name, label in classes.items())
    (tmp_path / "labels.csv").write_text(f"image,class\n{rows}")
    assert facts(load(tmp_path)) == [(["x", "y"], [1, 0]), (["x", "y"], [0])]


def test_a_table_beside_images_without_splits(tmp_path):
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    (tmp_path / "labels.csv").write_text("file_name,label\na.png,2\nb.png,1\n")
    with pytest.warns(UserWarning, match="1, 2, which are not 0 to 1"):
        splits = load(tmp_path, eval_split="train[:50%]")
    assert splits[0].class_names == ["1", "2"] and splits[0].labels().tolist() == [1, 0]
    (tmp_path / "labels.csv").write_text("file_name,label\na.png,2\nc.png,1\n")
    with pytest.raises(ValueError, match="labels.csv names c.png, but there is no file .*Add the file"):
        load(tmp_path, eval_split="train[:50%]")
    (tmp_path / "labels.csv").write_text("file_name,label\na.png,cat\nb.png,\n")
    with pytest.raises(ValueError, match="'label' of .* is empty text in some rows"):
        load(tmp_path, eval_split="train[:50%]")
    (tmp_path / "labels.csv").write_text("file_name,label\na.png\n")
    with pytest.raises(ValueError, match="labels.csv, row 2: it has 1 columns, and the header has 2"):
        load(tmp_path, eval_split="train[:50%]")


def test_class_folders_come_before_a_table_without_labels(tmp_path):
    class_folders(tmp_path)
    (tmp_path / "train" / "metadata.csv").write_text("file_name,photographer\ncat/a.png,Ann\n")
    assert facts(load(tmp_path)) == [(["cat", "dog"], [0, 1])] * 2
