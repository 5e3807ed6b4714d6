"""Data sets without labels, and batches of images with and without labels."""

import datasets
import pytest
import torch
from helpers import images
from pictures import encoded, photo
from torch.utils.data import DataLoader

from hfkd.data import (
    CenterCrop,
    MixedImageDataset,
    StreamingImageDataset,
    collate_batch,
    load_image_splits,
    open_streams,
)
from hfkd.errors import HfkdError
from hfkd.models.base import CIFAR_MEAN, CIFAR_STD

LOADERS = pytest.mark.parametrize("load", [load_image_splits, open_streams])


def picture(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    photo(24, 32, seed).save(path)


def described(split):
    return split.split, split.has_labels, split.class_names


@LOADERS
def test_a_flat_folder_has_no_labels_and_holds_one_of_20_out(tmp_path, load):
    for number in range(40):
        picture(tmp_path / f"{number}.png", number)
    train, held_out = load(str(tmp_path))
    assert described(train) == ("train[:38]", False, []) and described(held_out) == ("train[38:]", False, [])


@LOADERS
def test_a_declared_folder_is_read_whatever_its_folders_are_called(tmp_path, load):
    for name in ("train/2021/05/a.png", "train/b.png", "train/cats/c.png", "val/cats/d.png"):
        picture(tmp_path / name)
    train, held_out = load(str(tmp_path), label_column="none")
    assert (train.split, held_out.split) == ("train", "val") and not train.has_labels and not held_out.has_labels
    rows = [split.num_rows if load is open_streams else len(split) for split in (train, held_out)]
    assert rows == [3, 1]
    with pytest.raises(HfkdError, match="has no split 'valley'. It has: train, val"):
        load(str(tmp_path), label_column="none", eval_split="valley")


@LOADERS
def test_training_images_without_labels_beside_labelled_evaluation_images(tmp_path, load):
    for name in ("train/a.png", "train/b.png", "val/bee/c.png", "val/ant/d.png", "test/e.png"):
        picture(tmp_path / name)
    train, labelled = load(str(tmp_path))
    assert described(train) == ("train", False, []) and described(labelled) == ("val", True, ["ant", "bee"])
    assert described(load(str(tmp_path), eval_split="test")[1]) == ("test", False, [])


@LOADERS
def test_parquet_without_a_column_of_labels(tmp_path, load):
    columns = {"picture": [{"bytes": encoded(photo(seed=k)), "path": None} for k in range(4)], "size": [0.5] * 4}
    features = datasets.Features({"picture": datasets.Image(), "size": datasets.Value("float32")})
    rows = datasets.Dataset.from_dict(columns, features=features)
    for split in ("train", "test"):
        rows.to_parquet(str(tmp_path / f"{split}.parquet"))
    train, test = load(str(tmp_path))
    assert described(train) == ("train", False, []) and described(test) == ("test", False, [])
    if load is open_streams:
        spec = {"image_size": 16, "mean": CIFAR_MEAN, "std": CIFAR_STD}
        stream = StreamingImageDataset(test, transform=CenterCrop(**spec))
        stream.shard(1, 3, batch_size=2, drop_last=False)  # its second image only fills up
        assert [batch["labels"].tolist() for batch in stream] == [[-100, -100]]
        stream.shard(2, 3, batch_size=2, drop_last=False)
        assert [batch["labels"].tolist() for batch in stream] == [[stream.UNCOUNTED, stream.UNCOUNTED]]


@LOADERS
def test_an_empty_folder(tmp_path, load):
    (tmp_path / "photos").mkdir()
    with pytest.raises(HfkdError, match="photos.* cannot be (loaded|opened)"):
        load(str(tmp_path / "photos"))
    (tmp_path / "photos" / "train").mkdir()
    picture(tmp_path / "photos" / "test" / "a.png")
    with pytest.raises(HfkdError, match="photos/train holds no image: no file ends in one of"):
        load(str(tmp_path / "photos"), label_column="none")


# ---- Mixed batches -------------------------------------------------------------------------------------------------


def mixed(labelled=12, unlabelled=20, added=3, batch_size=6):
    others = images(unlabelled, seed=1)
    others.labels[:] = 7  # which nobody reads
    return MixedImageDataset(images(labelled), others, unlabelled_images=added, batch_size=batch_size)


def batches(dataset, epoch=0, **settings):
    dataset.set_epoch(epoch)
    generator = torch.Generator().manual_seed(epoch)
    size = dataset.labelled_images
    return list(DataLoader(dataset, size, True, collate_fn=collate_batch, generator=generator, **settings))


def test_every_batch_ends_in_images_without_labels():
    dataset = mixed()
    for batch in batches(dataset):
        assert len(batch["pixel_values"]) == 6 and batch["labels"][3:].tolist() == [-100] * 3
        assert (batch["index"][:3] < 12).all() and (batch["index"][3:] >= 12).all()
        assert batch["labels"][:3].tolist() == (batch["index"][:3] % 10).tolist()
        alone = dataset.unlabelled.__getitems__((batch["index"][3:] - 12).tolist())
        assert torch.equal(batch["pixel_values"][3:], alone["pixel_values"])


def test_images_without_labels_come_equally_often():
    dataset = mixed()
    seen = torch.cat([batch["index"][3:] - 12 for epoch in range(5) for batch in batches(dataset, epoch)])
    assert len(seen) == 60 and torch.bincount(seen).tolist() == [3] * 20
    first, second = seen[:20], seen[20:40]
    assert not torch.equal(first, second)


def test_workers_do_not_change_mixed_batches():
    here, there = batches(mixed(), 1), batches(mixed(), 1, num_workers=1)
    for one, other in zip(here, there, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_bad_images_of_both_kinds_are_counted():
    dataset = mixed()
    dataset.labelled.bad_rows[3] = dataset.unlabelled.bad_rows[4] = True
    assert dataset.bad_rows.nonzero().flatten().tolist() == [3, 16] and dataset.num_skipped == 2


def test_what_cannot_be_mixed():
    with pytest.raises(
        HfkdError, match="A batch of 6 images would hold 6 without labels: give another unlabelled_share"
    ):
        mixed(added=6)
    with pytest.raises(HfkdError, match="must have the same size"):
        MixedImageDataset(images(4), images(4, size=16), unlabelled_images=1, batch_size=2)
