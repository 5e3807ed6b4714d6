"""ImageDataset: batches, normalisation, determinism, workers, devices."""

import numpy as np
import pytest
import torch
from pictures import encoded, pixels, split_of
from PIL import Image
from torch.utils.data import DataLoader, Subset

from hfkd.data import ImageDataset, NoAugmentation, StrongAugmentation, WeakAugmentation, collate_batch
from hfkd.data.augment import random_bits

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def make(count=48, transform=None, **arguments):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)
    arguments = {"mean": MEAN, "std": STD, "transform": transform or WeakAugmentation(), **arguments}
    return ImageDataset(images, torch.arange(count) % 5, list("abcde"), **arguments)


def samples(dataset, **loader_arguments):
    """One pass over a DataLoader: {index: (weak view, strong view, label)}."""
    arguments = {"batch_size": 8, "collate_fn": collate_batch, **loader_arguments}
    return by_index(DataLoader(dataset, **arguments))


def by_index(loader):
    found = {}
    for batch in loader:
        views = zip(batch["pixel_values"], batch["pixel_values_strong"], batch["labels"], strict=True)
        found.update(zip(batch["index"].tolist(), views, strict=True))
    return found


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(x, y) for key in a for x, y in zip(a[key], b[key], strict=True))


# ---- Batches -------------------------------------------------------------------------------------


def test_batch():
    batch = make(views=2).__getitems__([5, 0, 47])
    assert {key: (value.dtype, tuple(value.shape)) for key, value in batch.items()} == {
        "pixel_values": (torch.float32, (3, 3, 16, 16)),
        "pixel_values_strong": (torch.float32, (3, 3, 16, 16)),
        "labels": (torch.int64, (3,)),
        "index": (torch.int64, (3,)),
    }
    assert batch["index"].tolist() == [5, 0, 47]
    assert batch["labels"].tolist() == [0, 0, 2]


def test_strong_view_only_on_demand():
    dataset = make()
    weak = dataset.__getitems__([1, 2])
    assert "pixel_values_strong" not in weak
    dataset.views = 2
    assert torch.equal(dataset.__getitems__([1, 2])["pixel_values"], weak["pixel_values"])


def test_normalisation():
    dataset = make(transform=NoAugmentation())
    pixels = dataset.images[:4].double() / 255
    expected = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    result = dataset.__getitems__([0, 1, 2, 3])["pixel_values"]
    torch.testing.assert_close(result, expected.float(), atol=1e-6, rtol=0)


def test_views_are_the_transforms_with_their_own_streams():
    dataset = make(seed=11, views=2)
    dataset.set_epoch(4)
    rows = np.array([3, 9])
    batch = dataset.__getitems__(rows)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    for key, transform, view in (
        ("pixel_values", WeakAugmentation(), 0),
        ("pixel_values_strong", StrongAugmentation(WeakAugmentation()), 1),
    ):
        expected = transform(dataset.images[rows], random_bits(11, 4, rows, view, transform.draws))
        assert torch.equal(((batch[key] * std + mean) * 255).round().to(torch.uint8), expected)


def test_single_samples():
    dataset = make(views=2)
    batch = dataset.__getitems__([7])
    for i in (7, 7 - len(dataset)):
        sample = dataset[i]
        assert sample.keys() == batch.keys()
        assert all(torch.equal(sample[key], batch[key][0]) for key in batch)
    with pytest.raises(IndexError, match="48 is out of range for 48 images"):
        dataset[48]
    assert len(list(dataset)) == 48


def test_subset_of_a_dataset():
    loader = DataLoader(Subset(make(), [40, 3, 9]), batch_size=3, collate_fn=collate_batch)
    assert next(iter(loader))["index"].tolist() == [40, 3, 9]


def test_classes():
    dataset = make()
    assert (dataset.num_classes, dataset.class_names, len(dataset)) == (5, list("abcde"), 48)


def test_what_the_trainer_reads():
    dataset = make(seed=3, views=2)
    assert (dataset.image_size, dataset.mean, dataset.std, dataset.seed, dataset.views) == (16, MEAN, STD, 3, 2)
    assert dataset.augmented and not make(transform=NoAugmentation()).augmented
    assert dataset.epoch == 0 and dataset.num_skipped == 0
    dataset.set_epoch(7)
    assert dataset.epoch == 7


