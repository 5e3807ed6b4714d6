"""Streams: every row once whatever the processes and workers, the same again when resumed, and clear ends."""

import io
import os
import warnings

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from datasets import ClassLabel, Features, Value
from hub_stand_in import hub_stand_in
from PIL import Image
from torch.utils.data import DataLoader

from hfkd.data import CenterCrop, LazyImageDataset, RandomResizedCrop, load_image_splits
from hfkd.data.decode import BadImageError
from hfkd.data.shards import open_streams
from hfkd.data.streaming import StreamingImageDataset, buffered_order

NORM = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
CLASSES = ["cat", "dog", "emu"]
PETS = Features({"image": datasets.Image(), "label": ClassLabel(names=CLASSES)})
CARD = """---
dataset_info:
  features:
  - name: image
    dtype: image
  - name: label
    dtype:
      class_label:
        names: {'0': cat, '1': dog, '2': emu}
---
"""
DAMAGED = b"no image at all"
GROUP = 5  # rows of a row group


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """`datasets` leaves locks in its cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def encoded(row):
    """A picture unlike that of any other row."""
    pixels = np.random.default_rng(row).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path, rows, damaged=(), features=PETS, label=lambda row: row % 3, **options):
    """`rows`: a range, numbers of the pictures."""
    cells = [{"bytes": DAMAGED if row in damaged else encoded(row), "path": f"{row}.png"} for row in rows]
    columns = {"image": cells, "label": [label(row) for row in rows]}
    table = datasets.Dataset.from_dict(columns, features=features).with_format("arrow")[:]
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path, row_group_size=GROUP, **options)


def parquet_folder(folder, rows, **options):
    """Two files of training rows, and one to test."""
    half = rows // 2
    write_parquet(folder / "train-00000-of-00002.parquet", range(half), **options)
    write_parquet(folder / "train-00001-of-00002.parquet", range(half, rows), **options)
    write_parquet(folder / "test-00000-of-00001.parquet", range(7), **options)
    return str(folder)


def image_folder(folder, rows, damaged=()):
    for split, number in (("train", rows), ("test", 7)):
        for row in range(number):
            path = folder / split / CLASSES[row * 3 // number] / f"{row:03}.png"  # listed in the order of the rows
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(DAMAGED if row in damaged else encoded(row))
    return str(folder)


KINDS = pytest.mark.parametrize("make", [parquet_folder, image_folder])


def training(name, **arguments):
    arguments = {"seed": 3, "shuffle_buffer_size": 4} | arguments
    return StreamingImageDataset(open_streams(name)[0], transform=RandomResizedCrop(8, **NORM), **arguments)


def evaluation(name, split="train", **arguments):
    """Without augmentation, of the rows of any split."""
    _, stream = open_streams(name, eval_split=split)
    return StreamingImageDataset(stream, transform=CenterCrop(8, **NORM), **arguments)


def batches(dataset, workers=0, rank=0, world_size=1, batch_size=4, drop_last=False):
    dataset.shard(rank, world_size, batch_size, drop_last)
    loader = DataLoader(dataset, batch_size=None, num_workers=workers)
    found = list(loader)
    assert len(found) == len(dataset) == len(loader)
    return found


def indices(found):
    return torch.cat([batch["index"] for batch in found]).tolist()


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# ---- Opening ---------------------------------------------------------------------------------------------------------


@KINDS
def test_open(tmp_path, make):
    name = make(tmp_path / "pets", 23)
    train, test = open_streams(name)
    assert (train.num_rows, test.num_rows) == (23, 7)
    assert (train.name, test.name) == (f"{name}, split 'train'", f"{name}, split 'test'")
    assert train.class_names == test.class_names == CLASSES
    assert open_streams(name, train_split=None)[0] is None
    assert open_streams(name, eval_split="train")[1].num_rows == 23


def test_plain_numbers_as_labels(tmp_path):
    numbers = PETS | {"label": Value("int32")}
    name = parquet_folder(tmp_path / "pets", 6, features=Features(numbers))
    assert open_streams(name)[0].class_names == ["0", "1", "2"]
    name = parquet_folder(tmp_path / "bare", 6, features=Features(numbers), write_statistics=False)
    assert open_streams(name)[0].class_names == ["0", "1", "2"]
    name = parquet_folder(tmp_path / "ids", 6, features=Features(numbers), label=lambda row: 1000 + row)
    with pytest.raises(ValueError, match="its numbers go up to 1006: they look like ids"):
        open_streams(name)
    name = parquet_folder(tmp_path / "unlabelled", 6, features=Features(numbers), label=lambda row: None)
    with pytest.raises(ValueError, match="column 'label' holds no label"):
        open_streams(name)


@pytest.mark.parametrize(("label", "found"), [(None, "no label"), (-1, "-1; -1 marks"), (3, "3; the classes are 0 ")])
@pytest.mark.parametrize("told", [True, False])
def test_a_label_that_is_no_class(tmp_path, label, found, told):
    """Said before training if the footer has statistics, and otherwise when the row is read."""
    features = Features(PETS | {"label": Value("int64")})
    write_parquet(tmp_path / "train.parquet", range(8), features=features, label=lambda row: row % 3)
    path, label_of = tmp_path / "test.parquet", {6: label}
    write_parquet(path, range(8), features=features, label=lambda row: label_of.get(row, 0), write_statistics=told)
    (tmp_path / "README.md").write_text(CARD)
    with pytest.raises(ValueError, match=f"row group 1 of {path}: column 'label' holds {found}"):
        batches(evaluation(str(tmp_path), "test"))
    if told:
        with pytest.raises(ValueError, match="column 'label' holds"):
            open_streams(str(tmp_path))


def test_classes_in_another_order(tmp_path):
    name = parquet_folder(tmp_path / "pets", 6)
    train, _ = open_streams(name, class_names=["dog", "cat", "emu"])
    assert [label for _, label in train.shards.read(0, np.arange(3))] == [1, 0, 2]


def test_what_cannot_be_streamed(tmp_path):
    name = parquet_folder(tmp_path / "pets", 6)
    with pytest.raises(ValueError, match=r"train_split: 'train\[:90%\]' is a part of a split.*streaming: false"):
        open_streams(name, train_split="train[:90%]")
    with pytest.raises(ValueError, match="eval_split: .* has no split 'dev'. It has: train, test"):
        open_streams(name, eval_split="dev")
    with pytest.raises(ValueError, match="image_column: .* has no column 'photo'"):
        open_streams(name, image_column="photo")
    with pytest.raises(ValueError, match="digits are in memory"):
        open_streams("digits")
    with pytest.raises(ValueError, match="'no/such' cannot be opened: there is no such folder"):
        open_streams("no/such")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="streaming: .*text is not made of Parquet files .found: .*csv.* Convert"):
        open_streams(str(tmp_path / "text"))


def test_files_that_do_not_fit_together(tmp_path):
    name = parquet_folder(tmp_path / "pets", 6)
    path = tmp_path / "pets" / "train-00001-of-00002.parquet"
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(path).rename_columns(["image", "animal"]), path)
    with pytest.raises(ValueError, match="train-00001-of-00002.parquet has no column 'label', unlike"):
        open_streams(name)


def test_a_file_that_was_cut_off_before_training(tmp_path):
    name = parquet_folder(tmp_path / "pets", 12)
    path = tmp_path / "pets" / "train-00001-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"{path} is not a whole Parquet file"):
        open_streams(name)


def test_an_empty_split(tmp_path):
    name = parquet_folder(tmp_path / "pets", 6)
    write_parquet(tmp_path / "pets" / "test-00000-of-00001.parquet", range(0))
    with pytest.raises(ValueError, match="eval_split: .* 'test' is empty"):
        open_streams(name)


def test_arguments(tmp_path):
    name = parquet_folder(tmp_path / "pets", 6)
    with pytest.raises(ValueError, match="shuffle_buffer_size must be at least 1"):
        training(name, shuffle_buffer_size=0)
    dataset = training(name)
    with pytest.raises(RuntimeError, match="Call shard"):
        len(dataset)
    with pytest.raises(ValueError, match="6 rows fill no batch of 4 for each of 2 processes"):
        dataset.shard(0, 2, batch_size=4, drop_last=True)


# ---- Sharing the rows ------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("rows", [32, 27])
def test_every_row_once_over_processes_and_workers(tmp_path, make, rows):
    dataset = training(make(tmp_path / "pets", rows))
    parts = [batches(dataset, workers=2, rank=rank, world_size=2) for rank in range(2)]
    sizes = [[len(batch["labels"]) for batch in part] for part in parts]
    assert sizes == [[4, 4, 4, 4]] * 2 if rows == 32 else [[4, 4, 4, 2]] * 2
    seen = indices(parts[0] + parts[1])
    assert set(seen) == set(range(rows))
    assert len(seen) == -(-rows // 2) * 2  # of 27 rows, one is repeated
    labels = torch.cat([batch["labels"] for part in parts for batch in part]).tolist()
    classes = dict(zip(seen, labels, strict=True))
    assert all(classes[row] == (row % 3 if make is parquet_folder else row * 3 // rows) for row in range(rows))


@KINDS
def test_drop_last_leaves_whole_batches(tmp_path, make):
    dataset = training(make(tmp_path / "pets", 27))
    parts = [batches(dataset, rank=rank, world_size=2, drop_last=True) for rank in range(2)]
    assert [[len(batch["labels"]) for batch in part] for part in parts] == [[4, 4, 4]] * 2
    seen = indices(parts[0] + parts[1])
    assert len(set(seen)) == len(seen) == 24


@pytest.mark.parametrize("workers", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("rows", [1, 8, 13])
def test_workers_share_the_batches(tmp_path, rows, workers):
    """Every row once, in whole batches but for the last, for more workers than batches, too."""
    dataset = training(parquet_folder(tmp_path / "pets", 2 * rows))
    dataset.shard(1, 2, batch_size=4, drop_last=False)
    runs = [dataset._part.run(worker, workers) for worker in range(workers)] or [dataset._part.run(0, 1)]
    covered = [row for start, number in runs for row in range(start, start + number)]
    assert covered == list(range(rows, 2 * rows))
    sizes = [number for _, number in runs]
    whole = [size for size in sizes if size % 4 == 0]
    assert len(whole) >= len(sizes) - 1
    last = (len(dataset) - 1) % len(runs)
    assert sizes[last] % 4 == rows % 4


def test_fewer_rows_than_processes(tmp_path):
    dataset = training(parquet_folder(tmp_path / "pets", 2))
    assert sorted(index for rank in range(5) for index in indices(batches(dataset, rank=rank, world_size=5))) in (
        [0, 0, 0, 1, 1],
        [0, 0, 1, 1, 1],
    )


@KINDS
def test_evaluation_keeps_the_order_and_pads(tmp_path, make):
    name = make(tmp_path / "pets", 27)
    dataset = evaluation(name)
    assert indices(batches(dataset)) == list(range(27))
    parts = [batches(dataset, workers=2 if rank == 3 else 0, rank=rank, world_size=4) for rank in range(4)]
    assert {tuple(len(batch["labels"]) for batch in part) for part in parts} == {(4, 3)}
    last = parts[3][-1]
    assert last["index"].tolist() == [25, 26, 0] and last["labels"].tolist()[2] == -100
    assert not last["pixel_values"][2].any() and last["pixel_values"][:2].flatten(1).any(dim=1).all()
    counted = [batch["index"][batch["labels"] != -100] for part in parts for batch in part]
    assert sorted(torch.cat(counted).tolist()) == list(range(27))


# ---- Order -----------------------------------------------------------------------------------------------------------


@KINDS
def test_epochs_differ_and_come_again(tmp_path, make):
    dataset = training(make(tmp_path / "pets", 30), shuffle_buffer_size=8)
    orders = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        orders.append(batches(dataset))
    assert all(equal(*pair) for pair in zip(orders[0], orders[2], strict=True))
    assert indices(orders[0]) != indices(orders[1])
    other_seed = training(make(tmp_path / "same", 30), shuffle_buffer_size=8, seed=4)
    assert indices(batches(other_seed)) != indices(orders[0])


@KINDS
def test_rows_are_mixed(tmp_path, make):
    """Neighbours in the files end up apart, even with a buffer of a few rows; a folder's, with none."""
    dataset = training(make(tmp_path / "pets", 60), shuffle_buffer_size=10 if make is parquet_folder else 1)
    seen = np.array(indices(batches(dataset)))
    steps = np.abs(np.diff(seen))
    assert np.mean(steps == 1) < 0.2 and np.mean(steps > GROUP) > 0.3
    assert np.median(np.abs(seen - np.arange(60))) > 5  # groups, too, change places


