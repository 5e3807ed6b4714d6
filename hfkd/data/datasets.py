"""Image classification data sets by name: scikit-learn's digits, the Hub, local folders."""

from collections.abc import Collection, Mapping
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from ..errors import HfkdError
from ..names import DIGITS
from .columns import ImageSplit, check_order, find_class_names, find_image_column, find_label_column

VALIDATION_SPLITS = ("validation", "val", "valid")
EVAL_SPLITS = ("test", *VALIDATION_SPLITS)
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".jp2"}


def load_image_splits(
    name: str,
    *,
    train_split: str | None = "train",
    eval_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    class_names: list[str] | None = None,
    config_name: str | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
) -> tuple[ImageSplit | None, ImageSplit]:
    """Load the training and the evaluation split of an image classification data set, not yet decoded.

    Args:
        name: "digits": scikit-learn's, enlarged to 32 x 32, 1,437 for training and 360 for testing; a local folder of
            Parquet files; a local folder of split folders ("train", "test", ...), each with a folder of images for
            every class; or an id on the Hub, e.g. "uoft-cs/cifar100".
        train_split: a name, or a slice in the notation of `datasets`, e.g. "train[:90%]". None: no training split is
            loaded, and None is returned in its place.
        eval_split: a name or a slice. By default the first of test, validation, val and valid that exists. The last
            three are one name: ImageNet's split is called validation on the Hub and val in most folders.
        image_column, label_column: by default found from the features.
        class_names: expected names of the classes. They select one of several columns of labels.
        config_name, revision, cache_dir: for `datasets.load_dataset`.

    Raises:
        HfkdError: the data set cannot be loaded, a split or a class folder is missing or empty, a column is missing, of
            a wrong type or not clear, or a label is no class.
    """
    splits = _load_splits(name, config_name, revision, cache_dir)
    requested = {"train_split": train_split, "eval_split": find_eval_split(name, splits, eval_split)}
    wanted = {key: split for key, split in requested.items() if split is not None}
    rows = [_select_rows(name, splits, key, split) for key, split in wanted.items()]
    features = rows[0].features
    image_column = find_image_column(features, image_column, name)
    label_column = find_label_column(features, label_column, class_names, name)
    names = find_class_names(
        [(part, f"{name}, split '{split}'") for part, split in zip(rows, wanted.values(), strict=True)], label_column
    )
    check_order(names, class_names, label_column, name)
    found = [
        ImageSplit(part, name, split, image_column, label_column, names)
        for part, split in zip(rows, wanted.values(), strict=True)
    ]
    for split in found:
        split.labels()  # finds a wrong label now and not after minutes of decoding
    return None if train_split is None else found[0], found[-1]


def _load_splits(name, config_name, revision, cache_dir) -> Mapping[str, datasets.Dataset]:
    """Return all splits by name."""
    if name == DIGITS:
        return _digits()
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return _load_with_datasets(name, name, config_name, revision, cache_dir)
    split_folders = _split_folders(folder)
    if {"train", *EVAL_SPLITS}.isdisjoint(split_folders):
        return _load_with_datasets(name, str(folder), config_name, revision, cache_dir)
    return _image_folder(folder, split_folders)


def _load_with_datasets(name, path, config_name, revision, cache_dir):
    try:
        return datasets.load_dataset(path, config_name, revision=revision, cache_dir=cache_dir)
    except Exception as error:  # the Hub, the network, the cache and the readers raise their own types
        if Path(path).is_dir():
            reason = "give a folder of Parquet files, or one of train and test folders with class folders"
        else:
            reason = (
                "there is no such folder, and the Hub does not provide it. Without a network, give the path of a "
                "local folder instead"
            )
        raise HfkdError(f"The data set '{name}' cannot be loaded: {reason}. ({error})") from error


