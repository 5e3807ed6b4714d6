"""Shards of streamed data sets: location of their rows, and reading of a few rows at a time."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow.compute
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.table import table_cast
from fsspec.implementations.local import LocalFileSystem
from pyarrow.parquet import FileMetaData, ParquetFile

from ..errors import HfkdError, RunError
from ..names import DIGITS, NO_LABELS
from .classes import ClassValues, LabelValues, check_several, number_classes, renumbered
from .columns import IGNORED, ImageSplit, find_image_column, find_label_column, own_class_label
from .datasets import find_eval_split, load_image_splits, loadable_name, missing_split_error
from .folders import check_regular_files, open_folder

_FOOTER_THREADS = 16  # ImageNet has hundreds of files, and reading a footer from the Hub is mostly waiting

Sample = tuple[dict[str, Any] | None, int]  # cell of the image column, {"bytes", "path"}, and label


@dataclass(frozen=True)
class StreamSplit:
    """Rows of one split, none of which has been read.

    Attributes:
        shards: reader of the rows.
        source: the name of the data set, e.g. "ILSVRC/imagenet-1k".
        split: e.g. "train".
        class_names: the name of class i at position i.
        has_labels: False if no row has a label; `class_names` are then empty, or those of a model.
    """

    shards: ParquetShards | FileShards
    source: str
    split: str
    class_names: list[str]
    has_labels: bool = True

    @property
    def name(self) -> str:
        """Name of the split for messages."""
        return f"{self.source}, split '{self.split}'"

    @property
    def num_rows(self) -> int:
        return int(self.shards.sizes.sum())

    def renumbered(self, class_names: list[str], indices: Sequence[int]) -> StreamSplit:
        """Return the split with a model's classes, of which `indices` are those that the split's classes become."""
        return replace(self, shards=self.shards.renumbered(indices, len(class_names)), class_names=class_names)


def open_streams(
    name: str,
    *,
    train_split: str | None = "train",
    eval_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    class_names: list[str] | None = None,
    config_name: str | None = None,
    revision: str | None = None,
) -> tuple[StreamSplit | None, StreamSplit]:
    """Open the training and the evaluation split of a data set without downloading or decoding it first.

    Only the list of files and the footers of Parquet files are read. The arguments are the same as in
    `load_image_splits`, except that a split is taken whole, without slices.

    Raises:
        HfkdError: the data set is neither Parquet files (in a local folder, on the Hub) nor a local folder of split
            folders with class folders; a Parquet file is damaged; a split is missing, empty or a slice; a column is
            missing, of a wrong type or not clear; or a label is no class.
    """
    for key, split in (("train_split", train_split), ("eval_split", eval_split)):
        if split is not None and "[" in split:
            raise HfkdError(
                f"{key}: '{split}' is a part of a split, and streaming reads whole splits. Name one, e.g. 'train', or "
                "set streaming: false."
            )
    folder = Path(name).expanduser()
    columns: dict[str, Any] = {"image_column": image_column, "label_column": label_column, "class_names": class_names}
    if folder.is_dir() and open_folder(folder, label_column != NO_LABELS) is not None:
        splits = load_image_splits(name, train_split=train_split, eval_split=eval_split, **columns)
        streams = [
            StreamSplit(FileShards(split), name, split.split, split.class_names, split.has_labels)
            for split in splits
            if split is not None
        ]
        return None if train_split is None else streams[0], streams[-1]
    builder = _parquet_builder(name, config_name, revision)
    urls = {str(split): files for split, files in builder.config.data_files.items()}
    wanted = {"train_split": train_split, "eval_split": find_eval_split(name, urls, eval_split)}
    footers = [(split, _footers(name, key, split, urls)) for key, split in wanted.items() if split is not None]
    found = _parquet_streams(name, builder.info.features, footers, **columns)
    if train_split is None:
        return None, found[-1]
    if found[0].has_labels:
        check_several(found[0].class_names, found[0].name)
    return found[0], found[-1]


# ---- Reading -------------------------------------------------------------------------------------------------------


class FileShards:
    """Images in one file each, listed by `load_image_splits`. A unit, the part that is read at once, is one file.

    Attributes:
        sizes: (U,) int64, the rows of each unit.
    """

    def __init__(self, split: ImageSplit):
        images = split.dataset.select_columns(split.image_column).with_format("arrow")[:][split.image_column]
        # Arrow's strings, not Python's: reference counts would make forked workers copy a million Python strings.
        self._paths = pyarrow.compute.struct_field(images, "path").combine_chunks()
        self._labels = split.labels()
        self._name = split.name
        self.sizes = np.ones(len(split), dtype=np.int64)

    def read(self, unit: int, rows: np.ndarray) -> list[Sample]:
        """Return the sample of a unit, as `ParquetShards.read`."""
        path = self._paths[unit].as_py()
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise _stream_error(self._name, path, 0, 1, error) from error
        return [({"bytes": data, "path": path}, int(self._labels[unit]))]

    def renumbered(self, indices: Sequence[int], num_classes: int) -> FileShards:
        """Return the same images with other numbers of the classes."""
        other = copy.copy(self)
        other._labels = np.asarray(indices, dtype=np.int64)[self._labels]
        return other


@dataclass(frozen=True)
class _Footer:
    """Footer of a Parquet file."""

    url: str
    size: int  # of the file, in bytes
    metadata: FileMetaData
    schema: pyarrow.Schema


@dataclass(frozen=True)
class _Labels:
    """Label column of one Parquet file.

    Attributes:
        feature: as in the file; each file keeps its own order of class names.
        values: the column's value for class i at position i; None if the column holds the numbers.
        num_classes: number of classes.
    """

    feature: datasets.ClassLabel | datasets.Value
    values: ClassValues
    num_classes: int

    def by_value(self) -> dict[Any, int]:
        """Return the class of each value."""
        values = range(self.num_classes) if self.values is None else self.values
        return {value: index for index, value in enumerate(values) if value is not None}


class ParquetShards:
    """Rows of Parquet files. A unit, the part that is read at once, is a row group: the smallest readable part.

    Attributes:
        sizes: (U,) int64, the rows of each unit.
    """

    def __init__(
        self,
        name: str,
        footers: Sequence[_Footer],
        image_column: str,
        label_column: str | None = None,
        labels: Sequence[_Labels] = (),
    ):
        self._name = name
        self._image_column, self._label_column = image_column, label_column
        pairs = zip(footers, labels, strict=True) if label_column else ()
        self._labels = {footer.url: each for footer, each in pairs}
        self._classes = {url: each.by_value() for url, each in self._labels.items()}
        groups = [(footer, i) for footer in footers for i in range(footer.metadata.num_row_groups)]
        sizes = np.array([footer.metadata.row_group(i).num_rows for footer, i in groups], dtype=np.int64)
        self._units = [groups[unit] for unit in np.flatnonzero(sizes)]
        self.sizes = sizes[sizes > 0]

    def renumbered(self, indices: Sequence[int], num_classes: int) -> ParquetShards:
        """Return the same rows with other numbers of the classes."""
        other = copy.copy(self)
        other._labels = {
            url: replace(each, values=renumbered(each.values, indices, num_classes), num_classes=num_classes)
            for url, each in self._labels.items()
        }
        other._classes = {url: each.by_value() for url, each in other._labels.items()}
        return other

    def read(self, unit: int, rows: np.ndarray) -> list[Sample]:
        """Return some rows of a unit, not decoded.

        Args:
            rows: (K,) int64, counted from the unit's first row.

        Raises:
            RunError: the unit's file no longer holds the rows that it held when the data set was opened.
            HfkdError: a label is no class.
        """
        footer, group = self._units[unit]
        table = self._read_group(footer, group, int(self.sizes[unit]))
        images, samples = table[self._image_column], []
        for row in rows.tolist():
            cell = images[row].as_py()
            if cell is not None and cell["bytes"] is not None:  # the path is for messages only
                cell["path"] = f"{cell['path']} in {footer.url}" if cell["path"] else footer.url
            samples.append((cell, self._label(table, footer, group, row)))
        return samples

    def _label(self, table, footer, group, row) -> int:
        if self._label_column is None:
            return IGNORED
        label, classes = table[self._label_column][row].as_py(), self._classes[footer.url]
        if label not in classes:
            where = f"{self._name}, row {row} of row group {group} of {footer.url}"
            raise _label_error(where, self._label_column, label, classes)
        return classes[label]

    def _read_group(self, footer, group, expected):
        """Read the columns of images and labels of a row group."""
        columns: dict[str, Any] = {self._image_column: datasets.Image()}
        if self._label_column is not None:
            columns[self._label_column] = self._labels[footer.url].feature
        num_read = 0
        try:
            with _open(footer) as stream:
                file = ParquetFile(stream, metadata=footer.metadata)
                table = file.read_row_group(
                    group, columns=list(columns), use_threads=False
                )  # workers are parallel already
            num_read = table.num_rows
            if num_read != expected:
                raise OSError("it is shorter than its footer says")
        except Exception as error:  # Arrow, the file systems and the Hub raise their own types
            raise _stream_error(self._name, f"row group {group} of {footer.url}", num_read, expected, error) from error
        table = table.select(list(columns))
        return table_cast(table, datasets.Features(columns).arrow_schema)


def _open(footer):
    """Open a Parquet file so that only the requested parts are fetched."""
    file_system, path = fsspec.url_to_fs(footer.url)
    # A URL on the Hub names a commit, whose files never change. Reading the size would cost a request.
    if isinstance(file_system, LocalFileSystem) and file_system.size(path) != footer.size:
        raise OSError(f"it had {footer.size} bytes when the run began and has {file_system.size(path)}")
    return file_system.open(path, "rb", size=footer.size, cache_type="none")


def _stream_error(name, what, num_read, expected, error):
    reason = " ".join(str(error).split())  # Arrow's messages have line breaks
    return RunError(
        f"{name}: the stream ended early: {what} gave {num_read} of {expected} rows ({reason}). Once it can be read "
        "again, continue with --resume_from_checkpoint true."
    )


# ---- Opening Parquet files -----------------------------------------------------------------------------------------


def _parquet_builder(name, config_name, revision):
    """Return the builder of `datasets`, which knows each split's files, and perhaps the features, without the data."""
    if name == DIGITS:
        raise HfkdError("streaming: the digits are in memory; set streaming: false.")
    path = Path(name).expanduser()
    if path.is_dir():
        check_regular_files(path)
    try:
        builder = datasets.load_dataset_builder(loadable_name(name), config_name, revision=revision)
    except Exception as error:  # the Hub, the network and the readers raise their own types
        raise HfkdError(
            f"The data set '{name}' cannot be opened: there is no such folder with data in it, and the Hub does not "
            f"provide it. ({error})"
        ) from error
    if not isinstance(builder, Parquet):
        files = [file for split in (builder.config.data_files or {}).values() for file in split]
        raise HfkdError(
            f"streaming: {name} is not made of Parquet files (found: {files[0] if files else 'a prepared copy'}). "
            "Streaming reads Parquet files in a local folder or on the Hub, and a local folder of train and test "
            "folders, each with a folder of images for every class. Convert it with `Dataset.to_parquet`, or set "
            "streaming: false."
        )
    return builder


