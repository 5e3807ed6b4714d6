"""Image column, label column and class names of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.compute

from ..errors import HfkdError, nearest
from ..names import NO_LABELS
from .classes import ClassValues, LabelValues, renumbered

# Preferred if several columns, plain integers or text could be labels.
LABEL_NAMES = ("label", "labels", "class", "category", "target")
IGNORED = -100  # label of an image without one, which torch's cross-entropy ignores


@dataclass(frozen=True)
class ImageSplit:
    """Rows of one split, not yet decoded.

    Attributes:
        dataset: the rows; `image_column` is a `datasets.Image`, `label_column` holds whole numbers or text.
        label_column: None for rows without labels; `class_names` are then empty, or those of a model.
        source: the name of the data set, e.g. "uoft-cs/cifar100".
        split: e.g. "train" or "train[:90%]".
        class_names: the name of class i at position i.
        class_values: the label column's value for class i at position i; None if the column holds the numbers.
    """

    dataset: datasets.Dataset
    source: str
    split: str
    image_column: str
    label_column: str | None
    class_names: list[str]
    class_values: ClassValues = None

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def name(self) -> str:
        """Name of the split for messages."""
        return f"{self.source}, split '{self.split}'"

    @property
    def has_labels(self) -> bool:
        return self.label_column is not None

    def labels(self) -> np.ndarray:
        """Return the labels, (N,) int64, each in 0 ... C - 1; IGNORED for rows without labels.

        Raises:
            HfkdError: a row has no label, or a label that is no class; the message names the first.
        """
        if self.label_column is None:
            return np.full(len(self), IGNORED, dtype=np.int64)
        values = _read_column(self.dataset, self.label_column, self.name)
        if self.class_values is None:
            labels = values.to_numpy().astype(np.int64)
        else:
            known = pyarrow.array(self.class_values, type=values.type)
            labels = pyarrow.compute.index_in(values, known, skip_nulls=True).fill_null(-1).to_numpy().astype(np.int64)
        classes = len(self.class_names)
        wrong = np.flatnonzero((labels < 0) | (labels >= classes))
        if len(wrong):
            value = values[int(wrong[0])].as_py()
            reason = "-1 marks an unlabelled row" if value == -1 else self._described_classes()
            raise HfkdError(
                f"{self.name}: column '{self.label_column}' holds {value} in row {wrong[0]}; {reason}. "
                f"Rows like it: {len(wrong)}. Choose another split or column, or remove these rows."
            )
        return labels

    def _described_classes(self):
        if self.class_values is None:
            return f"the classes are 0 ... {len(self.class_names) - 1}"
        return f"the classes are {_quoted(self.class_names[:5])}{', ...' if len(self.class_names) > 5 else ''}"

    def renumbered(self, class_names: list[str], indices: Sequence[int]) -> ImageSplit:
        """Return the split with a model's classes, of which `indices` are those that the split's classes become."""
        values = renumbered(self.class_values, indices, len(class_names))
        return replace(self, class_names=class_names, class_values=values)


def find_image_column(features: datasets.Features, requested: str | None, where: str) -> str:
    """Return `requested`, or the only column of images; if there is none, the only one of encoded bytes.

    Raises:
        HfkdError: the requested column is missing or holds no images, or none is requested and the number of columns of
            images is not one.
    """
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    encoded = [name for name, feature in features.items() if _holds_bytes(feature)]
    if requested is not None:
        _check_exists("image_column", requested, features, where)
        if requested not in images + encoded:
            raise HfkdError(
                f"image_column: column '{requested}' of {where} is {_describe(features[requested])}, not an "
                f"image. Columns of images: {_quoted(images + encoded)}."
            )
        return requested
    images = images or encoded  # bytes columns, as pandas writes them
    if len(images) != 1:
        problem = f"several columns hold images: {_quoted(images)}" if images else "no column holds images"
        raise HfkdError(f"{where}: {problem}. Set image_column to one of the columns: {_quoted(features)}.")
    return images[0]


def find_label_column(
    features: datasets.Features, requested: str | None, class_names: list[str] | None, where: str
) -> str | None:
    """Return `requested`, or the only column of class labels; None for NO_LABELS, or where no column could be one.

    Of several columns of class labels, it returns the one with one of LABEL_NAMES, otherwise the one with these
    `class_names`. If there are none, it returns a column of whole numbers or text with one of LABEL_NAMES.

    Raises:
        HfkdError: the requested column is missing or of another type, or the choice is not clear.
    """
    if requested == NO_LABELS:
        return None
    if requested is not None:
        _check_exists("label_column", requested, features, where)
        _check_one_class(requested, features, where)
        if not _is_label(features[requested]):
            raise HfkdError(
                f"label_column: column '{requested}' of {where} is {_describe(features[requested])}, but "
                f"labels are a ClassLabel, whole numbers or text. Candidates: {_label_candidates(features)}."
            )
        return requested
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if len(labels) == 1:
        return labels[0]
    named = [name for name in LABEL_NAMES if name in features and _is_label(features[name])]
    if named:
        return named[0]
    matching = [name for name in labels if class_names and set(features[name].names) == set(class_names)]
    if len(matching) == 1:
        return matching[0]
    for name in LABEL_NAMES:
        _check_one_class(name, features, where)
    candidates = _label_candidates(features)
    if candidates == "none":
        return None
    problem = "several columns hold class labels" if labels else "no column holds class labels"
    raise HfkdError(
        f"{where}: {problem}. Set label_column. Candidates: {candidates}; '{NO_LABELS}' reads images without labels."
    )


def as_images(dataset: datasets.Dataset, column: str) -> datasets.Dataset:
    """Return a data set whose column of encoded bytes is an Image."""
    if isinstance(dataset.features[column], datasets.Image):
        return dataset
    return dataset.cast_column(column, datasets.Image())


def own_class_label(
    schema: pyarrow.Schema, column: str, known: datasets.ClassLabel | datasets.Value
) -> datasets.ClassLabel | datasets.Value:
    """Return the label's feature as a Parquet file states it; each file keeps its own order of class names.

    Args:
        known: the feature of the whole data set. It holds for a file that names no classes, or that names them
            "0", "1", ...
    """
    own = datasets.Features.from_arrow_schema(schema).get(column, known)
    if not isinstance(known, datasets.ClassLabel):
        return own
    if not isinstance(own, datasets.ClassLabel) or own.names == [str(i) for i in range(len(own.names))]:
        return known
    return own


def label_values(dataset: datasets.Dataset, column: str, where: str, feature: Any = None) -> LabelValues:
    """Return the label column of a split, with its different values.

    Args:
        feature: of the column; by default the data set's.

    Raises:
        HfkdError: the column is missing, or its type is none of a label.
    """
    if column not in dataset.features:
        raise HfkdError(f"{where} has no column '{column}', unlike the training split.")
    feature = feature or dataset.features[column]
    if not _is_label(feature):
        raise HfkdError(f"label_column: column '{column}' of {where} is {_describe(feature)}, unlike another split's.")
    if isinstance(feature, datasets.ClassLabel):
        return LabelValues(feature, [], len(dataset), where)
    values = dataset.select_columns(column).with_format("arrow")[:][column]
    return LabelValues(feature, values.unique().drop_null().to_pylist(), len(dataset), where)


def _read_column(dataset, column, where):
    """Return a column without nulls as an Arrow array."""
    values = dataset.select_columns(column).with_format("arrow")[:][column]
    if values.null_count:
        row = pyarrow.compute.index(values.is_null(), True).as_py()
        raise HfkdError(
            f"{where}: column '{column}' is empty in row {row}. Rows like it: {values.null_count}. Choose "
            "another split or column, or remove these rows."
        )
    return values


def _is_label(feature):
    if isinstance(feature, datasets.Value):
        return feature.dtype.startswith(("int", "uint")) or feature.dtype in ("bool", "string", "large_string")
    return isinstance(feature, datasets.ClassLabel)


def _check_one_class(name, features, where):
    """Raise HfkdError for a column of several labels a row, which is how multi-label data are written."""
    if isinstance(features.get(name), (datasets.List, datasets.LargeList)):
        raise HfkdError(
            f"label_column: column '{name}' of {where} holds a list of labels for each image (multi-label data), and "
            "hfkd learns one class for each image. Name a column with one label, or write one."
        )


def _holds_bytes(feature):
    """Return True for a column of encoded files: bytes, or {"bytes", "path"}."""
    if isinstance(feature, dict):
        return _holds_bytes(feature.get("bytes")) and feature.keys() <= {"bytes", "path"}
    return isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")


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