@pytest.mark.parametrize(("number", "size"), [(0, 3), (1, 3), (10, 1), (10, 3), (10, 10), (10, 50)])
def test_buffered_order(number, size):
    bits = np.random.default_rng(0).integers(0, 2**64, number, dtype=np.uint64)
    order = buffered_order(bits, size)
    assert sorted(order) == list(range(number))
    assert all(row < step + size for step, row in enumerate(order))
    if size == 1:
        assert order.tolist() == list(range(number))


def test_buffered_order_is_uniform():
    """A buffer that holds all rows gives each of them each place equally often."""
    bits = np.random.default_rng(0).integers(0, 2**64, (6000, 4), dtype=np.uint64)
    orders = np.array([buffered_order(row, 4) for row in bits])
    counts = np.array([np.bincount(place, minlength=4) for place in orders.T])
    assert np.abs(counts - 1500).max() < 5 * (6000 * 0.25 * 0.75) ** 0.5


@pytest.mark.parametrize("views", [1, 2])
@KINDS
def test_pixels_of_a_lazy_data_set(tmp_path, make, views):
    name = make(tmp_path / "pets", 13)
    lazy_split, _ = load_image_splits(name)
    transform = RandomResizedCrop(8, **NORM, auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.5)
    lazy = LazyImageDataset(lazy_split, transform=transform, seed=3, views=views)
    stream = StreamingImageDataset(open_streams(name)[0], transform=transform, seed=3, views=views)
    for epoch in (0, 2):
        lazy.set_epoch(epoch)
        stream.set_epoch(epoch)
        for batch in batches(stream):
            assert equal(batch, lazy.__getitems__(batch["index"].tolist()))
    assert len(batch) == 2 + views


