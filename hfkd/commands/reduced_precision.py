"""Files of lower precision for `hfkd export`: training images to calibrate on, and what the files measure."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..data import ImageSource
from ..data.image_dataset import collate_batch
from ..errors import HfkdError
from ..export.formats import read_onnx
from ..export.quantization import StaticQuantizer, write_float16
from ..networks.class_matching import class_names_of
from ..networks.costs import latencies
from ..networks.loading import input_spec
from ..recipe.arguments import DataArguments
from ..recipe.parser import ArgumentParser, to_argv
from ..recipe.reading import load_recipe
from ..runs.folder import RECIPE_NAME
from ..runs.tables import markdown_table
from .build import evaluation_set, load_splits
from .evaluate import with_classes_of

HELD_OUT = 1000  # training images, beside those of the calibration
EVALUATION_BATCH = 100


def data_of_run(name: str) -> DataArguments:
    """Read the data settings from the recipe of MODEL's run.

    Raises:
        HfkdError: there is no recipe, or one that names no training split or streams its images.
    """
    path = Path(name).parent / RECIPE_NAME
    if not path.is_file():
        raise HfkdError(
            f"A lower --precision needs the data of MODEL's run, and there is no {path}. Give runs/.../student."
        )
    keys = {field.name for field in dataclasses.fields(DataArguments)}
    parser = ArgumentParser((DataArguments,), "hfkd export MODEL")
    recipe = {key: value for key, value in load_recipe(path).items() if key in keys}
    (data_args,) = parser.parse(to_argv(recipe, parser))
    if data_args.streaming:
        raise HfkdError(f"{path} streams its images, and a lower --precision needs their rows. Set streaming to false.")
    return data_args


def image_sets_of_run(model: nn.Module, data_args: DataArguments) -> tuple[ImageSource | None, ImageSource]:
    """Load the training and evaluation images, both prepared as for the evaluation, without augmentation."""
    splits = load_splits(data_args, class_names_of(model))
    spec = input_spec(model)
    train, evaluation = (
        None if split is None else evaluation_set(with_classes_of(model, split), spec, data_args) for split in splits
    )
    return train, evaluation


def write_reduced(
    precision: str, source: Path, path: Path, train_set: ImageSource | None, images: int, max_drop: float
) -> dict[str, Any]:
    """Write the file of a lower precision from the float32 file; return how it was made."""
    if precision == "float16":
        write_float16(source, path)
        return {}
    calibration, held_out = calibration_rows(0 if train_set is None else len(train_set), images)
    pixels, (held_out_pixels, labels) = _read(train_set, calibration)[0], _read(train_set, held_out)
    return dataclasses.asdict(StaticQuantizer(source, pixels, held_out_pixels, labels).quantize(path, max_drop))


def calibration_rows(available: int, wanted: int) -> tuple[list[int], list[int]]:
    """Draw the rows of the calibration and, apart from them, of the held-out images.

    Raises:
        HfkdError: if there are not more images than the calibration takes.
    """
    if available <= wanted:
        raise HfkdError(
            f"The training split has {available} images, and calibration takes {wanted} and compares on others. "
            "Give a smaller --calibration_images."
        )
    rows = torch.randperm(available, generator=torch.Generator().manual_seed(0)).tolist()
    return rows[:wanted], rows[wanted : wanted + HELD_OUT]


def _read(dataset: ImageSource, rows: list[int]) -> tuple[Tensor, Tensor]:
    batches = list(_batches(torch.utils.data.Subset(dataset, rows)))
    return torch.cat([batch["pixel_values"] for batch in batches]), torch.cat([batch["labels"] for batch in batches])


def _batches(dataset) -> Iterator[dict[str, Tensor]]:
    return iter(DataLoader(dataset, batch_size=EVALUATION_BATCH, collate_fn=collate_batch))


def measure(paths: dict[str, Path], eval_set: ImageSource, image_size: int) -> dict[str, dict[str, float]]:
    """Measure files on the whole evaluation split: top-1, agreement with the first one, bytes, latency."""
    models = {name: read_onnx(path) for name, path in paths.items()}
    first = next(iter(models))
    right, same, total = dict.fromkeys(models, 0), dict.fromkeys(models, 0), 0
    for batch in _batches(eval_set):
        known = batch["labels"] != ImageSource.IGNORED
        classes = {name: model(batch["pixel_values"]).argmax(1)[known] for name, model in models.items()}
        total += int(known.sum())
        for name, given in classes.items():
            right[name] += int((given == batch["labels"][known]).sum())
            same[name] += int((given == classes[first]).sum())
    times = [_median_latencies(paths, image_size, threads) for threads in (1, torch.get_num_threads())]
    return {
        name: {
            "top1": 100 * right[name] / total,
            "agreement": 100 * same[name] / total,
            "bytes": path.stat().st_size,
            "ms_1_thread": times[0][name],
            "ms_all_threads": times[1][name],
        }
        for name, path in paths.items()
    }


def _median_latencies(paths: dict[str, Path], image_size: int, threads: int) -> dict[str, float]:
    models = {name: read_onnx(path, threads) for name, path in paths.items()}
    return latencies(models, dict.fromkeys(models, image_size), statistic=statistics.median)


def precision_table(figures: dict[str, dict[str, float]]) -> str:
    """Return a Markdown table with a column for each file."""
    forms = {
        "top1": ("top-1, %", "{:.2f}"),
        "agreement": ("same class as float32, %", "{:.2f}"),
        "bytes": ("bytes", "{:,}"),
        "ms_1_thread": ("ms an image, 1 thread, median", "{:.2f}"),
        "ms_all_threads": (f"ms an image, {torch.get_num_threads()} threads, median", "{:.2f}"),
    }
    rows = [[label, *(form.format(each[key]) for each in figures.values())] for key, (label, form) in forms.items()]
    return markdown_table(["", *figures], rows, compact=True)
