"""`hfkd export --precision`: training images to calibrate on, and what the file measures on the evaluation split."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from ..data import ImageSource
from ..data.image_dataset import collate_batch
from ..errors import HfkdError, RunError
from ..export.formats import FORMATS, METADATA, read_onnx, write_model
from ..export.int8 import write_int8
from ..export.quantization import StaticQuantizer, has_int8_instructions, set_metadata, write_float16
from ..networks.class_matching import class_names_of
from ..networks.costs import latencies
from ..networks.input_spec import input_spec
from ..networks.int8 import is_int8, without_rounding
from ..recipe.arguments import DataArguments
from ..recipe.parser import ArgumentParser, to_argv
from ..recipe.reading import load_recipe
from ..runs.folder import RECIPE_NAME
from ..runs.onnx_files import PREPROCESSING_NAME
from ..runs.tables import markdown_table
from ..runs.writing import write_whole, writing_by_name
from .build import evaluation_set, load_splits
from .evaluate import with_classes_of

HELD_OUT = 1000  # training images, beside those of the calibration
EVALUATION_BATCH = 100


def data_of_run(name: str) -> DataArguments:
    """Read the data settings from the recipe of MODEL's run.

    Raises:
        HfkdError: there is no recipe, or one that streams its images.
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
        raise HfkdError(f"{path} streams its images, and a lower --precision draws from all. Set streaming to false.")
    return data_args