def test_first_batch(tmp_path):
    name = parquet_folder(tmp_path / "pets", 12)
    dataset = training(name, views=2)
    batch = dataset.first_batch(2)
    assert batch["index"].tolist() == [0, 1] and batch["labels"].tolist() == [0, 1]
    assert batch["pixel_values_strong"].shape == (2, 3, 8, 8)
    assert dataset.first_batch(100)["index"].tolist() == list(range(12))


# ---- Resuming --------------------------------------------------------------------------------------------------------


@KINDS
def test_skipped_batches_leave_the_others_as_they_were(tmp_path, make):
    dataset = training(make(tmp_path / "pets", 33))
    dataset.shard(1, 2, batch_size=3, drop_last=False)
    loader = DataLoader(dataset, batch_size=None, num_workers=2, persistent_workers=True)
    dataset.set_epoch(1)
    undisturbed = list(loader)
    for skipped in (3, 0, 6, 99):
        dataset.set_epoch(1)
        dataset.skip_batches(skipped)
        resumed = list(loader)
        assert len(resumed) == 6 and resumed[:skipped] == [{}] * min(skipped, 6)
        assert all(equal(*pair) for pair in zip(resumed[skipped:], undisturbed[skipped:], strict=True))
    dataset.set_epoch(2)
    dataset.skip_batches(2)
    dataset.set_epoch(1)  # the next epoch skips nothing
    assert all(equal(*pair) for pair in zip(loader, undisturbed, strict=True))