def _footers(name, key, split, urls) -> list[_Footer]:
    if split not in urls:
        raise missing_split_error(key, name, split, urls)
    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        footers = list(pool.map(_read_footer, urls[split]))
    if not any(footer.metadata.num_rows for footer in footers):
        raise HfkdError(f"{key}: {name}, split '{split}' is empty.")
    return footers


def _read_footer(url):
    try:
        file_system, path = fsspec.url_to_fs(url)
        with file_system.open(path, "rb", cache_type="none") as stream:
            file = ParquetFile(stream)
            return _Footer(url, file_system.size(path), file.metadata, file.schema_arrow)
    except Exception as error:  # as in _read_group
        raise HfkdError(f"{url} is not a whole Parquet file: it may be cut off, get it again. ({error})") from error


def _parquet_streams(name, features, splits, image_column, label_column, class_names) -> list[StreamSplit]:
    """Return the streams of [(split, footers)]; `features` come from the data set's card, if it has them."""
    features = features or datasets.Features.from_arrow_schema(splits[0][1][0].schema)
    image_column = find_image_column(features, image_column, name)
    label_column = find_label_column(features, label_column, class_names, name)
    footers = [footer for _, footers in splits for footer in footers]
    for footer in footers:
        missing = {image_column, label_column}.difference([*footer.schema.names, None])
        if missing:
            raise HfkdError(f"{footer.url} has no column '{missing.pop()}', unlike the other files of {name}.")
    if label_column is None:
        return [
            StreamSplit(ParquetShards(f"{name}, split '{split}'", own, image_column), name, split, [], has_labels=False)
            for split, own in splits
        ]
    parts = [_label_values(name, footer, label_column, features[label_column]) for footer in footers]
    names, values = number_classes(parts, len(splits[0][1]), label_column, class_names)
    labels = [_Labels(part.feature, each, len(names)) for part, each in zip(parts, values, strict=True)]
    for footer, each in zip(footers, labels, strict=True):
        _check_labels(name, footer, label_column, each.by_value())
    streams = []
    for split, own in splits:
        shards = ParquetShards(f"{name}, split '{split}'", own, image_column, label_column, labels[: len(own)])
        del labels[: len(own)]
        streams.append(StreamSplit(shards, name, split, names))
    return streams


