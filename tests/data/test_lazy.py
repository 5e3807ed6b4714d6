"""LazyImageDataset: batches, determinism, workers, images of every kind, bad images."""

import io
import pickle
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from pictures import encoded, photo, split_of
from PIL import Image
from torch.utils.data import DataLoader, Subset

from hfkd.data import CenterCrop, LazyImageDataset, RandomResizedCrop, collate_batch
from hfkd.data.augment import random_bits

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
EVALUATION = CenterCrop(16, MEAN, STD)
JPEGS = [encoded(photo(24, 32, seed=i), "JPEG", quality=95) for i in range(12)]


def opened(data):
    return Image.open(io.BytesIO(data))


def make(cells=None, transform=None, **arguments):
    cells = JPEGS if cells is None else cells
    split = split_of(*cells, labels=[i % 5 for i in range(len(cells))], class_names="abcde")
    transform = transform or RandomResizedCrop(16, MEAN, STD, auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.3)
    return LazyImageDataset(split, transform=transform, **arguments)


def samples(dataset, **loader_arguments):
    """One pass over a DataLoader: {index: (every tensor of the sample)}."""
    found = {}
    for batch in DataLoader(dataset, **{"batch_size": 4, "collate_fn": collate_batch, **loader_arguments}):
        index = batch.pop("index").tolist()
        found.update(zip(index, zip(*batch.values(), strict=True), strict=True))
    return found


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(x, y) for key in a for x, y in zip(a[key], b[key], strict=True))


# ---- Batches -------------------------------------------------------------------------------------------------------


def test_batch():
    dataset = make(views=2)
    batch = dataset.__getitems__([5, 0, 11])
    assert {key: (value.dtype, tuple(value.shape)) for key, value in batch.items()} == {
        "pixel_values": (torch.float32, (3, 3, 16, 16)),
        "pixel_values_strong": (torch.float32, (3, 3, 16, 16)),
        "labels": (torch.int64, (3,)),
        "index": (torch.int64, (3,)),
    }
    assert batch["index"].tolist() == [5, 0, 11] and batch["labels"].tolist() == [0, 0, 1]
    sample = dataset[11]
    assert all(torch.equal(sample[key], batch[key][2]) for key in batch) and sample.keys() == batch.keys()
    with pytest.raises(IndexError, match="12 is out of range for 12 images"):
        dataset[12]


def test_views_are_the_transform_with_their_own_streams():
    dataset = make(seed=11, views=2)
    dataset.set_epoch(4)
    batch = dataset.__getitems__([3, 9])
    for view, key in enumerate(("pixel_values", "pixel_values_strong")):
        bits = random_bits(11, 4, np.array([9]), view, dataset.transform.draws)[0]
        assert torch.equal(batch[key][1], dataset.transform(opened(JPEGS[9]), bits, view))


def test_strong_view_only_on_demand():
    dataset = make()
    weak = dataset.__getitems__([1, 2])
    assert "pixel_values_strong" not in weak
    dataset.views = 2
    assert torch.equal(dataset.__getitems__([1, 2])["pixel_values"], weak["pixel_values"])


def test_what_the_trainer_reads():
    dataset = make(seed=3)
    assert (dataset.image_size, dataset.mean, dataset.std, dataset.seed, dataset.views) == (16, MEAN, STD, 3, 1)
    assert (dataset.class_names, dataset.num_classes, len(dataset)) == (list("abcde"), 5, 12)
    assert dataset.augmented and not make(transform=EVALUATION).augmented
    assert dataset.epoch == 0 and dataset.num_skipped == 0


# ---- Determinism ---------------------------------------------------------------------------------------------------


def test_samples_do_not_depend_on_batches_order_or_workers():
    dataset = make(views=2)
    expected = samples(dataset)
    assert same(expected, samples(dataset, batch_size=5, shuffle=True))
    assert same(expected, samples(dataset, num_workers=2, shuffle=True))
    part = samples(Subset(dataset, [7, 2]))
    assert same(part, {row: expected[row] for row in (2, 7)})


def test_samples_depend_on_epoch_and_seed():
    dataset = make(views=2)
    first = samples(dataset)
    dataset.set_epoch(1)
    for other in (samples(dataset), samples(make(views=2, seed=1))):
        for view in (0, 1):
            assert not any(torch.equal(first[i][view], other[i][view]) for i in first)
    dataset.set_epoch(0)
    assert same(first, samples(dataset))


def test_evaluation_never_changes():
    dataset = make(transform=EVALUATION)
    before = dataset.__getitems__([4])["pixel_values"]
    dataset.set_epoch(3)
    assert torch.equal(dataset.__getitems__([4])["pixel_values"], before)
    assert torch.equal(make(transform=EVALUATION, seed=5).__getitems__([4])["pixel_values"], before)


def test_persistent_workers_see_the_epoch():
    dataset = make()
    loader = DataLoader(dataset, 4, num_workers=1, persistent_workers=True, collate_fn=collate_batch)
    for epoch in range(2):
        dataset.set_epoch(epoch)
        for batch in loader:
            expected = dataset.__getitems__(batch["index"].tolist())
            assert all(torch.equal(batch[key], expected[key]) for key in expected)


def in_shared_memory(batch):
    return batch["pixel_values"].is_shared()