def _digits():
    """Return scikit-learn's 8 x 8 digits in a fixed stratified split."""
    from sklearn.datasets import load_digits  # two seconds to import, and only this data set needs it
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    images = [Image.fromarray(p).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB") for p in pixels]
    label = datasets.ClassLabel(names=[str(name) for name in digits.target_names])
    features = datasets.Features({"image": datasets.Image(), "label": label})
    train, test = train_test_split(range(len(images)), test_size=360, stratify=digits.target, random_state=0)
    splits = {}
    for split, rows in (("train", train), ("test", test)):
        columns = {"image": [images[i] for i in rows], "label": digits.target[rows]}
        splits[split] = datasets.Dataset.from_dict(columns, features=features)
    return splits


def _split_folders(folder):
    """Return {split: {class: folder}} of a folder of split folders; empty for another folder."""
    splits = {name: _subfolders(path) for name, path in _subfolders(folder).items()}
    return {name: class_folders for name, class_folders in splits.items() if class_folders}


def _subfolders(folder):
    return {path.name: path for path in sorted(folder.iterdir()) if path.is_dir() and path.name[0] != "."}


def _image_folder(folder, split_folders):
    """Read split folders with class folders, without `datasets`.

    `datasets` infers the split from any folder name in the path, so the images of a class called "train" would land in
    the training split. It also copies the list of files into its cache.
    """
    names = list(split_folders["train"] if "train" in split_folders else next(iter(split_folders.values())))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    splits = {}
    for split, class_folders in split_folders.items():
        unknown = [name for name in class_folders if name not in names]
        if unknown:
            raise HfkdError(
                f"{folder}: {split} has class folders that the training split lacks: {', '.join(unknown)}. "
                f"The classes are: {', '.join(names)}."
            )
        columns = {"image": [], "label": []}
        for name, class_folder in class_folders.items():
            files = [str(file) for file in class_folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES]
            if not files:
                raise HfkdError(
                    f"The class folder {class_folder} holds no image: no file ends in one of "
                    f"{', '.join(sorted(IMAGE_SUFFIXES))}. Put the class's images there, or remove the folder."
                )
            columns["image"] += sorted(files)
            columns["label"] += [names.index(name)] * len(files)
        splits[split] = datasets.Dataset.from_dict(columns, features=features)
    return splits


def find_eval_split(name: str, splits: Collection[str], requested: str | None) -> str:
    """Return `requested`, by default the first of EVAL_SPLITS; "validation", "val" and "valid" are one name.

    Raises:
        HfkdError: none is requested and none exists.
    """
    if requested in VALIDATION_SPLITS and requested not in splits:
        return next((split for split in VALIDATION_SPLITS if split in splits), requested)
    if requested is not None:
        return requested
    for split in EVAL_SPLITS:
        if split in splits:
            return split
    raise HfkdError(
        f"eval_split: {name} has none of the splits {', '.join(EVAL_SPLITS)}. It has: {', '.join(splits)}. "
        "Set eval_split to one of these, or to a part of one, e.g. train_split: train[:90%] and eval_split: "
        "train[90%:]."
    )


def _select_rows(name, splits, key, spec):
    """Return the rows that `spec` selects, e.g. "train" or "train[:10%]"."""
    split, bracket, _ = spec.partition("[")
    if split not in splits:
        raise HfkdError(f"{key}: {name} has no split '{split}'. It has: {', '.join(splits)}.")
    rows = splits[split]
    if bracket:
        try:
            (part,) = datasets.ReadInstruction.from_spec(spec).to_absolute({split: len(rows)})
        except (ValueError, AssertionError) as error:
            raise HfkdError(
                f"{key}: '{spec}' is not a slice such as {split}[:90%] or {split}[5:9] ({error})."
            ) from error
        # Rows are often sorted by class, and a slice of sorted rows could miss whole classes. The fixed seed gives the
        # same order for every slice, so that slices of one split do not overlap.
        order = np.random.default_rng(0).permutation(len(rows))
        rows = rows.select(order[part.from_ : part.to])
    if len(rows) == 0:
        raise HfkdError(f"{key}: {name}, split '{spec}' is empty.")
    return rows