def _label_values(name, footer, column, known) -> LabelValues:
    """Return a file's labels; those of numbers and text are read, since a footer does not tell their classes."""
    feature = own_class_label(footer.schema, column, known)
    rows = footer.metadata.num_rows
    if isinstance(feature, datasets.ClassLabel):
        return LabelValues(feature, [], rows, f"{name}, file {footer.url}")
    try:
        with _open(footer) as stream:
            labels = ParquetFile(stream, metadata=footer.metadata).read(columns=[column])[column]
    except Exception as error:  # as in _read_group
        raise _stream_error(name, footer.url, 0, rows, error) from error
    return LabelValues(feature, labels.unique().drop_null().to_pylist(), rows, f"{name}, file {footer.url}")


def _check_labels(name, footer, column, classes):
    """Check the labels in a footer's statistics, so that a wrong one is found before hours of training."""
    for group, statistics in _label_statistics(footer, column):
        if statistics is None:
            continue  # `ParquetShards.read` checks the labels themselves
        where = f"{name}, row group {group} of {footer.url}"
        if statistics.null_count:
            raise _label_error(where, column, None, classes)
        for label in (statistics.min, statistics.max):
            if label not in classes:
                raise _label_error(where, column, label, classes)


def _label_statistics(footer, column) -> list[tuple[int, Any]]:
    """Return row groups and Arrow's statistics of a column of whole numbers in each; None if there are none."""
    place = [footer.metadata.schema.column(i).path for i in range(footer.metadata.num_columns)].index(column)
    found = []
    for group in range(footer.metadata.num_row_groups):
        statistics = footer.metadata.row_group(group).column(place).statistics
        known = statistics is not None and (statistics.null_count or isinstance(statistics.min, int))
        if footer.metadata.row_group(group).num_rows:
            found.append((group, statistics if known else None))
    return found


def _label_error(where, column, label, classes):
    known = f"the classes are {next(iter(classes))} ... {list(classes)[-1]}" if classes else "there are no classes"
    reason = "-1 marks an unlabelled row" if label == -1 else known
    value = "no label" if label is None else label
    return HfkdError(
        f"{where}: column '{column}' holds {value}; {reason}. Choose another split or column, or remove these rows."
    )