def test_workers_write_into_shared_memory():
    """Otherwise every batch is copied once more on its way out."""
    assert all(DataLoader(make(), 4, num_workers=1, collate_fn=in_shared_memory))
    assert not any(DataLoader(make(), 4, collate_fn=in_shared_memory))


def test_spawned_workers_share_epoch_and_count():
    """What spawn sends to a worker, without waiting for one to import everything."""
    dataset = make([b"no image", *JPEGS], skip_bad_images=True)
    worker = pickle.loads(ForkingPickler.dumps(dataset))
    dataset.set_epoch(6)
    assert worker.epoch == 6
    assert torch.equal(worker.__getitems__([3])["pixel_values"], dataset.__getitems__([3])["pixel_values"])
    with pytest.warns(UserWarning):
        worker.__getitems__([0])
    assert dataset.num_skipped == 1


# ---- Images of every kind ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
@pytest.mark.parametrize("transform", [EVALUATION, RandomResizedCrop(16, MEAN, STD)])
def test_other_modes_become_rgb(mode, transform):
    image = photo().convert(mode)
    if mode == "RGBA":
        image.putalpha(photo(seed=1).convert("L"))
    data = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    expected = make([encoded(image.convert("RGB"))], transform).__getitems__([0])["pixel_values"]
    assert torch.equal(make([data], transform).__getitems__([0])["pixel_values"], expected)


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(photo(), exif=exif)
    upright = encoded(photo().transpose(Image.Transpose.ROTATE_270))
    assert torch.equal(*(make([data], EVALUATION)[0]["pixel_values"] for data in (turned, upright)))


# ---- Bad images ----------------------------------------------------------------------------------------------------


def with_bad(tmp_path):
    """Ten rows; 3, 4 and 9 are bad."""
    cells = list(JPEGS[:10])
    (tmp_path / "broken.jpg").write_bytes(JPEGS[3][:300])
    cells[3], cells[4] = {"bytes": None, "path": str(tmp_path / "broken.jpg")}, None
    cells[9] = {"bytes": b"no image", "path": "n01440764_10026.JPEG"}
    return cells


def test_bad_images_are_named(tmp_path):
    dataset = make(with_bad(tmp_path))
    message = r"pets, split 'train', row 3, file .*broken.jpg: the image cannot be decoded: .*skip_bad_images: true"
    with pytest.raises(ValueError, match=message):
        dataset.__getitems__([0, 3])
    with pytest.raises(ValueError, match="row 9, file n01440764_10026.JPEG"):
        dataset[9]
    with pytest.raises(ValueError, match="row 4: there is no image"):
        dataset[4]


def test_bad_images_are_named_from_a_worker(tmp_path):
    batches = iter(DataLoader(make(with_bad(tmp_path)), 4, num_workers=1, collate_fn=collate_batch))
    with pytest.raises(ValueError, match="row 3, file .*broken.jpg: the image cannot be decoded"):
        next(batches)
    with pytest.raises(ValueError, match="row 4: there is no image"):
        next(batches)
    with pytest.raises(ValueError, match="row 9"):
        next(batches)
    assert list(batches) == []  # to the end, where the worker stops by itself


@pytest.mark.filterwarnings("ignore:pets")
def test_training_takes_the_next_good_row(tmp_path):
    dataset = make(with_bad(tmp_path), views=2, skip_bad_images=True)
    batch = dataset.__getitems__([3, 0, 4, 9])
    assert batch["index"].tolist() == [5, 0, 5, 0] and batch["labels"].tolist() == [0, 0, 0, 0]
    expected = dataset.__getitems__([5, 0, 5, 0])
    assert all(torch.equal(batch[key], expected[key]) for key in expected)
    assert dataset.num_skipped == 3


@pytest.mark.filterwarnings("ignore:pets")
def test_evaluation_leaves_the_row_out(tmp_path):
    dataset = make(with_bad(tmp_path), EVALUATION, skip_bad_images=True)
    batch = dataset.__getitems__([2, 3, 9])
    assert batch["index"].tolist() == [2, 3, 9] and batch["labels"].tolist() == [2, -100, -100]
    assert (batch["pixel_values"][1:] == 0).all() and (batch["pixel_values"][0] != 0).any()
    assert dataset.num_skipped == 2
    assert dataset.__getitems__([9])["labels"].tolist() == [-100] and dataset.num_skipped == 2


def test_bad_images_are_counted_once_over_workers(tmp_path):
    dataset = make(with_bad(tmp_path), EVALUATION, skip_bad_images=True)
    loader = DataLoader(dataset, 3, num_workers=2, collate_fn=collate_batch)
    for _ in range(2):
        labels = torch.cat([batch["labels"] for batch in loader])
        assert (labels == -100).nonzero().flatten().tolist() == [3, 4, 9]
        assert dataset.num_skipped == 3


def test_each_bad_image_is_warned_of_once(tmp_path):
    dataset = make(with_bad(tmp_path), skip_bad_images=True)
    with pytest.warns(UserWarning) as caught:
        dataset.__getitems__([3, 9])
        dataset.__getitems__([4, 9])
    assert [f"row {row}" in str(warning.message) for row, warning in zip((3, 4, 9), caught, strict=True)] == [True] * 3


@pytest.mark.filterwarnings("ignore:pets")
def test_training_gives_up_where_nothing_can_be_read():
    dataset = make([b"no image"] * 3, skip_bad_images=True)
    with pytest.raises(ValueError, match="row .* cannot be decoded"):
        dataset.__getitems__([1])
