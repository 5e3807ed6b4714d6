"""Local folders of images: split folders with class folders, or with a table of file names and labels."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import datasets

from ..errors import HfkdError
from .columns import LABEL_NAMES

VALIDATION_SPLITS = ("validation", "val", "valid")
EVAL_SPLITS = ("test", *VALIDATION_SPLITS)
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".jp2"}
SPLIT_NAMES = {"training": "train", "testing": "test"} | {name: name for name in ("train", *EVAL_SPLITS)}
TABLES = ("metadata.csv", "labels.csv")  # `datasets` reads the first
FILE_COLUMNS = ("file_name", "filename", "file", "image", "path")
_READ_SUFFIXES = IMAGE_SUFFIXES | {
    ".parquet",
    ".arrow",
    ".csv",
    ".tsv",
    ".json",
    ".jsonl",
    ".txt",
    ".zip",
    ".tar",
    ".md",
}


class FolderSplits(Mapping[str, datasets.Dataset]):
    """Splits of a local folder by name. A split is read when it is asked for, and folders beside it are not.

    The case of a name does not count, and "training" and "testing" mean train and test. This does not use `datasets`,
    which infers the split from any folder name in the path, so that the images of a class called "train" would land in
    the training split. It also copies the list of files into its cache.

    Args:
        folder: the whole folder.
        labelled: False: sub-folders are no classes, and every image below a split's folder belongs to it. Without
            folders named as a split, all images are the training split.

    Attributes:
        unlabelled: folders of splits without labels, by split. They are read like others, and not listed.
    """

    def __init__(self, folder: Path, labelled: bool = True):
        self.folder = folder
        self.labelled = labelled
        self.unlabelled: dict[str, Path] = {}
        self._paths: dict[str, Path] = {}
        for path in _subfolders(folder):
            split = SPLIT_NAMES.get(path.name.lower())
            if split is None:
                continue
            if labelled and not self._has_labels(path):
                self.unlabelled[split] = path
            elif split in self._paths:
                raise HfkdError(
                    f"{folder} has two folders for the split '{split}': {self._paths[split].name} and {path.name}. "
                    "Rename one of them."
                )
            else:
                self._paths[split] = path
        self._paths = {split: self._paths[split] for split in ("train", *EVAL_SPLITS) if split in self._paths}
        self._names: list[str] | None = None
        self._read: dict[str, datasets.Dataset] = {}
        if not labelled:
            self.unlabelled, self._paths = self._paths or {"train": folder}, {}
        elif not self._paths and (_table(folder) or len(_flat_class_folders(folder)) > 1):
            self._paths = {"train": folder}
        elif not self._paths and not self.unlabelled and not self._has_labels(folder):
            self.unlabelled = {"train": folder}

    def __contains__(self, split: object) -> bool:
        return self._path(str(split)) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, split: str) -> datasets.Dataset:
        path = self._path(split)
        if path is None:
            raise KeyError(split)
        if split not in self._read:
            self._read[split] = self._read_split(split, path)
        return self._read[split]

    def _path(self, split: str) -> Path | None:
        """Return the folder of a split; also of one with another name than the usual ones."""
        known = (self.unlabelled | self._paths).get(SPLIT_NAMES.get(split.lower(), split))
        if known is not None or split.lower() in SPLIT_NAMES or split.startswith(".") or Path(split).name != split:
            return known
        path = self.folder / split
        is_split = os.path.isdir(path) and (not self.labelled or self._has_labels(path))  # also of a name too long
        return path if is_split else None

    def _has_labels(self, path):
        if _table(path) or _annotations(path) or _table_above(self.folder, path):
            return True
        return any(each.name != "images" for each in _subfolders(path))  # `images` alone: a test set without labels

    def _class_folders(self, path):
        """Return the class folders of a split folder; none if its labels are in a file."""
        if _table(path) or _annotations(path) or _table_above(self.folder, path):
            return []
        return _flat_class_folders(path) if path == self.folder else _subfolders(path)

    def _class_names(self, split, path):
        """Return the names of the training split's classes, or else of those of the splits that there are."""
        if self._names is None:
            paths = [self._paths["train"]] if "train" in self._paths else [*self._paths.values(), path]
            found = {name for each in paths for name in self._named_classes(each)}
            self._names = sorted(found or self._named_classes(path))
        return self._names

    def _named_classes(self, path):
        annotations = _annotations(path)
        if annotations:
            return {label for _, label in _annotated(annotations)}
        return {folder.name for folder in self._class_folders(path)}

    def _read_split(self, split, path):
        if not self.labelled or path in self.unlabelled.values():
            files = _images_of(path, f"The folder {path}")
            return datasets.Dataset.from_dict({"image": files}, features=datasets.Features({"image": datasets.Image()}))
        table, above = _table(path), _table_above(self.folder, path)
        if table or above:
            return _read_table(table, path) if table else _read_table(above, self.folder, path)
        names = self._class_names(split, path)
        annotations = _annotations(path)
        if annotations:
            found = [
                (_named_file(annotations, path / "images", name), label) for name, label in _annotated(annotations)
            ]
        else:
            found = [
                (file, each.name)
                for each in self._class_folders(path)
                for file in _images_of(each, f"The class folder {each}")
            ]
        unknown = sorted({label for _, label in found}.difference(names))
        if unknown:
            raise HfkdError(
                f"{self.folder}: {path.name} has class folders that the training split lacks: {', '.join(unknown)}. "
                f"The classes are: {', '.join(names)}."
            )
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        number = {name: index for index, name in enumerate(names)}
        columns = {"image": [file for file, _ in found], "label": [number[label] for _, label in found]}
        return datasets.Dataset.from_dict(columns, features=features)