def export_reduced(
    precision: str,
    model: nn.Module,
    data_args: DataArguments,
    facts: dict[str, Any],
    path: Path,
    calibration_images: int,
    max_drop: float,
) -> Path:
    """Write the ONNX file of a lower precision, measure it beside the float32 file, and print both.

    Args:
        facts: description that is written into the file.

    Raises:
        HfkdError: if there are too few images to calibrate on, or ONNX Runtime cannot convert the model.
        RunError: if the file loses more than `max_drop` points of top-1; it is there all the same.
    """
    train_set, eval_set = _image_sets(model, data_args)
    trained = is_int8(model)
    calibrates = precision == "int8" and not trained
    images = read_calibration(train_set, eval_set, calibration_images) if calibrates else None
    facts = {**facts, "top1": None, "precision": precision}  # the top-1 of the model is not that of the file
    text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
    made: dict[str, Any] = {}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch, writing_by_name(path) as partial:
            source = Path(scratch, "float32.onnx")
            write_model(without_rounding(model), facts["image_size"], FORMATS["onnx"], source, text)
            if trained:
                made = write_int8(model, partial, text, next(_batches(eval_set))["pixel_values"])
            elif images is not None:
                made = dataclasses.asdict(StaticQuantizer(source, *images).quantize(partial, max_drop))
                made["calibration_images"] = calibration_images
            else:
                write_float16(source, partial)
            set_metadata(partial, METADATA, text)
            figures = measure({"float32": source, precision: partial}, eval_set, facts["image_size"])
    except OSError as error:
        raise RunError(f"{path} could not be written ({error}). An earlier file is unchanged.") from error
    facts |= {"top1": figures[precision]["top1"], "made": made, "measured": figures}
    write_whole(path.with_name(PREPROCESSING_NAME), json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    print(f"{path}, {precision}{_in_words(made)}\n\n{precision_table(figures, len(eval_set))}")
    _check_drop(figures, precision, path, max_drop, trained)
    return path


def _check_drop(
    figures: dict[str, dict[str, float]], precision: str, path: Path, max_drop: float, trained: bool
) -> None:
    drop = figures["float32"]["top1"] - figures[precision]["top1"]
    if drop > max_drop:
        advice = "Give more --calibration_images, or --precision float16." if precision == "int8" else "Keep float32."
        advice = "Train it longer with --quantize int8." if trained else advice
        raise RunError(
            f"{precision} loses {drop:.2f} points of top-1, and --max_drop allows {max_drop:g}. {path} is there all "
            f"the same. {advice}"
        )


def _in_words(made: dict[str, Any]) -> str:
    if not made:
        return "."
    kept = ", ".join(made["float_layers"]) or "none"
    words = (
        f": {made['int8_layers']} layers, {_ranges_in_words(made)}. Layers that stay float: {kept}. Operators that "
        f"stay float: {', '.join(made['float_operators'])}."
    )
    if "simulated_agreement" in made:
        words += (
            f"\nOn {EVALUATION_BATCH} images the file chooses the class that the training simulated for "
            f"{made['simulated_agreement']:.1f} %; its logits differ by {100 * made['simulated_difference']:.2g} % of "
            "their standard deviation."
        )
    return words


def _ranges_in_words(made: dict[str, Any]) -> str:
    if "calibration" in made:
        return f"ranges by {made['calibration']} of {made['calibration_images']} training images"
    return "ranges of its training"


def _image_sets(model: nn.Module, data_args: DataArguments) -> tuple[ImageSource, ImageSource]:
    """Load the training and evaluation images, both prepared as for the evaluation, without augmentation."""
    spec = input_spec(model)
    train, evaluation = (
        evaluation_set(with_classes_of(model, split), spec, data_args)
        for split in load_splits(data_args, class_names_of(model))
    )
    return train, evaluation


def read_calibration(train_set: ImageSource, eval_set: ImageSource, wanted: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw training images for the calibration and, apart from them, held-out ones.

    No image is among them twice, and none that the evaluation split holds, too.

    Returns:
        The calibration images (wanted, 3, H, W), the held-out ones (M, 3, H, W), and the labels (M,) of the latter.

    Raises:
        HfkdError: if there are not more images than the calibration takes.
    """
    known = {_digest(image) for batch in _batches(eval_set) for image in batch["pixel_values"]}
    rows = torch.randperm(len(train_set), generator=torch.Generator().manual_seed(0)).tolist()
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in _batches(Subset(train_set, rows)):
        for image, label in zip(batch["pixel_values"], batch["labels"], strict=True):
            if label != ImageSource.IGNORED and _digest(image) not in known:
                known.add(_digest(image))
                images.append(image)
                labels.append(label)
        if len(images) >= wanted + HELD_OUT:
            break
    if len(images) <= wanted:
        raise HfkdError(
            f"{len(images)} different training images are not in the evaluation split, too, and calibration takes "
            f"{wanted} and compares on others. Give a smaller --calibration_images, or a run whose splits are apart."
        )
    held_out = slice(wanted, wanted + HELD_OUT)
    return torch.stack(images[:wanted]), torch.stack(images[held_out]), torch.stack(labels[held_out])


def _digest(image: Tensor) -> bytes:
    """Return a digest of an image's pixels."""
    return hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest()


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


def precision_table(figures: dict[str, dict[str, float]], images: int) -> str:
    """Return a Markdown table with a column for each file."""
    forms = {
        "top1": ("top-1, %", "{:.2f}"),
        "agreement": ("same class as float32, %", "{:.2f}"),
        "bytes": ("bytes", "{:,}"),
        "ms_1_thread": ("ms an image, 1 thread", "{:.2f}"),
        "ms_all_threads": (f"ms an image, all threads ({torch.get_num_threads()})", "{:.2f}"),
    }
    rows = [[label, *(form.format(each[key]) for each in figures.values())] for key, (label, form) in forms.items()]
    note = (
        f"Measured in ONNX Runtime on the evaluation split of {images:,} images. Latency: CPU, one image, median of 30."
    )
    if "int8" in figures and not has_int8_instructions():
        note += (
            "\nThis CPU has no instructions for int8 (VNNI, AMX or dot product): int8 may be slower than float32 here, "
            "and sums of products may saturate, which costs accuracy."
        )
    return f"{markdown_table(['', *figures], rows, compact=True)}\n\n{note}"
