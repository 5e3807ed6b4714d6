"""Image column, label column and class names of a data set."""

from dataclasses import dataclass

import datasets
import numpy as np
import pyarrow.compute

from ..errors import HfkdError, nearest

LABEL_NAMES = ("label", "labels")  # preferred if several columns or plain integers could be labels


@dataclass(frozen=True)
class ImageSplit:
    """Rows of one split, not yet decoded.

    Attributes:
        dataset: the rows; `image_column` is a `datasets.Image`, `label_column` holds whole numbers.
        source: the name of the data set, e.g. "uoft-cs/cifar100".
        split: e.g. "train" or "train[:90%]".
        class_names: the name of class i at position i.
    """

    dataset: datasets.Dataset
    source: str
    split: str
    image_column: str
    label_column: str
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def name(self) -> str:
        """Name of the split for messages."""
        return f"{self.source}, split '{self.split}'"

    def labels(self) -> np.ndarray:
        """Return the labels, (N,) int64, each in 0 ... C - 1.

        Raises:
            HfkdError: a row has no label, or a label that is no class; the message names the first.
        """
        labels = _read_integers(self.dataset, self.label_column, self.name)
        classes = len(self.class_names)
        wrong = np.flatnonzero((labels < 0) | (labels >= classes))
        if len(wrong):
            value = labels[wrong[0]]
            reason = "-1 marks an unlabelled row" if value == -1 else f"the classes are 0 ... {classes - 1}"
            raise HfkdError(
                f"{self.name}: column '{self.label_column}' holds {value} in row {wrong[0]}; {reason}. "
                f"Rows like it: {len(wrong)}. Choose another split or column, or remove these rows."
            )
        return labels


def find_image_column(features: datasets.Features, requested: str | None, where: str) -> str:
    """Return `requested`, or the only column of images.

    Raises:
        HfkdError: the requested column is missing or holds no images, or none is requested and the number of columns of
            images is not one.
    """
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if requested is not None:
        _check_exists("image_column", requested, features, where)
        if requested not in images:
            raise HfkdError(
                f"image_column: column '{requested}' of {where} is {_describe(features[requested])}, not an "
                f"image. Columns of images: {_quoted(images)}."
            )
        return requested
    if len(images) != 1:
        problem = f"several columns hold images: {_quoted(images)}" if images else "no column holds images"
        raise HfkdError(f"{where}: {problem}. Set image_column to one of the columns: {_quoted(features)}.")
    return images[0]


def find_label_column(
    features: datasets.Features, requested: str | None, class_names: list[str] | None, where: str
) -> str:
    """Return `requested`, or the only column of class labels.

    Of several columns of class labels, it returns the one named label or labels, otherwise the one with these
    `class_names`. If there are none, it returns a column of whole numbers named label or labels.

    Raises:
        HfkdError: the requested column is missing or of another type, or the choice is not clear.
    """
    if requested is not None:
        _check_exists("label_column", requested, features, where)
        if not _is_label(features[requested]):
            raise HfkdError(
                f"label_column: column '{requested}' of {where} is {_describe(features[requested])}, but "
                f"labels are a ClassLabel or whole numbers. Candidates: {_label_candidates(features)}."
            )
        return requested
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if len(labels) == 1:
        return labels[0]
    named = [name for name in LABEL_NAMES if name in features and _is_label(features[name])]
    if named:
        return named[0]
    matching = [name for name in labels if features[name].names == class_names]
    if len(matching) == 1:
        return matching[0]
    problem = "several columns hold class labels" if labels else "no column holds class labels"
    raise HfkdError(
        f"{where}: {problem}. Set label_column. Candidates: {_label_candidates(features)}. Text can be made class "
        "labels with `Dataset.class_encode_column`."
    )


def find_class_names(splits: list[tuple[datasets.Dataset, str]], label_column: str) -> list[str]:
    """Return the names of a ClassLabel, or "0" up to the largest number in any split (rows, name).

    Raises:
        HfkdError: the numbers have large gaps.
    """
    feature = splits[0][0].features[label_column]
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    labels = np.unique(np.concatenate([_read_integers(rows, label_column, name) for rows, name in splits]))
    if labels.max() > 10 * len(labels):
        raise HfkdError(
            f"label_column: '{label_column}' of {splits[0][1]} has {len(labels)} different numbers up to "
            f"{labels.max()}; classes are numbered from 0 without gaps. `Dataset.class_encode_column` renumbers them."
        )
    return [str(i) for i in range(labels.max() + 1)]


def check_order(names: list[str], expected: list[str] | None, label_column: str, where: str) -> None:
    """Check that a data set numbers the expected classes in the expected order.

    Raises:
        HfkdError: it has the expected classes under other numbers.
    """
    if expected and names != expected and sorted(names) == sorted(expected):
        raise HfkdError(
            f"label_column: '{label_column}' of {where} numbers the expected classes in another order ({names[:3]}... "
            f"against {expected[:3]}...). Renumber it, e.g. with datasets' `align_labels_with_mapping`."
        )


def _read_integers(dataset, column, where):
    """Return a column of whole numbers as (N,) int64."""
    values = dataset.select_columns(column).with_format("arrow")[:][column]
    if values.null_count:  # to_numpy would convert nulls to floats
        row = pyarrow.compute.index(values.is_null(), True).as_py()
        raise HfkdError(
            f"{where}: column '{column}' is empty in row {row}. Rows like it: {values.null_count}. Choose "
            "another split or column, or remove these rows."
        )
    return values.to_numpy().astype(np.int64)


def _is_label(feature):
    if isinstance(feature, datasets.Value):
        return feature.dtype.startswith(("int", "uint"))
    return isinstance(feature, datasets.ClassLabel)


def _check_exists(key, name, features, where):
    if name not in features:
        [near] = nearest(name, features, cutoff=0)
        raise HfkdError(f"{key}: {where} has no column '{name}'. Did you mean '{near}'? Columns: {_quoted(features)}.")


def _label_candidates(features):
    return _quoted(name for name, feature in features.items() if _is_label(feature))


def _describe(feature):
    return feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__


def _quoted(names):
    return ", ".join(f"'{name}'" for name in names) or "none"