def open_folder(folder: Path, labelled: bool = True) -> FolderSplits | None:
    """Return the splits of a folder of images, or None for a folder of Parquet or other files.

    Args:
        labelled: see `FolderSplits`.

    Raises:
        HfkdError: two folders stand for one split, or the folder cannot be listed.
    """
    splits = FolderSplits(folder, labelled)
    # Folders without class folders may hold Parquet files.
    unlabelled = splits.unlabelled.values() if not labelled or "train" in splits.unlabelled else ()
    return splits if len(splits) or any(_has_image_below(path) for path in unlabelled) else None


def check_regular_files(folder: Path) -> None:
    """Check that no data file below a folder is a pipe, device, socket or dead link, at which a reader would hang.

    Raises:
        HfkdError: the message names the file.
    """
    for parent, below, files in os.walk(folder):
        below[:] = [name for name in below if not _is_hidden(name)]
        for name in files:
            path = os.path.join(parent, name)
            if not _is_hidden(name) and Path(name).suffix.lower() in _READ_SUFFIXES and not os.path.isfile(path):
                raise _irregular_error(path)


# ---- Class folders -------------------------------------------------------------------------------------------------


def _is_hidden(name):
    return name.startswith(".") or name in ("__MACOSX", "@eaDir")  # archives made on a Mac, and network storage


def _entries(folder):
    """Return what a folder holds, sorted by name, without hidden files."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not _is_hidden(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        raise HfkdError(f"The folder {folder} cannot be read: {error.strerror}.") from error


def _subfolders(folder):
    found = []
    for entry in _entries(folder):
        if _is_folder(entry):
            found.append(Path(entry.path))
        elif entry.is_symlink() and not Path(entry.name).suffix and not os.path.exists(entry.path):
            raise _irregular_error(entry.path)
    return found


def _is_folder(entry):
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _flat_class_folders(folder):
    """Return the subfolders that hold images themselves, or in a folder `images`."""
    return [each for each in _subfolders(folder) if _holds_images(each) or _holds_images(each / "images")]


def _holds_images(folder):
    return folder.is_dir() and any(_is_image(entry.name) for entry in _entries(folder))


def _is_image(name):
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _has_image_below(folder):
    return next(_images_below(str(folder), (os.path.realpath(folder),)), None) is not None


def _images_of(folder, name):
    """Return the images below a folder, sorted; `name` is its name in messages.

    Raises:
        HfkdError: there is none, one is no regular file, or a name is not UTF-8.
    """
    files = sorted(_images_below(str(folder), (os.path.realpath(folder),)))
    if not files:
        raise HfkdError(
            f"{name} holds no image: no file ends in one of {', '.join(sorted(IMAGE_SUFFIXES))}. Put its images there, "
            "or remove the folder."
        )
    try:
        "".join(files).encode()
    except UnicodeEncodeError as error:
        raise HfkdError(f"{name} holds a name that is not UTF-8. Rename it.") from error
    return files


def _images_below(folder, above):
    """Yield the images below a folder; `above`: the resolved folders that lead to it."""
    for entry in _entries(folder):
        if _is_folder(entry):
            resolved = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(above[-1], entry.name)
            if resolved in above:
                raise HfkdError(f"{entry.path} is a link to a folder that it lies in. Remove the link.")
            yield from _images_below(entry.path, (*above, resolved))
        elif _is_image(entry.name):
            if not os.path.isfile(entry.path) if entry.is_symlink() else not entry.is_file():
                raise _irregular_error(entry.path)
            yield entry.path


def _irregular_error(path):
    if os.path.islink(path) and not os.path.exists(path):
        return HfkdError(f"{path} is a link to {os.readlink(path)}, which does not exist. Remove the link, or mend it.")
    return HfkdError(f"{path} is a pipe, a device, a socket or a folder, and not a file. Remove it from the data set.")


# ---- Labels in a file ----------------------------------------------------------------------------------------------


def _annotations(path):
    """Return the file of labels beside `images/`, as Tiny-ImageNet has it for its validation split, or None."""
    file = path / f"{path.name.lower()}_annotations.txt"
    return file if file.is_file() and (path / "images").is_dir() else None


def _annotated(file):
    """Return [(file name, label)] of Tiny-ImageNet's annotations: columns separated by tabs, the first two of them."""
    rows = [line.split("\t") for line in _read_text(file).splitlines() if line.strip()]
    for number, row in enumerate(rows, 1):
        if len(row) < 2:
            raise HfkdError(f"{file}, line {number}: expected a file name, a tab and a class, got {row[0]!r}.")
    return [(row[0].strip(), row[1].strip()) for row in rows]