def counted_reads(monkeypatch, dataset):
    """[(unit, number of rows)] that are read from now on."""
    reads, read = [], dataset._shards.read

    def count(unit, rows):
        reads.append((unit, len(rows)))
        return read(unit, rows)

    monkeypatch.setattr(dataset._shards, "read", count)
    return reads


def test_only_what_is_needed_is_read(tmp_path, monkeypatch):
    dataset = training(parquet_folder(tmp_path / "pets", 60), shuffle_buffer_size=6)
    reads = counted_reads(monkeypatch, dataset)
    batches(dataset)
    assert sorted(unit for unit, _ in reads) == list(range(12))  # 60 rows in groups of 5, each group once
    reads.clear()
    batches(dataset, rank=2, world_size=4)
    assert sum(rows for _, rows in reads) == 15 and len(reads) <= 4
    reads.clear()
    dataset.shard(0, 1, batch_size=4, drop_last=False)
    for number, _ in enumerate(dataset, start=1):  # batches of 4, the buffer of 6, and what came with its last row
        assert sum(rows for _, rows in reads) <= 4 * number + 6 + GROUP
    reads.clear()
    dataset.skip_batches(10)
    assert len([batch for batch in dataset if batch]) == 5
    assert sum(rows for _, rows in reads) == 20 and len(reads) <= 4 + 2  # 20 rows are left, and few groups


def test_evaluation_reads_one_group_at_a_time(tmp_path, monkeypatch):
    dataset = evaluation(parquet_folder(tmp_path / "pets", 60))
    reads = counted_reads(monkeypatch, dataset)
    dataset.shard(0, 1, batch_size=GROUP, drop_last=False)
    iterator = iter(dataset)
    for batch in range(3):
        next(iterator)
        assert reads == [(unit, GROUP) for unit in range(batch + 1)]


# ---- Damage ----------------------------------------------------------------------------------------------------------


