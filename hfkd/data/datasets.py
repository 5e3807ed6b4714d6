"""Image classification data sets by name: scikit-learn's digits, the Hub, local folders."""

from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow.parquet
from datasets.packaged_modules.parquet.parquet import Parquet
from PIL import Image

from ..errors import HfkdError
from ..names import DIGITS, NO_LABELS
from .classes import check_several, number_classes
from .columns import ImageSplit, as_images, find_image_column, find_label_column, label_values, own_class_label
from .folders import EVAL_SPLITS, VALIDATION_SPLITS, FolderSplits, check_regular_files, open_folder

HELD_OUT = 20  # without labels and an evaluation split, one of so many images is held out
_SCHEMA_THREADS = 16  # reading a schema from the Hub is mostly waiting


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
            every class or with a table `labels.csv` of file names and labels; or an id on the Hub, e.g.
            "uoft-cs/cifar100".
        train_split: a name, or a slice in the notation of `datasets`, e.g. "train[:90%]". None: no training split is
            loaded, and None is returned in its place.
        eval_split: a name or a slice. By default the first of test, validation, val and valid that exists. The last
            three are one name: ImageNet's split is called validation on the Hub and val in most folders.
        image_column, label_column: by default found from the features. A data set without a column of labels, and any
            with the label_column "none", has no labels and no classes. Without an evaluation split, one image of 20 of
            the training split is then held out.
        class_names: expected names of the classes. They select one of several columns of labels. If all classes of
            the data set are among them, its labels are numbered as they are.
        config_name, revision, cache_dir: for `datasets.load_dataset`.

    Raises:
        HfkdError: the data set cannot be loaded, a split or a class folder is missing or empty, a column is missing, of
            a wrong type or not clear, or a label is no class.
    """
    splits = _load_splits(name, config_name, revision, cache_dir, label_column != NO_LABELS)
    wanted = _find_splits(name, splits, train_split, eval_split, label_column, class_names)
    rows = [_select_rows(name, splits, key, split) for key, split in wanted.items()]
    image_column = find_image_column(rows[0].features, image_column, name)
    found = [
        ImageSplit(as_images(part, image_column), name, split, image_column, None, [])
        for part, split in zip(rows, wanted.values(), strict=True)
    ]
    for first, part in enumerate(rows):  # evaluation images may have labels where those for training have none
        column = find_label_column(part.features, label_column, class_names, name)
        if column is not None:
            found[first:] = _with_labels(found[first:], splits, column, class_names, config_name, revision)
            break
    labels = [split.labels() for split in found]  # finds a wrong label now and not after minutes of decoding
    if train_split is None:
        return None, found[-1]
    names = found[0].class_names
    if found[0].has_labels:
        check_several([names[index] for index in np.unique(labels[0])] if len(labels[0]) > 1 else names, found[0].name)
    return found[0], found[-1]


def _find_splits(name, splits, train_split, eval_split, label_column, class_names) -> dict[str, str]:
    """Return the name or slice of each split to load, by its key."""
    if train_split is None:
        return {"eval_split": find_eval_split(name, splits, eval_split)}
    whole = train_split.partition("[")[0]
    features = splits[whole].features if whole in splits else {}
    if not features or find_label_column(features, label_column, class_names, name) is not None:
        eval_split = find_eval_split(name, splits, eval_split)
        if isinstance(splits, FolderSplits) and eval_split in splits.unlabelled:
            raise missing_split_error("eval_split", name, eval_split, splits)
        return {"train_split": train_split, "eval_split": eval_split}
    if eval_split is None and set(EVAL_SPLITS).isdisjoint(splits):
        known = splits.unlabelled if isinstance(splits, FolderSplits) else ()
        if train_split == whole and set(EVAL_SPLITS).isdisjoint(known):
            rows = len(splits[whole])
            kept = rows - max(1, rows // HELD_OUT)
            return {"train_split": f"{whole}[:{kept}]", "eval_split": f"{whole}[{kept}:]"}
        return {"train_split": train_split, "eval_split": find_eval_split(name, [*splits, *known], None)}
    return {"train_split": train_split, "eval_split": find_eval_split(name, splits, eval_split)}


def _with_labels(found, splits, label_column, class_names, config_name, revision) -> list[ImageSplit]:
    """Return splits with their labels and the names of their classes."""
    name, own_features = found[0].source, {}
    if not isinstance(splits, FolderSplits) and name != DIGITS:
        wholes = {each.split.partition("[")[0] for each in found}
        own_features = _own_label_features(name, wholes, found[0].dataset, label_column, config_name, revision)
    parts = []
    for each in found:
        whole = each.split.partition("[")[0]  # a slice may lack some classes
        parts.append(label_values(splits[whole], label_column, f"{name}, split '{whole}'", own_features.get(whole)))
    names, values = number_classes(parts, 1, label_column, class_names)
    return [
        replace(each, label_column=label_column, class_names=names, class_values=of_classes)
        for each, of_classes in zip(found, values, strict=True)
    ]


def _load_splits(name, config_name, revision, cache_dir, labelled) -> Mapping[str, datasets.Dataset]:
    """Return all splits by name."""
    if name == DIGITS:
        return _digits()
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return _load_with_datasets(name, name, config_name, revision, cache_dir)
    splits = open_folder(folder, labelled)
    if splits is None:
        check_regular_files(folder)
        return _load_with_datasets(name, loadable_name(name), config_name, revision, cache_dir)
    return splits


def loadable_name(name: str) -> str:
    """Return a Hub id, or a folder's whole path: `datasets` would take "csv" or "pandas" for one of its readers."""
    folder = Path(name).expanduser()
    return str(folder.absolute()) if folder.is_dir() else name


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