def test_bad_images_of_a_split_are_left_out_and_counted():
    split = split_of(encoded(Image.fromarray(pixels())), b"no image", encoded(Image.fromarray(255 - pixels())))
    arguments = {"image_size": 8, "transform": NoAugmentation(), "mean": MEAN, "std": STD}
    with pytest.raises(ValueError, match="row 1: the image cannot be decoded"):
        ImageDataset.from_split(split, **arguments)
    with pytest.warns(UserWarning, match="1 of 3 images are left out"):
        dataset = ImageDataset.from_split(split, skip_bad_images=True, **arguments)
    assert (len(dataset), dataset.num_skipped) == (2, 1)
    assert torch.equal(dataset.images[1], 255 - dataset.images[0])


# ---- Determinism ---------------------------------------------------------------------------------


def test_samples_do_not_depend_on_batches_order_or_workers():
    dataset = make(views=2)
    expected = samples(dataset)
    assert same(expected, samples(dataset, batch_size=17))
    assert same(expected, samples(dataset, shuffle=True))
    assert same(expected, samples(dataset, num_workers=2, shuffle=True))
    assert same(expected, samples(make(views=2)))


def test_samples_depend_on_epoch_and_seed():
    dataset = make(views=2)
    first = samples(dataset)
    dataset.set_epoch(1)
    second = samples(dataset)
    other_seed = samples(make(views=2, seed=1))
    for other in (second, other_seed):
        for view in (0, 1):
            changed = [not torch.equal(first[i][view], other[i][view]) for i in first]
            assert np.mean(changed) > 0.9
    dataset.set_epoch(0)
    assert same(first, samples(dataset))


def test_persistent_workers_see_the_epoch():
    dataset = make(views=2)
    arguments = {"num_workers": 2, "persistent_workers": True, "collate_fn": collate_batch}
    loader = DataLoader(dataset, batch_size=8, **arguments)
    for epoch in range(2):
        dataset.set_epoch(epoch)
        found = by_index(loader)
        assert same(found, samples(dataset))


def test_evaluation_never_changes():
    dataset = make(transform=NoAugmentation())
    before = dataset.__getitems__([4])["pixel_values"]
    dataset.set_epoch(3)
    assert torch.equal(dataset.__getitems__([4])["pixel_values"], before)


# ---- Devices -------------------------------------------------------------------------------------


def test_a_batch_needs_no_value_from_the_device():
    """A meta tensor has no values: whatever would wait for a CUDA device to give one fails here."""
    dataset = make(views=2).to("meta")
    batch = dataset.__getitems__(list(range(48)))
    assert dataset.device.type == "meta"
    assert {value.device.type for value in batch.values()} == {"meta"}
    assert batch["pixel_values_strong"].shape == (48, 3, 16, 16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_gives_the_same_batches_without_waiting():
    expected = make(count=512, views=2).__getitems__(list(range(512)))
    dataset = make(count=512, views=2).to("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch = dataset.__getitems__(list(range(512)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(batch[key].cpu(), expected[key]) for key in expected)


# ---- Errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(4, 3, 8, 8)}, r"\(N, 3, H, W\) uint8, but are \(4, 3, 8, 8\) torch.float32"),
        ({"images": torch.zeros(4, 8, 8, dtype=torch.uint8)}, r"but are \(4, 8, 8\)"),
        ({"images": torch.zeros(0, 3, 8, 8, dtype=torch.uint8)}, "no images"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, r"labels must be \(4,\) int64.*but are \(5,\)"),
        ({"labels": torch.zeros(4)}, "torch.float32"),
        ({"mean": (0.5,)}, r"mean and std must be three numbers each.*\(0.5,\)"),
        ({"std": (0.5, 0.0, 0.5)}, "std positive"),
        ({"views": 3}, "views must be 1 or 2, but is 3"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {
        "images": torch.zeros(4, 3, 8, 8, dtype=torch.uint8),
        "labels": torch.zeros(4, dtype=torch.int64),
        "class_names": ["a"],
        "transform": NoAugmentation(),
        "mean": MEAN,
        "std": STD,
    }
    with pytest.raises(ValueError, match=message):
        ImageDataset(**{**arguments, **change})