@KINDS
def test_an_undecodable_image(tmp_path, make):
    name = make(tmp_path / "pets", 12, damaged=[8])
    file = "train-00001-of-00002.parquet" if make is parquet_folder else "train/emu/008.png"
    message = f"pets, split 'train', row 8, file .*{file}: the image cannot be decoded.*skip_bad_images: true"
    for dataset in (training(name), evaluation(name)):
        with pytest.raises(BadImageError, match=message):
            batches(dataset)


@KINDS
def test_undecodable_images_are_skipped_and_counted(tmp_path, make):
    name = make(tmp_path / "pets", 12, damaged=[3, 8])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = evaluation(name, skip_bad_images=True)
        found = batches(dataset, workers=2)
        assert indices(found) in (list(range(12)), [0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7])
        black = [batch["index"][batch["labels"] == -100].tolist() for batch in found]
        assert sorted(sum(black, [])) == [3, 8] and dataset.num_skipped == 2
        assert not found[0]["pixel_values"][3].any()

        sound = training(make(tmp_path / "sound", 12))
        dataset = training(name, skip_bad_images=True)
        for epoch in range(3):
            for source in (sound, dataset):
                source.set_epoch(epoch)
            for expected, batch in zip(batches(sound), batches(dataset, workers=0), strict=True):
                rows = expected["index"].tolist()
                good = [next(row for row in rows[i:] + rows[:i] if row not in (3, 8)) for i in range(4)]
                places = [rows.index(row) for row in good]
                assert equal(batch, {key: value[places] for key, value in expected.items()})
        assert dataset.num_skipped == 2


def test_a_batch_of_undecodable_images(tmp_path):
    name = parquet_folder(tmp_path / "pets", 8, damaged=range(8))
    dataset = training(name, skip_bad_images=True)
    with pytest.raises(BadImageError, match="none of the 4 images"), pytest.warns(UserWarning, match="be decoded"):
        batches(dataset)


def test_an_undecodable_image_is_warned_of_once(tmp_path):
    dataset = evaluation(parquet_folder(tmp_path / "pets", 4, damaged=[2]), skip_bad_images=True)
    with pytest.warns(UserWarning, match="row 2") as warned:
        batches(dataset)
        batches(dataset)
    assert len(warned) == 1


@pytest.mark.parametrize("damage", ["removed", "cut off", "overwritten", "replaced by a shorter one"])
def test_a_stream_that_ends_early(tmp_path, damage):
    dataset = training(parquet_folder(tmp_path / "pets", 40), shuffle_buffer_size=1)
    path = tmp_path / "pets" / "train-00001-of-00002.parquet"
    size = path.stat().st_size
    dataset.shard(0, 1, batch_size=4, drop_last=False)
    iterator = iter(dataset)
    next(iterator)
    if damage == "removed":
        path.unlink()
    elif damage == "cut off":
        os.truncate(path, size // 2)
    elif damage == "overwritten":
        path.write_bytes(bytes(size))
    else:
        write_parquet(path, range(20, 25))
    expected = rf"row group \d of {path} gave 0 of 5 rows \(.*--resume_from_checkpoint true"
    with pytest.raises(RuntimeError, match=rf"pets, split 'train': the stream ended early: {expected}"):
        list(iterator)


def test_a_folder_that_loses_a_file(tmp_path):
    dataset = training(image_folder(tmp_path / "pets", 12), skip_bad_images=True)
    path = tmp_path / "pets" / "train" / "dog" / "005.png"
    path.unlink()
    with pytest.raises(RuntimeError, match=rf"the stream ended early: {path} gave 0 of 1 rows"):
        batches(dataset)


# ---- The Hub ---------------------------------------------------------------------------------------------------------


def test_a_stream_from_the_hub(tmp_path, monkeypatch):
    """The same as from a folder; no file is fetched as a whole, and no row group twice."""
    folder = parquet_folder(tmp_path / "pets", 40)
    expected = batches(training(folder))
    with hub_stand_in(folder, "someone/pets", monkeypatch) as hub:
        dataset = training("someone/pets")
        hub.sent.clear()  # footers; of files as small as these, all
        assert all(equal(*pair) for pair in zip(batches(dataset), expected, strict=True))
        assert len(hub.sent) == 8 and max(size for _, size in hub.sent) < len(hub.files[hub.sent[0][0]]) / 4
        assert all(equal(*pair) for pair in zip(batches(dataset, workers=1), expected, strict=True))
        hub.closed = True
        with pytest.raises(RuntimeError, match="ended early: row group . of hf://.*someone/pets.* gave 0 of 5 rows"):
            batches(dataset)