def _own_label_features(name, wholes, rows, label_column, config_name, revision):
    """Return the label's feature in each split's Parquet files, by split.

    `datasets` gives all splits the first file's order of class names, and leaves the numbers as each file has them.

    Raises:
        HfkdError: the files of one split have several orders.
    """
    known = rows.features[label_column]
    if not isinstance(known, datasets.ClassLabel):
        return {}
    builder = datasets.load_dataset_builder(loadable_name(name), config_name, revision=revision)
    if not isinstance(builder, Parquet):
        return {}
    found = {}
    for split in wholes:
        with ThreadPoolExecutor(_SCHEMA_THREADS) as pool:
            schemas = list(pool.map(_read_schema, builder.config.data_files[split]))
        features = [own_class_label(schema, label_column, known) for schema in schemas]
        if any(feature.names != features[0].names for feature in features):
            raise HfkdError(
                f"label_column: the files of {name}, split '{split}', have the class names of '{label_column}' in "
                "different orders. Write them with one order, or set streaming: true, which matches them by name."
            )
        found[split] = features[0]
    return found


def _read_schema(url):
    with fsspec.open(url, "rb") as stream:
        return pyarrow.parquet.read_schema(stream)


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
        if split in list(splits):  # of a folder, only those with labels
            return split
    raise HfkdError(
        f"eval_split: {name} has none of the splits {', '.join(EVAL_SPLITS)}. It has: {', '.join(splits)}. "
        "Set eval_split to one of these, or to a part of one, e.g. train_split: train[:90%] and eval_split: "
        "train[90%:]."
    )


def missing_split_error(key: str, name: str, split: str, splits: Collection[str]) -> HfkdError:
    """Return the error for a split that a data set does not have."""
    if isinstance(splits, FolderSplits) and split in splits.unlabelled:
        return HfkdError(
            f"{key}: {splits.unlabelled[split]} holds no labels: it has neither class folders nor a table such as "
            f"labels.csv. Splits with labels: {', '.join(splits) or 'none'}."
        )
    known = [*splits, *splits.unlabelled] if isinstance(splits, FolderSplits) else splits
    return HfkdError(f"{key}: {name} has no split '{split}'. It has: {', '.join(known)}.")


def _select_rows(name, splits, key, spec):
    """Return the rows that `spec` selects, e.g. "train" or "train[:10%]"."""
    split, bracket, _ = spec.partition("[")
    if split not in splits:
        raise missing_split_error(key, name, split, splits)
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
