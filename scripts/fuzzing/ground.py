"""What the cases share: imports, images, recipes, and the runs that some of them start from."""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import io
import pkgutil
import shutil
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from .cases import Records, hfkd, in_child, redirect

CLASSES = ("apple", "banana", "cherry", "date")
RECIPE = {
    "student_name_or_path": "cifar_resnet8",
    "teacher_name_or_path": "teacher",
    "dataset_name": "images",
    "random_flip": False,
    "image_size": 16,
    "per_device_train_batch_size": 16,
    "num_train_epochs": 1,
    "max_steps": 2,
    "optim": "sgd",
    "learning_rate": 0.01,
    "eval_strategy": "epoch",
    "save_strategy": "no",
    "disable_tqdm": True,
    "losses": {"kd": {"temperature": 4.0}},
    "output_dir": "out",
}
LABELS_ALONE = {key: value for key, value in RECIPE.items() if key not in ("teacher_name_or_path", "losses")}


@dataclass
class Content:
    """Right content of a data folder: the images of each class by split; a change updates it.

    `rows` are those of a table or of Parquet files, before they are written; `kind` says how the file is written.
    """

    root: Path
    counts: dict[str, dict[str, int]]
    rows: dict[str, list[dict]] = field(default_factory=dict)
    kind: str | None = None

    def images(self, split: str) -> int:
        return sum(self.counts[split].values())

    def add(self, split: str = "train", number: int = 1, name: str = CLASSES[0]) -> None:
        self.counts[split][name] += number


def png(value: int = 0, mode: str = "RGB", size: tuple[int, int] = (16, 16), suffix: str = "PNG") -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(value).integers(0, 250, (size[1], size[0], 3)).astype(np.uint8)
    Image.fromarray(noise).convert(mode).save(stream, suffix)
    return stream.getvalue()


def _huge_png(side: int) -> bytes:
    """Return a PNG whose header says side x side, with a few bytes of pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


BROKEN = {
    "empty": b"",
    "text": b"<html>404</html>",
    "cut": png(1, size=(64, 64))[:400],
    "cut JPEG": png(1, size=(64, 64), suffix="JPEG")[:900],
    "claims 60,000": _huge_png(60_000),
    "claims 2**31": _huge_png(2**31 - 1),
    "claims 9,000": _huge_png(9_000),
    "16 bit": png(1, "I;16"),
    "no pixels": _huge_png(0),
}
FINE = {
    "a.PNG": png(2),
    "a.jpg": png(2, suffix="JPEG"),
    "a.JPEG": png(2, suffix="JPEG"),
    "a.bmp": png(2, suffix="BMP"),
    "a.gif": png(2, suffix="GIF"),
    "a.tif": png(2, suffix="TIFF"),
    "a.webp": png(2, suffix="WEBP"),
    "grey.png": png(2, "L"),
    "palette.png": png(2, "P"),
    "alpha.png": png(2, "RGBA"),
    "two.png": png(2, "1"),
    "cmyk.jpg": png(2, "CMYK", suffix="JPEG"),
    "other.png": png(2, suffix="JPEG"),
    "large.png": png(2, size=(300, 200)),
    "tiny.png": png(2, size=(1, 1)),
    "thin.png": png(2, size=(400, 1)),
}


def import_all() -> None:
    """Import what commands need, once for all cases."""
    import torch
    from transformers.models.timm_wrapper import TimmWrapperForImageClassification  # noqa: F401

    import hfkd

    torch.set_num_threads(1)
    importlib.metadata.version = functools.cache(importlib.metadata.version)  # reads and parses files
    for module in pkgutil.walk_packages(hfkd.__path__, "hfkd."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    gc.freeze()  # else each process copies all objects when it collects garbage


def write_images(folder: Path, per_class: int, first: int, classes: tuple[str, ...] = CLASSES) -> None:
    """Write class folders of images, 16 x 16 pixels each; a class is brighter the later it comes."""
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(first, first + per_class):
            noise = np.random.default_rng(100 * number + i).integers(0, 100, (16, 16, 3))
            Image.fromarray((noise + 40 * number).astype(np.uint8)).save(folder / name / f"{i}.png")


def write_recipe(path: Path, recipe: dict) -> None:
    path.write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))


def build_ground(ground: Path) -> None:
    """Make what the cases share: images, a teacher, a run of two epochs, a cache and a search."""
    ground.mkdir()
    write_images(ground / "images/train", 8, 0)
    write_images(ground / "images/test", 4, 8)
    write_recipe(ground / "teacher.yaml", LABELS_ALONE | {"output_dir": "teacher_run"})
    run = RECIPE | {
        "output_dir": "run",
        "num_train_epochs": 2,
        "max_steps": -1,
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
    }
    write_recipe(ground / "run.yaml", run)
    write_recipe(ground / "search.yaml", {key: value for key, value in RECIPE.items() if key != "output_dir"})
    commands = [
        ["train-teacher", "teacher.yaml"],
        ["distill", "run.yaml"],
        ["cache-teacher", "run.yaml", "--cache_dir", "cache", "--epochs", "1"],
        ["search", "search.yaml", "--n_trials", "2", "--held_out", "0.25", "--search_dir", "search"],
    ]

    def work():
        redirect(ground / "said.txt")
        for argv in commands:
            Records.code = hfkd(argv)
            if Records.code:
                raise RuntimeError(f"hfkd {' '.join(argv)} failed")
            if argv[0] == "train-teacher":
                shutil.move("teacher_run/teacher", "teacher")

    code, _ = in_child(work, ground)
    if code:
        raise SystemExit(f"The runs that the cases start from failed:\n{(ground / 'said.txt').read_text()}")
