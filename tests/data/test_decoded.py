"""Decoded images that are kept in a file: equal to decoding, whole or not at all, and never of other images."""

import io
import multiprocessing

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hfkd.data import ImageDataset, NoAugmentation, load_image_splits

ARGUMENTS = {"transform": NoAugmentation(), "mean": (0.5,) * 3, "std": (0.5,) * 3, "image_size": 8}


def write_data(folder, number=12, seed=0, bad=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (number, 8, 8, 3), dtype=np.uint8)
    cells = []
    for image in pixels:
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "PNG")
        cells.append({"bytes": stream.getvalue() if len(cells) >= bad else b"no image", "path": None})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = datasets.Dataset.from_dict({"image": cells, "label": [i % 2 for i in range(number)]}, features=features)
    folder.mkdir(exist_ok=True)
    for split in ("train", "test"):
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def load(folder, split="train", **arguments):
    train, _ = load_image_splits(str(folder), train_split=split)
    return ImageDataset.from_split(train, decoded_cache=True, **ARGUMENTS | arguments)


def kept():
    return sorted(datasets.config.HF_DATASETS_CACHE.glob("hfkd_decoded/*.safetensors"))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "photos"


@pytest.fixture
def decodings(monkeypatch):
    """Number of splits that are decoded."""
    from hfkd.data import decoded

    counted, decode = [], decoded.decode_split
    monkeypatch.setattr(decoded, "decode_split", lambda *arguments: counted.append(1) or decode(*arguments))
    return counted


def test_a_second_run_reads_what_the_first_decoded(folder, decodings, capsys):
    pixels = write_data(folder)
    first, second = load(folder), load(folder)
    assert torch.equal(first.images, pixels) and torch.equal(second.images, pixels)
    assert torch.equal(second.labels, first.labels) and second.identity() == first.identity()
    assert len(decodings) == 1
    (path,) = kept()
    assert f"{path}, 0 MiB" in capsys.readouterr().out  # told once, with its size
    assert [len(load(folder, part).images) for part in ("train[:6]", "train[6:]")] == [6, 6]
    assert len(decodings) == 3 and len(kept()) == 3  # other rows, other files
    assert load(folder, image_size=4).images.shape == (12, 3, 4, 4)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign", "empty"])
def test_a_damaged_file_is_written_anew(folder, damage, caplog):
    pixels = write_data(folder)
    load(folder)
    (path,) = kept()
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes({"truncated": content[:-50], "flipped": content, "foreign": b"x" * 500, "empty": b""}[damage])
    assert torch.equal(load(folder).images, pixels)
    assert "is damaged or shows other images" in caplog.text
    caplog.clear()
    assert torch.equal(load(folder).images, pixels) and not caplog.text


def test_a_file_of_another_decoder_is_not_believed(folder, monkeypatch, decodings):
    pixels = write_data(folder)
    load(folder)
    (path,) = kept()
    other = pixels.clone()
    other[0, 0, 0, 0] ^= 1  # a decoder that rounds otherwise, and a whole file with a right checksum
    from hfkd.data import decoded

    decoded._write(path, other)
    assert torch.equal(load(folder).images, pixels) and len(decodings) == 2
    monkeypatch.setattr("PIL.__version__", "0")
    load(folder)
    assert len(decodings) == 3 and len(kept()) == 2


def test_changed_data_are_decoded_anew(folder):
    write_data(folder)
    load(folder)
    pixels = write_data(folder, number=14, seed=1)
    assert torch.equal(load(folder).images, pixels)


def test_a_full_disk_and_a_closed_folder_cost_only_time(folder, monkeypatch, caplog):
    pixels = write_data(folder)

    def full(*arguments, **settings):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("hfkd.data.decoded.save_file", full)
        assert torch.equal(load(folder).images, pixels)
    assert "not kept for later runs" in caplog.text and not kept()
    (datasets.config.HF_DATASETS_CACHE / "hfkd_decoded").rename(folder.parent / "away")
    (datasets.config.HF_DATASETS_CACHE / "hfkd_decoded").write_text("no folder")
    assert torch.equal(load(folder).images, pixels)


def test_two_processes_write_one_file(folder):
    pixels = write_data(folder, number=300)
    load(folder, "test")  # the cache of datasets is there
    context = multiprocessing.get_context("fork")
    with context.Pool(2) as pool:
        sums = pool.map(_sum_of_images, [folder] * 2)
    assert sums == [int(pixels.sum())] * 2
    assert len(list(datasets.config.HF_DATASETS_CACHE.glob("hfkd_decoded/*.partial"))) == 0


def _sum_of_images(folder):
    return int(load(folder).images.sum())


def test_bad_images_and_data_outside_the_cache_are_not_kept(folder, tmp_path):
    write_data(folder, bad=1)
    assert len(load(folder, skip_bad_images=True).images) == 11 and not kept()
    ImageDataset.from_split(load_image_splits("digits")[0], decoded_cache=True, **ARGUMENTS)
    photos = tmp_path / "files"
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (photos / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(photos / split / name / "0.png")
    load(photos)
    assert not kept()