def _table(path):
    """Return a table of labels in a folder, or None. Class folders come before a table without a column of labels."""
    for name in TABLES:
        file = path / name
        if file.is_file():
            header = _header(file)
            named = _file_column(header) is not None and len(header) > 1
            if named and (not {each.lower() for each in header}.isdisjoint(LABEL_NAMES) or len(_subfolders(path)) < 2):
                return file
    return None


def _table_above(folder, path):
    """Return the table of the whole folder if it labels the files of a split folder, or None."""
    file = next((folder / name for name in TABLES if (folder / name).is_file()), None)
    if file is None or path == folder or _file_column(_header(file)) is None:
        return None
    header, *rows = _rows(file)
    return file if any(_is_below(row[_file_column(header)], path.name) for row in rows) else None


def _is_below(name, split_folder):
    return Path(name).parts[:1] == (split_folder,)


def _file_column(header):
    lower = [each.lower() for each in header]
    return next((lower.index(name) for name in FILE_COLUMNS if name in lower), None)


def _header(file):
    with file.open("rb") as lines:
        line = lines.readline().decode("utf-8-sig", errors="replace")
    return next(csv.reader([line], delimiter=_separator(line)), [])


def _separator(line):
    return max(",;\t", key=line.count)


def _rows(file):
    """Return the lines of a table, the header first; columns are separated by commas, semicolons or tabs.

    Raises:
        HfkdError: a line has more or fewer columns than the header.
    """
    lines = _read_text(file).splitlines()
    separator = _separator(lines[0] if lines else "")
    rows = [row for row in csv.reader(lines, delimiter=separator) if row] or [[]]
    for number, row in enumerate(rows, 1):
        if len(row) != len(rows[0]):
            raise HfkdError(f"{file}, row {number}: it has {len(row)} columns, and the header has {len(rows[0])}.")
    return rows


def _read_text(file):
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise HfkdError(f"{file} cannot be read as UTF-8 text: {error}.") from error


def _read_table(file, base, split_folder=None):
    """Return the rows of a table, the images as `image`; of the files below `split_folder` only, if it is given."""
    header, *rows = _rows(file)
    position = _file_column(header)
    if split_folder is not None:
        rows = [row for row in rows if _is_below(row[position], split_folder.name)]
    columns = {"image": [_named_file(file, base, row[position]) for row in rows]}
    features = {"image": datasets.Image()}
    for i, name in enumerate(header):
        if i != position and name != "image":
            name = name.lower() if name.lower() in LABEL_NAMES else name
            values = [row[i].strip() for row in rows]
            whole = bool(values) and all(value.isdecimal() and str(int(value)) == value for value in values)
            columns[name] = [int(value) for value in values] if whole else values
            features[name] = datasets.Value("int64" if whole else "string")
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _named_file(table, base, name):
    """Return the path of an image that a table names.

    Raises:
        HfkdError: it does not exist, or is no regular file.
    """
    path = os.path.join(base, name.strip())
    if not os.path.isfile(path):
        if os.path.lexists(path):
            raise _irregular_error(path)
        raise HfkdError(f"{table} names {name}, but there is no file {path}. Add the file, or remove the row.")
    return path
