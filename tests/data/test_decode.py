"""Decoding: modes, orientation, sizes, damaged files, memory."""

import numpy as np
import psutil
import pytest
from pictures import encoded, pixels, split_of
from PIL import Image
from timm.data import create_transform

from hfkd.data.decode import FORMATS, BadImageError, decode_split, to_square


def decode_one(data, image_size=8):
    """(image_size, image_size, 3) uint8."""
    return decode_split(split_of(data), image_size)[0][0].permute(1, 2, 0).numpy()


def test_rows_keep_their_order():
    images = np.random.default_rng(0).integers(0, 256, (600, 8, 8, 3), dtype=np.uint8)
    tensor, rows = decode_split(split_of(*[encoded(Image.fromarray(image)) for image in images]), 8)
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), images)
    assert rows.tolist() == list(range(600))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000"])
def test_lossless_formats(kind):
    assert kind in FORMATS
    arguments = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(decode_one(encoded(Image.fromarray(pixels()), kind, **arguments)), pixels())


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK"])
def test_other_modes_become_rgb(mode):
    image = Image.fromarray(pixels()).convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(pixels()[:, :, 0]))
    kind = "TIFF" if mode == "CMYK" else "PNG"
    expected = image.convert("RGB")
    assert np.array_equal(decode_one(encoded(image, kind)), np.asarray(expected))
    if mode == "RGBA":
        assert np.array_equal(decode_one(encoded(image)), pixels())


def test_more_than_8_bits_is_refused():
    image = Image.fromarray(np.full((8, 8), 1000, dtype=np.uint16))
    with pytest.raises(ValueError, match="row 0: .* cannot be decoded: mode I;16 has more than 8 bits"):
        decode_one(encoded(image))


@pytest.mark.parametrize(("orientation", "turn"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_exif_orientation_is_applied(orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(pixels()), exif=exif)
    assert np.array_equal(decode_one(data), np.rot90(pixels(), turn))


SIZES = [(32, 48, (12, 8)), (40, 16, (8, 20)), (4, 5, (10, 8))]


@pytest.mark.parametrize(("height", "width", "resized"), SIZES)
def test_other_sizes_are_resized_and_cropped(height, width, resized):
    image = Image.fromarray(pixels(height, width))
    expected = np.asarray(image.resize(resized, Image.Resampling.BICUBIC))
    top, left = (resized[1] - 8) // 2, (resized[0] - 8) // 2
    assert np.array_equal(decode_one(encoded(image)), expected[top : top + 8, left : left + 8])


def test_damaged_image_is_named():
    good = encoded(Image.fromarray(pixels(64, 64)))
    for damaged in (b"no image", b"", good[: len(good) // 2]):
        match = r"pets, split 'train', row 300: .* cannot be decoded: .+ skip_bad_images: true leaves such images out"
        with pytest.raises(BadImageError, match=match):
            decode_split(split_of(*[good] * 300, damaged, good), 8)


def test_damaged_or_missing_file_is_named(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff no jpeg")
    good = encoded(Image.fromarray(pixels()))
    for name in ("broken.jpg", "missing.jpg"):
        cell = {"bytes": None, "path": str(tmp_path / name)}
        with pytest.raises(ValueError, match=rf"row 1, file .*{name}: the image cannot be decoded"):
            decode_split(split_of(good, cell), 8)


def test_empty_cell_is_named():
    with pytest.raises(ValueError, match="row 1: there is no image"):
        decode_split(split_of(encoded(Image.fromarray(pixels())), None), 8)


def test_bad_images_are_left_out_with_one_warning(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (300, 8, 8, 3), dtype=np.uint8)
    cells = [encoded(Image.fromarray(image)) for image in images]
    cells[1], cells[2], cells[280] = None, {"bytes": None, "path": str(tmp_path / "missing.jpg")}, b"no image"
    with pytest.warns(UserWarning) as caught:
        tensor, rows = decode_split(split_of(*cells), 8, skip_bad_images=True)
    assert [str(warning.message)[:71] for warning in caught] == [
        "pets, split 'train': 3 of 300 images are left out. The first: pets, spl"
    ]
    assert "row 1: there is no image" in str(caught[0].message)
    assert rows.tolist() == [i for i in range(300) if i not in (1, 2, 280)]
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), images[rows])


def test_a_split_of_bad_images_alone_is_an_error():
    with pytest.raises(BadImageError, match="row 0: .* cannot be decoded"):
        decode_split(split_of(b"no image", b"nor this"), 8, skip_bad_images=True)


def test_too_little_memory_is_found_before_decoding(monkeypatch):
    class Memory:
        available = 3 * 2**29

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    split = split_of(*[b"never decoded"] * 700)
    with pytest.raises(ValueError, match="images of 10+ x 10+ take"):
        decode_split(split, 10**30)
    with pytest.raises(ValueError, match="700 images of 1024 x 1024 take 2.05 GiB once decoded, and 1.5 GiB"):
        decode_split(split, 1024)


@pytest.mark.parametrize("size", [(32, 35), (37, 32), (50, 99)])
def test_the_crop_is_the_one_of_timm(size):
    """Whose transform the exported model is prepared by."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    resize, crop = create_transform((3, 32, 32), crop_pct=1.0, interpolation="bicubic").transforms[:2]
    assert to_square(image, 32).tobytes() == crop(resize(image)).tobytes()
